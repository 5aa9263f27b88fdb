"""Find the most probable prefixes under the draft, as a tree that one target forward verifies.

A chain bets the whole round on one guess for each position; a tree spends the same target queries on the most probable
continuations. The root is the last known token; nodes are counted from 1, and a node's parent always comes before it.
As in https://huggingface.co/papers/2604.12989 (DDTree), with conditional probabilities where a correction head gives
them. All functions are pure functions of tensors. Shapes: B rows, K depths, N nodes, V tokens, C candidates a depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .sampling import sample_with_noise

# In place of log 0: sums of it stay finite, and no deeper prefix is better than a shorter one.
LOG_ZERO = -1e9

# Log-probabilities of a depth's candidates after each of some tokens: from the depth and parent tokens `[B, F]`
# (`None` at depth 0) to `[B, F, C]`, or `[B, 1, C]` where the parent makes no difference.
Logprobs = Callable[[int, torch.Tensor | None], torch.Tensor]


class Candidates(NamedTuple):
    """What may follow the nodes of a depth, each field `[B, F, C]`, or `[B, 1, C]` where all have the same.

    A void candidate has the token -1, or no probability; the others of a node differ.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    shares: torch.Tensor | None = None  # `[B, F, C, S]`, of each component of a mixture in the probability.
    contexts: torch.Tensor | None = None  # `[B, F]`, of the mixture's weights.


# From a depth, the nodes there `[B, F]` and their parents as indices of the nodes before (`None` at the root).
Expand = Callable[[int, torch.Tensor | None, torch.Tensor | None], Candidates]


class Tree(NamedTuple):
    """The proposals of a round, each field `[B, N]`; the most probable nodes first."""

    tokens: torch.Tensor  # -1 where there was no candidate left: no choice of the target equals it.
    parents: torch.Tensor  # 0 for the root, `i + 1` for the node in column `i`; always an earlier column.
    depths: torch.Tensor  # Steps from the root, from 1.
    logprobs: torch.Tensor  # Of the path to each node.
    shares: torch.Tensor | None = None  # `[B, N, S]`, as in [`Candidates`].
    contexts: torch.Tensor | None = None


class Path(NamedTuple):
    """The path of a tree that the target accepts."""

    nodes: torch.Tensor  # `[B, K]`, the node of each depth from 1, void beyond `num_matched`.
    num_matched: torch.Tensor  # `[B]`, the depth of the last accepted node.


def grow_tree(expand: Expand, num_depths: int, num_nodes: int, width: int | None = None) -> Tree:
    """Find the `num_nodes` most probable prefixes, or all where fewer exist.

    Exact: a prefix is never more probable than its own beginning, so the best of a depth grow from the best of the
    depth before. Ties go to the shorter prefix. With a `width` only so many grow at each depth: 1 makes a chain.
    """
    levels: list[tuple[torch.Tensor, ...]] = []
    pool: list[Candidates] = []
    tokens, parents, scores, num_before, num_candidates = None, None, None, 0, 0
    for depth in range(num_depths):
        candidates = expand(depth, tokens, parents)
        steps = candidates.logprobs.float().nan_to_num(nan=LOG_ZERO, neginf=LOG_ZERO).clamp(max=0)
        totals = (steps if scores is None else scores.unsqueeze(2) + steps).flatten(1)
        scores, index = totals.topk(min(width or num_nodes, totals.shape[1]), dim=-1)
        parents = torch.div(index, steps.shape[2], rounding_mode="floor")
        tokens = candidates.tokens.flatten(1).gather(1, index % candidates.tokens[0].numel())
        # Parents counted through all levels, and candidates; the root comes first.
        levels.append(
            (scores, tokens, parents + num_before, torch.full_like(index, depth + 1), index + num_candidates)
        )
        num_before = 1 + sum(level[0].shape[1] for level in levels[:-1])
        num_candidates += totals.shape[1]
        pool.append(candidates)
    scores, tokens, parents, depths, index = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    # Stable: equally probable prefixes stay in the order of their lengths, so no node comes before its parent.
    scores, order = (values[:, :num_nodes] for values in scores.sort(dim=-1, descending=True, stable=True))
    rank = torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
    ranks = pad(torch.zeros_like(depths).scatter(1, order, rank), (1, 0))
    tokens, parents, depths, index = (values.gather(1, order) for values in (tokens, parents, depths, index))
    return Tree(tokens.long(), ranks.gather(1, parents), depths, scores, *mixture_of(pool, index))


def mixture_of(pool: list[Candidates], index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return shares and contexts of the candidates `index` `[B, N]`, counted through all depths, if they have any."""
    shares = [candidates.shares.flatten(1, 2) for candidates in pool if candidates.shares is not None]
    contexts = [
        candidates.contexts.unsqueeze(2).expand_as(candidates.tokens).flatten(1)
        for candidates in pool
        if candidates.contexts is not None
    ]
    if not shares:
        return ()
    rows = index.unsqueeze(2).expand(-1, -1, shares[0].shape[2])
    return torch.cat(shares, dim=1).gather(1, rows), torch.cat(contexts, dim=1).gather(1, index)


def best_prefixes(candidates: torch.Tensor, logprobs: Logprobs, num_nodes: int) -> Tree:
    """Find the most probable prefixes of distinct candidate tokens `[B, K, C]`, the same for all nodes of a depth.

    Over marginals the best `num_nodes` tokens of each depth are candidates enough.
    """

    def expand(depth: int, tokens: torch.Tensor | None, parents: torch.Tensor | None) -> Candidates:
        return Candidates(candidates[:, depth : depth + 1], logprobs(depth, tokens))

    return grow_tree(expand, candidates.shape[1], num_nodes)


def tree_of_marginals(scores: torch.Tensor, num_nodes: int) -> Tree:
    """Find the most probable prefixes under draft logits `[B, K, V]` whose positions are independent of each other."""
    best, candidates = scores.float().log_softmax(dim=-1).topk(min(num_nodes, scores.shape[-1]), dim=-1)
    return best_prefixes(candidates, lambda depth, parents: best[:, depth : depth + 1], num_nodes)


def chain_as_tree(tokens: torch.Tensor) -> Tree:
    """Make a tree of width one of proposals `[B, K]`, each the parent of the next."""
    parents = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Tree(tokens, parents, parents + 1, torch.zeros_like(tokens, dtype=torch.float32))


def ancestors(tree: Tree, num_depths: int) -> torch.Tensor:
    """Mark ancestors: `[B, N + 1, N + 1]`, true where the column's node lies on the path to the row's, or is it."""
    parents = pad(tree.parents, (1, 0))  # The root is its own.
    nodes = torch.arange(parents.shape[1], device=parents.device)
    reached = (nodes == nodes.unsqueeze(1)) | (nodes == parents.unsqueeze(2))
    for _ in range((num_depths - 1).bit_length()):  # Paths twice as long each time.
        reached = torch.bmm(reached.float(), reached.float()) > 0
    return reached


def choose_at_nodes(tree: Tree, scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Choose the target's own token after the root and each node, `[B, N + 1]`, from its scores `[B, N + 1, V]`.

    Nodes of one depth share its unit exponential noise `[B, K + 1, V]`, so whichever path is accepted, each position
    has the noise that plain `generate` would draw for it. Without noise the choice is greedy.
    """
    if noise is None:
        return scores.argmax(dim=-1)
    depths = pad(tree.depths, (1, 0))
    return sample_with_noise(scores, noise.gather(1, depths.unsqueeze(2).expand(-1, -1, noise.shape[2])))


def walk(tree: Tree, on_path: torch.Tensor, choices: torch.Tensor, num_depths: int) -> tuple[torch.Tensor, Path]:
    """Follow the target's own `choices` `[B, N + 1]` from the root as far as the tree has them.

    `on_path` is as [`ancestors`] returns it. Returns tokens `[B, K + 1]` as every `verify_*` does, and the path.
    """
    is_wrong = tree.tokens != choices.gather(1, tree.parents)
    # Siblings differ, so what is right all the way from the root is a single path.
    is_accepted = ~(on_path[:, 1:, 1:] & is_wrong.unsqueeze(1)).any(dim=-1)
    depths = torch.arange(1, num_depths + 1, device=choices.device)
    at_depth = is_accepted.unsqueeze(1) & (tree.depths.unsqueeze(1) == depths.unsqueeze(1))
    nodes = at_depth.long().argmax(dim=-1) + 1
    tokens = choices.gather(1, pad(nodes, (1, 0)))
    return tokens, Path(nodes, is_accepted.sum(dim=-1))


def child_with(tree: Tree, nodes: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the child of each row's node `[B]` that holds the row's token `[B]`, and whether there is one."""
    if tree.tokens.shape[1] == 0:
        return nodes, torch.zeros_like(nodes, dtype=torch.bool)
    is_child = (tree.parents == nodes.unsqueeze(1)) & (tree.tokens == tokens.unsqueeze(1))
    return is_child.long().argmax(dim=-1) + 1, is_child.any(dim=-1)
