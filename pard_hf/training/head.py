"""Training a correction head: on a draft that stays as it is, or together with it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..correction_head import CorrectionHead
from ..draft_model import PardDraftModel

logger = logging.getLogger(__name__)

MODES = ("frozen", "joint")


def is_adapted(config: PreTrainedConfig) -> bool:
    """Whether a base model is a draft already."""
    return getattr(config, "pard_token", None) is not None


def check_mode(mode: str | None) -> None:
    """Raise a `ValueError` for a way to train a head that we do not have."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"Expected `correction_head` to be one of {', '.join(MODES)}, got {mode!r}.")


def prepare_head(draft: PardDraftModel, mode: str | None, rank: int) -> None:
    """Give a draft the head that is to be trained, and say which weights are.

    A head the draft has already goes on; without `mode` it is left off, for its draft is about to change.

    Raises:
        ValueError: The mode is unknown, or the draft has a head of another rank or a trimmed vocabulary.
    """
    check_mode(mode)
    if draft.trimmed_vocabulary is not None:
        raise ValueError(
            "Expected a draft with its whole vocabulary, got a trimmed one, whose rows would not follow the training. "
            "Load it with `trimmed_vocabulary=False` and trim it afterwards."
        )
    if mode is None:
        if draft.correction_head is not None:
            logger.warning(
                "The draft's correction head is left off: the hidden states it belongs to are about to change. Train "
                'it along with `correction_head="joint"`, or a new one on the finished draft.'
            )
            draft.correction_head = None
        if not any(parameter.requires_grad for parameter in draft.parameters()):
            draft.requires_grad_(True)  # A frozen head was trained on it before.
        return
    config = draft.config.get_text_config()
    if draft.correction_head is None:
        head = CorrectionHead(config.vocab_size, config.hidden_size, rank)
        draft.correction_head = head.to(draft.device, draft.dtype)
    elif draft.correction_head.rank != rank:
        raise ValueError(
            f"Expected the draft's correction head to have the rank {rank}, got {draft.correction_head.rank}. Pass "
            "that rank, or load the draft with `correction_head=False` to begin a new head."
        )
    draft.requires_grad_(mode == "joint")
    draft.correction_head.requires_grad_(True)


def give_own_rate(optimizer: torch.optim.Optimizer, head: CorrectionHead, learning_rate: float) -> None:
    """Let a head learn at a rate of its own: it begins from nothing, the draft does not."""
    own = {id(parameter) for parameter in head.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts = [[p for p in group["params"] if (id(p) in own) == is_own] for is_own in (False, True)]
        groups += [
            {**group, "params": part, **({"lr": learning_rate} if is_own else {})}
            for part, is_own in zip(parts, (False, True), strict=True)
            if part
        ]
    optimizer.param_groups[:] = groups
