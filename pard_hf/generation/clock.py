"""Where the time of a generation goes, measured only where somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


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
