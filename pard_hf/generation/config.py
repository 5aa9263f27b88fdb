"""Generation options and outputs of a call with a parallel draft, beyond those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .schedule import Choice
from .stats import DecodingStats, RoundTimes

VERIFICATIONS = ("sample_and_match", "ratio_test")
MOST_NODES = 1024
# What `GenerationConfig` lacks; every one may be an argument of `generate()` too.
OPTIONS = ("assistant_tree_size", "assistant_sources", "verification", "measure_rounds")
# Arguments of a call that no config holds: it is copied, and these belong to the caller.
CALL_ARGUMENTS = ("assistant_memory", "assistant_reference_texts")
# What may propose besides the draft.
TEXT_SOURCES = ("copy", "successors")
DEFAULT_DEPTH = 10
# Nodes of a tree for one text without a draft; a batch shares them.
DEFAULT_TREE_SIZE, MIN_TREE_SIZE = 16, 2


class PardGenerationConfig(GenerationConfig):
    """A `GenerationConfig` with the options of a parallel draft; saved and loaded as any other.

    Args:
        assistant_tree_size (`int`, *optional*):
            N, nodes of the tree that the target verifies in a round; 0 for a chain of K proposals. Defaults to the
            draft's, and else to 0; with other sources to 16, shared by a batch, and at least K.
        assistant_sources (`list[str]`, *optional*):
            What proposes besides the draft: `"copy"` (continuations copied from the text so far) and `"successors"`
            (the target's own likeliest next tokens, remembered from earlier rounds). Both by default with
            `prompt_lookup_num_tokens`, and none without.
        verification (`str`, *optional*, defaults to `"sample_and_match"`):
            How sampled tokens are verified: `"sample_and_match"` (the tokens of plain `generate` under the same seed)
            or `"ratio_test"` (speculative sampling; the same distribution).
        measure_rounds (`bool`, *optional*, defaults to `False`):
            Whether to return [`RoundTimes`] as `round_times`. The device is waited for after every step of a round, so
            a measured call is slower.
        kwargs:
            Anything `GenerationConfig` takes.

    >>> config = PardGenerationConfig(max_new_tokens=256, assistant_tree_size=16)
    >>> target.generate(**inputs, generation_config=config, assistant_model=draft)
    """

    def __init__(
        self,
        assistant_tree_size: int | None = None,
        assistant_sources: list[str] | None = None,
        verification: str | None = None,
        measure_rounds: bool | None = None,
        **kwargs: Any,
    ):
        self.assistant_tree_size = assistant_tree_size
        self.assistant_sources = assistant_sources
        self.verification = verification
        self.measure_rounds = measure_rounds
        super().__init__(**kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_options(self)


def check_options(config: Any) -> None:
    """Raise a `ValueError` for a verification, a source, a tree size or a lookup that does not exist."""
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"Expected `{name}` to be an integer above 0, got {value!r}. Pass one, or drop it.")
    sources = config.assistant_sources
    if sources is not None and not (
        isinstance(sources, list | tuple) and all(name in TEXT_SOURCES for name in sources)
    ):
        raise ValueError(f"Expected `assistant_sources` to be a list of {TEXT_SOURCES}, got {sources!r}.")
    if config.verification not in (None, *VERIFICATIONS):
        raise ValueError(f"Expected `verification` to be one of {VERIFICATIONS}, got {config.verification!r}.")
    size = config.assistant_tree_size
    if size is not None and (type(size) is not int or not 0 <= size <= MOST_NODES):
        raise ValueError(
            f"Expected `assistant_tree_size` to be an integer in [0, {MOST_NODES}], got {size!r}. 0 is a chain; "
            "common sizes are 8 to 64."
        )


def text_sources(config: Any) -> tuple[str, ...]:
    """Return what proposes besides the draft."""
    if config.assistant_sources is not None:
        return tuple(config.assistant_sources)
    return TEXT_SOURCES if config.prompt_lookup_num_tokens is not None else ()


def largest_choice(config: Any, has_draft: bool, batch_size: int) -> Choice:
    """Return the depth and the nodes of a call's rounds.

    With other sources than the draft every round is a tree, since they seldom agree on one path.
    """
    depth, size = config.num_assistant_tokens if has_draft else 0, config.assistant_tree_size
    if not text_sources(config):
        return Choice(depth, size or 0)
    depth = max(depth, config.prompt_lookup_num_tokens or (0 if has_draft else DEFAULT_DEPTH))
    if size is None:
        size = max(DEFAULT_TREE_SIZE // batch_size, MIN_TREE_SIZE, config.num_assistant_tokens if has_draft else 0)
    return Choice(depth, size or depth)


@dataclass
class PardGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns with a draft.

    Args:
        stats ([`DecodingStats`], *optional*):
            Rounds, drafted and accepted tokens of this call, summed over batch rows.
        compile_seconds (`float`, *optional*):
            Wall time of this call that went into compiling, first runs of compiled steps included; 0 without any.
        round_times ([`RoundTimes`], *optional*):
            Seconds of each step of the rounds, with `measure_rounds=True`.
    """

    stats: DecodingStats | None = None
    compile_seconds: float | None = None
    round_times: RoundTimes | None = None
