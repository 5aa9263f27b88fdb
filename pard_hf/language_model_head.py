"""From last hidden states to logits, apart from a model's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .host import input_device

Head = Callable[[torch.Tensor], torch.Tensor]


def head_of(model: PreTrainedModel, head: Head | None = None) -> Head:
    """From last hidden states to logits, as the model's own forward does it: its head, then what some families add.

    Gemma caps logits, Cohere multiplies and Granite divides them; `check_head` finds the family that does otherwise.
    With `head`, that one is taken instead of the model's.
    """
    config, head = model.config.get_text_config(), head or model.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden) if scale == 1.0 else head(hidden) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return logits_of


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise a `ValueError` where a model's logits are something else than its head's output as `head_of` knows it."""
    was_training = model.training
    ids = torch.tensor([[1, 2]], device=input_device(model))
    expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    got = head_of(model)(hidden).float()
    model.train(was_training)
    if not torch.allclose(got, expected, atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"Expected the logits of `{type(model).__name__}` to be its head's output, got others (largest difference "
            f"{(got - expected).abs().max():.3g}): its head cannot be run apart from the model. Take another base."
        )
