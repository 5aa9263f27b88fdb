"""What a finished decoder hands back, in the shapes of plain `generate`."""

from __future__ import annotations

from typing import Any

import torch

from .request import DecodingRequest
from .role import Role
from .rows import Rows


def sequences_of(rows: Rows, request: DecodingRequest) -> torch.Tensor:
    """Prompt columns and what followed, `[B, num_columns + num_new]`; finished rows filled with `pad_token_id`."""
    counts = rows.lengths - rows.num_prompt_tokens
    columns = torch.arange(int(counts.max()), device=counts.device)
    index = rows.num_prompt_tokens.unsqueeze(1) + columns
    # A long row that ended early has columns of padding beyond its buffer.
    new = rows.tokens.gather(1, index.clamp(max=rows.tokens.shape[1] - 1))
    if request.pad_token_id is not None:
        new = torch.where(columns < counts.unsqueeze(1), new, request.pad_token_id)
    return torch.cat([request.input_ids, new], dim=1)


def on_path(values: torch.Tensor, nodes: torch.Tensor | None) -> torch.Tensor:
    """Of values `[B, N + 1, V]` at a tree's nodes, those at the root and on the accepted path, `[B, K + 1, V]`."""
    if nodes is None:
        return values
    rows = torch.nn.functional.pad(nodes, (1, 0)).unsqueeze(2)
    return values.gather(1, rows.expand(-1, -1, values.shape[2]))


class Recording:
    """The scores and raw logits of every round, for callers who ask for them."""

    def __init__(self) -> None:
        self.rounds: list[tuple[tuple[torch.Tensor, torch.Tensor], list[int]]] = []
        self.counts: list[list[int]] = []

    def add(self, scores: torch.Tensor, logits: torch.Tensor, row_ids: list[int]) -> None:
        """Keep a round's `[b, num_drafts + 1, V]` scores and logits of the rows `row_ids`."""
        self.rounds.append(((scores, logits), row_ids))

    def settle(self, counts: list[int]) -> None:
        """Say how many columns of each row counted, for the oldest round of which that was not known."""
        if len(self.counts) < len(self.rounds):
            self.counts.append(counts)

    def columns(self, which: int, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Scores (0) or raw logits (1) as plain `generate` gives them: one `[B, V]` a new column.

        Columns after a row's end are zeros.
        """
        filled = [0] * batch_size
        for (_, row_ids), counts in zip(self.rounds, self.counts, strict=True):
            for row, count in zip(row_ids, counts, strict=True):
                filled[row] += count
        first = self.rounds[0][0][which]
        merged = first.new_zeros(batch_size, max(filled), first.shape[-1])
        filled = [0] * batch_size
        for (tensors, row_ids), counts in zip(self.rounds, self.counts, strict=True):
            for source, (row, count) in enumerate(zip(row_ids, counts, strict=True)):
                merged[row, filled[row] : filled[row] + count] = tensors[which][source, :count]
                filled[row] += count
        return tuple(merged.unbind(1))


def extend_past(
    target: Role,
    rows: Rows,
    positions: torch.Tensor,
    sequences: torch.Tensor,
    num_columns: int,
    fewest_said: int,
    cache: Any,
) -> None:
    """Append to `cache` what plain `generate` would leave there: every column but the last new one.

    Args:
        positions (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            Logical positions of the prompt's columns, and of those before it; negative for padding.
        sequences (`torch.LongTensor`):
            As [`sequences_of`] gives them, of which the first `num_columns` are the prompt's.
        fewest_said (`int`):
            New tokens of the row that ended first, its last one included.
    """
    counts = rows.lengths - rows.num_prompt_tokens
    first, last = fewest_said - 1, int(counts.max()) - 1
    columns = torch.arange(last, device=counts.device)
    new = (rows.offset + rows.num_prompt_tokens).unsqueeze(1) + columns
    if first < last:  # Rows that ended early have not read their last token, nor the padding after it.
        ids = sequences[:, num_columns + first : num_columns + last]
        target.forward(new[:, first:], int(new.max()) + 1, 1, input_ids=ids)
    target.cache.append_to(cache, torch.cat([positions, new], dim=1)[:, cache.get_seq_length() :])
