"""Write a draft as vLLM and TensorRT-LLM load it: one mask key, and as many vocabulary rows as the target has."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..draft.model import PardDraftModel
from ..draft.packaged import is_packaged, load_packaged
from .checkpoint import (
    DRAFT_FILES,
    TARGET_FILES,
    first_lines,
    load_tokenizer,
    local_folder,
    read_json,
    tokenizer_files,
    vocab_size,
)
from .engines import ENGINES, check_draft, would_load


def export_draft(
    draft: str | Path, output: str | Path, target: str | Path | None = None, pad_vocab_to: int | None = None
) -> Path:
    """Write a draft as vLLM (0.16 and later) and TensorRT-LLM load it, and check it; its proposals stay the same.

    vLLM requires the target's number of vocabulary rows: padding rows are added (see [`pad_vocabulary`]) or cut.
    Tensors keep their dtype, weights are safetensors, and the folder is written atomically.

    Args:
        draft (`str`):
            Folder or Hub id of the draft, or folder of a training checkpoint.
        output (`str`):
            Folder to write, not there yet or empty.
        target (`str`, *optional*):
            Folder or Hub id of the target, whose config gives the number of rows. A draft without a tokenizer gets
            the target's.
        pad_vocab_to (`int`, *optional*):
            Number of rows, without a target.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: There is no such draft or target, or the Hub cannot be reached.
        ValueError: The output is in use, rows in use would have to be cut, or neither engine would load the result
            ([`~engines.check_draft`] reports what one of them would not).
    """
    output = Path(output).absolute()
    if output == Path.cwd():
        raise ValueError("Expected an output folder other than the current one, got that. Name a new one.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"Expected an output folder that is not there yet or empty, got {str(output)!r}.")
    if target is not None and pad_vocab_to is not None:
        raise ValueError("Expected a target or a number of rows to pad to, not both: the target's config gives it.")
    folder = local_folder(draft, DRAFT_FILES)
    is_small = is_packaged(folder)
    target_folder = None if target is None else local_folder(target, DRAFT_FILES if is_small else TARGET_FILES)
    model = whole_draft(folder, target_folder) if is_small else load_draft(folder)
    tokenizer_folder = target_folder if target_folder and not tokenizer_files(folder) else folder
    if target_folder is not None:
        fit_vocabulary(model, vocab_size(read_json(target_folder, "config.json")), tokenizer_folder)
    elif pad_vocab_to is not None:
        pad_vocabulary(model, pad_vocab_to)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        written = Path(temporary) / "draft"
        model.save_pretrained(written)
        for path in tokenizer_files(tokenizer_folder):
            copy = written / path.relative_to(tokenizer_folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        findings = check_draft(written, target_folder)
        if not any(would_load(findings, engine) for engine in ENGINES):
            problems = " ".join(finding.message for finding in findings if finding.is_blocking)
            raise ValueError(f"Expected a draft that vLLM or TensorRT-LLM can load. {problems}")
        if output.is_dir():
            output.rmdir()
        written.rename(output)
    return output


def whole_draft(folder: Path, target_folder: Path | None) -> PardDraftModel:
    """Load a draft in the small form, with the embedding and LM head of its target."""
    if target_folder is None:
        raise ValueError("Expected the target of this draft, whose embedding it shares, got none. Pass `--target`.")
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype="auto", trust_remote_code=False)
    return load_packaged(folder, target)


def load_draft(folder: Path) -> PardDraftModel:
    """Load a draft; raise a `ValueError` where a tensor is missing, which transformers would initialize at random."""
    if read_json(folder, "config.json").get("quantization_config"):
        raise ValueError("Expected a draft in a floating-point type, got a quantized one: export, then quantize.")
    try:
        model, info = PardDraftModel.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # Truncated files, weights of other shapes, a config of other types.
        raise ValueError(f"The draft cannot be loaded ({type(error).__name__}: {first_lines(error)}).") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"Expected all tensors of the draft, but {missing} is missing: save it again.")
    return model


def fit_vocabulary(model: PardDraftModel, num_rows: int, tokenizer_folder: Path) -> None:
    """Give the draft the target's number of rows; cut padding rows only."""
    if num_rows >= model.config.get_text_config().vocab_size:
        pad_vocabulary(model, num_rows)
        return
    largest = max(load_tokenizer(tokenizer_folder).get_vocab().values())
    if max(largest, model.mask_token_id) >= num_rows:
        raise ValueError(
            f"Expected a draft whose rows from the target's {num_rows} on are padding, but its mask token is "
            f"{model.mask_token_id} and the tokenizer's largest id is {largest}. Train the draft with a mask token "
            f"below {num_rows}, on the target's tokenizer."
        )
    model.resize_token_embeddings(num_rows, mean_resizing=False)


@torch.no_grad()
def pad_vocabulary(model: PardDraftModel, num_rows: int) -> None:
    """Add rows to embedding and LM head, in place, that never win the argmax and leave all other logits unchanged.

    Each is the mean of the existing rows without the mask token's, as in
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. Its logit is the mean of theirs, also below a soft cap:
    never above the largest, and equal to it only where all are, when the first wins the argmax. (Zeros would win where
    all logits are negative, -inf cannot be an embedding, and a copy of a row ties with it.) The embedding gets the
    same mean, so tied weights stay tied. In sampled drafting, by Jensen's inequality, n rows added to N hold at most
    n / N of the others' probability. bfloat16 rounds the mean within 0.4 %, which matters only for logits that close.

    Raises:
        ValueError: The draft has more than `num_rows` rows.
    """
    size = model.config.get_text_config().vocab_size
    if num_rows < size:
        raise ValueError(f"Expected to pad to at least the draft's {size} rows, got {num_rows}.")
    if num_rows == size:
        return
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for rows in (embedding.weight, head.weight, getattr(head, "bias", None)):
        if rows is not None:
            others = rows[:size].sum(0, dtype=torch.float64) - rows[model.mask_token_id].double()
            rows[size:] = (others / (size - 1)).to(rows.dtype)
