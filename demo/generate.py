"""One call of `generate()` by a visitor's settings."""

from __future__ import annotations

from typing import Any

import torch

from pard_hf.loading import Pair

from .settings import Settings


def generate(pair: Pair, ids: list[int], settings: Settings, uses_draft: bool = True, **arguments: Any) -> Any:
    """What `generate()` returns for token ids, seeded, with or without the draft; `arguments` go to the call."""
    torch.manual_seed(settings.seed)
    inputs = torch.tensor([ids], device=pair.target.device)
    if uses_draft:
        arguments |= {
            "assistant_model": pair.draft,
            "num_assistant_tokens": settings.num_assistant_tokens,
            "assistant_tree_size": settings.tree_size,
        }
    return pair.target.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        **settings.arguments(),
        **arguments,
        return_dict_in_generate=True,
    )
