"""Conditional drop-token (COD): which (anchor, depth) training rows are kept, and which of them they attend to.

A training row `(a, d)` reads the real tokens up to anchor `a` and `d` mask tokens of its own chain, has position
`a + d` and predicts token `a + d + 1`; depth 0 is next-token prediction. Row `(a, d)` needs its whole chain
`(a, 1) … (a, d)`, so dropping is conditional: an anchor kept at depth `d` was kept at depth `d - 1`. Only kept rows
are ever built. Method: PARD, https://huggingface.co/papers/2504.18583.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def keep_rows(
    is_label: torch.Tensor,
    num_draft_tokens: int,
    retention_rate: float,
    min_retention_rate: float,
    generator: torch.Generator | None = None,
    max_anchors: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the training rows of one text: depths 0 … K_train - 1, `max(r ** d, r_min)` of the labels at depth d.

    `is_label` `[length]` tells which tokens are learned; entry 0 is ignored, since no token precedes it. With
    `max_anchors` at most so many anchors have mask rows, which bounds the rows of a long text.

    Returns:
        Anchors and depths, `[num_rows]` each: every real token in order (depth 0, with or without a label, since
        others attend to it), then the kept mask rows depth by depth.
    """
    length = len(is_label)
    anchors, depths = [torch.arange(length)], [torch.zeros(length, dtype=torch.long)]
    # A chain starts where the first proposal is learned, and ends at the first token that is not.
    chain = torch.arange(length - 1)[is_label[1:]]
    chain = chain[torch.randperm(len(chain), generator=generator)]
    for depth in range(1, num_draft_tokens):
        chain = chain[chain + depth + 1 < length]
        chain = chain[is_label[chain + depth + 1]]
        num_all = int(is_label[depth + 1 :].sum())
        chain = chain[: round(num_all * max(retention_rate**depth, min_retention_rate))][:max_anchors]
        anchors.append(chain.sort().values)
        depths.append(torch.full((len(chain),), depth))
    return torch.cat(anchors), torch.cat(depths)


def build_rows(
    input_ids: torch.Tensor, is_label: torch.Tensor, anchors: torch.Tensor, depths: torch.Tensor, mask_token_id: int
) -> dict[str, torch.Tensor]:
    """Build `input_ids`, `position_ids` and `labels` `[num_rows]` of the training rows of one text.

    A label belongs to the row that predicts it (no shift to come) and is -100 where there is none.
    """
    positions = anchors + depths
    labels = torch.nn.functional.pad(torch.where(is_label, input_ids, -100)[1:], (0, 1), value=-100)
    return {
        "input_ids": torch.where(depths == 0, input_ids[anchors], mask_token_id),
        "position_ids": positions,
        "labels": labels[positions],
    }


def attention_mask(
    anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor | None = None, rows: slice = slice(None)
) -> torch.Tensor:
    """Compute which training rows attend to which, `[..., rows, num_rows]`; `True` = the row attends to the column.

    `anchors`, `depths` and `starts` are `[..., num_rows]`; `starts` holds the anchor of the first token of each row's
    text, 0 by default. A padding row has anchor -1: it attends to padding only, and only padding attends to it.
    `rows` limits the mask to some rows, since the whole one may be too large.
    """
    starts = torch.zeros_like(anchors) if starts is None else starts
    row = [values[..., rows].unsqueeze(-1) for values in (anchors, depths, starts)]
    return attends(row, anchors.unsqueeze(-2), depths.unsqueeze(-2))


def attends(row: Sequence[torch.Tensor], anchor: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Return whether a row (anchor, depth, start) attends to `(anchor, depth)`: its text up to its anchor, its chain.

    Anchors count through a packed sequence, so the real tokens of a row's text lie between its start and its anchor.
    """
    row_anchor, row_depth, row_start = row
    reads_text = (depth == 0) & (anchor <= row_anchor) & (anchor >= row_start)
    reads_chain = (anchor == row_anchor) & (depth <= row_depth)
    return (reads_text | reads_chain) & ((anchor < 0) == (row_anchor < 0))
