"""Run the steps of a round as functions of tensors: draft, verify, accept.

Shapes are fixed by batch size, K, tree and cache size; buffers change in place and no value is read on the host, so a
step runs eagerly or compiled (`compilation.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..draft.correction_head import CorrectedPositions, CorrectionHead, Depth
from ..draft.model import best
from .batch import CachedModel, Rows
from .sampling import count_emitted, verify_greedy, verify_sample_and_match
from .sources import NUM_DRAFT_CANDIDATES, DraftCandidates, Mixture, Sources, components_of, find_matches, learn
from .tree import (
    Level,
    Tree,
    ancestors,
    best_of_depth,
    best_of_levels,
    best_prefixes,
    choose_at_nodes,
    tree_of_marginals,
    walk,
)


class Proposals(NamedTuple):
    """Draft tokens `[B, num_proposals]` of a round, in the order in which the target reads them.

    Either a chain, with the logits `scores` `[B, K, V]` that its tokens were chosen from, or a tree, with a mask
    `on_path` `[B, N + 1, N + 1]`: of root and nodes, which others lie on the path to each.
    """

    tokens: torch.Tensor
    scores: torch.Tensor | None = None
    tree: Tree | None = None
    on_path: torch.Tensor | None = None

    def depths(self) -> torch.Tensor:
        """Return the steps from the last known token, `[B or 1, num_proposals]`."""
        if self.tree is not None:
            return self.tree.depths
        return torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device).unsqueeze(0)


def draft_step(
    draft: CachedModel,
    rows: Rows,
    width: int,
    num_drafts: int,
    num_visible: int | None,
    vocab_size: int,
    tree_size: int,
) -> Proposals:
    """Run the draft once over each row's last `width` tokens and `num_drafts - 1` masks; propose its best tokens."""
    scores, hidden = score_step(draft, rows, width, num_drafts, num_visible, vocab_size)
    return proposals_from(draft.model, scores, hidden, tree_size, rows.tokens.device)


def lookup_step(
    rows: Rows,
    sources: Sources,
    num_depths: int,
    tree_size: int,
    head: CorrectionHead | None = None,
    scores: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    grow: Callable[..., Level] | None = None,
) -> Proposals:
    """Propose the `tree_size` most probable prefixes under all sources, `num_depths` tokens deep.

    One of them is a draft where there are its logits `scores` `[B, num_drafts, vocab_size]`. `grow` is `grow_depth`
    compiled; it is given depths as tensors, so that it is compiled once for all.
    """
    matches = find_matches(sources.references, rows.tokens, rows.lengths, num_depths, sources.longest_match)
    with torch.autocast(rows.tokens.device.type, enabled=False):  # Which would round probabilities and tokens.
        draft = None if scores is None else draft_candidates(head, scores, hidden, rows.tokens.device)
        mixture = Mixture(sources.tables, matches, rows.known_last(2), draft)
        depths: Any = range(num_depths) if grow is None else mixture.depths.split(1)
        width = tree_size if sources.branches else 1
        levels = [grow_depth(mixture, 0, None, width)]
        for depth in depths[1:]:
            mixture.follow(depth, levels[-1].tokens, levels[-1].parents)
            levels.append((grow or grow_depth)(mixture, depth, levels[-1].scores, width))
        tree = best_of_levels(levels, tree_size)
    return Proposals(tree.tokens.clamp(min=0), tree=tree, on_path=ancestors(tree, num_depths))


def draft_candidates(
    head: CorrectionHead | None, scores: torch.Tensor, hidden: torch.Tensor | None, device: torch.device
) -> DraftCandidates:
    corrected = None if head is None or hidden is None else CorrectedPositions(head, hidden, scores)
    return DraftCandidates(scores, min(NUM_DRAFT_CANDIDATES, scores.shape[2]), corrected, device)


def grow_depth(mixture: Mixture, depth: Depth, scores: torch.Tensor | None, num_nodes: int) -> Level:
    """Choose the most probable prefixes of a depth; `scores` are those of the nodes that they follow."""
    return best_of_depth(mixture.candidates(depth), scores, num_nodes)


def score_step(
    draft: CachedModel, rows: Rows, width: int, num_drafts: int, num_visible: int | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the draft alone: logits `[B, num_drafts, vocab_size]`, and hidden states for a correction head."""
    model = draft.model
    ids, index = rows.last(width, num_drafts - 1)
    masks = ids.new_full((len(ids), num_drafts - 1), model.mask_token_id)
    input_ids = model.readable(torch.cat([ids, masks], dim=1))
    logits, hidden = draft.draft(index, num_visible, num_drafts, input_ids)
    return model.proposal_scores(logits, vocab_size), hidden


def proposals_from(
    draft: Any, scores: torch.Tensor, hidden: torch.Tensor | None, tree_size: int, device: torch.device
) -> Proposals:
    """Choose proposals from logits `[B, K, vocab_size]`: the best chain, or the `tree_size` most probable prefixes."""
    if tree_size == 0:
        tokens, scores = draft.chain(scores, hidden, best)
        return Proposals(tokens.to(device), scores.to(device))
    if hidden is None or draft.correction_head is None:
        tree = tree_of_marginals(scores, tree_size)
    else:
        corrected = CorrectedPositions(draft.correction_head, hidden, scores)
        tree = best_prefixes(corrected.candidates, corrected.logprobs, tree_size)
    tree = Tree(*(values.to(device) for values in tree[:4]))
    return Proposals(tree.tokens, tree=tree, on_path=ancestors(tree, scores.shape[1]))


def target_step(
    target: CachedModel, rows: Rows, proposals: Proposals, width: int, num_visible: int | None
) -> torch.Tensor:
    """Run the target once over each row's last `width` tokens and the proposals.

    Returns:
        Logits `[B, num_proposals + 1, V]`, float32.
    """
    ids, index = rows.last(width)
    index = torch.cat([index, index[:, -1:] + proposals.depths()], dim=1)
    input_ids = torch.cat([ids, proposals.tokens], dim=1)
    num_logits = proposals.tokens.shape[1] + 1
    logits = target.forward(rows.positions(index), num_visible, num_logits, proposals.on_path, input_ids=input_ids)
    return logits.to(rows.tokens.device, torch.float32)


def accept_step(
    target: CachedModel,
    rows: Rows,
    proposals: Proposals,
    num_depths: int,
    scores: torch.Tensor,
    eos_token_id: torch.Tensor | None,
    noise: torch.Tensor | None,
    sources: Sources | None = None,
    verify: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Verify proposals as [`verify_step`], or `verify`, which is that compiled; keep the accepted path of a tree."""
    last = rows.lengths - 1  # Before anything is appended.
    outcome, nodes = (verify or verify_step)(rows, proposals, num_depths, scores, eos_token_id, noise, sources)
    if nodes is not None:
        keep_step(target, rows, last, nodes)
    return outcome, nodes


def verify_step(
    rows: Rows,
    proposals: Proposals,
    num_depths: int,
    scores: torch.Tensor,
    eos_token_id: torch.Tensor | None,
    noise: torch.Tensor | None,
    sources: Sources | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Verify greedily, or by sample-and-match where there is `noise`; append what was accepted and finish rows.

    Returns:
        The outcome as [`append_step`] returns it, and of a tree the accepted node of each depth, `[B, num_depths]`.
        With `sources` the outcome ends with the component that gave each of these nodes.
    """
    nodes = None
    if proposals.tree is not None and proposals.on_path is not None:
        choices = choose_at_nodes(proposals.tree, scores, noise)
        tokens, (nodes, num_matched) = walk(proposals.tree, proposals.on_path, choices, num_depths)
    elif noise is None:
        tokens, num_matched = verify_greedy(proposals.tokens, scores)
    else:
        tokens, num_matched = verify_sample_and_match(proposals.tokens, scores, noise)
    if sources is not None:
        remember_step(sources, rows, proposals.tree, scores, nodes, num_matched)
    outcome = append_step(rows, tokens, num_matched, eos_token_id)
    if proposals.tree is not None and nodes is not None and proposals.tree.shares is not None:
        outcome = torch.cat([outcome, components_of(proposals.tree, nodes)], dim=1)
    return outcome, nodes


def remember_step(
    sources: Sources,
    rows: Rows,
    tree: Tree | None,
    scores: torch.Tensor,
    nodes: torch.Tensor | None,
    num_matched: torch.Tensor,
) -> None:
    """Remember what the target found likeliest after each node, and which components gave what it chose.

    Comes before [`append_step`]. `nodes` and `num_matched` are the path that was accepted. Rows that have finished
    would say the same again and again.
    """
    before = rows.known_last(2)
    previous, tokens = before.split(1, dim=1)
    if tree is not None:
        tokens = torch.cat([tokens, tree.tokens], dim=1)
        previous = torch.cat([previous, tokens.gather(1, tree.parents)], dim=1)
    if sources.learns_successors:
        sources.tables.observe(previous, tokens.masked_fill(rows.is_finished.unsqueeze(1), -1), scores)
    if tree is not None and nodes is not None:
        learn(sources.tables, tree, nodes, num_matched.masked_fill(rows.is_finished, -1), sources.has_draft)


def keep_step(target: CachedModel, rows: Rows, last: torch.Tensor, nodes: torch.Tensor) -> None:
    """Move keys and values of the accepted nodes `[B, K]` to their positions, those after the index `last` `[B]`."""
    roots = rows.positions(last.unsqueeze(1)).squeeze(1)
    target.cache.keep_path(roots.to(target.device), nodes.to(target.device))


def append_step(
    rows: Rows, tokens: torch.Tensor, num_matched: torch.Tensor, eos_token_id: torch.Tensor | None
) -> torch.Tensor:
    """Append what was accepted, cut where plain `generate` would stop, and finish rows.

    Returns:
        The outcome `[B, 2 + K + 1]`, all that is copied to the host: tokens emitted, whether the row is finished, and
        the tokens, of which those beyond the emitted are void.
    """
    num_emitted, is_finished = count_emitted(tokens, num_matched, rows.remaining(), eos_token_id)
    rows.append(tokens, num_emitted)
    rows.is_finished.logical_or_(is_finished)
    return torch.cat([num_emitted.unsqueeze(1), rows.is_finished.long().unsqueeze(1), tokens], dim=1)
