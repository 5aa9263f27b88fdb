"""Pushing a draft to the Hub as serving engines load it: one commit with weights, config, tokenizer and card.

Writing a draft as vLLM and TensorRT-LLM load it: one mask key, and as many vocabulary rows as the target has.

Knows how to change the number of rows without changing what the draft says; what engines want is in `engines`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..draft.model import PardDraftModel
from .checkpoint import (
    DRAFT_FILES,
    TARGET_FILES,
    first_line,
    load_tokenizer,
    local_folder,
    read_json,
    tokenizer_files,
    vocab_size,
)
from .engines import ENGINES, Finding, check_draft, weight_findings, would_load

logger = logging.getLogger(__name__)


def export_draft(
    draft: str | Path, output: str | Path, target: str | Path | None = None, pad_vocab_to: int | None = None
) -> Path:
    """Write a draft as vLLM (0.16 and later) and TensorRT-LLM load it, and check it; its proposals stay the same.

    vLLM wants exactly the target's number of vocabulary rows. Rows are added at the end of the embedding and of the
    head (see [`pad_vocabulary`]); where the draft has more rows than the target, those that are mere padding are cut.
    Tensors keep their dtype, weights are safetensors, and the folder appears whole or not at all.

    Args:
        draft (`str`):
            Folder or Hub id of the draft; the folder of a training checkpoint does as well.
        output (`str`):
            Folder to write, not there yet or empty.
        target (`str`, *optional*):
            Folder or Hub id of the target it is to serve with. Its config says the number of rows, and its tokenizer
            is taken where the draft has none.
        pad_vocab_to (`int`, *optional*):
            Number of rows, where the target is not at hand.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: There is no such draft or target.
        ValueError: The output is in use, rows in use would have to be cut, or something is wrong that no export can
            mend, such as a mask token the tokenizer produces. What one engine alone cannot serve is written:
            [`~engines.check_draft`] says so.
    """
    output = Path(output).absolute()
    if output == Path.cwd():
        raise ValueError(
            "Expected an output folder other than the current one, which cannot be renamed. Name a new one."
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"Expected an output folder that is not there yet or empty, got {str(output)!r}.")
    if target is not None and pad_vocab_to is not None:
        raise ValueError("Expected a target or a number of rows to pad to, not both: the target's config says it.")
    folder = local_folder(draft, DRAFT_FILES)
    target_folder = None if target is None else local_folder(target, TARGET_FILES)
    model = load_draft(folder)
    tokenizer_folder = target_folder if target_folder and not tokenizer_files(folder) else folder
    if target_folder is not None:
        fit_vocabulary(model, vocab_size(read_json(target_folder, "config.json")), tokenizer_folder)
    elif pad_vocab_to is not None:
        pad_vocabulary(model, pad_vocab_to)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside:
        written = Path(beside) / "draft"
        model.save_pretrained(written)
        copy_files(tokenizer_files(tokenizer_folder), tokenizer_folder, written)
        refuse(check_draft(written, target_folder))
        if output.is_dir():
            output.rmdir()
        written.rename(output)
    return output


def load_draft(folder: Path) -> PardDraftModel:
    """The draft in a folder, whole: transformers would fill a missing tensor with noise."""
    config = read_json(folder, "config.json")
    if config.get("quantization_config"):
        raise ValueError("Expected a draft in a floating-point type, got a quantized one: export, then quantize.")
    refuse(weight_findings(folder, config))
    try:
        model, info = PardDraftModel.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # Weights of other shapes, a config of other types: a class of error for each.
        raise ValueError(f"The draft cannot be loaded ({type(error).__name__}: {first_line(error)}).") from error
    if info["missing_keys"]:
        raise ValueError(
            f"Expected all tensors of the draft, but {', '.join(sorted(info['missing_keys']))} is missing."
        )
    return model


def refuse(findings: Iterable[Finding]) -> None:
    """Raise a `ValueError` with all that is wrong where no engine would draft with the checkpoint."""
    findings = list(findings)
    if any(would_load(findings, engine) for engine in ENGINES):
        return
    messages = [finding.message for finding in findings if finding.is_blocking]
    raise ValueError("Expected a draft that vLLM or TensorRT-LLM can load. " + " ".join(messages))


def fit_vocabulary(model: PardDraftModel, num_rows: int, tokenizer_folder: Path) -> None:
    """Give the draft the target's number of rows; only rows that are mere padding are cut."""
    size = model.config.get_text_config().vocab_size
    if num_rows >= size:
        pad_vocabulary(model, num_rows)
        return
    largest = max(load_tokenizer(tokenizer_folder).get_vocab().values())
    if max(largest, model.mask_token_id) >= num_rows:
        raise ValueError(
            f"Expected a draft whose rows from the target's {num_rows} on are mere padding, but its mask token is "
            f"{model.mask_token_id} and the tokenizer's largest id is {largest}. Train the draft with a mask token "
            f"below {num_rows}, on the target's tokenizer."
        )
    model.resize_token_embeddings(num_rows, mean_resizing=False)


@torch.no_grad()
def pad_vocabulary(model: PardDraftModel, num_rows: int) -> None:
    """Add rows to embedding and head, in place, that never win the argmax and leave all other logits as they are.

    Each added row is the mean of the rows there were, without the mask token's. A head is linear, so the row's logit
    is the mean of their logits: never above the largest of them, and as large only where all are equal, when the
    first wins the argmax. A monotone function of the logits, such as a soft cap, changes nothing in that. The same
    mean stands in the embedding, so tied weights stay tied. (A row of zeros would win wherever all other logits are
    negative, one of -inf cannot be an embedding, and a copy of a row ties with it, so that rounding decides.)

    In sampled drafting a row keeps some probability: by Jensen's inequality no more than the average token's, so n
    rows beside N hold at most n / N of what those hold, in practice far less.
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html takes this mean for tokens that are to be trained.

    The limit is rounding: in bfloat16 the entries of a row are those of the mean within 0.4 %, which could tell only
    where the largest logit is about as close to the mean of all.

    Args:
        model ([`PardDraftModel`]):
            The draft.
        num_rows (`int`):
            Rows to have afterwards.

    Raises:
        ValueError: The draft has more rows than that.
    """
    size = model.config.get_text_config().vocab_size
    if num_rows < size:
        raise ValueError(f"Expected to pad to at least the draft's {size} rows, got {num_rows}.")
    if num_rows == size:
        return
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    # Tied weights get the same values twice.
    for rows in (embedding.weight, head.weight, getattr(head, "bias", None)):
        if rows is not None:
            others = rows[:size].sum(0, dtype=torch.float64) - rows[model.mask_token_id].double()
            rows[size:] = (others / (size - 1)).to(rows.dtype)


def copy_files(paths: list[Path], source: Path, destination: Path) -> None:
    """Copy files under `source` byte for byte, to the same places under `destination`."""
    for path in paths:
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
