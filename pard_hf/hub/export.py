"""Pushing a draft to the Hub as serving engines load it: one commit with weights, config, tokenizer and card.

Writing a draft as vLLM and TensorRT-LLM load it: one mask key, and as many vocabulary rows as the target has.

Knows how to change the number of rows without changing what the draft says; what engines want is in `engines`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedTokenizerBase

from ..draft.addons import CORRECTION_HEAD, PART_FILES, SETTINGS_FILE
from ..draft.model import PardDraftModel
from .checkpoint import (
    DRAFT_FILES,
    TARGET_FILES,
    TOKENIZER_FILES,
    first_line,
    load_tokenizer,
    local_folder,
    mend_checkpoint,
    mend_config,
    read_json,
    tokenizer_files,
    vocab_size,
)
from .engines import ENGINES, Finding, check_draft, weight_findings, would_load
from .errors import hub_errors
from .model_card import CardSource, model_card

logger = logging.getLogger(__name__)


def push_draft(
    draft: PardDraftModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    commit_message: str = "Upload PARD draft",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a draft in one commit, so that a repository never holds half of one.

    The config keeps one mask key, `pard_token`, and says its rope in the words of transformers 4 as well. A card is
    rendered where the repository has none yet.

    Args:
        draft ([`PardDraftModel`]):
            The draft.
        repo_id (`str`):
            Repository to write, made if it is not there.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            The target's. By default the one beside the checkpoint that the draft was loaded from.
        commit_message (`str`, *optional*), commit_description (`str`, *optional*), create_pr (`bool`, *optional*):
            As for every `push_to_hub`.
        private (`bool`, *optional*):
            Whether a repository that is made is private; by default what its owner has chosen.
        token (`str` or `bool`, *optional*):
            By default the one of `hf auth login`.
        revision (`str`, *optional*):
            Branch to write, made from `main` if it is not there.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
            Largest weight file.
        tags (`list[str]`, *optional*):
            More tags for a card that is rendered.

    Returns:
        `CommitInfo`.

    Raises:
        OSError: The token may not write there, or the Hub cannot be reached.
        ValueError: No engine could draft with it, such as for a mask token that the tokenizer produces. Nothing
            was written then. What one of them alone could not serve is said in the log.
    """
    with TemporaryDirectory() as made:
        folder = Path(made)
        draft.save_pretrained(folder, max_shard_size=max_shard_size)
        mend_config(folder)
        add_tokenizer(draft, tokenizer, folder)
        findings = check_draft(folder, name=repo_id)
        refuse(findings)
        for finding in findings:
            if finding.is_blocking:
                logger.warning("%s would not load the draft. %s", finding.engine, finding.message)
        api = HfApi(library_name="pard_hf", token=token)
        with hub_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                write_card(draft, repo_id, folder, tags)
            stale = [  # A head of an earlier draft would be loaded with this one.
                name for name in PART_FILES
                if not (folder / name).exists() and api.file_exists(repo_id, name, revision=revision)
            ]  # fmt: skip
            return api.create_commit(
                repo_id,
                [
                    *(
                        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path)
                        for path in sorted(folder.rglob("*"))
                        if path.is_file()
                    ),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def add_tokenizer(draft: PardDraftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Put a tokenizer beside a checkpoint: the given one, else that of the checkpoint the draft came from."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    source = source_folder(draft)
    if source is None or not tokenizer_files(source):
        logger.warning("The draft goes without a tokenizer, for none lies where it came from: pass `tokenizer=`.")
        return
    copy_files(tokenizer_files(source), source, folder)


def source_folder(draft: PardDraftModel) -> Path | None:
    """Where a draft was loaded from, if that still is to be found."""
    if not draft.config.name_or_path:
        return None
    patterns = (*TOKENIZER_FILES, "provenance.json")
    try:
        return local_folder(draft.config.name_or_path, patterns, revision=draft.config.__dict__.get("_commit_hash"))
    except (OSError, ValueError):
        return None


def write_card(draft: PardDraftModel, repo_id: str, folder: Path, tags: list[str] | None) -> None:
    """Render the card of the checkpoint in `folder`; what its training wrote down comes along."""
    source = source_folder(draft)
    provenance = read_json(source, "provenance.json") if source and (source / "provenance.json").is_file() else {}
    if provenance:
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n", "utf-8")
    card = model_card(
        CardSource(
            name=repo_id,
            config=read_json(folder, "config.json"),
            num_assistant_tokens=draft.num_assistant_tokens,
            provenance=provenance,
            correction_head=read_json(folder / CORRECTION_HEAD, SETTINGS_FILE) if draft.correction_head else {},
            tags=tuple(tags or ()),
        )
    )
    card.save(folder / "README.md")


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
        mend_checkpoint(written)
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
