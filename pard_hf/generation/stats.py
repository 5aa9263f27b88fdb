"""What a decoding run did, as counts and the formulas over them.

Knows nothing but integers: no tensor, no model, no clock. Ratios are derived, never stored, so that the statistics of
two runs merge by addition. Symbols: K = `num_assistant_tokens`, n = accepted draft tokens of a round.

Where the time of a generation goes, measured only where somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch


@dataclass(frozen=True)
class DecodingStats:
    """Counts over rounds; a round is one draft and one verify of one row, also when the verify is fused with prefill.

    Args:
        histogram (`tuple[int, ...]`, *optional*, defaults to `()`):
            Entry `n` counts the rounds that accepted `n` draft tokens, the bonus token not counted. Accepted tokens
            are counted after the cut at an end token or at `max_length`.
        num_drafted (`int`, *optional*, defaults to 0):
            Draft tokens that could still be accepted when they were proposed; near `max_length` fewer than K a round.
            All nodes of a tree count, though those of one path can be accepted at most.
        loop (`str`, *optional*):
            What ran the rounds: `"own"`, `"lockstep"` (our loop, column by column), `"stock"` (the assisted loop of
            transformers) or `"none"` (plain decoding, the draft was not used); `"mixed"` in a sum of several.
        fallback_reason (`str`, *optional*):
            Why a call left our loop; `None` where it did not.
    """

    histogram: tuple[int, ...] = ()
    num_drafted: int = 0
    loop: str | None = None
    fallback_reason: str | None = None

    @property
    def num_rounds(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        return sum(n * rounds for n, rounds in enumerate(self.histogram))

    @property
    def num_tokens(self) -> int:
        """Tokens emitted by rounds, bonus tokens included."""
        return self.num_accepted + self.num_rounds

    @property
    def acceptance_length(self) -> float:
        """Tau: mean tokens a round, bonus token included; in `[1, K + 1]`, 0 where no round ran."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Alpha: accepted over drafted tokens."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def position_acceptance(self) -> tuple[float, ...]:
        """Entry `i - 1` is a_i: the share of rounds whose i-th draft token was accepted."""
        return tuple(sum(self.histogram[i:]) / self.num_rounds for i in range(1, len(self.histogram)))

    def __add__(self, other: DecodingStats) -> DecodingStats:
        if not isinstance(other, DecodingStats):
            return NotImplemented
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        loops = {self.loop, other.loop} - {None}
        return DecodingStats(
            tuple(a + b for a, b in pairs),
            self.num_drafted + other.num_drafted,
            "mixed" if len(loops) > 1 else next(iter(loops), None),
            self.fallback_reason or other.fallback_reason,
        )

    def record(self, num_accepted: int, num_drafted: int) -> DecodingStats:
        """Return these statistics with one more round."""
        return self + DecodingStats((0,) * num_accepted + (1,), num_drafted)

    def to_dict(self) -> dict[str, Any]:
        """Counts and ratios under the names used in JSON results."""
        return {
            "num_rounds": self.num_rounds,
            "num_drafted": self.num_drafted,
            "num_accepted": self.num_accepted,
            "acceptance_length": round(self.acceptance_length, 4),
            "acceptance_rate": round(self.acceptance_rate, 4),
            "position_acceptance": [round(a, 4) for a in self.position_acceptance],
            "histogram": list(self.histogram),
        }


class RoundClock:
    """Seconds of each part: `prefill` is the whole first round, `draft`, `verify` and `loop` the sums over the others.

    A device that works ahead is waited for at every mark, so a measured run is slower than an unmeasured one.
    """

    def __init__(self) -> None:
        self.prefill = self.draft = self.verify = self.loop = 0.0
        self.num_rounds = 0
        self.since = 0.0
        self.parts: list[tuple[str, float]] = []

    def start(self, device: torch.device) -> None:
        """Begin to measure what comes next."""
        self.device = device
        self.since = self.now()

    def mark(self, part: str) -> None:
        """Count the time since the last mark as `part` of this round."""
        now = self.now()
        self.parts.append((part, now - self.since))
        self.since = now

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def end_round(self, is_prefill: bool) -> None:
        """Book a round and its rest; the parts of a first round all count as prefill."""
        self.mark("loop")
        for part, seconds in self.parts:
            name = "prefill" if is_prefill else part
            setattr(self, name, getattr(self, name) + seconds)
        self.parts.clear()
        self.num_rounds += not is_prefill


class NoClock(RoundClock):
    """Measures nothing and waits for nothing."""

    def start(self, device: torch.device) -> None: ...

    def mark(self, part: str) -> None: ...

    def end_round(self, is_prefill: bool) -> None: ...


clock_of_call: ContextVar[RoundClock | None] = ContextVar("clock_of_call", default=None)


@contextmanager
def measure_rounds() -> Iterator[RoundClock]:
    """Measure the parts of every round generated inside; what several calls took adds up.

    >>> with measure_rounds() as clock:
    ...     target.generate(**inputs, assistant_model=draft)
    >>> clock.draft, clock.verify, clock.loop
    """
    clock = RoundClock()
    reset = clock_of_call.set(clock)
    try:
        yield clock
    finally:
        clock_of_call.reset(reset)
