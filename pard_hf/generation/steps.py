"""The three parts of a round as functions of tensors: draft, verify, accept.

Each has fixed shapes for a given batch size, K, tree and cache size, changes its buffers in place and never asks the
device for a value, so that it can run as it stands or compiled (`compilation.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..draft.correction_head import CorrectedPositions
from ..draft.model import best
from .batch import Role, Rows
from .sampling import count_emitted, verify_greedy, verify_sample_and_match
from .schedule import Choice
from .tree import Tree, ancestors, best_prefixes, choose_at_nodes, tree_of_marginals, walk


class Proposals(NamedTuple):
    """What a draft proposes in a round.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, num_proposals)`):
            In the order of the target's rows: a chain, or the nodes of a tree.
        num_depths (`int`):
            K, the longest path among them.
        scores (`torch.FloatTensor` of shape `(batch_size, K, vocab_size)`, *optional*):
            Of a chain: the logits that its tokens were chosen from.
        tree ([`Tree`], *optional*) and on_path (`torch.BoolTensor` of shape `(batch_size, N + 1, N + 1)`, *optional*):
            Of a tree: how its nodes hang together, and who lies on whose path.
    """

    tokens: torch.Tensor
    num_depths: int
    scores: torch.Tensor | None = None
    tree: Tree | None = None
    on_path: torch.Tensor | None = None

    @property
    def choice(self) -> Choice:
        """K and N of the round."""
        return Choice(self.num_depths, 0 if self.tree is None else self.tokens.shape[1])


def draft_step(
    draft: Role, rows: Rows, width: int, num_drafts: int, num_visible: int, vocab_size: int, tree_size: int = 0
) -> Proposals:
    """One draft forward over each row's last `width` tokens and `num_drafts - 1` masks, and the best of what it says.

    Proposals are a chain of `num_drafts` tokens, or the `tree_size` most probable prefixes.
    """
    scores, hidden = score_step(draft, rows, width, num_drafts, num_visible, vocab_size)
    return proposals_from(draft.model, scores, hidden, tree_size, rows.tokens.device)


def proposals_from(
    draft: Any, scores: torch.Tensor, hidden: torch.Tensor | None, tree_size: int, device: torch.device
) -> Proposals:
    """The best that logits `[B, K, vocab_size]` of a draft, and its correction head, say; on `device`."""
    num_drafts = scores.shape[1]
    if tree_size == 0:
        tokens, scores = draft.chain(scores, hidden, best)
        return Proposals(tokens.to(device), num_drafts, scores.to(device))
    if hidden is None or draft.correction_head is None:
        tree = tree_of_marginals(scores, tree_size)
    else:
        places = CorrectedPositions(draft.correction_head, hidden, scores)
        tree = best_prefixes(places.candidates, places.logprobs, tree_size)
    tree = Tree(*(values.to(device) for values in tree))
    return Proposals(tree.tokens, num_drafts, tree=tree, on_path=ancestors(tree, num_drafts))


def score_step(
    draft: Role, rows: Rows, width: int, num_drafts: int, num_visible: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The draft forward alone: logits `[B, num_drafts, vocab_size]`, and hidden states where a head asks for them."""
    model = draft.model
    ids, index = rows.last(width, num_drafts - 1)
    masks = ids.new_full((len(ids), num_drafts - 1), model.mask_token_id)
    logits, hidden = draft.places(index, num_visible, num_drafts, model.readable(torch.cat([ids, masks], dim=1)))
    return model.proposal_scores(logits, vocab_size), hidden


def target_step(target: Role, rows: Rows, proposals: Proposals, width: int, num_visible: int) -> torch.Tensor:
    """One target forward over each row's last `width` tokens and the proposals.

    Returns:
        Logits `[B, num_proposals + 1, V]`, float32.
    """
    num_proposals, tree = proposals.tokens.shape[1], proposals.tree
    ids, index = rows.last(width, num_proposals if tree is None else 0)
    if tree is not None:
        index = torch.cat([index, index[:, -1:] + tree.depths], dim=1)
    logits = target.forward(
        rows.positions(index),
        num_visible,
        num_proposals + 1,
        None if proposals.on_path is None else proposals.on_path.to(target.device),
        input_ids=torch.cat([ids, proposals.tokens], dim=1),
    )
    return logits.to(rows.tokens.device, torch.float32)


def accept_step(
    target: Role,
    rows: Rows,
    proposals: Proposals,
    scores: torch.Tensor,
    eos_token_id: torch.Tensor | None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Verify greedily, or by sample-and-match where there is `noise`, then append and finish rows.

    Returns:
        The outcome as [`append_step`] has it, and of a tree the accepted node of each depth, `[B, K]`.
    """
    if proposals.tree is not None and proposals.on_path is not None:
        choices = choose_at_nodes(proposals.tree, scores, noise)
        tokens, path = walk(proposals.tree, proposals.on_path, choices, proposals.num_depths)
        keep_step(target, rows, path.nodes)
        return append_step(rows, tokens, path.num_matched, eos_token_id), path.nodes
    if noise is None:
        tokens, num_matched = verify_greedy(proposals.tokens, scores)
    else:
        tokens, num_matched = verify_sample_and_match(proposals.tokens, scores, noise)
    return append_step(rows, tokens, num_matched, eos_token_id), None


def keep_step(target: Role, rows: Rows, nodes: torch.Tensor) -> None:
    """Put keys and values of the accepted nodes, `[B, K]`, where their tokens stand in the text."""
    roots = rows.positions(rows.lengths.unsqueeze(1) - 1).squeeze(1)
    target.cache.keep_path(roots.to(target.device), nodes.to(target.device))


def append_step(
    rows: Rows, tokens: torch.Tensor, num_matched: torch.Tensor, eos_token_id: torch.Tensor | None
) -> torch.Tensor:
    """Append what was accepted and finish rows that end.

    Returns:
        The outcome `[B, 2 + K + 1]`, all the host wants to know: tokens emitted, whether the row is finished, and the
        tokens, of which those beyond the emitted are void.
    """
    num_emitted, is_finished = count_emitted(tokens, num_matched, rows.remaining(), eos_token_id)
    rows.append(tokens, num_emitted)
    rows.is_finished.logical_or_(is_finished)
    return torch.cat([num_emitted.unsqueeze(1), rows.is_finished.long().unsqueeze(1), tokens], dim=1)
