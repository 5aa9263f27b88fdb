"""The three parts of a round as functions of tensors: draft, verify, accept.

Each has fixed shapes for a given batch size, K and cache size, changes its buffers in place and never asks the device
for a value, so that it can run as it stands or compiled (`compilation.py`).
"""

from __future__ import annotations

import torch

from .role import Role
from .rows import Rows
from .verification import count_emitted, verify_greedy, verify_sample_and_match


def draft_step(
    draft: Role, rows: Rows, width: int, num_drafts: int, num_visible: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One draft forward over each row's last `width` tokens and `num_drafts - 1` masks.

    Returns:
        Proposals `[B, num_drafts]` and the logits `[B, num_drafts, vocab_size]` they are the best of.
    """
    model = draft.model
    ids, index = rows.last(width, num_drafts - 1)
    masks = ids.new_full((len(ids), num_drafts - 1), model.mask_token_id)
    logits = draft.forward(index, num_visible, num_drafts, input_ids=model.readable(torch.cat([ids, masks], dim=1)))
    scores = model.proposal_scores(logits, vocab_size).to(rows.tokens.device)
    return scores.argmax(dim=-1), scores


def target_step(target: Role, rows: Rows, draft_tokens: torch.Tensor, width: int, num_visible: int) -> torch.Tensor:
    """One target forward over each row's last `width` tokens and the proposals.

    Returns:
        Logits `[B, num_drafts + 1, V]`, float32.
    """
    num_drafts = draft_tokens.shape[1]
    ids, index = rows.last(width, num_drafts)
    logits = target.forward(
        rows.positions(index), num_visible, num_drafts + 1, input_ids=torch.cat([ids, draft_tokens], dim=1)
    )
    return logits.to(rows.tokens.device, torch.float32)


def accept_step(
    rows: Rows,
    draft_tokens: torch.Tensor,
    scores: torch.Tensor,
    eos_token_id: torch.Tensor | None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Verify greedily, or by sample-and-match where there is `noise`, then append and finish rows.

    Returns:
        As [`append_step`].
    """
    if noise is None:
        tokens, num_matched = verify_greedy(draft_tokens, scores)
    else:
        tokens, num_matched = verify_sample_and_match(draft_tokens, scores, noise)
    return append_step(rows, tokens, num_matched, eos_token_id)


def append_step(
    rows: Rows, tokens: torch.Tensor, num_matched: torch.Tensor, eos_token_id: torch.Tensor | None
) -> torch.Tensor:
    """Append what was accepted and finish rows that end.

    Returns:
        The outcome `[B, 2 + num_drafts + 1]`, all the host wants to know: tokens emitted, whether the row is finished,
        and the tokens, of which those beyond the emitted are void.
    """
    num_emitted, is_finished = count_emitted(tokens, num_matched, rows.remaining(), eos_token_id)
    rows.append(tokens, num_emitted)
    rows.is_finished.logical_or_(is_finished)
    return torch.cat([num_emitted.unsqueeze(1), rows.is_finished.long().unsqueeze(1), tokens], dim=1)
