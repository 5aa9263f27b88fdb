"""Plain `generate` against ours on one prompt, interleaved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..generation.stats import DecodingStats
from ..pair import Pair


@dataclass(frozen=True)
class RaceResult:
    """One prompt, both routes; results of several prompts add up."""

    plain_text: str
    pard_text: str
    is_identical: bool
    num_new_tokens: int
    plain_seconds: float
    pard_seconds: float
    stats: DecodingStats

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
        """Wall time of plain `generate` over ours."""
        return self.plain_seconds / self.pard_seconds

    def __add__(self, other: RaceResult) -> RaceResult:
        return RaceResult(
            "",
            "",
            self.is_identical and other.is_identical,
            self.num_new_tokens + other.num_new_tokens,
            self.plain_seconds + other.plain_seconds,
            self.pard_seconds + other.pard_seconds,
            self.stats + other.stats,
        )


def race(
    pair: Pair,
    inputs: Any,
    num_assistant_tokens: int,
    max_new_tokens: int,
    repeats: int = 3,
    tree_size: int | None = None,
) -> RaceResult:
    """Run both routes alternately and take the median time of each; the first run of each is not timed.

    Args:
        pair ([`Pair`]):
            Target, draft and tokenizer.
        inputs:
            Model inputs of one prompt, `input_ids` of shape `(1, length)`.
        tree_size (`int`, *optional*):
            N, nodes of a round's tree; by default the draft's own, a chain where it has none.
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
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    outputs: dict[str, Any] = {}
    for _ in range(repeats + 1):
        for name, arguments in routes.items():
            start = time.perf_counter()
            outputs[name] = pair.target.generate(**inputs, **common, **arguments)
            if pair.target.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    new = {name: output.sequences[0, inputs["input_ids"].shape[1] :] for name, output in outputs.items()}
    return RaceResult(
        plain_text=pair.tokenizer.decode(new["plain"], skip_special_tokens=True),
        pard_text=pair.tokenizer.decode(new["pard"], skip_special_tokens=True),
        is_identical=torch.equal(new["plain"], new["pard"]),
        num_new_tokens=len(new["pard"]),
        plain_seconds=median(seconds["plain"][1:]),
        pard_seconds=median(seconds["pard"][1:]),
        stats=outputs["pard"].stats,
    )
