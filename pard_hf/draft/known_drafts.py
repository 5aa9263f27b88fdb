"""Published drafts and the targets they serve, recognized by config, Hub id and tokenizer.

Sources: the table of weights and the prompt templates in https://github.com/AMD-AGI/PARD; vocabulary sizes of the
targets' configs. A wrong choice costs time and changes no token, since every token is verified.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.utils.hub import cached_file

# DeepSeek's distillations keep the config of their base and redefine special tokens of its tokenizer.
DEEPSEEK_TURN = "<｜User｜>"
# Vocabularies of one family differ by padding and a few added tokens; those of two families by thousands.
NEAR_ROWS = 1024
TARGET_ARGUMENTS = ("token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class KnownDraft:
    """A published draft and the targets it serves; the last fields are for its card.

    `model_types` and `vocab_sizes` (which differ by padding rows) are those of the targets' configs, `targets` is a
    regular expression over their Hub ids and `example` one of them.
    """

    name: str
    family: str
    model_types: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    targets: str
    example: str
    has_deepseek_turns: bool = False
    mask_token_id: int | None = None
    base_model: str | None = None
    license: str | None = None
    training_data: str | None = None

    @property
    def needs_export(self) -> bool:
        """Return whether its targets have several vocabulary sizes: vLLM requires the target's."""
        return len(self.vocab_sizes) > 1


KNOWN_DRAFTS = (
    KnownDraft(
        "amd/PARD-Llama-3.2-1B", "Llama 3, 3.1, 3.2 and 3.3", ("llama",), (128256,),
        r"meta-llama/(Meta-)?Llama-3.*", "meta-llama/Llama-3.1-8B-Instruct",
        mask_token_id=128020, base_model="meta-llama/Llama-3.2-1B", license="mit",
        training_data="Magpie-Llama-3.1-Pro and Evol-CodeAlpaca",
    ),
    KnownDraft(
        "amd/PARD-Llama-4-1B", "Llama 4", ("llama4", "llama4_text"), (202048,),
        r"meta-llama/Llama-4-.*", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ),
    KnownDraft(
        "amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen", ("qwen2",), (151936, 152064),
        r"deepseek-ai/DeepSeek-R1-Distill-Qwen-.*", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", has_deepseek_turns=True,
        mask_token_id=151665, base_model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", training_data="OpenR1-Math",
    ),
    KnownDraft(
        "amd/PARD-Qwen2.5-0.5B", "Qwen2.5", ("qwen2",), (151936, 152064),
        r"Qwen/Qwen2\.5-.*", "Qwen/Qwen2.5-7B-Instruct",
        mask_token_id=151665, base_model="Qwen/Qwen2.5-0.5B-Instruct", license="mit",
        training_data="the Magpie set for Qwen2.5",
    ),
    KnownDraft(
        "amd/PARD-Qwen3-0.6B", "Qwen3", ("qwen3", "qwen3_moe"), (151936,), r"Qwen/Qwen3-.*", "Qwen/Qwen3-8B",
        mask_token_id=151670, base_model="Qwen/Qwen3-0.6B", license="mit",
    ),
)  # fmt: skip


def known_draft_for(target: PreTrainedModel | str | Path, **kwargs: Any) -> KnownDraft:
    """Find the published draft that serves a target.

    Where two families share a config, such as Qwen2.5 and DeepSeek's distillations, Hub id or tokenizer decides.

    Args:
        target ([`PreTrainedModel`] or `str`):
            A loaded model, a folder, or a Hub id, of which config and tokenizer are downloaded.
        kwargs:
            `token`, `cache_dir` and `local_files_only` as for `from_pretrained`; others are ignored.

    Raises:
        OSError: There is no such folder or repository, or the Hub cannot be reached.
        ValueError: No draft is known, or several fit; the message names the nearest and what to do.
    """
    hub: dict[str, Any] = {key: kwargs[key] for key in TARGET_ARGUMENTS if key in kwargs}
    if isinstance(target, PreTrainedModel):
        config, name = target.config, target.config.name_or_path
    elif isinstance(target, str | Path):
        config, name = AutoConfig.from_pretrained(target, trust_remote_code=False, **hub), str(target)
    else:
        raise ValueError(f"Expected a model, a folder or a Hub id as target, got `{type(target).__name__}`.")
    num_rows = getattr(config.get_text_config(), "vocab_size", 0)
    family = [draft for draft in KNOWN_DRAFTS if config.model_type in draft.model_types]
    fitting = [draft for draft in family if num_rows in draft.vocab_sizes]
    for draft in fitting:
        if re.fullmatch(draft.targets, name, re.IGNORECASE):
            return draft
    has_turns = has_deepseek_turns(name, hub) if fitting else None
    if has_turns is not None:
        fitting = [draft for draft in fitting if draft.has_deepseek_turns == has_turns]
    if len(fitting) == 1:
        return fitting[0]
    near = [draft for draft in family if any(abs(num_rows - size) <= NEAR_ROWS for size in draft.vocab_sizes)]
    shown = Path(name).name if Path(name).is_dir() else name
    raise ValueError(
        f"Expected a target with a known PARD draft, got `{shown or 'this model'}` ({config.model_type!r}, vocabulary "
        f"of {num_rows}). {what_to_load(shown or 'TARGET', fitting, near)}"
    )


def what_to_load(target: str, fitting: list[KnownDraft], near: list[KnownDraft]) -> str:
    """Advise on a target without one known draft: which fit, which are near, how to train one."""
    train = (
        f"train one for this target: `pard data --target {target} --prompts prompts.jsonl --output answers.jsonl`, "
        f"then `pard train --base SMALL-MODEL --target {target} --data answers.jsonl --output my-draft` with a small "
        "model of the same tokenizer."
    )
    by_name = "load it by name with `PardDraftModel.from_pretrained`"
    named = " and ".join(f"`{draft.name}` (made for {draft.family})" for draft in fitting or near)
    if fitting:
        return f"Its config fits {named}, which only its tokenizer could tell apart. Take the right one and {by_name}."
    if near:
        return f"{named} comes near, and at worst costs time, since every token is verified: {by_name}, or {train}"
    return f"Known drafts serve {', '.join(draft.family for draft in KNOWN_DRAFTS)}. For other targets, {train}"


def has_deepseek_turns(name: str, hub: dict[str, Any]) -> bool | None:
    """Return whether a checkpoint's tokenizer has DeepSeek's turn tokens; `None` where it has no files to read."""
    try:
        found = [optional_file(name, file, **hub) for file in ("tokenizer.json", "tokenizer_config.json")]
    except (OSError, ValueError):  # A loaded model may have no name, or that of a deleted folder.
        return None
    texts = [Path(file).read_text(encoding="utf-8") for file in found if file is not None]
    escaped = json.dumps(DEEPSEEK_TURN).strip('"')
    return any(DEEPSEEK_TURN in text or escaped in text for text in texts) if texts else None


def optional_file(name: str, file: str, **arguments: Any) -> str | None:
    """Find a file of a folder or a Hub repository; `None` where it is missing or cannot be fetched."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    return cached_file(name, file, **arguments, **quiet)
