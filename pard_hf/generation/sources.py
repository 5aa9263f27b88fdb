"""Propose without a draft: copy from the text, and remember the target's own likeliest next tokens.

Copying continues earlier positions of the text whose last tokens are those of the row (prompt lookup,
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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..draft.correction_head import CorrectedPositions
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
NUM_CONTEXTS = 8 * 3 * NUM_DEPTHS
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
    """

    tables: Tables
    references: torch.Tensor
    longest_match: int
    learns_successors: bool
    has_draft: bool


def encode_references(texts: Sequence[Any], tokenizer: Any) -> torch.Tensor:
    """Encode texts to copy from, strings or token ids, as `[1, R]` ids, -1 after each text.

    Raises:
        ValueError: There is a string and no tokenizer, or something else than a list of texts.
    """
    ids: list[int] = [-1]
    if isinstance(texts, str):
        raise ValueError(
            "Expected `assistant_reference_texts` to be a list of texts, got one string. Put it in a list."
        )
    for text in texts:
        if not isinstance(text, str):
            if (given := torch.as_tensor(text)).dim() != 1:
                raise ValueError(
                    "Expected each text in `assistant_reference_texts` to be a string or a list of token ids, got "
                    f"{given.dim()} dimensions. Pass one list of ids a text."
                )
            ids += [*given.tolist(), -1]
        elif tokenizer is not None:
            ids += [*tokenizer.encode(text, add_special_tokens=False), -1]
        else:
            raise ValueError(
                "Expected `tokenizer` with `assistant_reference_texts` that are strings, got none. Pass `tokenizer=`, "
                "or token ids."
            )
    return torch.tensor([ids])


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
    matched, is_match = torch.zeros_like(text), columns < end
    for k in range(longest):
        is_match = is_match & (pad(text[:, : width - k], (k, 0), value=-1) == suffix[:, k : k + 1])
        matched = matched + is_match
    rank, ends = (matched * width + columns).topk(min(NUM_MATCHES, width), dim=1)
    lengths = rank // width
    following = ends.unsqueeze(2) + torch.arange(1, num_depths + 1, device=text.device)
    is_known = (following <= end.unsqueeze(2)) & (lengths > 0).unsqueeze(2)
    copied = text.gather(1, following.clamp(max=width - 1).flatten(1)).view_as(following)
    return Matches(torch.where(is_known, copied, -1), lengths)


@dataclass(eq=False)
class Tables:
    """What is remembered of a target; changed in place, so that compiled steps find it where it was.

    Of each token, and of each pair of tokens that a slot holds, the target's likeliest next tokens, -1 for none, and
    their probabilities. The last row of each takes what is to be dropped. `weights` are the expected counts of each
    component in each context, and of none of them.
    """

    after_one: torch.Tensor  # `[V + 1, NUM_SUCCESSORS]`
    after_one_probs: torch.Tensor
    pairs: torch.Tensor  # `[NUM_PAIRS + 1]`
    after_two: torch.Tensor  # `[NUM_PAIRS + 1, NUM_SUCCESSORS]`
    after_two_probs: torch.Tensor
    weights: torch.Tensor  # `[2, NUM_CONTEXTS, S + 1]`, without a draft and with one.

    @classmethod
    def empty(cls, vocab_size: int, device: torch.device) -> Tables:
        def nothing(num_rows: int) -> torch.Tensor:
            return torch.full((num_rows + 1, NUM_SUCCESSORS), -1, dtype=torch.int32, device=device)

        with torch.inference_mode(False):  # Later calls outside it write to them too.
            one, two = nothing(vocab_size), nothing(NUM_PAIRS)
            pairs = torch.full((NUM_PAIRS + 1,), -1, dtype=torch.long, device=device)
            return cls(
                one,
                torch.zeros_like(one, dtype=torch.float32),
                pairs,
                two,
                torch.zeros_like(two, dtype=torch.float32),
                prior_weights().to(device),
            )

    @property
    def vocab_size(self) -> int:
        return len(self.after_one) - 1

    def copy_(self, other: Tables) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))

    def to(self, device: torch.device) -> Tables:
        """Return these tables, or a copy where they are on another device."""
        if self.pairs.device == device:
            return self
        return Tables(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def clear(self) -> None:
        self.copy_(Tables.empty(self.vocab_size, self.pairs.device))

    def mixture_weights(self, has_draft: bool) -> torch.Tensor:
        """Return what each component is to be believed in each context, and none of them, `[NUM_CONTEXTS, S + 1]`."""
        weights = self.weights[int(has_draft)]
        return weights / weights.sum(dim=-1, keepdim=True)

    def key_of(self, previous: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys of pairs of tokens and the slots where they are kept; the last slot where one is unknown."""
        keys = previous * self.vocab_size + tokens
        slots = (previous * 1_000_003 + tokens * 7_919) % NUM_PAIRS
        return keys, torch.where((previous < 0) | (tokens < 0), NUM_PAIRS, slots)

    def successors(
        self, previous: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Look up what follows `[B, F]` tokens: tokens and probabilities `[B, F, NUM_SUCCESSORS]` after two and one.

        What is known is 0 for nothing, 1 for the last token, 2 for the last two.
        """
        keys, slots = self.key_of(previous, tokens)
        is_pair = ((self.pairs[slots] == keys) & (slots < NUM_PAIRS)).unsqueeze(2)
        row = torch.where(tokens < 0, self.vocab_size, tokens)
        one, two = self.after_one[row], torch.where(is_pair, self.after_two[slots], -1)
        known = torch.where(is_pair[..., 0], 2, (one[..., 0] >= 0).long())
        return (two.long(), self.after_two_probs[slots]), (one.long(), self.after_one_probs[row]), known

    def observe(self, previous: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Remember the likeliest next tokens after `[B, N]` tokens, of which -1 are none, from logits `[B, N, V]`."""
        likeliest, probs = likeliest_tokens(logits)
        # Of equal keys the first, which is the likelier node, is written last.
        previous, tokens, likeliest, probs = (
            values.flip(1).flatten(0, 1) for values in (previous, tokens, likeliest.int(), probs)
        )
        keys, slots = self.key_of(previous, tokens)
        row = torch.where(tokens < 0, self.vocab_size, tokens)
        width = likeliest.shape[1]
        for table, index, values in (
            (self.after_one[:, :width], row, likeliest),
            (self.after_one_probs[:, :width], row, probs),
            (self.after_two[:, :width], slots, likeliest),
            (self.after_two_probs[:, :width], slots, probs),
            (self.pairs, slots, keys),
        ):
            table.index_copy_(0, index, values)
        self.after_one[-1].fill_(-1)
        self.after_two[-1].fill_(-1)


def likeliest_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens of logits `[..., V]` and their probabilities, `NUM_SUCCESSORS` of each at most."""
    vocab_size = logits.shape[-1]
    if vocab_size <= LARGE_VOCABULARY:
        best, tokens = logits.topk(min(NUM_SUCCESSORS, vocab_size), dim=-1)
    else:  # The likeliest are in the blocks that have the likeliest of a block.
        num_blocks = vocab_size // BLOCK
        peaks = logits[..., : num_blocks * BLOCK].unflatten(-1, (num_blocks, BLOCK)).amax(dim=-1)
        blocks = peaks.topk(NUM_SUCCESSORS, dim=-1).indices.unsqueeze(-1) * BLOCK
        inside = (blocks + torch.arange(BLOCK, device=logits.device)).flatten(-2)
        rest = torch.arange(num_blocks * BLOCK, vocab_size, device=logits.device).expand(*inside.shape[:-1], -1)
        searched = torch.cat([inside, rest], dim=-1)
        best, index = logits.gather(-1, searched).topk(NUM_SUCCESSORS, dim=-1)
        tokens = searched.gather(-1, index)
    return tokens, (best - logits.logsumexp(dim=-1, keepdim=True)).exp().nan_to_num(0.0)


class DraftCandidates:
    """The draft's likeliest tokens of each depth, of logits `[B, K, V]`, corrected by its head where it has one."""

    def __init__(
        self, scores: torch.Tensor, num_candidates: int, corrected: CorrectedPositions | None, device: torch.device
    ):
        self.corrected, self.device = corrected, device
        if corrected is None:
            self.logprobs, self.candidates = scores.float().log_softmax(dim=-1).topk(num_candidates, dim=-1)
        else:
            self.candidates = corrected.candidates[:, :, :num_candidates]

    def __call__(self, depth: int, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a depth's tokens `[B, 1, C]` and their probabilities after each of `tokens`, `[B, F or 1, C]`."""
        if depth >= self.candidates.shape[1]:  # The draft does not see so far.
            nothing = torch.full_like(self.candidates[:, :1], -1, device=self.device)
            return nothing, torch.zeros_like(nothing, dtype=torch.float32)
        ids = self.candidates[:, depth : depth + 1]
        if self.corrected is None:
            logprobs = self.logprobs[:, depth : depth + 1]
        else:  # A void node has the token -1.
            previous = None if tokens is None else tokens.clamp(min=0).to(ids.device)
            logprobs = self.corrected.logprobs(depth, previous)[:, :, : ids.shape[2]]
        return ids.to(self.device), logprobs.to(self.device).exp().nan_to_num(0.0)


class Mixture:
    """The next tokens of the nodes of one round, depth by depth, under the mixture of all sources.

    `last_two` `[B, 2]` are each row's last tokens, -1 where there is none.
    """

    def __init__(self, tables: Tables, matches: Matches, last_two: torch.Tensor, draft: DraftCandidates | None = None):
        self.tables, self.matches, self.draft = tables, matches, draft
        self.weights = tables.mixture_weights(draft is not None)
        self.previous, self.tokens = last_two.split(1, dim=1)
        self.is_followed = (matches.lengths > 0).unsqueeze(1)

    def __call__(self, depth: int, tokens: torch.Tensor | None, parents: torch.Tensor | None) -> Candidates:
        """Return what may follow a depth's nodes `tokens` `[B, F]`; `parents` index the nodes of the depth before."""
        if tokens is not None and parents is not None:
            follows = self.matches.tokens[:, :, depth - 1].unsqueeze(1) == tokens.unsqueeze(2)
            index = parents.unsqueeze(2).expand(-1, -1, follows.shape[2])
            self.is_followed = self.is_followed.expand(-1, self.tokens.shape[1], -1).gather(1, index) & follows
            self.previous, self.tokens = self.tokens.gather(1, parents), tokens
        copied = torch.where(self.is_followed, self.matches.tokens[:, :, depth].unsqueeze(1), -1)
        lengths = torch.where(copied < 0, 0, self.matches.lengths.unsqueeze(1) + depth)
        votes = torch.where(copied < 0, 0.0, 2.0 ** lengths.clamp(max=LONGEST_VOTE))
        votes = votes / votes.sum(dim=2, keepdim=True).clamp(min=1.0)
        two, one, known = self.tables.successors(self.previous, self.tokens)
        parts = [(copied, votes), two, one]
        if self.draft is not None:
            ids, probs = self.draft(depth, tokens)
            parts.append((ids.expand(-1, copied.shape[1], -1), probs.expand(-1, copied.shape[1], -1)))
        contexts = context_of(lengths.amax(dim=2), known, 0 if self.draft is None else depth)
        return merged(parts, self.weights[contexts], contexts)


def context_of(lengths: torch.Tensor, known: torch.Tensor, depth: int) -> torch.Tensor:
    """Number the contexts of nodes: by matched `lengths`, by what of the last two tokens is `known`, and by depth."""
    matched = lengths.clamp(max=5) + (lengths >= 7) + (lengths >= 10)
    return (matched * 3 + known) * NUM_DEPTHS + sum(depth >= bound for bound in DEPTH_BOUNDS)


def merged(
    parts: list[tuple[torch.Tensor, torch.Tensor]], weights: torch.Tensor, contexts: torch.Tensor
) -> Candidates:
    """Merge the tokens and probabilities, `[B, F, C]` each, of some components under their `weights` `[B, F, S + 1]`.

    A token that several name is one candidate, the first, with all their shares.
    """
    tokens = torch.cat([ids for ids, _ in parts], dim=2)
    shares = []
    for component, (ids, probs) in enumerate(parts):
        is_same = tokens.unsqueeze(3) == ids.unsqueeze(2)
        given = probs * weights[..., component : component + 1]
        shares.append((is_same.to(given.dtype) @ given.unsqueeze(3)).squeeze(3))
    shares += [torch.zeros_like(shares[0])] * (len(COMPONENTS) - len(parts))
    columns = torch.arange(tokens.shape[2], device=tokens.device)
    is_earlier = columns < columns.unsqueeze(1)
    is_repeated = ((tokens.unsqueeze(3) == tokens.unsqueeze(2)) & is_earlier).any(dim=3)
    shares_BFCS = torch.stack(shares, dim=3)
    total = shares_BFCS.sum(dim=3)
    is_void = is_repeated | (tokens < 0) | (total <= 0)
    logprobs = total.clamp(min=1e-30).log().masked_fill(is_void, LOG_ZERO)
    contexts = contexts.unsqueeze(2).expand_as(tokens)
    return Candidates(tokens.masked_fill(is_void, -1), logprobs, shares_BFCS, contexts)


def learn(tables: Tables, tree: Tree, nodes: torch.Tensor, num_matched: torch.Tensor, has_draft: bool) -> None:
    """Count, in the context of each node on the accepted path, which components gave what the target chose.

    `nodes` `[B, K]` are the path's, `num_matched` `[B]` its length. One step of expectation and maximization: what was
    chosen counts for each component by its share; where the path ends, by the share that it had left for other tokens.
    """
    assert tree.shares is not None
    assert tree.contexts is not None
    weights = tables.mixture_weights(has_draft)
    batch_size, num_nodes = tree.tokens.shape
    parents = tree.parents.unsqueeze(2).expand(-1, -1, len(COMPONENTS))
    spent = tree.shares.new_zeros(batch_size, num_nodes + 1, len(COMPONENTS)).scatter_add(1, parents, tree.shares)
    contexts = tree.contexts.new_zeros(batch_size, num_nodes + 1).scatter(1, tree.parents, tree.contexts)
    offers = torch.zeros_like(contexts).scatter_add(1, tree.parents, (tree.tokens >= 0).long())

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
    weights = torch.ones(2, 8, 3, NUM_DEPTHS, len(COMPONENTS) + 1)
    weights[0, ..., 3] = 0
    weights[1, ..., 3] = 6
    weights[:, 0, ..., 0] = 0
    weights[:, :, 0, :, 1:3] = 0
    weights[:, :, 1, :, 1] = 0
    return (weights / weights.sum(dim=-1, keepdim=True) * PRIOR_STRENGTH).flatten(1, 3)
