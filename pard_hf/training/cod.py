"""Conditional drop-token: which (anchor, depth) rows are trained, and who may attend to whom.

Pure functions of tensors; knows no model and no text. A row `(a, d)` reads the real tokens up to anchor `a` and then
`d` mask tokens of its own chain; it sits at position `a + d` and predicts token `a + d + 1`. Depth 0 is ordinary
next-token prediction. A mask row can only be computed with its whole chain `(a, 1) … (a, d)`, so dropping is
conditional: an anchor kept at depth `d` was kept at depth `d - 1`. Only kept rows are ever built.

Method: https://huggingface.co/papers/2504.18583, COnditional Drop-token (COD).
"""

from __future__ import annotations

import torch


def keep_rows(
    is_label: torch.Tensor,
    num_draft_tokens: int,
    retention_rate: float,
    min_retention_rate: float,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the rows of one sequence.

    Args:
        is_label (`torch.BoolTensor` of shape `(length,)`):
            Whether token `i` is to be learned; entry 0 is ignored, for nothing precedes it.
        num_draft_tokens (`int`):
            K_train: depths 0 … K_train - 1 are built.
        retention_rate (`float`) and min_retention_rate (`float`):
            Depth `d` keeps `max(r ** d, r_min)` of the rows that have something to predict there.

    Returns:
        Anchors and depths, `torch.LongTensor` of shape `(num_rows,)` each: first every real token in order (depth 0;
        also those without a label, which others read), then depth by depth the kept mask rows.
    """
    length = len(is_label)
    anchors, depths = [torch.arange(length)], [torch.zeros(length, dtype=torch.long)]
    # A chain starts where the first proposal would be learned, and goes on while every token it predicts is.
    chain = torch.arange(length - 1)[is_label[1:]]
    chain = chain[torch.randperm(len(chain), generator=generator)]
    for depth in range(1, num_draft_tokens):
        chain = chain[chain + depth + 1 < length]
        chain = chain[is_label[chain + depth + 1]]
        whole = int(is_label[depth + 1 :].sum())
        share = max(retention_rate**depth, min_retention_rate)
        chain = chain[: round(whole * share)]
        anchors.append(chain.sort().values)
        depths.append(torch.full((len(chain),), depth))
    return torch.cat(anchors), torch.cat(depths)


def build_rows(
    input_ids: torch.Tensor, is_label: torch.Tensor, anchors: torch.Tensor, depths: torch.Tensor, mask_token_id: int
) -> dict[str, torch.Tensor]:
    """Write out what each row reads, where it sits and what it predicts.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`) and is_label (`torch.BoolTensor` of shape `(length,)`):
            The sequence and which of its tokens are to be learned.
        anchors, depths (`torch.LongTensor` of shape `(num_rows,)`):
            As `keep_rows` returns them.

    Returns:
        `input_ids`, `position_ids` and `labels`, each of shape `(num_rows,)`; a label stands at the row that predicts
        it (no shift to come), -100 where there is none.
    """
    positions = anchors + depths
    following = positions + 1
    has_label = following < len(input_ids)
    following = following.clamp(max=len(input_ids) - 1)
    has_label &= is_label[following]
    return {
        "input_ids": torch.where(depths == 0, input_ids[anchors], mask_token_id),
        "position_ids": positions,
        "labels": torch.where(has_label, input_ids[following], -100),
    }


def attention_mask(
    anchors: torch.Tensor,
    depths: torch.Tensor,
    starts: torch.Tensor | None = None,
    rows: slice = slice(None),
) -> torch.Tensor:
    """Who attends to whom: real tokens of the own text up to the own anchor, and the own chain up to the own depth.

    Args:
        anchors, depths (`torch.LongTensor` of shape `(..., num_rows)`):
            A padding row has anchor -1; it attends to padding only, and nothing else attends to it.
        starts (`torch.LongTensor` of shape `(..., num_rows)`, *optional*):
            Anchor of the first token of each row's text, where several texts are packed into one sequence; 0
            everywhere by default.
        rows (`slice`, *optional*):
            Some of the rows, where the whole mask is too large to be there at once.

    Returns:
        `torch.BoolTensor` of shape `(..., num_rows, num_rows)`, True = the row attends to the column.
    """
    starts = torch.zeros_like(anchors) if starts is None else starts
    row_anchor, row_depth, row_start = (t[..., rows].unsqueeze(-1) for t in (anchors, depths, starts))
    return attends(row_anchor, row_depth, row_start, anchors.unsqueeze(-2), depths.unsqueeze(-2))


def attends(
    row_anchor: torch.Tensor,
    row_depth: torch.Tensor,
    row_start: torch.Tensor,
    anchor: torch.Tensor,
    depth: torch.Tensor,
) -> torch.Tensor:
    """The rule itself, for any shapes that broadcast: may a row see the row `(anchor, depth)`?

    Anchors count through a packed sequence, so one text's real tokens lie between its start and the row's anchor.
    """
    reads_text = (depth == 0) & (anchor <= row_anchor) & (anchor >= row_start)
    reads_chain = (anchor == row_anchor) & (depth <= row_depth)
    return (reads_text | reads_chain) & ((anchor < 0) == (row_anchor < 0))
