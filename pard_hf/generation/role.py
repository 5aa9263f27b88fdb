"""One of the two models with the cache it decodes over."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft_model import num_positions
from .cache import SlotCache


class Role:
    """One of the two models with its cache: token ids and positions in, logits out."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        self.model = model
        self.cache = cache
        self.last_position = num_positions(model.config) - 1
        self.is_eager_attention = model.config._attn_implementation == "eager"

    def forward(
        self, positions: torch.Tensor, num_visible: int, num_logits: int, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Run `input_ids` or `inputs_embeds` at `positions` `[B, q]`; returns the last `num_logits` rows of logits."""
        positions = positions.to(self.model.device)
        mask = self.cache.place(positions, num_visible)
        if self.is_eager_attention:
            mask = as_additive(mask, self.model.dtype)
        output = self.model(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            attention_mask=mask,
            # Slots past the end of a row are written but never accepted; a learned position table ends before them.
            position_ids=positions.clamp(min=0, max=self.last_position),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        self.cache.slots.flat_rows = None  # Compiled code would keep it as a result.
        return output.logits[:, -num_logits:]


def as_additive(mask: Any, dtype: torch.dtype) -> Any:
    """Turn a boolean mask, or a dict of them, into the additive form eager attention takes."""
    if isinstance(mask, dict):
        return {name: as_additive(part, dtype) for name, part in mask.items()}
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
