"""Pushing a draft to the Hub as serving engines load it: one commit with weights, config, tokenizer and card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedTokenizerBase

from ..draft_model import PardDraftModel
from ..parts import CORRECTION_HEAD, PART_FILES, SETTINGS_FILE
from .checkpoint import TOKENIZER_FILES, local_folder, mend_config, read_json, tokenizer_files
from .engines import check_draft
from .errors import hub_errors
from .export import copy_files, refuse
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
