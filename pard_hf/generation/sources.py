"""Propose without a draft: copy from the text, and remember the target's own likeliest next tokens.

Copying continues earlier positions of the text whose last tokens are those of the row (inference with reference,
https://arxiv.org/abs/2304.04487). Successors are what the target found likeliest after a token, or after two, when it
last read them; every verify gives them for each node, accepted or not (https://arxiv.org/abs/2408.08696). With a draft
all of them grow one tree.

A node's probability is a mixture: each source gives a distribution over the next token, and weights say how far it is
to be believed, given how many tokens match, whether the tables have seen the last one or two, and the depth. Weights
are expected counts, a prior at first, updated every round by what the target chose. All of it runs on the device in
fixed shapes, so a round can be compiled, and no value is read on the host.

Shapes: B rows, W columns of text, M matches, K depths, F nodes of a depth, N nodes, C candidates of a node, S
components of the mixture, V tokens.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..draft.correction_head import CorrectedPositions, Depth, at_depth
from .tree import LOG_ZERO, Candidates, Tree

# The components of the mixture, in the order of weights and shares, and the sources they belong to.
COMPONENTS = ("copy", "successors", "successors", "draft")

NUM_MATCHES, MAX_MATCH_LENGTH = 8, 8
NUM_SUCCESSORS = 8
# Pairs of tokens share slots by a hash; a slot keeps the pair seen last.
NUM_PAIRS = 1 << 15
# A match counts twice as much as one that is a token shorter, up to this length.
LONGEST_VOTE = 12
# Of the draft's likeliest tokens at a depth, those that may become nodes beside the other sources'.
NUM_DRAFT_CANDIDATES = 32

# Contexts have weights of their own. They differ in the tokens matched (0 to 5, from 7, from 10; those of the path
# too), in whether the tables know the last token or the last two, and, where a draft proposes, in depth.
DEPTH_BOUNDS = (1, 2, 3, 5)
NUM_DEPTHS = len(DEPTH_BOUNDS) + 1
LONGEST_CONTEXT = 10
NUM_CONTEXTS = 8 * 3 * NUM_DEPTHS
# The prior, in per cent of what is chosen: of each component (copies, successors of two tokens, of one) by what is
# known and by tokens matched. Fitted to answers of SmolLM2-135M-Instruct to HumanEval and GSM8K prompts. Where a draft
# proposes too it has at least `DRAFT_SHARES`, by tokens matched.
PRIOR_SHARES = (
    ((0, 33, 68, 78, 76, 86, 84, 87), (0, 25, 38, 60, 75, 75, 74, 90), (0, 18, 25, 34, 36, 45, 57, 63)),
    ((0, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0, 0), (60, 53, 37, 37, 38, 31, 28, 26)),
    ((0, 0, 0, 0, 0, 0, 0, 0), (55, 40, 35, 17, 13, 9, 12, 3), (26, 12, 24, 16, 15, 17, 11, 9)),
)
DRAFT_SHARES = (95, 95, 95, 90, 80, 70, 60, 50)
# Rounds' worth of belief in the prior, and the most that a context remembers.
PRIOR_STRENGTH, MOST_REMEMBERED = 10.0, 100.0
# Vocabularies beyond this size are searched block by block.
LARGE_VOCABULARY, BLOCK = 4096, 128


@dataclass(eq=False)
class Sources:
    """The sources of one call besides the draft.

    Args:
        references (`torch.LongTensor` of shape `(1, R)`):
            Further texts to copy from, each ended by -1; -1 alone for none.
        longest_match (`int`):
            Tokens that are compared at most; 0 to copy nothing.
        branches (`bool`, defaults to `True`):
            Whether proposals are a tree; else the chain that follows the likeliest token of each depth.
    """

    tables: Tables
    references: torch.Tensor
    longest_match: int
    learns_successors: bool
    has_draft: bool
    branches: bool = True


def encode_references(texts: Sequence[Any], tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """Encode texts to copy from, strings or token ids, as `[1, R]` ids, -1 after each text.

    Raises:
        ValueError: There is a string and no tokenizer, something else than a list of texts, or an id that is none.
    """
    if isinstance(texts, str):
        raise ValueError(
            "Expected `assistant_reference_texts` to be a list of texts, got one string. Put it in a list."
        )
    encoded = [torch.tensor([-1])]
    for text in texts:
        if isinstance(text, str) and tokenizer is None:
            raise ValueError(
                "Expected `tokenizer` with `assistant_reference_texts` that are strings, got none. Pass `tokenizer=`, "
                "or token ids."
            )
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        try:
            row = torch.as_tensor(ids).cpu()
        except (TypeError, ValueError, RuntimeError):  # Nested lists, or what a tokenizer returns as a dict.
            row = torch.empty(0, 0)
        is_text = row.dim() == 1 and not (len(row) and row.is_floating_point())
        if not is_text or ((row < 0) | (row >= vocab_size)).any():
            raise ValueError(
                "Expected each of `assistant_reference_texts` to be a string or a list of token ids in [0, "
                f"{vocab_size}), got {reprlib.repr(ids)}. Pass `tokenizer(text).input_ids` of each text."
            )
        encoded += [row.long(), encoded[0]]
    return torch.cat(encoded).unsqueeze(0)


class Matches(NamedTuple):
    """Earlier positions whose last tokens are a row's, best first."""

    tokens: torch.Tensor  # `[B, M, K]`, what follows each; -1 where nothing does.
    lengths: torch.Tensor  # `[B, M]`, how many tokens match; 0 where there is no further match.


def find_matches(
    references: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, num_depths: int, longest: int
) -> Matches:
    """Find the positions whose last tokens, `longest` at most, are a row's: the longest matches, the latest of equals.

    Rows `tokens` `[B, width]` hold `lengths` `[B]` known tokens; `references` `[1, R]` are further texts, each ended
    by -1.
    """
    text = torch.cat([references.expand(len(tokens), -1), tokens], dim=1)
    start, width = references.shape[1], text.shape[1]
    end = (lengths + start - 1).unsqueeze(1)  # The column of each row's last token.
    columns = torch.arange(width, device=text.device)
    back = end - torch.arange(longest, device=text.device)
    # Neither a match nor the row's own text reaches across the beginning of a text.
    suffix = torch.where(back < start, -2, text.gather(1, back.clamp(min=0)))
    # Nothing follows a reference's last token.
    matched, is_match = torch.zeros_like(text), (columns < end) & (text.roll(-1, dims=1) >= 0)
    for k in range(min(longest, width)):
        is_match = is_match & (pad(text[:, : width - k], (k, 0), value=-1) == suffix[:, k : k + 1])
        matched = matched + is_match
    rank, ends = (matched * width + columns).topk(min(NUM_MATCHES, width), dim=1)
    lengths = rank // width
    following = ends.unsqueeze(2) + torch.arange(1, num_depths + 1, device=text.device)
    is_known = (following <= end.unsqueeze(2)) & (lengths > 0).unsqueeze(2)
    copied = text.gather(1, following.clamp(max=width - 1).flatten(1)).view_as(following)
    is_known &= (copied < 0).cumsum(dim=2) == 0  # As far as a reference's end.
    return Matches(torch.where(is_known, copied, -1), lengths)


@dataclass(eq=False)
class Tables:
    """What is remembered of a target; changed in place, so that compiled steps find it where it was.

    A row holds the target's likeliest next tokens, -1 for none, and their probabilities, all as floats, so that a
    round looks up both at once. The last row of each table takes what is to be dropped, and stays empty.
    """

    after_one: torch.Tensor  # `[V + 1, 2 * NUM_SUCCESSORS]`, by the last token.
    after_two: torch.Tensor  # `[NUM_PAIRS + 1, 2 * NUM_SUCCESSORS + 2]`, by the last two, which end the row.
    weights: torch.Tensor  # `[2, NUM_CONTEXTS, S + 1]`, expected counts without a draft and with one.

    @classmethod
    def empty(cls, vocab_size: int, device: torch.device) -> Tables:
        with torch.inference_mode(False):  # Later calls outside it write to them too.
            one = torch.full((vocab_size + 1, 2 * NUM_SUCCESSORS), -1.0, device=device)
            two = torch.full((NUM_PAIRS + 1, 2 * NUM_SUCCESSORS + 2), -1.0, device=device)
            return cls(one, two, prior_weights().to(device))

    @property
    def vocab_size(self) -> int:
        return len(self.after_one) - 1

    def copy_(self, other: Tables) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))

    def to(self, device: torch.device) -> Tables:
        """Return these tables, or a copy where they are on another device."""
        if self.weights.device == device:
            return self
        return Tables(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def clear(self) -> None:
        self.copy_(Tables.empty(self.vocab_size, self.weights.device))

    def is_valid(self) -> bool:
        """Return whether all tokens are of the vocabulary, probabilities at most 1 and counts not negative."""
        keys, halves = self.after_two[:, 2 * NUM_SUCCESSORS :], (self.after_one, self.after_two)
        tokens = (keys, *(table[:, :NUM_SUCCESSORS] for table in halves))
        probs = (table[:, NUM_SUCCESSORS : 2 * NUM_SUCCESSORS] for table in halves)  # -1 beside no token.
        return (
            all(bool(((ids >= -1) & (ids < self.vocab_size) & (ids == ids.round())).all()) for ids in tokens)
            and all(bool(((values >= -1) & (values <= 1)).all()) for values in probs)
            and bool(((self.weights >= 0) & self.weights.isfinite()).all())
        )

    def mixture_weights(self, has_draft: bool) -> torch.Tensor:
        """Return what each component is to be believed in each context, and none of them, `[NUM_CONTEXTS, S + 1]`."""
        weights = self.weights[int(has_draft)]
        return weights / weights.sum(dim=-1, keepdim=True)

    def successors(
        self, previous: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Look up what follows `[B, F]` tokens: tokens and probabilities `[B, F, NUM_SUCCESSORS]` after two and one.

        What is known is 0 for nothing, 1 for the last token, 2 for the last two.
        """
        one, two = self.after_one[tokens], self.after_two[slots_of(previous, tokens)]  # -1 is the last row.
        is_other = (two[..., -2] != previous) | (two[..., -1] != tokens)
        ids = two[..., :NUM_SUCCESSORS].masked_fill(is_other.unsqueeze(2), -1)
        known = (one[..., 0] >= 0).long() + ~is_other
        return (ids, two[..., NUM_SUCCESSORS:-2]), (one[..., :NUM_SUCCESSORS], one[..., NUM_SUCCESSORS:]), known

    def observe(self, previous: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Remember the likeliest next tokens after `[B, N]` tokens, of which -1 are none, from logits `[B, N, V]`."""
        likeliest, probs = likeliest_tokens(logits)
        missing = NUM_SUCCESSORS - likeliest.shape[2]
        pairs = torch.stack([previous, tokens], dim=2)
        rows = torch.cat([pad(likeliest, (0, missing), value=-1), pad(probs, (0, missing)), pairs], dim=2)
        slots = slots_of(previous, tokens).masked_fill((previous < 0) | (tokens < 0), NUM_PAIRS)
        tokens = tokens.masked_fill(tokens < 0, self.vocab_size)
        # Of equal ones the first, which is the likelier node, comes last.
        rows, slots, tokens = rows.flip(1).flatten(0, 1), slots.flip(1).flatten(), tokens.flip(1).flatten()
        write_last(self.after_one, tokens, rows[:, :-2])
        write_last(self.after_two, slots, rows)


def write_last(table: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write `rows` `[n, width]` to the rows `index` `[n]` of a table, of equal ones the last.

    A GPU writes to equal ones in no order, and may mix them. The table's last row takes the others and stays empty.
    """
    index, order = index.sort(stable=True)
    comes_again = pad(index[:-1] == index[1:], (0, 1))
    table.index_copy_(0, index.masked_fill(comes_again, len(table) - 1), rows[order])
    table[-1].fill_(-1)


def slots_of(previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the rows that pairs of tokens share by a hash."""
    return (previous * 1_000_003 + tokens * 7_919) & (NUM_PAIRS - 1)


def likeliest_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens of logits `[..., V]` and their probabilities, `NUM_SUCCESSORS` of each at most.

    A large vocabulary is not summed over: probabilities are those among the blocks that hold the likeliest tokens.
    """
    vocab_size = logits.shape[-1]
    if vocab_size <= LARGE_VOCABULARY:
        searched, index = logits.float(), None
    else:
        num_blocks = vocab_size // BLOCK
        peaks = logits[..., : num_blocks * BLOCK].unflatten(-1, (num_blocks, BLOCK)).amax(dim=-1)
        blocks = peaks.topk(NUM_SUCCESSORS, dim=-1).indices.unsqueeze(-1) * BLOCK
        inside = (blocks + torch.arange(BLOCK, device=logits.device)).flatten(-2)
        rest = torch.arange(num_blocks * BLOCK, vocab_size, device=logits.device).expand(*inside.shape[:-1], -1)
        index = torch.cat([inside, rest], dim=-1)
        searched = logits.gather(-1, index).float()
    best, tokens = searched.topk(min(NUM_SUCCESSORS, vocab_size), dim=-1)
    probs = (best - searched.logsumexp(dim=-1, keepdim=True)).exp().nan_to_num(0.0)
    return tokens if index is None else index.gather(-1, tokens), probs


class DraftCandidates:
    """The draft's likeliest tokens of each depth, of logits `[B, K, V]`, corrected by its head where it has one."""

    def __init__(
        self, scores: torch.Tensor, num_candidates: int, corrected: CorrectedPositions | None, device: torch.device
    ):
        self.corrected = corrected
        if corrected is None:
            logprobs, candidates = scores.float().log_softmax(dim=-1).topk(num_candidates, dim=-1)
            self.probs = logprobs.exp().nan_to_num(0.0).to(device)
        else:
            candidates = corrected.candidates[:, :, :num_candidates]
        self.candidates, self.num_candidates = candidates.to(device).float(), candidates.shape[2]

    @property
    def num_depths(self) -> int:
        """Return how deep the draft sees."""
        return self.candidates.shape[1]

    def __call__(self, depth: Depth, previous: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a depth's tokens `[B, 1, C]` and their probabilities `[B, F or 1, C]` after the tokens `previous`."""
        tokens = at_depth(self.candidates, depth)
        if self.corrected is None:
            return tokens, at_depth(self.probs, depth)
        if previous is not None:  # A void node has the token -1.
            previous = previous.clamp(min=0).to(self.corrected.scores.device)
        logprobs = self.corrected.logprobs(depth, previous)[..., : self.num_candidates]
        return tokens, logprobs.exp().nan_to_num(0.0).to(tokens.device)


class Mixture:
    """The next tokens of the nodes of one round, depth by depth, under the mixture of all sources.

    `last_two` `[B, 2]` are each row's last tokens, -1 where there is none. Tokens are floats here, as in the tables.
    What does not depend on the nodes is computed once a round.
    """

    def __init__(self, tables: Tables, matches: Matches, last_two: torch.Tensor, draft: DraftCandidates | None = None):
        self.tables, self.draft = tables, draft
        self.previous, self.tokens = last_two.split(1, dim=1)
        self.is_at_root = True
        device, (_, num_matches, num_depths) = last_two.device, matches.tokens.shape
        self.copies_BKM = matches.tokens.float().transpose(1, 2)
        self.is_end_BKM = self.copies_BKM < 0
        self.is_left = self.is_end_BKM[:, :1]  # Which matches the path to a node has left, `[B, F, M]`.
        self.lengths_BKM = matches.lengths.unsqueeze(1) + torch.arange(num_depths, device=device).unsqueeze(1)
        self.votes_BKM = self.lengths_BKM.clamp(max=LONGEST_VOTE).float().exp2()
        sizes = [num_matches, NUM_SUCCESSORS, NUM_SUCCESSORS, 0 if draft is None else draft.num_candidates]
        self.columns = torch.arange(sum(sizes), device=device)
        self.depths = torch.arange(num_depths, device=device)
        # Of which component each candidate is.
        components = torch.eye(len(COMPONENTS), device=device)
        self.is_of_CS = torch.cat([one.expand(size, -1) for one, size in zip(components, sizes, strict=True)])
        self.weights = tables.mixture_weights(draft is not None)[:, :-1] @ self.is_of_CS.T
        lengths = torch.arange(LONGEST_CONTEXT + 1, device=device)
        matched = lengths.clamp(max=5) + (lengths >= 7) + (lengths >= LONGEST_CONTEXT)
        # The number of a context by three times the length of the longest match and what is known.
        self.contexts = (matched.unsqueeze(1) * 3 + self.columns[:3]).flatten() * NUM_DEPTHS

    def __call__(self, depth: Depth, tokens: torch.Tensor | None, parents: torch.Tensor | None) -> Candidates:
        """Return what may follow a depth's nodes `tokens` `[B, F]`; `parents` index the nodes of the depth before."""
        if tokens is not None and parents is not None:
            self.follow(depth, tokens, parents)
        return self.candidates(depth)

    def follow(self, depth: Depth, tokens: torch.Tensor, parents: torch.Tensor) -> None:
        """Move to the nodes `tokens` `[B, F]` of a depth, whose `parents` are nodes of the depth before."""
        leaves = at_depth(self.copies_BKM, depth - 1) != tokens.unsqueeze(2)
        index = parents.unsqueeze(2).expand_as(leaves)
        self.is_left = self.is_left.expand(-1, self.tokens.shape[1], -1).gather(1, index) | leaves
        self.previous, self.tokens, self.is_at_root = self.tokens.gather(1, parents), tokens.long(), False

    def candidates(self, depth: Depth) -> Candidates:
        """Return what may follow the current nodes, which are of this depth."""
        copied = at_depth(self.copies_BKM, depth).expand_as(self.is_left)
        is_void = self.is_left | at_depth(self.is_end_BKM, depth)
        longest = at_depth(self.lengths_BKM, depth).masked_fill(is_void, 0).amax(dim=2)
        votes = at_depth(self.votes_BKM, depth).masked_fill(is_void, 0)
        votes = votes / votes.sum(dim=2, keepdim=True).clamp(min=1)
        two, one, known = self.tables.successors(self.previous, self.tokens)
        parts = [(copied, votes), two, one]
        if self.draft is not None:
            ids, probs = self.from_draft(depth, None if self.is_at_root else self.tokens)
            parts.append((ids.expand(-1, copied.shape[1], -1), probs.expand(-1, copied.shape[1], -1)))
        ids, probs = (torch.cat(values, dim=2) for values in zip(*parts, strict=True))
        contexts = self.contexts[torch.add(known, longest.clamp(max=LONGEST_CONTEXT), alpha=3)]
        return self.merged(ids, probs, contexts if self.draft is None else contexts + depth_number(depth))

    def from_draft(self, depth: Depth, previous: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the draft proposes after the tokens `previous`; no tokens where it does not see so far."""
        assert self.draft is not None
        last = self.draft.num_depths - 1
        ids, probs = self.draft(min(depth, last) if isinstance(depth, int) else depth.clamp(max=last), previous)
        if isinstance(depth, int):  # No tensor of it: a value of the host would be copied to the device.
            return ids if depth <= last else torch.full_like(ids, -1), probs
        return ids.masked_fill(depth > last, -1), probs

    def merged(self, tokens: torch.Tensor, probs: torch.Tensor, contexts: torch.Tensor) -> Candidates:
        """Merge what the components give, `[B, F, C]`; a token that several give is one candidate, the first."""
        weighted = probs * self.weights[contexts]
        is_same = (tokens.unsqueeze(3) == tokens.unsqueeze(2)).float()
        shares = is_same @ (weighted.unsqueeze(3) * self.is_of_CS)
        is_void = (is_same.argmax(dim=3) != self.columns) | (tokens < 0)
        shares = shares.masked_fill(is_void.unsqueeze(3), 0)
        return Candidates(tokens.masked_fill(is_void, -1), shares.sum(dim=3).log(), shares, contexts)


def depth_number(depth: Depth) -> Depth:
    """Return which of the depths that contexts tell apart one belongs to."""
    return sum(depth >= bound for bound in DEPTH_BOUNDS)


def learn(tables: Tables, tree: Tree, nodes: torch.Tensor, num_matched: torch.Tensor, has_draft: bool) -> None:
    """Count, in the context of each node on the accepted path, which components gave what the target chose.

    `nodes` `[B, K]` are the path's, `num_matched` `[B]` its length, -1 for a row that does not count. One step of
    expectation and maximization: what was chosen counts for each component by its share; where the path ends, by the
    share that it had left for other tokens.
    """
    assert tree.shares is not None
    assert tree.contexts is not None
    weights = tables.mixture_weights(has_draft)
    batch_size, num_nodes = tree.tokens.shape
    parents = tree.parents.unsqueeze(2).expand(-1, -1, len(COMPONENTS))
    spent = tree.shares.new_zeros(batch_size, num_nodes + 1, len(COMPONENTS)).scatter_add(1, parents, tree.shares)
    contexts = tree.contexts.new_zeros(batch_size, num_nodes + 1).scatter(1, tree.parents, tree.contexts)
    offers = torch.zeros_like(contexts).scatter_add(1, tree.parents, (tree.logprobs > LOG_ZERO / 2).long())

    path = pad(nodes, (1, 0))  # `[B, K + 1]`, from the root on.
    contexts, offers = contexts.gather(1, path), offers.gather(1, path)
    spent = spent.gather(1, path.unsqueeze(2).expand(-1, -1, len(COMPONENTS)))
    chosen = tree.shares.gather(1, (nodes - 1).clamp(min=0).unsqueeze(2).expand(-1, -1, len(COMPONENTS)))
    chosen = pad(chosen, (0, 1, 0, 1))
    left = weights[contexts]
    left = torch.cat([(left[..., :-1] - spent).clamp(min=0), left[..., -1:]], dim=2)
    steps = torch.arange(path.shape[1], device=path.device)
    is_accepted = (steps < num_matched.unsqueeze(1)).unsqueeze(2)
    counts = torch.where(is_accepted, chosen, left)
    counts = counts / counts.sum(dim=2, keepdim=True).clamp(min=1e-30)
    is_evidence = (steps <= num_matched.unsqueeze(1)) & (offers > 0)
    counts = counts * is_evidence.unsqueeze(2)
    table = tables.weights[int(has_draft)]
    table.index_add_(0, contexts.flatten(), counts.flatten(0, 1))
    table.mul_((MOST_REMEMBERED / table.sum(dim=1, keepdim=True)).clamp(max=1.0))


def components_of(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
    """Return the component with the largest share in each of some nodes `[B, n]`, which are counted from 1."""
    assert tree.shares is not None
    return tree.shares.argmax(dim=2).gather(1, (nodes - 1).clamp(min=0))


def accepted_by_source(by_component: Sequence[int]) -> dict[str, int]:
    """Add up counts of accepted tokens by the names of the sources."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, count in zip(COMPONENTS, by_component, strict=True):
        counts[name] += count
    return counts


def prior_weights() -> torch.Tensor:
    """Return the expected counts before anything was seen, `[2, NUM_CONTEXTS, S + 1]`."""
    alone = torch.zeros(8, 3, NUM_DEPTHS, len(COMPONENTS) + 1)
    for component, shares in enumerate(PRIOR_SHARES):
        alone[..., component] = torch.tensor(shares).T.unsqueeze(2) / 100
    beside = alone * (1 - torch.tensor(DRAFT_SHARES).view(-1, 1, 1, 1) / 100)
    beside[..., COMPONENTS.index("draft")] = 1 - beside.sum(dim=-1)
    weights = torch.stack([alone, beside]).flatten(1, 3)
    weights[..., -1] = 1 - weights.sum(dim=-1)
    return weights * PRIOR_STRENGTH
