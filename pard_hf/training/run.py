"""From a base model and files of rows to a finished draft: what `pard train` runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from ..draft_model import PardDraftModel, num_positions
from .data import read_rows, tokenize_rows
from .mask_token import check_mask_token
from .trainer import PardTrainer, PardTrainingArguments

logger = logging.getLogger(__name__)


def train_draft(
    base: str,
    data: Sequence[Path],
    output: Path,
    mask_token_id: int,
    max_length: int = 512,
    dtype: str = "float32",
    skip_bad_rows: bool = False,
    restart: bool = False,
    **arguments: Any,
) -> Path:
    """Adapt `base` on the rows of `data`; the finished draft and its tokenizer are written to `output`.

    Checkpoints lie in `output/checkpoints`; a run that finds one goes on from it. With `restart` they are moved aside.

    Args:
        arguments:
            Anything [`PardTrainingArguments`] takes.

    Raises:
        ValueError: A row is broken (its file and line are named), or the mask token is one the tokenizer produces.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    check_mask_token(tokenizer, mask_token_id)
    rows = tokenize_rows(
        tokenizer, (row for file in data for row in read_rows(file, skip_bad_rows)), max_length, skip_bad_rows
    )
    if not rows:
        raise ValueError(f"Expected training rows in {', '.join(map(str, data))}, got none.")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
    if max_length > num_positions(model.config):
        raise ValueError(
            f"Expected `--max-length` within the {num_positions(model.config)} positions of the base model, got "
            f"{max_length}."
        )
    draft = PardDraftModel.from_causal_lm(model, mask_token_id)
    checkpoints = output / "checkpoints"
    trainer = PardTrainer(
        draft, PardTrainingArguments(str(checkpoints), report_to="none", **arguments), train_dataset=rows
    )
    if restart and checkpoints.is_dir():
        checkpoints.rename(free_name(checkpoints))  # Nothing is lost, and nothing of it is gone on from.
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None:
        logger.warning("Going on from %s; pass --restart to begin anew.", last)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(output)
    return output


def free_name(folder: Path) -> Path:
    """The first of `folder.1`, `folder.2`, … that does not exist."""
    return next(name for n in itertools.count(1) if not (name := folder.with_name(f"{folder.name}.{n}")).exists())
