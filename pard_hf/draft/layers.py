"""A draft's base model made of some of a target's own layers, for families without a small model.

Related: Kangaroo (https://huggingface.co/papers/2404.18911) and S2D (https://huggingface.co/papers/2407.01955).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def base_from_layers(target: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Copy a causal LM with some of its decoder layers; embedding, norm and LM head are the target's.

    Args:
        target ([`PreTrainedModel`]):
            The model to take from; it stays as it is.
        layers (`int` or list of `int`):
            How many of the first layers, or which ones, in their order.

    Raises:
        ValueError: There are no such layers, or the target's layers differ from each other.
    """
    path, stack = decoder_layers(target)
    chosen = check_layers(layers, len(stack))
    shapes = [{name: weight.shape for name, weight in layer.named_parameters()} for layer in stack]
    if len({type(layer) for layer in stack}) > 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"Expected layers that are alike, got several kinds in `{type(target).__name__}`. Take a small model of "
            "its family as the base."
        )
    base = AutoModelForCausalLM.from_config(with_layers(target.config, chosen), dtype=target.dtype)
    base.load_state_dict(taken_weights(target.state_dict(), path, chosen))
    base.generation_config = copy.deepcopy(target.generation_config)
    return base


def check_layers(layers: int | Sequence[int], number: int) -> list[int]:
    """Return the indices of chosen layers; raise a `ValueError` unless a target of so many layers has them."""
    chosen = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not chosen or not all(0 <= index < number for index in chosen):
        raise ValueError(f"Expected layers from 0 to {number - 1} of the target, got {layers}.")
    return chosen


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a causal LM's decoder layers."""
    number = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return path, module
    raise ValueError(
        f"Expected a list of {number} decoder layers in `{type(model).__name__}`, got none. Take a small model of its "
        "family as the base."
    )


def with_layers(config: Any, chosen: Sequence[int]) -> Any:
    """Copy a config for the chosen layers; a list with an entry for each layer keeps theirs."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    number = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == number:
            setattr(text, name, [value[index] for index in chosen])
    text.num_hidden_layers = len(chosen)
    return config


def taken_weights(weights: dict[str, Any], path: str, chosen: Sequence[int]) -> dict[str, Any]:
    """Rename the weights of the chosen layers and drop those of the others."""
    numbers = {str(old): new for new, old in enumerate(chosen)}
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    taken = {}
    for name, weight in weights.items():
        match = pattern.match(name)
        if match is None:
            taken[name] = weight
        elif match[1] in numbers:
            taken[f"{path}.{numbers[match[1]]}.{name[match.end() :]}"] = weight
    return taken
