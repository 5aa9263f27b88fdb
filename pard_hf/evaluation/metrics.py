"""What a benchmark has found, in the words of its JSON.

A figure that nobody measured is `None`, and absent from the JSON. Times are in seconds and sizes in bytes; figures are
medians over repeats, ranges `[least, most]`.

The formulas from what was measured to what is reported.

Everything here is a pure function of records: no model, no clock. A ratio is taken in each repeat, whose routes took
turns, and then the median of the repeats.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..generation.stats import DecodingStats
from .routes import COMPILED_BY_HOST, Route


@dataclass
class Parts:
    """Seconds of a repeat's rounds by part, all batches together; the first rounds are `prefill`."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    loop: float = 0.0
    num_rounds: int = 0

    def add(self, clock: object) -> None:
        for name in ("prefill", "draft", "verify", "loop", "num_rounds"):
            setattr(self, name, getattr(self, name) + getattr(clock, name))


@dataclass
class RouteRecord:
    """What a route did on all batches of a cell.

    Args:
        texts (`dict[int, list[int]]`):
            New tokens of every prompt, as the warm-up said them.
        differing (`dict[int, list[int]]`):
            What was said for prompts that got other tokens than plain `generate`'s, in whichever run.
        seconds (`list[float]`), first_seconds (`list[float]`) and parts (`list[Parts]`):
            One a repeat, summed over batches: wall time, that of a run for a single token, and where rounds spent it.
        num_steps (`int`):
            Forwards for one token a row that plain `generate` takes for these texts.
    """

    route: Route
    texts: dict[int, list[int]] = field(default_factory=dict)
    differing: dict[int, list[int]] = field(default_factory=dict)
    stats: DecodingStats | None = None
    warm_up_seconds: float = 0.0
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    peak_memory: int | None = None
    num_steps: int = 0

    @property
    def num_new_tokens(self) -> int:
        return sum(map(len, self.texts.values()))

    def compare(self, texts: dict[int, list[int]], expected: dict[int, list[int]]) -> None:
        """Note where `texts` leave `expected`."""
        for index, text in texts.items():
            if text != expected[index]:
                self.differing.setdefault(index, text)

    def note_memory(self, peak: int | None) -> None:
        if peak is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)


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


def route_result(
    record: RouteRecord, records: dict[str, RouteRecord], num_batches: int, bytes_seconds: float
) -> RouteResult:
    """The figures of one route.

    Args:
        records (`dict[str, RouteRecord]`):
            Of every route in the same cell, plain `generate` among them.
        num_batches (`int`):
            Of the cell.
        bytes_seconds (`float`):
            Seconds that copying the bytes of a round would take.
    """
    rates, speedups = tokens_per_second(record), ratios(tokens_per_second(record), tokens_per_second(records["ar"]))
    result = RouteResult(
        route=record.route.name,
        tokens_per_second=median(rates),
        tokens_per_second_range=[min(rates), max(rates)],
        time_to_first_token=median(record.first_seconds) / num_batches,
        speedup=median(speedups),
        speedup_range=[min(speedups), max(speedups)],
        num_new_tokens=record.num_new_tokens,
        identical_share=1 - len(record.differing) / len(record.texts),
        seconds=record.seconds,
        compile_seconds=record.compile_seconds,
        peak_memory=record.peak_memory,
    )
    if record.route.name in COMPILED_BY_HOST:
        result.compile_seconds = max(record.warm_up_seconds - median(record.seconds), 0.0)
    if "ar_plus" in records:
        compiled_speedups = ratios(rates, tokens_per_second(records["ar_plus"]))
        result.speedup_over_ar_plus = median(compiled_speedups)
        result.speedup_over_ar_plus_range = [min(compiled_speedups), max(compiled_speedups)]
    decode_rates = decode_tokens_per_second(record)
    result.decode_tokens_per_second = median(decode_rates) if decode_rates else None
    result.decode_speedup = decode_speedup(record, records["ar"])
    add_acceptance(result, record)
    if record.route.baseline is not None and record.parts and record.parts[0].num_rounds:
        add_rounds(result, record, bytes_seconds)
        add_ideal(result, record, records.get(record.route.baseline, records["ar"]))
    if record.route.name in ("ar", "ar_plus"):
        steps = plain_step_seconds(record)
        result.plain_step_seconds = median(steps) if steps else None
    return result


def tokens_per_second(record: RouteRecord) -> list[float]:
    """Tokens a second in each repeat, prefill included."""
    return [record.num_new_tokens / seconds for seconds in record.seconds]


def decode_seconds(record: RouteRecord) -> list[float]:
    """Seconds after the first tokens in each repeat; empty where there are too few to tell."""
    seconds = [s - first for s, first in zip(record.seconds, record.first_seconds, strict=True)]
    return seconds if record.num_steps and min(seconds) > 0 else []


def decode_tokens_per_second(record: RouteRecord) -> list[float]:
    """Tokens a second after the first ones in each repeat, where there are any."""
    return [(record.num_new_tokens - len(record.texts)) / seconds for seconds in decode_seconds(record)]


def plain_step_seconds(record: RouteRecord) -> list[float]:
    """Seconds of one plain decode step in each repeat, where there are any."""
    return [seconds / record.num_steps for seconds in decode_seconds(record)]


def decode_speedup(record: RouteRecord, baseline: RouteRecord) -> float | None:
    """Median ratio of the rates after the first tokens; `None` where one of them is not known."""
    rates, plain_rates = decode_tokens_per_second(record), decode_tokens_per_second(baseline)
    return median(ratios(rates, plain_rates)) if rates and plain_rates else None


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Repeat by repeat: what slows both sides of one repeat down cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def add_acceptance(result: RouteResult, record: RouteRecord) -> None:
    """How many proposals were accepted, as far as it is known."""
    if record.stats is None:
        result.acceptance_length = 1.0  # Plain decoding: every round is one token.
        return
    result.acceptance_length = record.stats.acceptance_length
    if record.route.name == "pld":
        return  # How many proposals it finds differs from round to round, and the host does not say.
    result.histogram = list(record.stats.histogram)
    result.position_acceptance = list(record.stats.position_acceptance)
    if record.route.is_pard:
        result.acceptance_rate = record.stats.acceptance_rate


def seconds_of_part(record: RouteRecord, name: str) -> list[float]:
    """Seconds of a part of a round in each repeat."""
    return [getattr(parts, name) / parts.num_rounds for parts in record.parts]


def add_rounds(result: RouteResult, record: RouteRecord, bytes_seconds: float) -> None:
    """What the rounds cost, and how near they come to the device's bandwidth."""
    draft, verify, loop = (seconds_of_part(record, name) for name in ("draft", "verify", "loop"))
    whole = sum(draft + verify + loop)
    result.draft_seconds, result.verify_seconds, result.loop_seconds = median(draft), median(verify), median(loop)
    result.draft_share, result.verify_share, result.loop_share = (sum(part) / whole for part in (draft, verify, loop))
    timed = [(s - p.prefill) / p.num_rounds for s, p in zip(record.seconds, record.parts, strict=True)]
    if min(timed) > 0:
        result.seconds_per_round = median(timed)
        result.bandwidth_share = bytes_seconds / result.seconds_per_round


def add_ideal(result: RouteResult, record: RouteRecord, baseline: RouteRecord) -> None:
    """How rounds compare with plain steps, and what is made of it."""
    steps = plain_step_seconds(baseline)
    if not steps or result.acceptance_length is None:
        return
    drafts = seconds_of_part(record, "draft")
    result.baseline = baseline.route.name
    result.verify_ratio = median(ratios(seconds_of_part(record, "verify"), steps))
    result.ideal_speedup = median(result.acceptance_length / (1 + share) for share in ratios(drafts, steps))
    speedup = median(ratios(tokens_per_second(record), tokens_per_second(baseline)))
    result.ideal_share = speedup / result.ideal_speedup
    decoding = decode_speedup(record, baseline)
    result.decode_ideal_share = None if decoding is None else decoding / result.ideal_speedup
