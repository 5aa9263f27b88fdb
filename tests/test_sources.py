"""Proposals without a draft: matches, tables, their mixture and its weights, each beside the same in plain Python."""

import itertools
import math

import pytest
from device import DEVICE, torch
from families import add_head, character_tokenizer, make_draft, make_model, make_prompts, make_self_draft, path_of

from pard_hf import AssistantMemory, with_pard, without_pard
from pard_hf.draft.correction_head import CorrectedPositions, CorrectionHead
from pard_hf.generation.batch import Rows
from pard_hf.generation.sources import (
    COMPONENTS,
    LARGE_VOCABULARY,
    LONGEST_CONTEXT,
    LONGEST_VOTE,
    MOST_REMEMBERED,
    NUM_CONTEXTS,
    NUM_MATCHES,
    NUM_PAIRS,
    NUM_SUCCESSORS,
    PRIOR_STRENGTH,
    DraftCandidates,
    Matches,
    Mixture,
    Sources,
    Tables,
    accepted_by_source,
    components_of,
    depth_number,
    encode_references,
    find_matches,
    learn,
    likeliest_tokens,
)
from pard_hf.generation.steps import lookup_step, remember_step
from pard_hf.generation.tree import LOG_ZERO, ancestors, child_with, grow_tree

NUM_DEPTHS = 4


def reference_ids(texts):
    return torch.tensor([[-1, *itertools.chain.from_iterable([*text, -1] for text in texts)]])


def common_suffix(one, other, longest):
    count = 0
    while count < min(len(one), len(other), longest) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def plain_matches(texts, row, num_depths, longest):
    """Length and continuation of every earlier position that something follows, best first."""
    found = []
    for order, text in enumerate([*texts, row]):
        for end in range(1, len(text)):
            length = common_suffix(text[:end], row, longest)
            if length:
                found.append((length, order, end, text[end : end + num_depths]))
    return [(length, text) for length, _, _, text in sorted(found, reverse=True)[:NUM_MATCHES]]


def matches_of(matches, row):
    """The same, from tensors."""
    pairs = zip(matches.lengths[row].tolist(), matches.tokens[row].tolist(), strict=True)
    found = [(length, tokens) for length, tokens in pairs if length or any(token >= 0 for token in tokens)]
    return [(length, [token for token in tokens if token >= 0]) for length, tokens in found]


@pytest.mark.parametrize("longest", [0, 1, 3, 8, 60])
@pytest.mark.parametrize("vocab_size", [2, 4, 30])
@pytest.mark.parametrize("num_texts", [0, 3])
def test_matches_are_those_of_plain_loops(longest, vocab_size, num_texts):
    """The longest first, of equals the latest, and never across a text's beginning or end."""
    generator = torch.Generator().manual_seed(longest + 100 * vocab_size)
    texts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (9, 0, 1, 17)[:num_texts]]
    tokens = torch.randint(vocab_size, (7, 40), generator=generator)  # What lies behind the lengths is garbage.
    lengths = torch.tensor([0, 1, 2, 3, 11, 39, 40])

    matches = find_matches(reference_ids(texts), tokens, lengths, NUM_DEPTHS, longest)

    for row, length in enumerate(lengths.tolist()):
        assert matches_of(matches, row) == plain_matches(texts, tokens[row, :length].tolist(), NUM_DEPTHS, longest)
        assert all(-1 not in tokens[: tokens.index(-1)] for tokens in matches.tokens[row].tolist() if -1 in tokens)


def test_nothing_follows_the_end_of_a_reference():
    """What comes behind it in memory is another text, or the row."""
    matches = find_matches(reference_ids([[5, 6], [7, 8]]), torch.tensor([[9, 5]]), torch.tensor([2]), NUM_DEPTHS, 8)

    assert matches.tokens[0, 0].tolist() == [6, -1, -1, -1]


def test_garbage_behind_a_row_changes_nothing():
    torch.manual_seed(0)
    tokens, lengths = torch.randint(4, (3, 50)), torch.tensor([7, 20, 31])
    other = torch.where(torch.arange(50) < lengths.unsqueeze(1), tokens, torch.randint(4, (3, 50)))

    found = [find_matches(reference_ids([]), ids, lengths, NUM_DEPTHS, 8) for ids in (tokens, other)]

    assert not torch.equal(tokens, other)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].lengths, found[1].lengths)


def as_logits(row):
    return torch.tensor(row).softmax(-1).tolist()


class PlainTables:
    """The tables in dictionaries: of a token, and of a slot the pair it holds, the likeliest next tokens."""

    def __init__(self, vocab_size):
        self.vocab_size, self.after_one, self.slots = vocab_size, {}, {}

    @staticmethod
    def slot(pair):
        return (pair[0] * 1_000_003 + pair[1] * 7_919) % NUM_PAIRS

    def observe(self, previous, token, logits):
        if token < 0:
            return
        probs = as_logits(logits)
        best = sorted(range(len(probs)), key=lambda i: -probs[i])[:NUM_SUCCESSORS]
        self.after_one[token] = {i: probs[i] for i in best}
        if previous >= 0:
            self.slots[self.slot((previous, token))] = (previous, token), self.after_one[token]

    def after_two(self, previous, token):
        pair, found = self.slots.get(self.slot((previous, token)), (None, None))
        return found if previous >= 0 and pair == (previous, token) else None


def observed(vocab_size, num_rounds=6, batch_size=2, num_nodes=7, seed=0):
    """Tables, and their twins, after rounds of random nodes, some of them void."""
    torch.manual_seed(seed)
    tables, plain = Tables.empty(vocab_size, DEVICE), PlainTables(vocab_size)
    for _ in range(num_rounds):
        previous, tokens = (torch.randint(-1, vocab_size, (batch_size, num_nodes)) for _ in range(2))
        logits = 3 * torch.randn(batch_size, num_nodes, vocab_size)
        tables.observe(previous, tokens, logits)
        for row in range(batch_size):
            for node in reversed(range(num_nodes)):  # Of equal nodes the first counts, which is the likeliest.
                plain.observe(int(previous[row, node]), int(tokens[row, node]), logits[row, node].tolist())
    return tables, plain


def as_dict(tokens, probs):
    return {token: prob for token, prob in zip(tokens.tolist(), probs.tolist(), strict=True) if token >= 0}


def check_successors(tables, plain, pairs):
    previous, tokens = torch.tensor([pairs]).unbind(2)
    (two, two_probs), (one, one_probs), known = tables.successors(previous, tokens)
    for column, (before, token) in enumerate(pairs):
        after_two, after_one = plain.after_two(before, token), plain.after_one.get(token)
        assert token < 0 or known[0, column] == (2 if after_two else 1 if after_one else 0)
        assert as_dict(two[0, column], two_probs[0, column]) == pytest.approx(after_two or {}, rel=1e-4)
        assert as_dict(one[0, column], one_probs[0, column]) == pytest.approx(after_one or {}, rel=1e-4)


@pytest.mark.parametrize("vocab_size", [3, 8, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_tables_are_dictionaries(vocab_size, seed):
    """Void nodes are dropped, and of a token seen twice in a round the likelier node counts."""
    tables, plain = observed(vocab_size, seed=seed)

    check_successors(tables, plain, list(itertools.product(range(-1, vocab_size), repeat=2)))
    assert tables.vocab_size == vocab_size


def test_pairs_that_share_a_slot_take_it_from_each_other():
    vocab_size = 1 << 16
    pair = (11, 12)
    other = next(
        (a, b) for a in range(13, 99) for b in range(vocab_size) if PlainTables.slot((a, b)) == PlainTables.slot(pair)
    )
    tables, plain = Tables.empty(vocab_size, DEVICE), PlainTables(vocab_size)
    for number, (before, token) in enumerate([pair, other]):
        logits = torch.zeros(1, 1, vocab_size)
        logits[0, 0, 100 * number : 100 * number + 8] = 20.0 - torch.arange(8)
        tables.observe(torch.tensor([[before]]), torch.tensor([[token]]), logits)
        plain.observe(before, token, logits[0, 0].tolist())

        check_successors(tables, plain, [pair, other, (12, 11)])
    assert plain.after_two(*pair) is None
    assert plain.after_two(*other) is not None


def test_nothing_follows_no_token():
    """Also after nodes without one, whose logits go where nothing is read."""
    tables = Tables.empty(9, DEVICE)
    tables.observe(torch.tensor([[-1, 3]]), torch.tensor([[-1, -1]]), torch.randn(1, 2, 9))

    (two, _), (one, _), known = tables.successors(torch.tensor([[-1, 3, 3]]), torch.tensor([[-1, -1, 4]]))

    assert (two == -1).all()
    assert (one == -1).all()
    assert known[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("vocab_size", [1, 3, 10, 4096, 5000, 49_152])
@pytest.mark.parametrize("values", ["random", "few", "one block", "ties"])
def test_likeliest_tokens_are_the_top_of_the_softmax(vocab_size, values):
    """Large vocabularies are searched block by block, with what is left over behind the last whole block."""
    torch.manual_seed(vocab_size)
    logits = 3 * torch.randn(2, 3, vocab_size)
    if values == "few":  # As processors leave them.
        logits[..., torch.randperm(vocab_size)[5:]] = -torch.inf
    elif values == "one block":
        logits[..., -min(vocab_size, 9) :] += 40
    elif values == "ties":
        logits = logits.round().clamp(max=2)

    tokens, probs = likeliest_tokens(logits)

    best = logits.softmax(-1).topk(min(NUM_SUCCESSORS, vocab_size), dim=-1)
    torch.testing.assert_close(logits.softmax(-1).gather(-1, tokens), best.values)
    assert all(len(set(row)) == len(row) for row in tokens.flatten(0, 1).tolist())
    assert (probs.sum(-1) <= 1.00001).all()
    if vocab_size <= LARGE_VOCABULARY or values in ("few", "one block"):
        torch.testing.assert_close(probs, best.values)
    else:  # Of the searched blocks only, so in the same proportions.
        assert (probs >= best.values).all()
        torch.testing.assert_close(probs / probs[..., :1], best.values / best.values[..., :1])


@pytest.mark.parametrize("vocab_size", [10, 5000])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_odd_logits_have_no_likely_tokens(vocab_size, value):
    tokens, probs = likeliest_tokens(torch.full((1, 2, vocab_size), value))

    assert (probs == 0).all()
    assert ((tokens >= 0) & (tokens < vocab_size)).all()


class PlainMixture:
    """The mixture in dictionaries: `after(path)` are shares by token, `[S]` each, and the number of the context."""

    def __init__(self, tables, plain, matches, last_two, draft=None):
        self.plain, self.matches, self.last_two, self.draft = plain, matches, list(last_two), draft
        weights = tables.weights[int(draft is not None)].double()
        self.weights = (weights / weights.sum(-1, keepdim=True)).tolist()

    def after(self, path):
        depth, votes, longest = len(path), {}, 0
        for length, tokens in self.matches:
            if len(tokens) > depth and tokens[:depth] == list(path):
                longest = max(longest, length + depth)
                votes[tokens[depth]] = votes.get(tokens[depth], 0.0) + 2.0 ** min(length + depth, LONGEST_VOTE)
        copied = {token: vote / sum(votes.values()) for token, vote in votes.items()}
        previous, token = [*self.last_two, *path][-2:]
        two, one = self.plain.after_two(previous, token), self.plain.after_one.get(token)
        known = 2 if two else 1 if one else 0
        parts = [copied, two or {}, one or {}, {}]
        if self.draft is not None:
            parts[3] = self.draft(path)
        matched = min(longest, 5) + (longest >= 7) + (longest >= 10)
        level = sum(depth >= bound for bound in (1, 2, 3, 5)) if self.draft is not None else 0
        context = (matched * 3 + known) * 5 + level
        shares = {}
        for component, part in enumerate(parts):
            for token, prob in part.items():
                shares.setdefault(token, [0.0] * 4)[component] += prob * self.weights[context][component]
        return {token: share for token, share in shares.items() if sum(share) > 0}, context

    def best(self, num_depths, num_nodes):
        """The most probable prefixes, found best-first, with their log-probabilities."""
        frontier, found = [(0.0, ())], []
        while frontier and len(found) <= num_nodes:
            frontier.sort(key=lambda item: -item[0])
            score, path = frontier.pop(0)
            found.append((path, score))
            if len(path) < num_depths:
                shares, _ = self.after(path)
                frontier += [(score + math.log(sum(share)), (*path, token)) for token, share in shares.items()]
        return dict(found[1:])


def learned_tables(vocab_size, seed, num_rounds):
    """Tables with weights of every kind."""
    tables, plain = observed(vocab_size, num_rounds, num_nodes=4, seed=seed)
    tables.weights *= torch.rand(tables.weights.shape) + 0.05
    return tables, plain


def mixtures(vocab_size, draft_kind, seed, num_rounds=6):
    """Mixtures of a batch with their twins: ragged rows of few tokens, so that sources agree now and then."""
    tables, plain = learned_tables(vocab_size, seed, num_rounds)
    tokens, lengths = torch.randint(vocab_size, (3, 30)), torch.tensor([1, 9, 30])
    matches = find_matches(reference_ids([[1, 2, 0, 1, 1, 2]]), tokens, lengths, NUM_DEPTHS, 8)
    index = lengths.unsqueeze(1) + torch.tensor([-2, -1])
    last_two = torch.where(index < 0, -1, tokens.gather(1, index.clamp(min=0)))
    draft, plain_drafts = None, [None] * 3
    if draft_kind is not None:  # It sees less far than the other sources.
        scores, hidden = 2 * torch.randn(3, NUM_DEPTHS - 1, vocab_size), torch.randn(3, NUM_DEPTHS - 1, 6)
        num_candidates = min(5, vocab_size)
        head = CorrectionHead(vocab_size, 6, rank=3)
        torch.nn.init.normal_(head.output.weight)
        head.requires_grad_(False).to(DEVICE)
        corrected = CorrectedPositions(head, hidden, scores) if draft_kind == "head" else None
        draft = DraftCandidates(scores, num_candidates, corrected, DEVICE)

        def plain_head(row):
            def after(path):
                if len(path) >= NUM_DEPTHS - 1:
                    return {}
                logits = scores[row, len(path)]
                if path and draft_kind == "head":
                    logits = logits + head(hidden[row, len(path)], torch.tensor(path[-1]))
                best = scores[row, len(path)].topk(num_candidates).indices
                return dict(zip(best.tolist(), logits.softmax(-1)[best].tolist(), strict=True))

            return after

        plain_drafts = [plain_head(row) for row in range(3)]
    twins = [
        PlainMixture(tables, plain, matches_of(matches, row), last_two[row].tolist(), plain_drafts[row])
        for row in range(3)
    ]
    return tables, (lambda: Mixture(tables, matches, last_two, draft)), twins


@pytest.mark.parametrize("num_nodes", [1, 6, 40, 300])
@pytest.mark.parametrize("vocab_size", [3, 12])
@pytest.mark.parametrize("draft_kind", [None, "marginals", "head"])
def test_tree_is_best_first_over_the_mixture(num_nodes, vocab_size, draft_kind):
    """N of the likeliest prefixes under all sources, or all there are; void nodes come last and share nothing."""
    _, mixture, twins = mixtures(vocab_size, draft_kind, seed=num_nodes)

    tree = grow_tree(mixture(), NUM_DEPTHS, num_nodes)

    assert tree.tokens.shape[1] <= num_nodes
    for row, twin in enumerate(twins):
        wanted = twin.best(NUM_DEPTHS, num_nodes)
        real = [node for node, logprob in enumerate(tree.logprobs[row].tolist(), start=1) if logprob > LOG_ZERO / 2]
        paths = [path_of(tree, row, node) for node in real]
        assert real == list(range(1, len(wanted) + 1))
        assert len(set(paths)) == len(paths)
        assert all(parent < node for node, parent in enumerate(tree.parents[row].tolist(), start=1))
        assert [len(path) for path in paths] == tree.depths[row, : len(real)].tolist()
        assert tree.logprobs[row, : len(real)].tolist() == pytest.approx(sorted(wanted.values())[::-1], abs=1e-4)
        for node, path in zip(real, paths, strict=True):
            shares, context = twin.after(path[:-1])
            assert tree.contexts[row, node - 1] == context
            assert tree.shares[row, node - 1].tolist() == pytest.approx(shares[path[-1]], abs=1e-5)
        is_void = tree.tokens[row] < 0
        assert (tree.shares[row][is_void] == 0).all()
        assert (tree.logprobs[row, len(real) :] <= LOG_ZERO / 2).all()


@pytest.mark.parametrize("draft_kind", [None, "marginals", "head"])
def test_candidates_are_the_mixture(draft_kind):
    """Each token once, under the sum of its shares; the others void."""
    _, mixture, twins = mixtures(6, draft_kind, seed=3)

    candidates = mixture()(0, None, None)

    for row, twin in enumerate(twins):
        wanted, context = twin.after(())
        found = {
            token: (shares, math.exp(logprob))
            for token, shares, logprob in zip(
                candidates.tokens[row, 0].tolist(),
                candidates.shares[row, 0].tolist(),
                candidates.logprobs[row, 0].tolist(),
                strict=True,
            )
            if token >= 0 and math.isfinite(logprob)
        }
        assert found.keys() == wanted.keys()
        tokens = candidates.tokens[row, 0][candidates.tokens[row, 0] >= 0].tolist()
        assert len(set(tokens)) == len(tokens)
        assert (candidates.contexts[row] == context).all()
        for token, (shares, prob) in found.items():
            assert shares == pytest.approx(wanted[token], abs=1e-6)
            assert prob == pytest.approx(sum(wanted[token]), abs=1e-6)


def test_a_token_that_several_name_is_one_candidate():
    """The first, with the shares of all; void ones share nothing."""
    tables = Tables.empty(9, DEVICE)
    tables.weights[:] = torch.tensor([0.5, 0.25, 0.125, 0.0, 0.125])
    mixture = Mixture(tables, Matches(torch.zeros(1, 3, 2), torch.ones(1, 3)), torch.tensor([[1, 2]]))
    ids = torch.tensor([[[4.0, 4, -1] + [4, 5] + [-1] * 6 + [6, -1] + [-1] * 6]])
    probs = torch.tensor([[[0.5, 0.5, 0.0] + [0.75, 0.25] + [0.0] * 6 + [1.0, 0.9] + [0.9] * 6]])

    tokens, logprobs, shares, contexts = mixture.merged(ids, probs, torch.tensor([[7]]))

    where = [0, 4, 11]
    assert tokens[0, 0, where].tolist() == [4, 5, 6]
    assert shares[0, 0, where].tolist() == [[0.5, 0.1875, 0.0, 0.0], [0.0, 0.0625, 0.0, 0.0], [0.0, 0.0, 0.125, 0.0]]
    assert logprobs[0, 0, where].exp().tolist() == pytest.approx([0.6875, 0.0625, 0.125])
    is_void = tokens[0, 0] < 0
    assert is_void.sum() == tokens.shape[2] - 3
    assert (shares[0, 0][is_void] == 0).all()
    assert (logprobs[0, 0][is_void] <= LOG_ZERO).all()
    assert contexts.tolist() == [[7]]


def test_contexts_have_numbers_of_their_own():
    """By matched tokens, by what the tables know and by depth; every weight has its use."""
    nothing = Matches(torch.full((1, 8, 3), -1), torch.zeros(1, 8, dtype=torch.long))
    mixture = Mixture(Tables.empty(9, DEVICE), nothing, torch.tensor([[1, 2]]))
    numbers = {
        (length, known, depth): int(mixture.contexts[known + 3 * min(length, LONGEST_CONTEXT)]) + depth_number(depth)
        for length, known, depth in itertools.product(range(20), range(3), range(12))
    }

    assert set(numbers.values()) == set(range(NUM_CONTEXTS))
    classes = {}
    for (n, k, d), number in numbers.items():
        kind = min(n, 5) + (n >= 7) + (n >= 10), k, sum(d >= bound for bound in (1, 2, 3, 5))
        assert classes.setdefault(number, kind) == kind


def test_prior_is_a_distribution():
    weights = Tables.empty(9, DEVICE).weights

    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.full(weights.shape[:-1], PRIOR_STRENGTH))


def plain_learn(twin, weights, path_ids, offered):
    """Counts by context: at each node of the accepted path, who gave the choice, or what was left for others."""
    counts = {}
    for step in range(len(path_ids) + 1):
        prefix = tuple(path_ids[:step])
        children = offered.get(prefix, [])
        if not children:
            continue
        shares, context = twin.after(prefix)
        if step < len(path_ids):
            given = [*shares[path_ids[step]], 0.0]
        else:
            spent = [sum(shares[token][i] for token in children) for i in range(4)]
            given = [max(weights[context][i] - spent[i], 0.0) for i in range(4)] + [weights[context][4]]
        total = sum(given)
        counts.setdefault(context, []).append([value / total if total else 0.0 for value in given])
    return counts


@pytest.mark.parametrize("draft_kind", [None, "head"])
@pytest.mark.parametrize("num_nodes", [5, 40, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_learning_counts_who_gave_what_was_chosen(draft_kind, num_nodes, seed):
    """As plain loops over the accepted paths; void nodes, of a tree with room for more, count for nothing."""
    tables, mixture, twins = mixtures(12, draft_kind, seed=seed, num_rounds=3 + seed)
    tree = grow_tree(mixture(), 2, num_nodes)
    before = tables.weights.clone()
    kind, wanted = int(draft_kind is not None), tables.weights.double().tolist()
    nodes, num_matched = torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 1, 2])
    for row, twin in enumerate(twins):
        offered, node, path = {}, 0, []
        for child in range(1, tree.tokens.shape[1] + 1):
            ids = path_of(tree, row, child)
            if tree.logprobs[row, child - 1] > LOG_ZERO / 2:
                offered.setdefault(ids[:-1], []).append(ids[-1])
        while len(path) < num_matched[row] and offered.get(tuple(path)):
            path.append(offered[tuple(path)][0])
            children, _ = child_with(tree, torch.full((3,), node), torch.full((3,), path[-1]))
            node = int(children[row])
            nodes[row, len(path) - 1] = node
        num_matched[row] = len(path)
        for context, more in plain_learn(twin, twin.weights, path, offered).items():
            for values in more:
                wanted[kind][context] = [a + b for a, b in zip(wanted[kind][context], values, strict=True)]

    learn(tables, tree, nodes, num_matched, draft_kind is not None)

    torch.testing.assert_close(tables.weights, torch.tensor(wanted).float(), atol=2e-4, rtol=1e-4)
    assert not torch.equal(tables.weights, before)
    assert torch.equal(tables.weights[1 - kind], before[1 - kind])


def test_no_offer_is_no_evidence():
    """At the start no source has anything to say, which says nothing about the sources."""
    tables = Tables.empty(9, DEVICE)
    nothing = Matches(torch.full((2, 8, 3), -1), torch.zeros(2, 8, dtype=torch.long))
    before = tables.weights.clone()
    tree = grow_tree(Mixture(tables, nothing, torch.tensor([[-1, 4], [3, 3]])), 3, 8)

    learn(tables, tree, torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 0]), False)

    assert (tree.tokens == -1).all()
    assert torch.equal(tables.weights, before)


def test_counts_are_bounded():
    """What was learned long ago fades: a context remembers so much and no more."""
    tables, mixture, _ = mixtures(4, None, seed=0)
    tree = grow_tree(mixture(), NUM_DEPTHS, 12)
    nodes, num_matched = torch.ones(3, NUM_DEPTHS, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    for _ in range(300):
        learn(tables, tree, nodes, num_matched, False)

    sums = tables.weights.sum(-1)
    assert sums.max() <= MOST_REMEMBERED * 1.0001
    assert sums.max() > MOST_REMEMBERED * 0.99


def test_a_source_that_is_right_is_believed_more():
    tables = Tables.empty(9, DEVICE)
    matches = Matches(torch.full((1, 8, 2), 3), torch.tensor([[2, 0, 0, 0, 0, 0, 0, 0]]))
    tables.observe(torch.tensor([[-1]]), torch.tensor([[1]]), torch.arange(9.0).view(1, 1, 9))

    def probability():
        tree = grow_tree(Mixture(tables, matches, torch.tensor([[-1, 1]])), 2, 6)
        node = tree.tokens[0].tolist().index(3) + 1
        return tree, node, tree.logprobs[0, node - 1].exp().item()

    tree, node, at_first = probability()
    learn(tables, tree, torch.tensor([[node, 0]]), torch.tensor([1]), False)
    tree, node, after_success = probability()
    learn(tables, tree, torch.tensor([[node, 0]]), torch.tensor([0]), False)
    _, _, after_failure = probability()

    assert at_first < after_success
    assert after_failure < after_success


def test_components_are_named_by_their_source():
    tables, mixture, _ = mixtures(6, "marginals", seed=1)
    tree = grow_tree(mixture(), NUM_DEPTHS, 20)

    found = components_of(tree, torch.tensor([[1, 20], [2, 3], [4, 5]]))

    assert found[0].tolist() == [max(range(4), key=tree.shares[0, node].tolist().__getitem__) for node in (0, 19)]
    assert accepted_by_source([1, 2, 3, 4]) == {"copy": 1, "successors": 5, "draft": 4}
    assert len(COMPONENTS) == 4


def test_a_draft_alone_stays_in_its_order():
    """Where no other source has anything to say, the tree is the draft's."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(1, 3, 40)
    nothing = Matches(torch.full((1, 8, 3), -1), torch.zeros(1, 8, dtype=torch.long))
    draft = DraftCandidates(scores, 32, None, DEVICE)

    tree = grow_tree(Mixture(Tables.empty(40, DEVICE), nothing, torch.tensor([[3, 4]]), draft), 1, 8)

    assert tree.tokens[0].tolist() == scores[0, 0].topk(8).indices.tolist()
    assert (components_of(tree, torch.arange(1, 9).unsqueeze(0)) == COMPONENTS.index("draft")).all()
    assert ancestors(tree, 1).shape == (1, 9, 9)


def test_references_are_texts_with_ends(small_tokenizer):
    texts = [[5, 6], "ab", torch.tensor([7]), (8, 9), [], "", range(3)]

    found = encode_references(texts, small_tokenizer, 100)

    a, b = small_tokenizer.encode("ab", add_special_tokens=False)
    assert found.tolist() == [[-1, 5, 6, -1, a, b, -1, 7, -1, 8, 9, -1, -1, -1, 0, 1, 2, -1]]
    assert encode_references(torch.tensor([[5, 6], [7, 8]]), None, 100).tolist() == [[-1, 5, 6, -1, 7, 8, -1]]
    assert encode_references([], None, 100).tolist() == [[-1]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "to be a list of texts, got one string"),
        (["a text"], "Pass `tokenizer=`"),
        ([5, 6], "a list of token ids in"),
        ([[[5, 6]]], "a list of token ids in"),
        ([{"input_ids": [5]}], "a list of token ids in"),
        ([[[5], [6, 7]]], "a list of token ids in"),
        ([[5.0, 6.0]], "a list of token ids in"),
        ([[5, 100]], r"in \[0, 100\), got \[5, 100\]"),
        ([[5, -1]], r"in \[0, 100\), got \[5, -1\]"),
    ],
)
def test_what_is_no_text_is_refused(texts, message):
    """An id without an embedding too: it would stop the device."""
    target = with_pard(make_model("llama"))

    with pytest.raises(ValueError, match=message):
        target.generate(**make_prompts(1), max_new_tokens=4, assistant_reference_texts=texts)


# Whole calls, with a memory of the same text, so that much is accepted.


class Streamer:
    def __init__(self):
        self.tokens, self.sources = [], []

    def put(self, tokens):
        self.tokens += tokens.tolist()

    def put_accepted(self, tokens, source):
        self.put(tokens)
        self.sources.append(source)

    def end(self):
        pass


class Watcher(Streamer):
    """Keeps of each round the token and the parent of each proposal, and what was accepted."""

    def __init__(self):
        super().__init__()
        self.rounds = []

    def put_proposals(self, proposals):
        tree = proposals.tree  # `None` where there is room for the bonus token alone.
        parts = ([], []) if tree is None else (proposals.tokens[0].tolist(), tree.parents[0].tolist())
        self.rounds.append((*parts, []))

    def put_accepted(self, tokens, source):
        self.rounds[-1][2].extend(tokens.tolist())


def test_a_streamer_sees_what_a_round_proposes():
    target, watcher = with_pard(make_model("llama")), Watcher()
    call = {"assistant_tree_size": 8, "prompt_lookup_num_tokens": 3, "assistant_memory": AssistantMemory(target)}
    for streamer in (None, watcher):
        target.generate(**make_prompts(1), max_new_tokens=24, do_sample=False, streamer=streamer, **call)

    assert any(accepted for *_, accepted in watcher.rounds)
    for tokens, parents, accepted in watcher.rounds:
        parent = 0
        for token in accepted:
            parent = 1 + list(zip(tokens, parents, strict=True)).index((token, parent))


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20}
CALLS = {
    "text": (1, {}, {}),
    "ragged": (4, {}, {}),
    "depth of one": (2, {}, {"prompt_lookup_num_tokens": 1}),
    "one node": (2, {}, {"assistant_tree_size": 1}),
    "more nodes than candidates": (2, {}, {"assistant_tree_size": 1000, "prompt_lookup_num_tokens": 2}),
    "sampled": (1, SAMPLED, {}),
    "processor": (3, {"repetition_penalty": 1.1}, {}),
    "processor, sampled": (2, {"repetition_penalty": 1.1, **SAMPLED}, {}),
    "stop strings": (3, {"stop_strings": ["zq", "A"]}, {}),
    "several sequences": (1, {"num_return_sequences": 3, "repetition_penalty": 1.05, **SAMPLED}, {}),
    "scores": (2, {"output_scores": True, "output_logits": True}, {}),
    "copies only": (3, {}, {"assistant_sources": ["copy"]}),
    "successors only": (3, {}, {"assistant_sources": ["successors"]}),
    "adaptive": (2, {}, {"num_assistant_tokens_schedule": "adaptive"}),
}


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_accepted_token_has_a_source(name, ends, with_draft):
    """Also where an end token lies among the accepted; and what is emitted is what plain `generate` emits."""
    batch_size, plain, ours = CALLS[name]
    target, prompts = make_model("llama"), make_prompts(batch_size)
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **plain}
    if "stop_strings" in plain:
        arguments["tokenizer"] = character_tokenizer("éßø")
    draft = add_head(make_self_draft(target), 0.3) if with_draft else None

    def run(**more):
        torch.manual_seed(3)
        return target.generate(**prompts, **arguments, **more)

    end = int(run().sequences[-1, -12])
    ours = {"assistant_memory": AssistantMemory(target), "prompt_lookup_num_tokens": 6, **ours}
    with_pard(target)
    run(**ours, assistant_model=draft)  # Without ends, so that the memory knows how the text goes on behind them.
    arguments |= {"eos_token_id": end} if ends else {}
    without_pard(target)
    expected = run()

    output = with_pard(target) and run(**ours, assistant_model=draft)

    stats = output.stats
    assert torch.equal(output.sequences, expected.sequences)
    assert stats.loop == ("lockstep" if "repetition_penalty" in plain or "stop_strings" in plain else "own")
    assert set(stats.accepted_by_source) == {"copy", "successors", "draft"}
    assert sum(stats.accepted_by_source.values()) == stats.num_accepted
    if name not in ("copies only", "adaptive") and (batch_size > 1 or not ends):
        assert stats.num_accepted > 0
    if not with_draft:
        assert stats.accepted_by_source["draft"] == 0
    for source in {"copy", "successors"} - set(ours.get("assistant_sources", ("copy", "successors"))):
        assert stats.accepted_by_source[source] == 0
    if "stop_strings" not in plain:
        new = output.sequences[:, prompts["input_ids"].shape[1] :]
        counts = [row.index(end) + 1 if ends and end in row else len(row) for row in new.tolist()]
        assert stats.num_tokens == sum(counts)


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.1}, {"eos_token_id": [7, 30]}])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("with_draft", [False, True])
def test_streamer_is_told_the_source(more, batch_size, with_draft):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = make_self_draft(target) if with_draft else None
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False, **more)
    arguments = {"assistant_memory": AssistantMemory(with_pard(target)), "assistant_model": draft, **more}
    for _ in range(2):
        streamer = Streamer()
        output = target.generate(
            **prompts, **arguments, max_new_tokens=20, do_sample=False, streamer=streamer, return_dict_in_generate=True
        )

    assert torch.equal(output.sequences, expected)
    told = {name: streamer.sources.count(name) for name in ("copy", "successors", "draft")}
    assert sum(told.values()) == len(streamer.sources)
    if batch_size == 1:
        assert told == output.stats.accepted_by_source
        assert streamer.tokens[-20:] == expected[0, -20:].tolist()


def test_draft_alone_has_no_sources():
    target = with_pard(make_model("llama"))
    draft = make_draft(make_model("llama", seed=5))

    stats = target.generate(
        **make_prompts(1), max_new_tokens=9, assistant_model=draft, return_dict_in_generate=True, do_sample=False
    ).stats

    assert stats.accepted_by_source is None
    assert "accepted_by_source" not in stats.to_dict()


@pytest.mark.parametrize("vocab_size", [3, 5, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_vocabulary_smaller_than_a_table(vocab_size, batch_size):
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    target = make_model("llama", vocab_size=vocab_size, **special)
    prompts = make_prompts(batch_size)
    prompts["input_ids"] %= vocab_size
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)

    for size in (None, 1, 500):
        output = with_pard(target).generate(
            **prompts, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4, assistant_tree_size=size
        )
        assert torch.equal(output, expected)


@pytest.mark.parametrize("with_draft", [False, True])
def test_embeddings_have_no_text_to_copy(with_draft):
    """What was generated since is text."""
    target, ids = make_model("llama"), make_prompts(1)["input_ids"]
    embeds = target.get_input_embeddings()(ids).detach()
    draft = make_self_draft(target) if with_draft else None
    arguments = {"max_new_tokens": 20, "do_sample": False}
    expected = target.generate(inputs_embeds=embeds, **arguments)

    output = with_pard(target).generate(
        inputs_embeds=embeds,
        **arguments,
        assistant_model=draft,
        prompt_lookup_num_tokens=5,
        assistant_reference_texts=[expected[0].tolist()],
        return_dict_in_generate=True,
    )

    assert torch.equal(output.sequences, expected)
    assert output.stats.loop == "own"
    assert output.stats.accepted_by_source["copy"] > 0
    assert sum(output.stats.accepted_by_source.values()) == output.stats.num_accepted


@pytest.mark.parametrize("with_draft", [False, True])
def test_second_turn_copies_from_the_whole_conversation(with_draft):
    """Whose cache is kept, while the text is passed whole."""
    target, prompts = make_model("llama"), make_prompts(2)
    draft = make_self_draft(target) if with_draft else None
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    texts = []
    for more in ({}, {"prompt_lookup_num_tokens": 5, "assistant_model": draft}):
        first = (with_pard if more else without_pard)(target).generate(**prompts, **arguments, **more)
        ids = torch.cat([first.sequences, first.sequences[:, -6:]], dim=1)
        mask = torch.cat([prompts["attention_mask"], torch.ones(2, 18, dtype=torch.long)], dim=1)
        again = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        texts.append(target.generate(**again, **arguments, **more).sequences)

    assert torch.equal(*texts)


def test_references_are_copied_from():
    target, prompts = make_model("llama"), make_prompts(2)
    arguments = {"max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**prompts, **arguments)
    texts = [row[-24:] for row in expected.tolist()]

    def rounds(**more):
        output = with_pard(target).generate(
            **prompts, **arguments, assistant_sources=["copy"], return_dict_in_generate=True, **more
        )
        assert torch.equal(output.sequences, expected)
        return output.stats.num_rounds

    assert rounds(assistant_reference_texts=texts) < rounds() / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sources_work_in_half_precision_and_under_autocast(dtype):
    target, prompts = make_model("llama"), make_prompts(2)
    draft = add_head(make_self_draft(target), 0.3)
    with torch.autocast(DEVICE.type, dtype):
        for model in (None, draft):
            with_pard(target).generate(
                **prompts, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=5, assistant_model=model
            )
    stats = (
        target.to(dtype)
        .generate(
            **prompts, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=5, return_dict_in_generate=True
        )
        .stats
    )

    assert stats.loop == "own"


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "max_matching_ngram_size"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_bad_lookups_are_refused(name, value):
    arguments = {"prompt_lookup_num_tokens": 4, name: value}

    with pytest.raises(ValueError, match=f"Expected `{name}` to be an integer above 0, got {value}"):
        with_pard(make_model("llama")).generate(**make_prompts(1), **arguments)


@pytest.mark.parametrize("value", ["copy", ["draft"], [["copy"]], True])
def test_bad_sources_are_refused(value):
    with pytest.raises(ValueError, match="Expected `assistant_sources` to be a list of"):
        with_pard(make_model("llama")).generate(**make_prompts(1), assistant_sources=value)


def test_rows_that_have_finished_teach_nothing():
    """Their last node is verified again and again while others go on."""
    torch.manual_seed(0)
    ids, logits = torch.randint(9, (2, 12)), torch.randn(2, 9, 9)
    learned = []
    for kept in ([0, 1], [1]):
        tables, _ = observed(9)
        rows = Rows.from_prompt(ids[kept], torch.ones_like(ids[kept]), 20)
        rows.is_finished[: len(kept) - 1] = True
        sources = Sources(tables, reference_ids([]), 8, True, False)
        tree = lookup_step(rows, sources, 3, 8).tree
        before = tables.weights.clone()

        nodes, num_matched = torch.zeros(len(kept), 3, dtype=torch.long), torch.zeros(len(kept), dtype=torch.long)
        remember_step(sources, rows, tree, logits[kept], nodes, num_matched)

        assert not torch.equal(tables.weights, before)
        learned.append((tables.weights, tables.after_one, tables.after_two[:-1]))

    assert all(torch.equal(*tensors) for tensors in zip(*learned, strict=True))


def test_finished_rows_teach_nothing_in_lockstep():
    """What they are padded with is no text."""
    target, prompts = with_pard(make_model("llama")), make_prompts(2)
    arguments = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.01}
    end, memory = int(target.generate(**prompts, **arguments)[0, -20]), AssistantMemory(target)

    output = target.generate(**prompts, **arguments, eos_token_id=end, assistant_memory=memory)

    assert output[0, -3:].tolist() == [0, 0, 0]
    assert memory.tables.after_one[0, 0] == -1
