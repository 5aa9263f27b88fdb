"""The formulas from what was measured to what is reported.

Everything here is a pure function of records: no model, no clock. A ratio is taken in each repeat, whose routes took
turns, and then the median of the repeats.
"""

from __future__ import annotations

from statistics import median

from .measurement import RouteRecord
from .results import RouteResult
from .routes import COMPILED_BY_HOST


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
