"""Compute attention and linear layers for the few queries of a round.

Grouped attention: with a mask, transformers repeats keys and values for each query head before it attends; at 8 k
tokens and 4 query heads to a key-value head it writes four caches a layer and round. The queries of a group stand side
by side as queries of one head instead. It is installed under the name `sdpa`, which models keep: some compare it and
attend by code of their own, and those never look the function up. Outside [`grouped_attention`] it is the function
that was there before.

Streamed linear layers: for 2 to 64 vectors in float32 on a CPU, `torch.nn.functional.linear` packs the whole weight
anew at every call and takes two to three times as long as for one vector; the same product with the weight on the left
streams it once. Measured on a (5632, 2048) weight, 2 threads, AVX2, milliseconds: 1 vector 2.2; 4 vectors 6.7 against
2.4; 9 vectors 7.9 against 4.7.
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

# Beyond this many queries the repeated mask costs more than the copy saves; a tree of 64 and its root are fewer.
MAX_QUERIES = 72
MAX_VECTORS = 64
# Smaller weights stay in the processor's caches, and checking every call of torch has a cost. A draft of 42 M, most of
# them its LM head: 3 vectors 48 ms against 19, 9 the same.
MIN_PARAMETERS = 20_000_000

ungrouped_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
# `is_grouped` while this thread is inside `grouped_attention`.
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
    is_grouped = getattr(state, "is_grouped", False) and group > 1 and num_queries <= MAX_QUERIES
    if not is_grouped or is_special or attention_mask is None or attention_mask.shape[1] != 1:
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
    """Group the attention of models that this thread runs inside."""
    before = getattr(state, "is_grouped", False)
    state.is_grouped = True
    try:
        yield
    finally:
        state.is_grouped = before


class StreamedLinear(TorchFunctionMode):
    """Compute `linear` over few vectors with the weight on the left.

    Quantized weights are subclasses of a tensor with a product of their own, and keep it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            vectors, weight, *bias = args
            num_vectors = vectors.numel() // vectors.shape[-1]
            is_plain = type(vectors) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
            if is_plain and 1 < num_vectors <= MAX_VECTORS and vectors.dtype == weight.dtype == torch.float32:
                # Rows of their own again: what follows, attention above all, is slow on columns.
                product = torch.mm(weight, vectors.reshape(num_vectors, -1).t()).t().contiguous()
                if bias and bias[0] is not None:
                    product = product + bias[0]
                return product.reshape(*vectors.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def can_stream(model: PreTrainedModel) -> bool:
    """Return whether streaming pays in forwards of a model: it is large, in float32 and on a CPU.

    In forwards only: the mode costs every function of torch a few microseconds.
    """
    is_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    return is_cpu and model.num_parameters() >= MIN_PARAMETERS
