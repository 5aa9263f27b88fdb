"""The drafts that others have published, and which targets they serve, told by config, tokenizer and Hub id.

Sources: the table of weights and the prompt templates in https://github.com/AMD-AGI/PARD; vocabulary sizes of the
targets' configs. A wrong choice costs time and never a word, since every token is verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .checkpoint import TARGET_FILES, local_folder, read_json, vocab_size

# DeepSeek's distillations keep the config of their base and redefine special tokens of its tokenizer.
DEEPSEEK_TURN = "<｜User｜>"
# Vocabularies of one family differ by padding and a few added tokens; those of two families by thousands.
NEAR_ROWS = 1024


@dataclass(frozen=True)
class KnownDraft:
    """A published draft and the targets it serves.

    Args:
        name (`str`):
            Hub id.
        family (`str`):
            The targets, in words.
        model_types (`tuple[str, ...]`):
            `model_type` of the targets' configs.
        vocab_sizes (`tuple[int, ...]`):
            `vocab_size` of the targets' configs; sizes of one row differ by padding rows only.
        targets (`str`):
            Regular expression over the Hub ids of the targets.
        example (`str`):
            Hub id of one of them.
        mask_token_id (`int`, *optional*):
            `pard_token` of its config, where known without the checkpoint.
        base_model (`str`, *optional*):
            Hub id of the model it was adapted from.
        license (`str`, *optional*):
            As its own card names it, where known.
        training_data (`str`, *optional*):
            In words.
        has_deepseek_turns (`bool`):
            Whether the targets' tokenizer has DeepSeek's turn tokens.
    """

    name: str
    family: str
    model_types: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    targets: str
    example: str
    mask_token_id: int | None = None
    base_model: str | None = None
    license: str | None = None
    training_data: str | None = None
    has_deepseek_turns: bool = False

    @property
    def needs_export(self) -> bool:
        """Whether one checkpoint cannot have the number of rows of all its targets, which vLLM wants it to have."""
        return len(self.vocab_sizes) > 1

    def fits(self, model_type: str, num_rows: int) -> bool:
        """Whether a target's config is one of the family."""
        return model_type in self.model_types and num_rows in self.vocab_sizes

    def is_near(self, model_type: str, num_rows: int) -> bool:
        """Whether a target's vocabulary is about as large as the family's, so that it may be the same."""
        return model_type in self.model_types and any(abs(num_rows - size) <= NEAR_ROWS for size in self.vocab_sizes)


KNOWN_DRAFTS = (
    KnownDraft(
        name="amd/PARD-Llama-3.2-1B",
        family="Llama 3, 3.1, 3.2 and 3.3",
        model_types=("llama",),
        vocab_sizes=(128256,),
        targets=r"meta-llama/(Meta-)?Llama-3.*",
        example="meta-llama/Llama-3.1-8B-Instruct",
        mask_token_id=128020,
        base_model="meta-llama/Llama-3.2-1B",
        license="mit",
        training_data="Magpie-Llama-3.1-Pro and Evol-CodeAlpaca",
    ),
    KnownDraft(
        name="amd/PARD-Llama-4-1B",
        family="Llama 4",
        model_types=("llama4", "llama4_text"),
        vocab_sizes=(202048,),
        targets=r"meta-llama/Llama-4-.*",
        example="meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ),
    KnownDraft(
        name="amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B",
        family="DeepSeek-R1-Distill-Qwen",
        model_types=("qwen2",),
        vocab_sizes=(151936, 152064),
        targets=r"deepseek-ai/DeepSeek-R1-Distill-Qwen-.*",
        example="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        mask_token_id=151665,
        base_model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        training_data="OpenR1-Math",
        has_deepseek_turns=True,
    ),
    KnownDraft(
        name="amd/PARD-Qwen2.5-0.5B",
        family="Qwen2.5",
        model_types=("qwen2",),
        vocab_sizes=(151936, 152064),
        targets=r"Qwen/Qwen2\.5-.*",
        example="Qwen/Qwen2.5-7B-Instruct",
        mask_token_id=151665,
        base_model="Qwen/Qwen2.5-0.5B-Instruct",
        license="mit",
        training_data="the Magpie set for Qwen2.5",
    ),
    KnownDraft(
        name="amd/PARD-Qwen3-0.6B",
        family="Qwen3",
        model_types=("qwen3", "qwen3_moe"),
        vocab_sizes=(151936,),
        targets=r"Qwen/Qwen3-.*",
        example="Qwen/Qwen3-8B",
        mask_token_id=151670,
        base_model="Qwen/Qwen3-0.6B",
        license="mit",
    ),
)


def known_draft_for(target: PreTrainedModel | str | Path, **kwargs: Any) -> KnownDraft:
    """The published draft that serves a target.

    The config narrows it down; where two families share a config, as Qwen2.5 and DeepSeek's distillations of it do,
    the Hub id or the tokenizer decides.

    Args:
        target ([`PreTrainedModel`] or `str`):
            A live model, a folder, or a Hub id, of which config and tokenizer are downloaded.
        kwargs:
            `token`, `cache_dir` and `local_files_only` as for `from_pretrained`; others are ignored.

    Raises:
        OSError: There is no such folder or repository, or the Hub cannot be reached.
        ValueError: None is known, or several come into question; the message names what comes near and what to do.
    """
    where = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if kwargs.get(key) is not None}
    folder = None
    if isinstance(target, PreTrainedModel):
        config, name = target.config.to_dict(), target.config.name_or_path
    elif isinstance(target, (str, Path)):
        name = str(target)
        folder = local_folder(name, TARGET_FILES, **where)
        config = read_json(folder, "config.json")
    else:
        raise ValueError(f"Expected a model, a folder or a Hub id as target, got `{type(target).__name__}`.")
    model_type, num_rows = str(config.get("model_type")), vocab_size(config)
    fitting = [draft for draft in KNOWN_DRAFTS if draft.fits(model_type, num_rows)]
    named = [draft for draft in fitting if re.fullmatch(draft.targets, name, re.IGNORECASE)]
    if named:
        return named[0]
    tokens = special_tokens(folder or tokenizer_folder(name, where)) if fitting else None
    if tokens is not None:
        fitting = [draft for draft in fitting if draft.has_deepseek_turns == (DEEPSEEK_TURN in tokens)]
    if len(fitting) == 1:
        return fitting[0]
    shown = Path(name).name if Path(name).is_dir() else name
    raise ValueError(none_known(shown, model_type, num_rows, fitting))


def tokenizer_folder(name: str, where: dict[str, Any]) -> Path | None:
    """Where a live model was loaded from, as far as that still is to be found; a help, so failing is no error."""
    try:
        return local_folder(name, TARGET_FILES, **where) if name else None
    except (OSError, ValueError):
        return None


def special_tokens(folder: Path | None) -> set[str] | None:
    """Tokens added to a tokenizer beside its ordinary words; `None` where there is no tokenizer to read."""
    if folder is None:
        return None
    found = [set(added_tokens(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json")]
    return set.union(*found) or None


def added_tokens(folder: Path, name: str) -> Iterator[str]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    entries = [*content.get("added_tokens", []), *content.get("added_tokens_decoder", {}).values()]
    yield from (entry["content"] for entry in entries if isinstance(entry, dict) and "content" in entry)


def none_known(name: str, model_type: str, num_rows: int, fitting: list[KnownDraft]) -> str:
    """Why no draft is suggested, which come near, and how to train one."""
    shown = f"`{name}`" if name else "this model"
    got = f"Expected a target with a known PARD draft, got {shown} ({model_type!r}, vocabulary of {num_rows})."
    if fitting:
        names = " and ".join(f"`{draft.name}` ({draft.family})" for draft in fitting)
        return (
            f"{got} Its config fits {names}, and without its tokenizer nobody can tell: load one of them by name with "
            "`PardDraftModel.from_pretrained`."
        )
    near = [draft for draft in KNOWN_DRAFTS if draft.is_near(model_type, num_rows)]
    if near:
        names = " and ".join(f"`{draft.name}` (made for {draft.family})" for draft in near)
        return (
            f"{got} {names} comes near, and would cost time, never a word, if it drafts badly: load it by name with "
            f"`PardDraftModel.from_pretrained`, or train one for this target. {how_to_train(name)}"
        )
    families = ", ".join(draft.family for draft in KNOWN_DRAFTS)
    return f"{got} Known drafts serve {families}. Train one for this target: {how_to_train(name)}"


def how_to_train(name: str) -> str:
    target = name or "TARGET"
    return (
        f"`pard data --target {target} --prompts prompts.jsonl --output answers.jsonl`, then `pard train --base "
        f"SMALL-MODEL --target {target} --data answers.jsonl --output my-draft` with a small model of the same "
        "tokenizer."
    )


def find_known_draft(name: str) -> KnownDraft | None:
    """The row of a Hub id; `None` for a draft that is not in the table."""
    return next((draft for draft in KNOWN_DRAFTS if draft.name == name), None)
