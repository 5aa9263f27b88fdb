"""Record the runs of one route in one cell of a benchmark, and compute its metrics.

Times are in seconds and sizes in bytes. A ratio is taken in each repeat, in which the routes took turns; results hold
its median with `[least, most]` as its range. A metric that was not measured is absent from the JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..generation.stats import DecodingStats
from .routes import Route

MEMORY_NOTE = "kept from batch to batch; emptied before each repeat"
# New tokens by the index of the prompt.
Texts = dict[int, list[int]]


@dataclass
class RouteRecord:
    """One route on all batches of a cell.

    `records` are all routes of the cell, `ar` among them. `texts` are the new tokens of each prompt in the warm-up, up
    to and with the end token; `differing` those of any run that are not plain `generate`'s. Each repeat has an entry,
    summed over batches, in `seconds` (wall time), `first_seconds` (of a run for one token) and `round_seconds` (steps
    of the rounds, and `num_rounds`). `num_steps` counts the forwards of plain `generate` for these texts;
    `copy_seconds` is the time of copying the bytes of a round on the device.
    """

    route: Route
    records: dict[str, RouteRecord] = field(repr=False)
    num_batches: int = 1
    texts: Texts = field(default_factory=dict)
    differing: Texts = field(default_factory=dict)
    stats: DecodingStats | None = None
    warm_up_seconds: float = 0.0
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    round_seconds: list[Counter[str]] = field(default_factory=list)
    peak_memory: int | None = None
    num_steps: int = 0
    copy_seconds: float = 0.0
    logit_gaps: dict[int, float | None] = field(default_factory=dict)
    difference: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return for_json({**self.speed(), **self.acceptance(), **self.rounds(), **self.agreement()})

    @property
    def num_new_tokens(self) -> int:
        return sum(map(len, self.texts.values()))

    @property
    def rates(self) -> list[float]:
        """Return tokens a second in each repeat, prefill included."""
        return [self.num_new_tokens / seconds for seconds in self.seconds]

    @property
    def decode_seconds(self) -> list[float]:
        """Return seconds after the first tokens in each repeat; empty where texts are too short."""
        seconds = [whole - first for whole, first in zip(self.seconds, self.first_seconds, strict=True)]
        return seconds if self.num_steps and min(seconds) > 0 else []

    @property
    def decode_rates(self) -> list[float]:
        return [(self.num_new_tokens - len(self.texts)) / seconds for seconds in self.decode_seconds]

    @property
    def step_seconds(self) -> list[float]:
        """Return, for a plain route, seconds of a forward for one token of each batch row, in each repeat."""
        return [seconds / self.num_steps for seconds in self.decode_seconds]

    @property
    def acceptance_length(self) -> float:
        """Return τ, mean tokens a round with the bonus token; every round of plain decoding is one token."""
        return 1.0 if self.stats is None else self.stats.acceptance_length

    def speed(self) -> dict[str, Any]:
        """Compute tokens a second, and over those of plain `generate`: with equal texts the ratio of wall times."""
        ar, ar_plus = self.records["ar"], self.records.get("ar_plus")
        over_ar = ratios(self.rates, ar.rates)
        over_ar_plus = ratios(self.rates, ar_plus.rates) if ar_plus else []
        compile_seconds = self.compile_seconds
        if self.route.is_compiled_by_transformers:
            compile_seconds = max(self.warm_up_seconds - median(self.seconds), 0.0)
        return {
            "route": self.route.name,
            "assistant_memory": MEMORY_NOTE if self.route.keeps_memory else None,
            "tokens_per_second": median(self.rates),
            "tokens_per_second_range": bounds(self.rates),
            "time_to_first_token": median(self.first_seconds) / self.num_batches,
            "speedup": median(over_ar),
            "speedup_range": bounds(over_ar),
            "num_new_tokens": self.num_new_tokens,
            "seconds": self.seconds,
            "decode_tokens_per_second": middle(self.decode_rates),
            "decode_speedup": middle(ratios(self.decode_rates, ar.decode_rates)),
            "speedup_over_ar_plus": middle(over_ar_plus),
            "speedup_over_ar_plus_range": bounds(over_ar_plus),
            "compile_seconds": compile_seconds,
            "peak_memory": self.peak_memory,
            "plain_step_seconds": middle(self.step_seconds) if self.route.loop == "none" else None,
        }

    def acceptance(self) -> dict[str, Any]:
        """Count accepted proposals; transformers does not report how many prompt lookup makes."""
        stats = None if self.route.name == "pld" else self.stats
        return {
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": stats.acceptance_rate if stats and self.route.is_pard else None,
            "position_acceptance": list(stats.position_acceptance) if stats else None,
            "histogram": list(stats.histogram) if stats else None,
            "accepted_by_source": stats.accepted_by_source if stats else None,
        }

    def rounds(self) -> dict[str, Any]:
        """Return the cost of a round by step, and the speedup that is possible at this τ and these costs.

        Only where every round has the same K. Steps are timed in runs of their own, which wait for the device.
        """
        if self.route.is_adaptive or not self.round_seconds or not self.round_seconds[0]["num_rounds"]:
            return {}
        repeats = self.round_seconds
        steps = {name: [r[name] / r["num_rounds"] for r in repeats] for name in ("draft", "verify", "loop")}
        whole = sum(map(sum, steps.values()))
        rounds = [(s - r["prefill"]) / r["num_rounds"] for s, r in zip(self.seconds, repeats, strict=True)]
        seconds_per_round = median(rounds) if min(rounds) > 0 else None
        return {
            **{f"{name}_seconds": median(seconds) for name, seconds in steps.items()},
            **{f"{name}_share": sum(seconds) / whole for name, seconds in steps.items()},
            "seconds_per_round": seconds_per_round,
            "bandwidth_share": self.copy_seconds / seconds_per_round if seconds_per_round else None,
            **self.ideal(steps["draft"], steps["verify"]),
        }

    def ideal(self, draft: list[float], verify: list[float]) -> dict[str, Any]:
        """Compute τ / (1 + draft / plain step), and the share of it that is reached.

        The baseline is the plain route that runs its forwards as the rounds do: compiled if that was measured.
        """
        ar = self.records["ar"]
        baseline = self.records.get("ar_plus", ar) if self.route.is_compiled else ar
        if not (steps := baseline.step_seconds):
            return {}
        ideal = median(self.acceptance_length / (1 + share) for share in ratios(draft, steps))
        decode_speedup = middle(ratios(self.decode_rates, baseline.decode_rates))
        return {
            "baseline": baseline.route.name,
            "verify_ratio": median(ratios(verify, steps)),
            "ideal_speedup": ideal,
            "ideal_share": median(ratios(self.rates, baseline.rates)) / ideal,
            "decode_ideal_share": None if decode_speedup is None else decode_speedup / ideal,
        }

    def agreement(self) -> dict[str, Any]:
        """Count the texts equal to plain `generate`'s in every run, and locate where the others first differ."""
        return {
            "identical_share": 1 - len(self.differing) / len(self.texts),
            "difference": self.difference,
            "logit_gaps": known(self.logit_gaps) if self.differing else None,
        }


def middle(values: Sequence[float]) -> float | None:
    """Return the median, or `None` where nothing was measured."""
    return median(values) if values else None


def bounds(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide repeat by repeat, so that what slows both sides of one repeat cancels; empty where one is not known."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)] if numerators and denominators else []


def known(gaps: dict[int, float | None]) -> list[float]:
    return [gap for gap in gaps.values() if gap is not None]


def for_json(values: Any) -> Any:
    """Copy nested values without the entries that are `None`, floats to six digits."""
    if isinstance(values, dict):
        return {name: for_json(value) for name, value in values.items() if value is not None}
    if isinstance(values, list):
        return [for_json(value) for value in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values


def repeated_share(texts: Iterable[Sequence[int]], size: int = 4) -> float:
    """Compute the share of n-grams that occur earlier in the same text: a text that loops is easy to draft."""
    grams = [[tuple(text[i : i + size]) for i in range(len(text) - size + 1)] for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(found)) for found in grams) / total if total else 0.0
