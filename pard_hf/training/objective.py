"""The loss of a batch of training rows: one forward of the draft, and one of the target where it teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from ..draft.vocabulary import head_of
from ..generation.cache import attention_windows
from ..host import input_device
from .cod import attends, attention_mask
from .losses import (
    DIVERGENCES,
    Correction,
    TopLogprobs,
    confidence_weights,
    divergence,
    gold_logprobs,
    row_loss,
    stored_gold_logprobs,
)
from .settings import ObjectiveName, check_ranges, objective_weights

ATTENTIONS = ("sdpa", "eager", "flex_attention")
# Rows of an additive mask that are computed at once, since the boolean mask of all is large.
MASK_CHUNK_SIZE = 1024


def row_mask(model: PreTrainedModel, anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor) -> Any:
    """Make the `attention_mask` of training rows: `[B, 1, num_rows, num_rows]`, or a `BlockMask` for FlexAttention.

    An additive mask in the dtype of the computation is shared by all layers; each would convert another one, and keep
    it for the backward pass.
    """
    if model.config._attn_implementation == "flex_attention":
        return block_mask(anchors, depths, starts)
    return additive_mask(anchors, depths, starts, compute_dtype(model))


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that a model's attention computes in: autocast's where it is on."""
    is_cast = torch.is_autocast_enabled(model.device.type)
    return torch.get_autocast_dtype(model.device.type) if is_cast else model.dtype


def additive_mask(
    anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Make a mask of 0 where a row attends and the lowest value elsewhere, `MASK_CHUNK_SIZE` rows at a time."""
    batch_size, num_rows = anchors.shape
    mask = torch.full((batch_size, 1, num_rows, num_rows), torch.finfo(dtype).min, dtype=dtype, device=anchors.device)
    for first in range(0, num_rows, MASK_CHUNK_SIZE):
        rows = slice(first, first + MASK_CHUNK_SIZE)
        mask[:, 0, rows].masked_fill_(attention_mask(anchors, depths, starts, rows), 0)
    return mask


def block_mask(anchors: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor) -> Any:
    """Make the same mask for FlexAttention, which skips blocks without an attended column."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Any, head: Any, row: Any, column: Any) -> Any:
        own = [values[batch][row] for values in (anchors, depths, starts)]
        return attends(own, anchors[batch][column], depths[batch][column])

    batch_size, num_rows = anchors.shape
    return create_block_mask(rule, batch_size, None, num_rows, num_rows, device=anchors.device)


def check_attention(model: PreTrainedModel, is_teacher: bool = False, device: torch.device | None = None) -> None:
    """Raise a `ValueError` if a model's attention, on the `device` of the training, does not follow a mask of rows.

    A teacher needs none, unless several texts are packed in a sequence.
    """
    name, attention = type(model).__name__, model.config._attn_implementation
    taken = ("sdpa", "eager") if is_teacher else ATTENTIONS
    if attention not in taken:
        raise ValueError(
            f"Expected attention that takes a mask of rows ({', '.join(taken)}), got `{attention}` in `{name}`. Load "
            "it with `attn_implementation='sdpa'`."
        )
    if attention == "flex_attention" and (device or model.device).type == "cpu":
        raise ValueError("Expected a device whose FlexAttention has a backward pass, got a CPU. Take `sdpa`.")
    if any(window is not None for window in attention_windows(model.config)):
        raise ValueError(
            f"Expected full attention, got sliding-window layers in `{name}`: what a row attends to would depend on "
            "the window. " + ("Train without packing." if is_teacher else "Train a base model without one.")
        )


@dataclass
class Objective:
    """The loss that is minimized over kept training rows.

    `"ce"` is cross-entropy (PARD), `"kd"` adds the divergence from the target's distribution, and `"cat"` weights both
    in each row by the probability that a block gets that far (PARD-2, target-independent). `"tv"` and `"lk"` add the
    total variation (DSpark) or -log of the acceptance instead. `depth_decay` weighs rows at depth d by e^(-d/γ), as
    DFlash does. The target, with the draft's tokenizer, is never trained; with `is_stored` batches hold its top
    logits, and none runs. The default weights are those of `objective_weights`.
    """

    name: str = "ce"
    cross_entropy_weight: float | None = None
    divergence_weight: float | None = None
    temperature: float = 1.0
    target: PreTrainedModel | None = None
    depth_decay: float | None = None
    is_stored: bool = False

    def __post_init__(self) -> None:
        check_ranges({"depth_decay": self.depth_decay})
        if self.name not in get_args(ObjectiveName):
            raise ValueError(
                f"Expected the objective to be one of {', '.join(get_args(ObjectiveName))}, got {self.name!r}."
            )
        if self.name != "ce" and self.target is None and not self.is_stored:
            raise ValueError(
                f"Expected a target for the objective {self.name!r}, got none. Name the target model, or train on "
                "answers that `pard data --top-logits` wrote."
            )
        if self.is_stored and self.temperature != 1:
            raise ValueError(
                f"Expected a distillation temperature of 1 with stored `top_logits`, got {self.temperature}: other "
                "temperatures need the whole distribution. Train on rows without them, with a target."
            )
        self.weights = objective_weights(
            self.name, self.cross_entropy_weight, self.divergence_weight, self.temperature
        )

    def __call__(
        self, draft: PreTrainedModel, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the loss of a collated batch: a weighted sum over labels, divided by their number.

        Dividing by the number, not by the sum of the weights, makes batches that are accumulated or spread over
        devices add up to the loss of one large batch; `num_items` counts the labels of the whole step then.
        """
        is_label = batch["labels"] != -100
        hidden = draft.base_model(
            input_ids=batch["input_ids"],
            attention_mask=row_mask(draft, batch["anchors"], batch["depths"], batch["starts"]),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        teacher = {} if self.name == "ce" else self.stored(batch, is_label) or self.teacher(batch, is_label)
        row_weights = self.row_weights(batch["depths"][is_label], teacher.pop("row_weights", None))
        target = self.target if "target_head" in teacher else None
        sizes = [model.config.get_text_config().vocab_size for model in (draft, target) if model is not None]
        total = row_loss(
            head_of(draft), hidden[is_label], batch["labels"][is_label], max(sizes), head_parameters(draft),
            loss_weights=self.weights, temperature=self.temperature, correction=correction_of(draft, batch, is_label),
            row_weights=row_weights, divergence_of=DIVERGENCES.get(self.name, divergence), **teacher,
        )  # fmt: skip
        return total / (is_label.sum().clamp(min=1) if num_items is None else num_items)

    def row_weights(self, depths: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor | None:
        """Return the weights of labeled rows, `[num_rows]`, or `None` where all count alike."""
        if self.depth_decay is None:
            return confidence
        decayed = (-depths.float() / self.depth_decay).exp()
        return decayed if confidence is None else confidence * decayed

    @torch.no_grad()
    def stored(self, batch: dict[str, Any], is_label: torch.Tensor) -> dict[str, Any]:
        """Return what `teacher` does, by the top logits in a batch; nothing where none are stored."""
        if not self.is_stored:
            return {}
        ids, logprobs = batch["top_ids"].long(), batch["top_logprobs"].float()
        examples = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(is_label)[is_label]
        predicted = (batch["anchors"] + batch["depths"] + 1)[is_label]
        arguments: dict[str, Any] = {"top": TopLogprobs(ids[examples, predicted], logprobs[examples, predicted])}
        if self.name != "cat":
            return arguments
        gold = stored_gold_logprobs(TopLogprobs(ids, logprobs), batch["input_ids"][:, : ids.shape[1]])
        weights = confidence_weights(gold, batch["anchors"], batch["depths"])
        return {**arguments, "row_weights": weights[is_label]}

    @torch.no_grad()
    def teacher(self, batch: dict[str, Any], is_label: torch.Tensor) -> dict[str, Any]:
        """Run the target; return its arguments of `row_losses` and, for `"cat"`, the weights of labeled rows."""
        assert self.target is not None
        hidden, ids = self.target_hidden(batch)
        batch_size, longest = ids.shape
        first = torch.arange(batch_size, device=is_label.device).unsqueeze(1) * longest
        index = (predicting_column(batch, longest) + first)[is_label].to(hidden.device)
        head, vocab_size = head_of(self.target), self.target.config.get_text_config().vocab_size
        arguments = {"target_head": head, "target_hidden": hidden.flatten(0, 1), "target_index": index}
        if self.name != "cat":
            return arguments
        gold = gold_logprobs(head, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), vocab_size)
        logprobs = torch.nn.functional.pad(gold.view(batch_size, longest - 1), (1, 0)).to(is_label.device)
        return {**arguments, "row_weights": confidence_weights(logprobs, batch["anchors"], batch["depths"])[is_label]}

    def target_hidden(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target on the real tokens of a batch: last hidden states `[B, longest, H]`, and the tokens' ids."""
        assert self.target is not None
        is_text = (batch["depths"] == 0) & (batch["anchors"] >= 0)
        longest = int(is_text.sum(-1).max())  # Real tokens come first, in order.
        is_text, anchors, starts, positions, ids = (
            values[:, :longest].to(input_device(self.target))
            for values in (is_text, batch["anchors"], batch["starts"], batch["position_ids"], batch["input_ids"])
        )
        # Mask rows in these columns, of shorter examples, become padding on the right, which causal attention ignores.
        ids, anchors = ids.masked_fill(~is_text, 0), anchors.masked_fill(~is_text, -1)
        mask = None
        if starts.any():  # Packed: causal attention would cross texts.
            mask = additive_mask(anchors, torch.zeros_like(anchors), starts, compute_dtype(self.target))
        output = self.target.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state, ids


def head_parameters(draft: Any) -> list[torch.Tensor]:
    """Return the parameters of the LM head and of the correction head."""
    heads = (draft.get_output_embeddings(), getattr(draft, "correction_head", None))
    return [parameter for head in heads if head is not None for parameter in head.parameters()]


def predicting_column(batch: dict[str, Any], num_columns: int) -> torch.Tensor:
    """Return the column of the real token before the one each row predicts."""
    return (batch["anchors"] + batch["depths"]).clamp(min=0, max=num_columns - 1)


def correction_of(draft: Any, batch: dict[str, Any], is_label: torch.Tensor) -> Correction | None:
    """Bind the draft's correction head to labeled rows and the gold token before each predicted one."""
    head = getattr(draft, "correction_head", None)
    if head is None:
        return None
    previous = batch["input_ids"].gather(1, predicting_column(batch, is_label.shape[1]))[is_label]
    # At depth 0 the draft has read the token before.
    is_corrected = (batch["depths"] > 0)[is_label].unsqueeze(1)
    return lambda hidden, rows: head(hidden, previous[rows]) * is_corrected[rows]
