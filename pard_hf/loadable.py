"""Whether a live model comes back as it is when it is saved and loaded: the weights its class makes of its config.

Knows names and shapes; knows nothing of drafts. What the class does not have (an adapter, a parametrization) would be
left unread, and what it has and the model lacks (a layer taken out) would be made up at random.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

logger = logging.getLogger(__name__)


def check_loadable(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` where weights are others than those of the class and config that would load them.

    Args:
        model ([`PreTrainedModel`]):
            The model; one that is quantized is left to its quantizer.
        weights (`Mapping[str, torch.Tensor]`):
            Its state dict, of whole tensors or of empty ones, as they are where weights are sharded.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    made = made_of_config(model)
    if made is None:
        return
    own = made.state_dict()
    tied = set(getattr(made, "all_tied_weights_keys", None) or ())
    foreign = [
        name
        for name, tensor in weights.items()
        if name not in own or (tensor.numel() and tensor.shape != own[name].shape)
    ]
    missing = [name for name in own if name not in weights and name not in tied]
    if foreign or missing:
        raise ValueError(
            f"Expected the weights of `{type(made).__name__}` as its config has them, got "
            + " and ".join(
                f"{len(names)} {what} (`{'`, `'.join(names[:3])}`{', …' * (len(names) > 3)})"
                for names, what in ((foreign, "that are not among them"), (missing, "missing"))
                if names
            )
            + ": saved and loaded again it would be another draft. Merge adapters first (`merge_and_unload()` of "
            "peft), take parametrizations off, and let the config say how many layers and rows there are."
        )


def made_of_config(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model as loading its config makes it, without memory for weights; `None` where it cannot be made so."""
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    own = type(model)
    loading = next((one for one in classes if issubclass(own, one)), own)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            return loading(copy.deepcopy(model.config))
    except Exception as error:  # Code of the Hub may compute with its weights while it is made.
        logger.info("%s cannot be made without weights, so what is saved is not compared: %s", loading.__name__, error)
        return None
