"""What a call with a draft returns.

What a call of `generate()` says beyond what the host's own arguments can hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..draft.model import PardDraftModel
from ..host import warn_once
from .stats import DecodingStats


@dataclass
class PardGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns, with the decoding statistics.

    Args:
        stats ([`DecodingStats`], *optional*):
            Rounds, drafted and accepted tokens of this call, summed over rows.
        compile_seconds (`float`, *optional*):
            Wall time of this call that went into compiling, first runs of compiled code included; 0 without any.
    """

    stats: DecodingStats | None = None
    compile_seconds: float | None = None


VERIFICATIONS = ("sample_and_match", "ratio_test")
MOST_NODES = 1024


@dataclass(frozen=True)
class CallSettings:
    """How tokens are verified, how many nodes a round's tree has (0 for a chain), and what else the caller passed.

    transformers adds model arguments of its own, other ones in each version; only the caller's can be unknown to us.
    """

    verification: str = VERIFICATIONS[0]
    tree_size: int = 0
    keywords: frozenset[str] = frozenset()
    # Filled where the draft reaches a loop that knows drafts.
    was_seen: list[bool] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.verification not in VERIFICATIONS:
            raise ValueError(f"Expected `verification` to be one of {VERIFICATIONS}, got {self.verification!r}.")
        size = self.tree_size
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_NODES:
            raise ValueError(
                f"Expected `assistant_tree_size` to be an integer in [0, {MOST_NODES}], got {size!r}. 0 is a chain; "
                "common sizes are 8 to 64."
            )


# `generate()` hands its decoding method only arguments it knows, so these travel beside it.
DEFAULTS = CallSettings()
settings_of_call: ContextVar[CallSettings] = ContextVar("settings_of_call", default=DEFAULTS)


def settings_for(
    verification: str,
    tree_size: int | None,
    configs: Sequence[GenerationConfig | None],
    assistant: Any,
    keywords: Iterable[str] = (),
) -> CallSettings:
    """The settings of a call: what it names itself, then its generation config, the target's own, and the draft's.

    Raises:
        ValueError: One of them is nothing we know.
    """
    draft_config = assistant.generation_config if isinstance(assistant, PardDraftModel) else None
    for config in (*configs, draft_config):
        if tree_size is None:
            tree_size = getattr(config, "assistant_tree_size", None)
    settings = CallSettings(verification, 0 if tree_size is None else tree_size, frozenset(keywords))
    if settings.tree_size and verification == "ratio_test":
        warn_once("The ratio test is made for one path: a chain is drafted instead of a tree.")
        return replace(settings, tree_size=0)
    return settings


def with_draft_defaults(
    draft: PardDraftModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Say the draft's K where the call names none; the host would fill in its own, 20. May change `kwargs`."""
    if kwargs.get("num_assistant_tokens") is not None:
        return generation_config
    kwargs.pop("num_assistant_tokens", None)
    if generation_config is None:
        kwargs["num_assistant_tokens"] = draft.num_assistant_tokens
    elif generation_config.num_assistant_tokens is None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.num_assistant_tokens = draft.num_assistant_tokens
    return generation_config
