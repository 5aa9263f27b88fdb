"""Plain `generate`, eager and where wanted compiled, against ours on one prompt, interleaved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..generation.compilation import why_not_compiled
from ..generation.stats import DecodingStats
from ..host import end_token_ids, pad_token_id
from ..loading import Pair
from .benchmark import is_exact, logit_gap
from .prompts import REGROUPED_SIZE, cut
from .routes import compile_anywhere

PARD, COMPILED, BATCH = "with the draft", "eager against compiled", f"one row against a batch of {REGROUPED_SIZE}"


@dataclass(frozen=True)
class Agreement:
    """How many texts are identical, and the logit gaps of the others; agreements on several texts add up."""

    num_identical: int
    num_texts: int = 1
    logit_gaps: tuple[float, ...] = ()

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_identical + other.num_identical,
            self.num_texts + other.num_texts,
            self.logit_gaps + other.logit_gaps,
        )

    def __str__(self) -> str:
        gap = f", gap {max(self.logit_gaps):.2g}" if self.logit_gaps else ""
        return f"{self.num_identical}/{self.num_texts}{gap}"


def agreement(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> Agreement:
    """Compare one text with plain `generate`'s."""
    gap = None if got == expected else logit_gap(target, prompt, expected, got)
    return Agreement(int(got == expected), logit_gaps=() if gap is None else (gap,))


@dataclass(frozen=True)
class RaceResult:
    """One prompt, every route; results of several prompts add up.

    Args:
        agreements (`dict[str, Agreement]`):
            How far texts are those of eager plain `generate`: ours, and in 16 bit its own in other ways.
        compiled_seconds (`float`, *optional*):
            Of compiled plain `generate`, where it ran.
    """

    plain_text: str
    pard_text: str
    num_new_tokens: int
    plain_seconds: float
    pard_seconds: float
    stats: DecodingStats
    agreements: dict[str, Agreement]
    compiled_seconds: float | None = None

    @property
    def is_identical(self) -> bool:
        return self.agreements[PARD].num_identical == self.agreements[PARD].num_texts

    @property
    def plain_rate(self) -> float:
        """Tokens a second of plain `generate`, prefill included."""
        return self.num_new_tokens / self.plain_seconds

    @property
    def pard_rate(self) -> float:
        """Tokens a second of ours, prefill included."""
        return self.num_new_tokens / self.pard_seconds

    @property
    def speedup(self) -> float:
        """Wall time of eager plain `generate` over ours."""
        return self.plain_seconds / self.pard_seconds

    @property
    def speedup_over_compiled(self) -> float | None:
        """Wall time of compiled plain `generate` over ours, where it ran."""
        return None if self.compiled_seconds is None else self.compiled_seconds / self.pard_seconds

    def __add__(self, other: RaceResult) -> RaceResult:
        compiled = self.compiled_seconds, other.compiled_seconds
        return RaceResult(
            "",
            "",
            self.num_new_tokens + other.num_new_tokens,
            self.plain_seconds + other.plain_seconds,
            self.pard_seconds + other.pard_seconds,
            self.stats + other.stats,
            {name: agreed + other.agreements[name] for name, agreed in self.agreements.items()},
            None if compiled[0] is None or compiled[1] is None else compiled[0] + compiled[1],
        )


def race(
    pair: Pair,
    inputs: Any,
    num_assistant_tokens: int,
    max_new_tokens: int,
    repeats: int = 3,
    tree_size: int | None = None,
    with_compiled: bool = False,
) -> RaceResult:
    """Run the routes alternately and take the median time of each; the first run of each is not timed.

    Args:
        pair ([`Pair`]):
            Target, draft and tokenizer.
        inputs:
            Model inputs of one prompt, `input_ids` of shape `(1, length)`.
        tree_size (`int`, *optional*):
            N, nodes of a round's tree; by default the draft's own, a chain where it has none.
        with_compiled (`bool`, *optional*, defaults to `False`):
            Whether compiled plain `generate` runs as well; the first of a length compiles for a while.
    """
    inputs = {name: tensor.to(pair.target.device) for name, tensor in inputs.items()}
    common = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    routes: dict[str, dict[str, Any]] = {
        "plain": {},
        "pard": {
            "assistant_model": pair.draft,
            "num_assistant_tokens": num_assistant_tokens,
            "assistant_tree_size": tree_size,
        },
    }
    if with_compiled:
        routes["compiled"] = compiled_arguments()
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    outputs: dict[str, Any] = {}
    for _ in range(repeats + 1):
        for name, arguments in routes.items():
            start = time.perf_counter()
            outputs[name] = pair.target.generate(**inputs, **common, **arguments)
            if pair.target.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    if not is_exact(pair.target.dtype):
        rows = {name: tensor.repeat(REGROUPED_SIZE, 1) for name, tensor in inputs.items()}
        outputs["batch"] = pair.target.generate(
            **rows, **common, pad_token_id=pad_token_id(pair.target.generation_config)
        )
    prompt, ends = inputs["input_ids"][0].tolist(), end_token_ids(pair.target.generation_config)
    new = {name: cut(output.sequences[0, len(prompt) :].tolist(), ends) for name, output in outputs.items()}
    return RaceResult(
        plain_text=pair.tokenizer.decode(new["plain"], skip_special_tokens=True),
        pard_text=pair.tokenizer.decode(new["pard"], skip_special_tokens=True),
        agreements={
            title: agreement(pair.target, prompt, new["plain"], new[name])
            for name, title in (("pard", PARD), ("compiled", COMPILED), ("batch", BATCH))
            if name in new
        },
        num_new_tokens=len(new["pard"]),
        plain_seconds=median(seconds["plain"][1:]),
        pard_seconds=median(seconds["pard"][1:]),
        stats=outputs["pard"].stats,
        compiled_seconds=median(seconds["compiled"][1:]) if with_compiled else None,
    )


def compiled_arguments() -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": compile_anywhere()}


def compile_plain(pair: Pair, inputs: Any, max_new_tokens: int) -> str | None:
    """Compile plain `generate` for prompts no longer than `inputs`; returns why that cannot be, if so."""
    if (reason := why_not_compiled(pair.target, pair.target)) is not None:
        return reason
    inputs = {name: tensor.to(pair.target.device) for name, tensor in inputs.items()}
    try:
        pair.target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **compiled_arguments())
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"torch.compile failed: {str(error).strip().splitlines()[0]}"
    return None
