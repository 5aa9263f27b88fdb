"""The mask of kept rows in the form that a model's attention takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..generation.cache import attention_windows
from .cod import attends, attention_mask

ATTENTIONS = ("sdpa", "eager", "flex_attention")
ROWS_AT_A_TIME = 1024


def row_mask(model: PreTrainedModel, anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor) -> Any:
    """Who sees whom, for `model` to take as its `attention_mask`.

    One additive mask in the model's dtype, made once and shared by all layers: a boolean one would be converted, and
    kept for the backward pass, in every layer. FlexAttention takes blocks instead, and no mask is ever written out.

    Args:
        anchors, depths, starts (`torch.LongTensor` of shape `(batch_size, num_rows)`):
            As the collator makes them.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, 1, num_rows, num_rows)`, or a `BlockMask`.
    """
    if model.config._attn_implementation == "flex_attention":
        return block_mask(anchors, depths, starts)
    return additive_mask(anchors, depths, starts, model.dtype)


def text_mask(model: PreTrainedModel, anchors: torch.Tensor, starts: torch.Tensor) -> torch.Tensor | None:
    """The mask of real tokens for a teacher; `None` where every example is one text, which causal attention serves.

    Padding stands on the right, where causal attention keeps it out of sight.

    Args:
        anchors, starts (`torch.LongTensor` of shape `(batch_size, longest)`):
            Of the real tokens.
    """
    if not bool(starts.any()):
        return None
    return additive_mask(anchors, torch.zeros_like(anchors), starts, model.dtype)


def additive_mask(
    anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """0 where a row sees, the lowest number where it does not; written some rows at a time, for it is large."""
    batch_size, num_rows = anchors.shape
    mask = torch.full((batch_size, 1, num_rows, num_rows), torch.finfo(dtype).min, dtype=dtype, device=anchors.device)
    for first in range(0, num_rows, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        mask[:, 0, rows].masked_fill_(attention_mask(anchors, depths, starts, rows), 0)
    return mask


def block_mask(anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor) -> Any:
    """The same rule for FlexAttention, which leaves out blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Any, head: Any, row: Any, column: Any) -> Any:
        a, d = anchors[batch], depths[batch]
        return attends(a[row], d[row], starts[batch][row], a[column], d[column])

    batch_size, num_rows = anchors.shape
    return create_block_mask(rule, batch_size, None, num_rows, num_rows, device=anchors.device)


def check_attention(
    model: PreTrainedModel, is_packed: bool = False, is_teacher: bool = False, device: torch.device | None = None
) -> None:
    """Raise a `ValueError` where a model's attention cannot be given a mask of rows, or would see past it.

    Args:
        device (`torch.device`, *optional*):
            Where it will be trained; where it is by default.
    """
    device = device or model.device
    name, attention = type(model).__name__, model.config._attn_implementation
    if is_teacher and not is_packed:
        return
    taken = ("sdpa", "eager") if is_teacher else ATTENTIONS
    if attention not in taken:
        raise ValueError(
            f"Expected attention that takes a mask of rows ({', '.join(taken)}), got `{attention}` in `{name}`. Load "
            "it with `attn_implementation='sdpa'`."
        )
    if attention == "flex_attention" and device.type == "cpu" and not is_teacher:
        raise ValueError("Expected a device whose FlexAttention has a backward pass, got a CPU. Take `sdpa`.")
    if any(window is not None for window in attention_windows(model.config)):
        raise ValueError(
            f"Expected full attention, got sliding-window layers in `{name}`: what a row may see would depend on the "
            + ("window. Train without packing." if is_teacher else "window. Train a base model without one.")
        )
