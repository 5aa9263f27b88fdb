"""One call of `generate()` by a visitor's settings."""

from __future__ import annotations

from typing import Any

import torch

from pard_hf.loading import Pair

from .settings import Settings
from .visitor import Visitor


def generate(
    pair: Pair, ids: list[int], settings: Settings, visitor: Visitor | None, is_ours: bool = True, **arguments: Any
) -> Any:
    """Return what our `generate()`, or the plain one, gives for token ids, seeded; `arguments` go to the call.

    With `visitor` lookup remembers the target's habits from earlier calls.
    """
    torch.manual_seed(settings.seed)
    inputs = torch.tensor([ids], device=pair.target.device)
    if is_ours:
        memory = visitor.memory_of(pair.target) if visitor is not None and settings.looks_up else None
        arguments |= settings.proposing(pair.draft, memory)
    return pair.target.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        **settings.arguments(),
        **arguments,
        return_dict_in_generate=True,
    )
