"""Attention of a few queries over a long cache, without a copy of the cache for every group of heads.

With a mask, the host repeats keys and values for each query head before it attends: at 8 k tokens and 4 query heads to
a key-value head it writes four caches a layer and round. Queries of one group can as well stand side by side as rows
of one head. Knows nothing of decoding; models run it while [`packed_attention`] lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_packed"
# Beyond this many rows a head the repeated mask costs more than the copy saves; a tree of 64 and its root are fewer.
MOST_QUERIES = 72


def sdpa_packed_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As the host's `sdpa`: `query` `[B, heads, q, dim]` over `[B, kv_heads, k, dim]`, to `[B, q, heads, dim]`."""
    batch_size, num_heads, num_queries, head_dim = query.shape
    group = num_heads // key.shape[1]
    is_special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if group == 1 or is_special or num_queries > MOST_QUERIES or attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], group * num_queries, head_dim),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, group, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    output = output.reshape(batch_size, num_heads, num_queries, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, sdpa_packed_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


# Calls under way on each model: the first begins to pack, the last ends it.
num_calls: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
lock = Lock()


@contextmanager
def packed_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Let models that attend by `sdpa` do so packed; whatever else runs on them meanwhile gets the same results."""
    packed = [model for model in models if model.config._attn_implementation in ("sdpa", NAME)]
    count(packed, 1)
    try:
        yield
    finally:
        count(packed, -1)


def count(models: list[PreTrainedModel], change: int) -> None:
    """Count a call in or out."""
    with lock:
        for model in models:
            num_calls[model] = num_calls.get(model, 0) + change
            model.config._attn_implementation = NAME if num_calls[model] else "sdpa"
