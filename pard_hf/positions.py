"""How many positions a model has, and the cache that lets go of some again."""

from __future__ import annotations

import sys

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def croppable_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache from which the host may take back any number of entries.

    Sliding layers forget what lies before their window, and the stock loop takes back more than was proposed; keeping
    every entry costs memory and changes no mask.
    """
    cache = DynamicCache(config=config)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return DynamicCache()
    return cache


def num_positions(config: PreTrainedConfig) -> int:
    """Positions a model was made for; without bound for the few configs that name none, or a number below 1."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else sys.maxsize


def check_num_assistant_tokens(num_assistant_tokens: int, *configs: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless K is a positive integer that fits the positions of every model."""
    if isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1:
        raise ValueError(
            f"Expected `num_assistant_tokens` to be an integer of at least 1, got {num_assistant_tokens!r}."
        )
    for config in configs:
        positions = num_positions(config)
        if num_assistant_tokens >= positions:
            raise ValueError(
                f"Expected `num_assistant_tokens` below the {positions} positions of `{type(config).__name__}`, got "
                f"{num_assistant_tokens}. Common values are 4 to 16."
            )
