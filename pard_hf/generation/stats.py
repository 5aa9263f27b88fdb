"""Counts of what a decoding run drafted and accepted, the ratios of the field, and the time of each step of a round.

Ratios are derived, never stored, so that the statistics of two runs merge by addition. Symbols: K =
`num_assistant_tokens`, n = accepted draft tokens of a round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch


@dataclass(frozen=True)
class DecodingStats:
    """Counts over rounds; a round is one draft and one verify of one batch row, the prefill's included.

    Args:
        histogram (`tuple[int, ...]`, *optional*, defaults to `()`):
            Entry `n` counts the rounds that accepted `n` draft tokens, the bonus token not counted. Accepted tokens
            are counted after the cut at an end token or at `max_length`.
        num_drafted (`int`, *optional*, defaults to 0):
            Draft tokens that could still be accepted when they were proposed; near `max_length` fewer than K a round.
            All nodes of a tree count, though those of one path can be accepted at most.
        loop (`str`, *optional*):
            What ran the rounds: `"own"`, `"lockstep"` (our loop, token by token), `"stock"` (the assisted loop of
            transformers) or `"none"` (plain decoding without the draft); `"mixed"` in a sum of several.
        fallback_reason (`str`, *optional*):
            Why a call left our loop; `None` where it did not.
        accepted_by_source (`dict[str, int]`, *optional*):
            Accepted tokens by what proposed them, `"draft"`, `"copy"` or `"successors"`; of a token that several
            proposed, the one that held it likeliest. `None` where a draft alone proposed.
        num_compiled (`int`, *optional*, defaults to 0):
            Rounds that ran through `torch.compile`; equal texts may differ in it.
    """

    histogram: tuple[int, ...] = ()
    num_drafted: int = 0
    loop: str | None = None
    fallback_reason: str | None = None
    accepted_by_source: dict[str, int] | None = None
    num_compiled: int = field(default=0, compare=False)

    @property
    def num_rounds(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        return sum(n * rounds for n, rounds in enumerate(self.histogram))

    @property
    def num_tokens(self) -> int:
        """Count the tokens emitted by rounds, bonus tokens included."""
        return self.num_accepted + self.num_rounds

    @property
    def acceptance_length(self) -> float:
        """Return τ, mean tokens a round with the bonus token; in `[1, K + 1]`, 0 where no round ran."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Return α, accepted over drafted tokens."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def position_acceptance(self) -> tuple[float, ...]:
        """Return as entry `i - 1` the share of rounds whose i-th draft token was accepted."""
        return tuple(sum(self.histogram[i:]) / self.num_rounds for i in range(1, len(self.histogram)))

    @property
    def accepted_shares(self) -> dict[str, float]:
        """Return the shares of accepted tokens by source; empty where a draft alone proposed, or none was accepted."""
        counts = self.accepted_by_source or {}
        total = sum(counts.values())
        return {name: count / total for name, count in counts.items()} if total else {}

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
            added(self.accepted_by_source, other.accepted_by_source),
            self.num_compiled + other.num_compiled,
        )

    def record(self, num_accepted: int, num_drafted: int) -> DecodingStats:
        """Return these statistics with one more round."""
        return self + DecodingStats((0,) * num_accepted + (1,), num_drafted)

    def to_dict(self) -> dict[str, Any]:
        """Return counts and ratios under the names used in JSON results."""
        return {
            "num_rounds": self.num_rounds,
            "num_drafted": self.num_drafted,
            "num_accepted": self.num_accepted,
            "acceptance_length": round(self.acceptance_length, 4),
            "acceptance_rate": round(self.acceptance_rate, 4),
            "position_acceptance": [round(a, 4) for a in self.position_acceptance],
            "histogram": list(self.histogram),
            **({} if self.accepted_by_source is None else {"accepted_by_source": self.accepted_by_source}),
        }


def added(one: dict[str, int] | None, other: dict[str, int] | None) -> dict[str, int] | None:
    """Add up counts by name."""
    if one is None or other is None:
        return one or other
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def now(device: torch.device) -> float:
    """Return the time, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class RoundTimes:
    """Seconds of each step of a call's rounds: `prefill` is the whole first round, the others sums over the rest.

    Every mark waits for the device.
    """

    def __init__(self, device: torch.device):
        self.prefill = self.draft = self.verify = self.loop = 0.0
        self.num_rounds = 0
        self.device = device
        self.since = now(device)

    def mark(self, step: str) -> None:
        """Add the time since the last mark to a step."""
        time_now = now(self.device)
        setattr(self, step, getattr(self, step) + time_now - self.since)
        self.since = time_now
