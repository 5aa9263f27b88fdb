"""One of the two models with the cache it decodes over."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..host import cache_argument, forward_parameters, input_device
from ..positions import num_positions
from .cache import SlotCache


class Role:
    """One of the two models with its cache: token ids and positions in, logits out."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        self.model = model
        self.cache = cache
        self.device = input_device(model)
        self.cache_name = cache_argument(model)
        self.takes_num_logits = "logits_to_keep" in forward_parameters(model)
        self.last_position = num_positions(model.config) - 1
        self.is_eager_attention = model.config._attn_implementation == "eager"

    def forward(
        self,
        positions: torch.Tensor,
        num_visible: int,
        num_logits: int,
        on_path: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Run `input_ids` or `inputs_embeds` at `positions` `[B, q]`; returns the last `num_logits` rows of logits.

        With `on_path` the last columns are nodes of a tree; see [`SlotCache.place`].
        """
        arguments = self.arguments(positions, num_visible, on_path, inputs)
        if self.takes_num_logits:
            arguments["logits_to_keep"] = num_logits
        logits = self.model(**arguments).logits
        self.cache.slots.flat_rows = None  # Compiled code would keep it as a result.
        return logits[:, -num_logits:]

    def places(
        self, positions: torch.Tensor, num_visible: int, num_places: int, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of a draft: logits of the last `num_places` rows, and their hidden states where a head asks for them."""
        model: Any = self.model
        found = model.places(num_places, **self.arguments(positions, num_visible, None, {"input_ids": input_ids}))
        self.cache.slots.flat_rows = None
        return found

    def arguments(
        self, positions: torch.Tensor, num_visible: int, on_path: torch.Tensor | None, inputs: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What a forward over the cache takes."""
        positions = positions.to(self.device)
        mask = self.cache.place(positions, num_visible, on_path)
        if self.is_eager_attention:
            mask = as_additive(mask, self.model.dtype)
        return {
            **{name: tensor.to(self.device) for name, tensor in inputs.items()},
            "attention_mask": mask,
            # Slots past the end of a row are written but never accepted; a learned position table ends before them.
            "position_ids": positions.clamp(min=0, max=self.last_position),
            self.cache_name: self.cache,
            "use_cache": True,
        }


def as_additive(mask: Any, dtype: torch.dtype) -> Any:
    """Turn a boolean mask, or a dict of them, into the additive form eager attention takes."""
    if isinstance(mask, dict):
        return {name: as_additive(part, dtype) for name, part in mask.items()}
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
