"""What a benchmark has found, in the words of its JSON.

A figure that nobody measured is `None`, and absent from the JSON. Times are in seconds and sizes in bytes; figures are
medians over repeats, ranges `[least, most]`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Difference:
    """The first place where a route left plain `generate`, and how far that prefers its best token there."""

    prompts: str
    prompt_index: int
    position: int
    expected: str
    got: str
    logit_gap: float | None = None


@dataclass
class Regrouped:
    """How far plain `generate` agrees with itself when the same prompts come in batches of another size.

    Args:
        batch_size (`int`):
            That other size.
        identical_share (`float`) and logit_gaps (`list[float]`):
            As in [`RouteResult`].
    """

    batch_size: int
    identical_share: float
    logit_gaps: list[float]


@dataclass
class RouteResult:
    """One route in one cell. Rates count new tokens up to and with the end token.

    Args:
        tokens_per_second (`float`) and decode_tokens_per_second (`float`, *optional*):
            Prefill included, and after the first token.
        time_to_first_token (`float`):
            Seconds of a call for one token, mean over batches.
        speedup (`float`) and decode_speedup (`float`, *optional*):
            The route's tokens a second over plain `generate`'s in the same repeat, prefill included and after the
            first token: the ratio of wall times, where texts are equal.
        speedup_over_ar_plus (`float`, *optional*) and speedup_over_ar_plus_range (`list[float]`, *optional*):
            The same over `ar_plus`, compiled plain `generate`, where that was measured.
        identical_share (`float`) and logit_gaps (`list[float]`, *optional*):
            The share of texts that are plain `generate`'s in every run, and for each other one how far the plain model
            prefers its best token to the one said where the texts first part, in the run's dtype.
        acceptance_length (`float`, *optional*):
            τ, tokens a round with the bonus token. Other counts as in [`DecodingStats`].
        compile_seconds (`float`, *optional*):
            Spent compiling before anything was timed; where the host compiles, what the warm-up took longer than a
            timed run.
        seconds_per_round (`float`, *optional*):
            Wall time of the timed runs without their first rounds, over the number of other rounds.
        draft_seconds (`float`, *optional*), verify_seconds and loop_seconds:
            Parts of a round, from runs of their own in which the device is waited for; the shares add up to 1.
        plain_step_seconds (`float`, *optional*):
            Of plain routes: one forward for one token a row.
        baseline (`str`, *optional*):
            The plain route that the next figures compare with: compiled rounds with compiled steps, if measured.
        verify_ratio (`float`, *optional*):
            A verify over a plain step: 1 where K + 1 rows cost as much as one.
        ideal_speedup (`float`, *optional*):
            τ / (1 + draft / plain step), over `baseline`; `ideal_share` and `decode_ideal_share` are what the speedups
            over `baseline` are of it, prefill included and after the first token.
        bandwidth_share (`float`, *optional*):
            Time that copying the bytes of a round takes, over the time of a round.
    """

    route: str
    tokens_per_second: float
    tokens_per_second_range: list[float]
    time_to_first_token: float
    speedup: float
    speedup_range: list[float]
    num_new_tokens: int
    identical_share: float
    seconds: list[float]
    decode_tokens_per_second: float | None = None
    decode_speedup: float | None = None
    speedup_over_ar_plus: float | None = None
    speedup_over_ar_plus_range: list[float] | None = None
    acceptance_length: float | None = None
    acceptance_rate: float | None = None
    position_acceptance: list[float] | None = None
    histogram: list[int] | None = None
    compile_seconds: float | None = None
    peak_memory: int | None = None
    seconds_per_round: float | None = None
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    loop_seconds: float | None = None
    draft_share: float | None = None
    verify_share: float | None = None
    loop_share: float | None = None
    plain_step_seconds: float | None = None
    baseline: str | None = None
    verify_ratio: float | None = None
    ideal_speedup: float | None = None
    ideal_share: float | None = None
    decode_ideal_share: float | None = None
    bandwidth_share: float | None = None
    difference: Difference | None = None
    logit_gaps: list[float] | None = None


@dataclass
class CellResult:
    """Every route on one prompt set at one batch size and K; `regrouped` only in 16 bit."""

    prompts: str
    prompts_digest: str
    num_prompts: int
    num_left_out: int
    batch_size: int
    num_assistant_tokens: int
    mean_prompt_tokens: float
    mean_new_tokens: float
    repeated_4gram_share: float
    repeated_4gram_share_of_references: float | None
    bytes_per_round: int
    copy_bandwidth: float
    peak_memory_kind: str
    routes: list[RouteResult] = field(default_factory=list)
    not_served: dict[str, str] = field(default_factory=dict)
    regrouped: Regrouped | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.prompts, self.batch_size, self.num_assistant_tokens

    def route(self, name: str) -> RouteResult | None:
        return next((route for route in self.routes if route.route == name), None)

    def to_dict(self) -> dict[str, Any]:
        return for_json(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CellResult:
        values = {"repeated_4gram_share_of_references": None, **values}
        routes = [
            RouteResult(
                **{**route, "difference": Difference(**route["difference"]) if "difference" in route else None}
            )
            for route in values.pop("routes")
        ]
        regrouped = values.pop("regrouped", None)
        return cls(**values, routes=routes, regrouped=None if regrouped is None else Regrouped(**regrouped))


@dataclass
class BenchmarkResult:
    """All cells of a run and the conditions they were measured under."""

    conditions: dict[str, Any]
    cells: list[CellResult]

    def to_dict(self) -> dict[str, Any]:
        return {**self.conditions, "cells": [cell.to_dict() for cell in self.cells]}

    def to_json(self) -> str:
        """As files hold it."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"


def for_json(values: Any) -> Any:
    """Nested values without the entries that are `None`, floats to six digits."""
    if isinstance(values, dict):
        return {name: for_json(value) for name, value in values.items() if value is not None}
    if isinstance(values, list):
        return [for_json(value) for value in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values
