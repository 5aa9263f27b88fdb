"""Attention of a few queries over a long cache, without a copy of the cache for every group of heads.

With a mask, transformers repeats keys and values for each query head before it attends: at 8 k tokens and 4 query
heads to a key-value head it writes four caches a layer and round. Queries of one group can as well stand side by side
as rows of one head. Knows nothing of decoding.

It stands behind the name `sdpa`, and models keep that name: some compare it and attend by code of their own then, and
those are left alone, for they never look the function up. Outside [`grouped_attention`] it is the function that was
there before.

Linear layers over a few rows on a CPU, without a copy of the weights.

For 2 to 32 rows in float32, `torch.nn.functional.linear` packs the whole weight anew at every call and takes two to
three times as long as for one row; the same product with the weight on the left streams it once. Measured on a
(5632, 2048) weight, 2 threads, AVX2, milliseconds: 1 row 2.2; 4 rows 6.7 against 2.4; 9 rows 7.9 against 4.7.
Knows nothing of decoding; models run it while [`streamed_linear`] lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Beyond this many rows a head the repeated mask costs more than the copy saves; a tree of 64 and its root are fewer.
MOST_QUERIES = 72
ungrouped_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
# Whether this thread is inside `grouped_attention`.
state = threading.local()


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` of transformers: `query` `[B, heads, q, dim]` over `[B, kv_heads, k, dim]`.

    Returns `[B, q, heads, dim]`, and `None` for the weights.
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    group = num_heads // key.shape[1]
    is_special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    has_shared_mask = attention_mask is not None and attention_mask.shape[1] == 1
    is_grouped = getattr(state, "is_grouped", False) and group > 1 and num_queries <= MOST_QUERIES
    if not is_grouped or is_special or not has_shared_mask or attention_mask is None:
        return ungrouped_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
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


AttentionInterface.register("sdpa", grouped_sdpa)


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Let what this thread runs inside attend by groups of heads."""
    before = getattr(state, "is_grouped", False)
    state.is_grouped = True
    try:
        yield
    finally:
        state.is_grouped = before


MOST_ROWS = 32
# Smaller weights stay in the processor's caches, and every call of torch would pay for being looked at.
FEWEST_PARAMETERS = 50_000_000


class StreamedLinear(TorchFunctionMode):
    """Computes `linear` over few rows with the weight on the left; everything else is as it was.

    Quantized weights are subclasses of a tensor with a product of their own, and keep it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            rows, weight, *bias = args
            num_rows = rows.numel() // rows.shape[-1]
            is_plain = type(rows) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
            if is_plain and 1 < num_rows <= MOST_ROWS and rows.dtype == weight.dtype == torch.float32:
                product = torch.mm(weight, rows.reshape(num_rows, -1).t()).t()
                if bias and bias[0] is not None:
                    product = product + bias[0]
                return product.reshape(*rows.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def is_worth(model: PreTrainedModel) -> bool:
    """Whether a model's weights are large, in float32 and on a CPU."""
    return model.device.type == "cpu" and model.dtype == torch.float32 and model.num_parameters() >= FEWEST_PARAMETERS


@contextmanager
def streamed_linear(*models: PreTrainedModel) -> Iterator[None]:
    """Let models whose weights are worth it multiply few rows this way, in this thread."""
    if not any(map(is_worth, models)):
        yield
        return
    with StreamedLinear():
        yield
