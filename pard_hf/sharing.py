"""Second models over the same weights."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel


def sharing_weights(model: PreTrainedModel, model_class: Any) -> Any:
    """A second model of the given class over the same tensors, with generation settings and parts of its own."""
    twin = model_class.__new__(model_class)
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model._modules)
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def without_head(draft: Any) -> Any:
    """The same draft without its correction head."""
    twin = sharing_weights(draft, type(draft))
    twin.correction_head = None
    return twin
