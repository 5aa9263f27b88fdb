"""The loss of a batch of kept rows: one forward of the draft, one of the target where it is asked.

Knows models and batches; the formulas are those of `losses.py`, and the steps the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..host import input_device
from ..language_model_head import head_of
from .losses import Correction, confidence_weights, gold_logprobs, row_losses
from .row_attention import row_mask, text_mask

OBJECTIVES = ("ce", "kd", "cat")


@dataclass
class Objective:
    """What is minimised over kept rows.

    Args:
        name (`str`, *optional*, defaults to `"ce"`):
            `"ce"`: cross-entropy (PARD); `"kd"`: with the target's distribution as a teacher; `"cat"`: as `"kd"`, each
            row weighted by the chance that a block gets that far (PARD-2, target-independent).
        cross_entropy_weight (`float`, *optional*) and divergence_weight (`float`, *optional*):
            The mix; by default 1 and 0 for `"ce"`, else PARD-2's 0.1 and 1.
        temperature (`float`, *optional*, defaults to 1):
            Of both distributions in the divergence.
        target ([`PreTrainedModel`], *optional*):
            The teacher, of the draft's tokenizer; run beside the draft, never trained.

    Raises:
        ValueError: The name is unknown, a target is missing, a weight is negative or the temperature not positive.
    """

    name: str = "ce"
    cross_entropy_weight: float | None = None
    divergence_weight: float | None = None
    temperature: float = 1.0
    target: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"Expected the objective to be one of {', '.join(OBJECTIVES)}, got {self.name!r}.")
        if self.name != "ce" and self.target is None:
            raise ValueError(f"Expected a target for the objective {self.name!r}, got none. Name the target model.")
        if self.temperature <= 0:
            raise ValueError(f"Expected a temperature above 0, got {self.temperature}.")
        defaults = (1.0, 0.0) if self.name == "ce" else (0.1, 1.0)
        given = (self.cross_entropy_weight, self.divergence_weight)
        self.weights = tuple(d if g is None else float(g) for d, g in zip(defaults, given, strict=True))
        if min(self.weights) < 0 or max(self.weights) == 0:
            raise ValueError(f"Expected weights of at least 0, one of them positive, got {self.weights}.")
        if self.name == "ce" and self.weights[1]:
            raise ValueError("Expected no divergence weight for the objective 'ce', which has no teacher. Take 'kd'.")

    def __call__(
        self, draft: PreTrainedModel, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a collated batch: a weighted sum over labels, divided by their number.

        The number, not the weights' sum: so batches that are accumulated, or spread over devices, add up to what one
        large batch gives.

        Args:
            num_items (`int` or `torch.Tensor`, *optional*):
                Labels of the whole step, where a step is several batches; those of this batch by default.
        """
        is_label = batch["labels"] != -100
        hidden = draft.base_model(
            input_ids=batch["input_ids"],
            attention_mask=row_mask(draft, batch["anchors"], batch["depths"], batch["starts"]),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        teacher = self.teacher(batch, is_label) if self.target is not None and self.name != "ce" else {}
        sizes = [model.config.get_text_config().vocab_size for model in (draft, self.target) if model is not None]
        losses = row_losses(
            head_of(draft), hidden[is_label], batch["labels"][is_label], max(sizes), temperature=self.temperature,
            correction=correction_of(draft, batch, is_label), **teacher,
        )  # fmt: skip
        total = self.weights[0] * losses.cross_entropy + self.weights[1] * losses.divergence
        head = getattr(draft, "correction_head", None)
        if head is not None and not is_label.any():  # Even then its gradient is zero, not missing.
            total = total + 0.0 * sum(parameter.sum() for parameter in head.parameters())
        return total / (is_label.sum().clamp(min=1) if num_items is None else num_items)

    @torch.no_grad()
    def teacher(self, batch: dict[str, Any], is_label: torch.Tensor) -> dict[str, Any]:
        """What the target says of each labelled row, and for `"cat"` how much the row counts."""
        assert self.target is not None
        hidden, ids = self.target_hidden(batch)
        batch_size, longest = ids.shape
        places = (batch["anchors"] + batch["depths"]).clamp(min=0, max=longest - 1)
        places = places + torch.arange(batch_size, device=places.device).unsqueeze(1) * longest
        device, head = hidden.device, head_of(self.target)
        found = {
            "target_head": head,
            "target_hidden": hidden.flatten(0, 1),
            "target_places": places[is_label].to(device),
        }
        if self.name == "kd":
            return found
        vocab_size = self.target.config.get_text_config().vocab_size
        said = gold_logprobs(head, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), vocab_size)
        logprobs = torch.nn.functional.pad(said.view(batch_size, longest - 1), (1, 0)).to(is_label.device)
        return {**found, "weights": confidence_weights(logprobs, batch["anchors"], batch["depths"])[is_label]}

    def target_hidden(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's last hidden states over the real tokens of a batch, `[B, longest, H]`, and the tokens' ids."""
        assert self.target is not None
        is_text = (batch["depths"] == 0) & (batch["anchors"] >= 0)
        longest = int(is_text.sum(-1).max())  # Real tokens stand first, in order.
        is_text, anchors, starts, positions, ids = (
            values[:, :longest].to(input_device(self.target))
            for values in (is_text, batch["anchors"], batch["starts"], batch["position_ids"], batch["input_ids"])
        )
        # Where texts are fewer, mask rows stand in these columns: padding, out of everyone's sight.
        ids, anchors = ids.masked_fill(~is_text, 0), anchors.masked_fill(~is_text, -1)
        hidden = self.target.base_model(
            input_ids=ids,
            attention_mask=text_mask(self.target, anchors, starts),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return hidden, ids


def correction_of(draft: Any, batch: dict[str, Any], is_label: torch.Tensor) -> Correction | None:
    """What the draft's correction head adds to labelled rows, given the gold token before the one each predicts."""
    head = getattr(draft, "correction_head", None)
    if head is None:
        return None
    places = (batch["anchors"] + batch["depths"]).clamp(min=0, max=is_label.shape[1] - 1)
    previous = batch["input_ids"].gather(1, places)[is_label]  # Real tokens stand first, in order.
    # At depth 0 the draft has read the token before.
    is_corrected = (batch["depths"] > 0)[is_label].unsqueeze(1)
    return lambda hidden, rows: head(hidden, previous[rows]) * is_corrected[rows]
