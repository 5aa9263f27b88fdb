"""Race plain `generate` against ours on one prompt, interleaved: what `pard demo` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..generation.compilation import not_compilable_reason
from ..generation.stats import DecodingStats, now
from ..host import end_token_ids, pad_token_id
from ..loading import Pair
from .benchmark import is_exact, logit_gap
from .prompts import REGROUPED_SIZE, PromptBatch, make_batches
from .routes import compile_anywhere

# The ways to generate; the last two are plain `generate` too, computed otherwise.
PLAIN, PARD = "plain generate", "PARD"
COMPILED, BATCHED = "eager against compiled", f"one row against a batch of {REGROUPED_SIZE}"
WARM_UP_TOKENS = 4
COMPILED_ARGUMENTS = {"cache_implementation": "static", "compile_config": compile_anywhere()}


@dataclass(frozen=True)
class RaceResult:
    """Texts, median seconds and differing texts of each way to generate; results of several prompts add up.

    `gaps` holds one logit gap for each text that is not eager plain `generate`'s, see [`logit_gap`].
    """

    texts: dict[str, str]
    seconds: dict[str, float]
    gaps: dict[str, list[float | None]]
    num_new_tokens: int
    stats: DecodingStats
    num_texts: int = 1

    def __add__(self, other: RaceResult) -> RaceResult:
        seconds = {name: one + other.seconds[name] for name, one in self.seconds.items()}
        gaps = {name: one + other.gaps[name] for name, one in self.gaps.items()}
        counts = self.num_new_tokens + other.num_new_tokens, self.stats + other.stats, self.num_texts + other.num_texts
        return RaceResult({}, seconds, gaps, *counts)

    def agreement(self, name: str) -> str:
        """Count identical texts, and give the largest logit gap of the others."""
        gaps = [gap for gap in self.gaps[name] if gap is not None]
        return f"{self.num_texts - len(self.gaps[name])}/{self.num_texts}" + (f", gap {max(gaps):.2g}" if gaps else "")


def race(
    pair: Pair,
    ids: list[int],
    max_new_tokens: int,
    repeats: int,
    with_compiled: bool,
    advance: Callable[[float, str], None] = lambda share, text: None,
    **ours: Any,
) -> RaceResult:
    """Run each way on the token ids of a prompt in turns; the first run of each is not timed.

    Each run is announced to `advance`, with its share of all.

    That run is as long as the others where something compiles, and a few tokens elsewhere. Compiled plain `generate`
    is a way of its own; the first prompt of a length compiles. `ours` are further arguments of our `generate`, what
    proposes among them.
    """
    target, batch = pair.target, prompt_batch(pair, ids)
    common = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    compiles = with_compiled or target.device.type != "cpu"
    first = common if compiles else {**common, "max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens)}
    ways = {PLAIN: {}, PARD: ours}
    if with_compiled:
        ways[COMPILED] = COMPILED_ARGUMENTS
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    for settings in (first, *[common] * repeats):
        for name, arguments in ways.items():
            advance(1 / (1 + repeats) / len(ways), name)
            start = now(target.device)
            outputs[name] = target.generate(**batch.inputs, **settings, **arguments)
            seconds[name].append(now(target.device) - start)
    if not is_exact(target.dtype):
        rows = prompt_batch(pair, ids, REGROUPED_SIZE).inputs
        outputs[BATCHED] = target.generate(**rows, **common, pad_token_id=pad_token_id(target.generation_config))
    ends = end_token_ids(target.generation_config)
    new = {name: batch.new_texts(output.sequences[:1], ends)[0] for name, output in outputs.items()}
    gaps = {
        name: [] if text == new[PLAIN] else [logit_gap(target, ids, new[PLAIN], text)] for name, text in new.items()
    }
    texts = {name: pair.tokenizer.decode(text, skip_special_tokens=True) for name, text in new.items()}
    medians = {name: median(runs[1:]) for name, runs in seconds.items()}
    return RaceResult(texts, medians, gaps, len(new[PARD]), outputs[PARD].stats)


def prompt_batch(pair: Pair, ids: list[int], size: int = 1) -> PromptBatch:
    return make_batches([ids] * size, size, None, pair.target.device)[0]


def compile_plain(pair: Pair, ids: list[int], max_new_tokens: int) -> str | None:
    """Compile plain `generate` for prompts no longer than `ids`; return the reason where that fails."""
    if (reason := not_compilable_reason(pair.target, pair.target, of_rounds=False)) is not None:
        return reason
    inputs = prompt_batch(pair, ids).inputs
    try:
        pair.target.generate(**inputs, **COMPILED_ARGUMENTS, max_new_tokens=max_new_tokens, do_sample=False)
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"torch.compile failed: {str(error).strip().splitlines()[0]}"
    return None
