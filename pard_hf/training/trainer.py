"""Training a parallel draft with the host's `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..draft_model import PardDraftModel
from ..generation.cache import attention_windows
from .data_collator import DataCollatorForPard


@dataclass
class PardTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of PARD; defaults are the paper's."""

    num_draft_tokens: int = field(
        default=8, metadata={"help": "K_train, depths that are trained; at inference K may be larger."}
    )
    retention_rate: float = field(
        default=0.7, metadata={"help": "Depth d keeps max(r**d, r_min) of its rows; 1 drops nothing."}
    )
    min_retention_rate: float = field(default=0.2, metadata={"help": "r_min, the least share any depth keeps."})
    # The collator reads columns that no model's forward names.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: rows are built from all columns."}
    )


class PardTrainer(Trainer):
    """Adapts a [`PardDraftModel`] with cross-entropy over the kept (anchor, depth) rows.

    Everything else (schedules, mixed precision, distributed training, checkpoints, resuming) is the host's.

    Args:
        model ([`PardDraftModel`]):
            The draft; `PardDraftModel.from_causal_lm` makes one of any small causal LM.
        args ([`PardTrainingArguments`]):
            Training arguments.
        train_dataset:
            Rows with `input_ids` and, optionally, `loss_mask`, as `tokenize_rows` makes them.

    >>> draft = PardDraftModel.from_causal_lm(model, mask_token_id=151665)
    >>> PardTrainer(draft, PardTrainingArguments("out"), train_dataset=rows).train()
    """

    def __init__(self, model: PardDraftModel, args: PardTrainingArguments, **kwargs: Any):
        if not isinstance(model, PardDraftModel):
            raise ValueError(
                f"Expected a `PardDraftModel`, got `{type(model).__name__}`. Make one with "
                "`PardDraftModel.from_causal_lm(model, mask_token_id=…)`."
            )
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"Expected attention that takes a mask of kept rows, got `{model.config._attn_implementation}`. Load "
                "the model with `attn_implementation='sdpa'`."
            )
        if any(window is not None for window in attention_windows(model.config)):
            raise ValueError(
                f"Expected a draft with full attention, got sliding-window layers in `{type(model).__name__}`: what a "
                "kept row may see would depend on the window. Train a base model without one."
            )
        kwargs.setdefault(
            "data_collator",
            DataCollatorForPard(
                model.mask_token_id,
                args.num_draft_tokens,
                args.retention_rate,
                args.min_retention_rate,
                seed=args.data_seed if args.data_seed is not None else args.seed,
            ),
        )
        super().__init__(model, args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.model.config._attn_implementation == "eager":
            mask = inputs["attention_mask"]
            blocked = torch.finfo(self.model.dtype).min
            inputs["attention_mask"] = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, blocked)
        return inputs
