"""Trees of proposals: the right prefixes, seen by the right nodes, walked by the target's own choices."""

import itertools
import math

import pytest
import torch as real_torch
from device import DEVICE, torch
from families import FAMILIES, make_draft, make_model, make_prompts, make_self_draft, path_of
from transformers import GenerationConfig

from pard_hf import with_pard, without_pard
from pard_hf.draft.correction_head import CorrectedPositions, CorrectionHead
from pard_hf.generation.cache import SlotCache
from pard_hf.generation.sampling import sample_with_noise, verify_greedy
from pard_hf.generation.tree import (
    LOG_ZERO,
    Candidates,
    Tree,
    ancestors,
    best_prefixes,
    chain_as_tree,
    child_with,
    choose_at_nodes,
    grow_tree,
    tree_of_marginals,
    walk,
)
from pard_hf.host import warn_once

NEW_TOKENS = 30


def paths_of(tree, row):
    return [path_of(tree, row, node) for node in range(1, tree.tokens.shape[1] + 1)]


def all_prefixes(logprobs, num_depths, vocab_size):
    """Every prefix with its log-probability, by plain loops; `logprobs(depth, path)` is a list over the vocabulary."""
    found = {}
    for depth in range(1, num_depths + 1):
        for path in itertools.product(range(vocab_size), repeat=depth):
            found[path] = sum(logprobs(step, path[:step])[path[step]] for step in range(depth))
    return found


def check_best(tree, row, found, num_nodes):
    """The nodes are the most probable prefixes; where several are equally probable, any of them."""
    paths = paths_of(tree, row)
    assert len(set(paths)) == len(paths) == min(num_nodes, len(found))
    wanted = sorted(found.values(), reverse=True)[: len(paths)]
    assert sorted((found[path] for path in paths), reverse=True) == pytest.approx(wanted, abs=1e-4)
    assert tree.logprobs[row].tolist() == pytest.approx([found[path] for path in paths], abs=1e-4)


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 8, 17, 64])
@pytest.mark.parametrize(("num_depths", "vocab_size"), [(1, 5), (2, 7), (3, 5), (4, 4), (6, 2)])
def test_tree_is_the_brute_force_best(num_nodes, num_depths, vocab_size):
    generator = torch.Generator().manual_seed(num_nodes + 100 * num_depths)
    scores = 2 * torch.randn(3, num_depths, vocab_size, generator=generator)

    tree = tree_of_marginals(scores, num_nodes)

    logs = scores.log_softmax(-1).tolist()
    for row in range(3):
        found = all_prefixes(lambda depth, path, row=row: logs[row][depth], num_depths, vocab_size)
        check_best(tree, row, found, num_nodes)


@pytest.mark.parametrize("num_nodes", [1, 4, 9, 40])
def test_tree_with_a_head_is_the_brute_force_best(num_nodes):
    """Places that depend on their parents: every prefix scored by plain loops over the head's own forward."""
    torch.manual_seed(num_nodes)
    num_depths, vocab_size = 4, 5
    head = CorrectionHead(vocab_size, 6, rank=3)
    torch.nn.init.normal_(head.output.weight)
    head.to(DEVICE)
    hidden, scores = torch.randn(2, num_depths, 6), torch.randn(2, num_depths, vocab_size)
    with torch.no_grad():
        places = CorrectedPositions(head, hidden, scores)
        tree = best_prefixes(places.candidates, places.logprobs, num_nodes)
        corrected = {
            (row, place, token): (scores[row, place] + head(hidden[row, place], torch.tensor(token))).log_softmax(-1)
            for row, place, token in itertools.product(range(2), range(num_depths), range(vocab_size))
        }

    for row in range(2):

        def logprobs(place, path, row=row):
            return corrected[row, place, path[-1]].tolist() if path else scores[row, 0].log_softmax(-1).tolist()

        check_best(tree, row, all_prefixes(logprobs, num_depths, vocab_size), num_nodes)


def test_few_candidates_keep_their_probabilities():
    """With the rest of the vocabulary weighed as a whole, a candidate's probability is that of the whole softmax."""
    torch.manual_seed(0)
    head = CorrectionHead(50, 6, rank=3, num_candidates=50)
    torch.nn.init.normal_(head.output.weight, std=0.1)
    head.to(DEVICE)
    hidden, scores = torch.randn(1, 2, 6), 3 * torch.randn(1, 2, 50)
    with torch.no_grad():
        whole = CorrectedPositions(head, hidden, scores)
        head.num_candidates = 4
        few = CorrectedPositions(head, hidden, scores)
        tokens = torch.tensor([[7, 9]])
        wanted = scores[0, 1].scatter_add(
            0, few.candidates[0, 1], head(hidden[0, 1], torch.tensor(7))[few.candidates[0, 1]]
        )

        torch.testing.assert_close(few.logprobs(1, tokens)[0, 0], wanted.log_softmax(-1)[few.candidates[0, 1]])
    assert whole.candidates.shape[-1] == 50


@pytest.mark.parametrize("num_nodes", [1, 3, 12, 60, 500])
@pytest.mark.parametrize("num_void", [0, 1, 3])
@pytest.mark.parametrize("tokens_are_shared", [False, True])
def test_grown_tree_is_the_heaps(num_nodes, num_void, tokens_are_shared):
    """Candidates that depend on the whole path, some void: the best prefixes, in order, each with its own share."""
    num_depths, num_rows = 3, 2

    def after(path, row):
        """Tokens and log-probabilities; behind every other path the first are void."""
        generator = real_torch.Generator().manual_seed(hash(path) % 1000 + row)
        tokens = real_torch.randperm(9, generator=generator)[:5].tolist()
        logprobs = real_torch.randn(5, generator=generator).log_softmax(-1).tolist()
        num_left_out = num_void if sum(path) % 2 else 0
        if tokens_are_shared:
            return [3, 1, 4, 2, 5], [math.nan] * num_left_out + logprobs[num_left_out:]
        return [-1] * num_left_out + tokens[num_left_out:], [-math.inf] * num_left_out + logprobs[num_left_out:]

    paths = {}

    def expand(depth, tokens, parents):
        for row in range(num_rows):
            pairs = [] if depth == 0 else zip(parents[row].tolist(), tokens[row].tolist(), strict=True)
            paths[row] = [(*paths[row][parent], token) for parent, token in pairs] or [()]
        found = [[after(path, row) for path in paths[row]] for row in range(num_rows)]
        ids = torch.tensor([[tokens for tokens, _ in row] for row in found])
        logprobs = torch.tensor([[logprobs for _, logprobs in row] for row in found])
        if tokens_are_shared:
            return Candidates(ids[:, :1], logprobs)
        shares = torch.stack([logprobs.exp(), ids.float()], dim=3)
        return Candidates(ids, logprobs, shares, torch.tensor([[sum(path) for path in paths[row]] for row in paths]))

    tree = grow_tree(expand, num_depths, num_nodes)

    for row in range(num_rows):
        found, frontier = {}, [()]
        for path in frontier:
            for token, logprob in zip(*after(path, row), strict=True):
                if math.isfinite(logprob):
                    found[(*path, token)] = found.get(path, 0.0) + logprob
                    frontier += [(*path, token)] if len(path) + 1 < num_depths else []
        num_real = min(num_nodes, len(found))
        scores = tree.logprobs[row].tolist()
        assert [score > LOG_ZERO / 2 for score in scores] == [node < num_real for node in range(len(scores))]
        assert scores[:num_real] == pytest.approx(sorted(found.values(), reverse=True)[:num_real], abs=1e-4)
        reached = paths_of(tree, row)
        assert [found[path] for path in reached[:num_real]] == pytest.approx(scores[:num_real], abs=1e-4)
        assert [len(path) for path in reached] == tree.depths[row].tolist()
        assert all(parent < node for node, parent in enumerate(tree.parents[row].tolist(), 1))
        if not tokens_are_shared:
            assert tree.shares[row, :num_real, 1].tolist() == [path[-1] for path in reached[:num_real]]
            assert tree.contexts[row, :num_real].tolist() == [sum(path[:-1]) for path in reached[:num_real]]


@pytest.mark.parametrize("values", ["nan", "equal", "certain", "infinite"])
def test_odd_scores_still_give_a_tree(values):
    scores = {
        "nan": torch.full((1, 3, 9), torch.nan),
        "equal": torch.zeros(1, 3, 9),
        "certain": torch.full((1, 3, 9), -torch.inf).index_fill(-1, torch.tensor(4), 0.0),
        "infinite": torch.zeros(1, 3, 9).index_fill(-1, torch.tensor(4), torch.inf),
    }[values]

    tree = tree_of_marginals(scores, 12)

    paths = paths_of(tree, 0)
    assert len(set(paths)) == 12
    assert [len(path) for path in paths] == tree.depths[0].tolist()
    assert all(parent <= node for node, parent in enumerate(tree.parents[0].tolist()))
    if values == "certain":
        assert {(4,), (4, 4), (4, 4, 4)} <= set(paths)


def test_ancestors_are_those_of_plain_loops():
    torch.manual_seed(0)
    tree = tree_of_marginals(2 * torch.randn(2, 7, 5), 40)

    found = ancestors(tree, 7)

    for row in range(2):
        for node in range(41):
            seen, step = {node}, node
            while step:
                step = int(tree.parents[row, step - 1])
                seen.add(step)
            assert set(found[row, node].nonzero().flatten().tolist()) == seen


def test_walk_follows_the_choices():
    torch.manual_seed(1)
    for _ in range(50):
        tree = tree_of_marginals(torch.randn(4, 5, 3), 20)
        choices = torch.randint(0, 3, (4, 21))

        tokens, path = walk(tree, ancestors(tree, 5), choices, 5)

        for row in range(4):
            pairs = zip(tree.parents[row].tolist(), tree.tokens[row].tolist(), strict=True)
            children = {pair: node for node, pair in enumerate(pairs, 1)}
            node, said, nodes = 0, [], []
            while True:
                said.append(int(choices[row, node]))
                node = children.get((node, said[-1]), 0)
                if not node:
                    break
                nodes.append(node)
            assert path.num_matched[row] == len(nodes)
            assert tokens[row, : len(said)].tolist() == said
            assert path.nodes[row, : len(nodes)].tolist() == nodes


def test_chain_is_the_tree_of_width_one():
    torch.manual_seed(2)
    draft_tokens, scores = torch.randint(0, 3, (5, 4)), torch.randn(5, 5, 3)
    tree = chain_as_tree(draft_tokens)

    tokens, path = walk(tree, ancestors(tree, 4), choose_at_nodes(tree, scores, None), 4)

    expected, num_matched = verify_greedy(draft_tokens, scores)
    assert torch.equal(path.num_matched, num_matched)
    for row, count in enumerate(num_matched.tolist()):
        assert torch.equal(tokens[row, : count + 1], expected[row, : count + 1])


def test_nodes_of_a_depth_share_their_noise():
    torch.manual_seed(3)
    tree = tree_of_marginals(torch.randn(1, 3, 4), 10)
    scores, noise = torch.randn(1, 11, 4), torch.empty(1, 4, 4).exponential_()

    choices = choose_at_nodes(tree, scores, noise)

    depths = [0, *tree.depths[0].tolist()]
    for node, depth in enumerate(depths):
        assert choices[0, node] == sample_with_noise(scores[0, node], noise[0, depth])


def test_child_of_nothing_is_none():
    empty = torch.zeros(2, 0, dtype=torch.long)

    nodes, is_there = child_with(Tree(empty, empty, empty, empty.float()), torch.tensor([0, 0]), torch.tensor([4, 5]))

    assert not is_there.any()
    assert nodes.tolist() == [0, 0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_every_node_reads_its_own_path(family):
    """Logits of each node are those of its path as an ordinary text, windows by position; and a kept path goes on."""
    torch.manual_seed(4)
    model = make_model(family)
    texts, lengths = torch.randint(3, 99, (3, 24)), torch.tensor([5, 11, 16])
    cache = SlotCache(model.config, 64)
    columns = torch.arange(16) - 16 + lengths.unsqueeze(1)

    def forward(ids, positions, on_path=None):
        mask = cache.prepare(positions, 64, on_path)
        with torch.no_grad():
            return model(
                input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=cache
            ).logits

    forward(texts.gather(1, (columns - 1).clamp(min=0)), columns - 1)  # All but each text's last token.
    tree = tree_of_marginals(torch.randn(3, 5, 99), 18)
    roots = (lengths - 1).unsqueeze(1)
    ids = torch.cat([texts.gather(1, roots), tree.tokens], dim=1)

    logits = forward(ids, torch.cat([roots, roots + tree.depths], dim=1), ancestors(tree, 5))

    def alone(row, tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1]

    for row in range(3):
        text = texts[row, : lengths[row]].tolist()
        for node in range(19):
            torch.testing.assert_close(
                logits[row, node], alone(row, [*text, *path_of(tree, row, node)]), atol=3e-5, rtol=1e-4
            )

    deepest = tree.depths.argmax(dim=1) + 1
    kept = [path_of(tree, row, int(deepest[row])) for row in range(3)]
    nodes = torch.zeros(3, 5, dtype=torch.long)
    for row in range(3):
        node = int(deepest[row])
        while node:
            nodes[row, int(tree.depths[row, node - 1]) - 1] = node
            node = int(tree.parents[row, node - 1])
    cache.keep_path(lengths - 1, nodes)
    following = torch.tensor([[7], [8], [9]])
    ends = lengths + torch.tensor([len(path) for path in kept])
    logits = forward(following, ends.unsqueeze(1))
    for row in range(3):
        whole = [*texts[row, : lengths[row]].tolist(), *kept[row], int(following[row])]
        torch.testing.assert_close(logits[row, 0], alone(row, whole), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [-1, 2.5, True, 5000, "8"])
def test_bad_sizes_are_refused(size):
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=5))

    with pytest.raises(ValueError, match="assistant_tree_size"):
        target.generate(**make_prompts(1), assistant_model=draft, assistant_tree_size=size)


def test_size_comes_from_the_call_then_the_configs():
    target, prompts = with_pard(make_model("llama")), make_prompts(1)
    draft = make_self_draft(without_pard(target))
    with_pard(target)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "assistant_model": draft}

    def drafted(**more):
        stats = target.generate(**prompts, **kwargs, **more).stats
        return stats.num_drafted / stats.num_rounds

    chain = drafted()
    draft.generation_config.assistant_tree_size = 24
    assert drafted() > 2 * chain
    assert drafted(assistant_tree_size=0) == chain
    target.generation_config.assistant_tree_size = 0
    assert drafted() == chain
    assert drafted(generation_config=GenerationConfig(assistant_tree_size=24)) > 2 * chain


def test_size_is_saved_with_the_draft(tmp_path):
    draft = make_draft(make_model("llama", seed=5))
    draft.generation_config.assistant_tree_size = 16

    draft.save_pretrained(tmp_path)

    assert type(draft).from_pretrained(tmp_path).generation_config.assistant_tree_size == 16


def test_ratio_test_drafts_a_chain(caplog):
    warn_once.cache_clear()
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=5))
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 8, "do_sample": True, "verification": "ratio_test", "return_dict_in_generate": True}

    output = target.generate(**make_prompts(1), assistant_model=draft, assistant_tree_size=16, **arguments)

    assert "a chain is drafted instead of a tree" in caplog.text
    assert output.stats.num_drafted <= 5 * output.stats.num_rounds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_perfect_draft_is_accepted_whole(family, batch_size):
    """With the target as its own draft the first proposal is right everywhere: a tree loses nothing of a chain."""
    target, prompts = make_model(family), make_prompts(batch_size)
    draft = make_self_draft(target)
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "assistant_model": draft}
    rounds = [
        with_pard(target).generate(**prompts, **arguments, assistant_tree_size=size).stats.num_rounds
        for size in (0, 64)
    ]

    assert rounds[1] <= rounds[0]
