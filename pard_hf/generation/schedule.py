"""How many tokens to propose in a round.

Knows counts and seconds; knows nothing of models and tensors. `adaptive` weighs what a round of K proposals has cost
on this machine at this batch size against how many of them have been accepted lately; K = 0 is plain decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

COUNTS = (0, 2, 4, 8, 12, 16)
SCHEDULES = ("constant", "adaptive")
# A cost is believed after this many rounds, the first of which is thrown away: it pays for new shapes.
NUM_TRIALS = 3
# Rounds between two looks at another count that promises at least this share of the best rate. Every fourth look is
# at whatever was not tried for longest: what it promised may date from a moment when the machine was busy.
LOOK_EVERY, LOOK_SHARE = 48, 0.7
# Weight of the past when one more round comes in, and of the belief that each position repeats the one before it.
MEMORY, PRIOR = 0.98, 2.0


def check_schedule(name: str, num_assistant_tokens: int) -> None:
    """Raise a `ValueError` for a schedule we do not have, or a K that it cannot choose."""
    if name not in SCHEDULES:
        raise ValueError(
            f"Expected `num_assistant_tokens_schedule` to be one of {SCHEDULES}, got {name!r}. Drop it for a constant "
            "number of proposals."
        )
    if name == "adaptive" and num_assistant_tokens not in COUNTS:
        raise ValueError(
            f"Expected `num_assistant_tokens` to be one of {COUNTS[1:]} with the adaptive schedule, which chooses "
            f"among these up to it, got {num_assistant_tokens}."
        )


class ConstantSchedule:
    """The same K every round."""

    is_adaptive = False

    def __init__(self, num_assistant_tokens: int):
        self.most = num_assistant_tokens

    def choose(self, work: Hashable) -> int:
        """K for the next round; rounds of equal `work` cost about the same."""
        return self.most

    def record(self, work: Hashable, num_drafts: int, seconds: float | None, num_accepted: list[int]) -> None:
        """Learn from a round: its wall time (`None` = not typical) and what unfinished rows accepted."""


class RoundCosts:
    """What is known of a pair from call to call: seconds of rounds, and acceptance by position."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[Hashable, int], deque[float]] = {}
        self.num_trials: dict[tuple[Hashable, int], int] = {}
        self.last_tried: dict[tuple[Hashable, int], int] = {}
        self.num_rounds = 0
        self.tried = [0.0] * COUNTS[-1]
        self.passed = [0.0] * COUNTS[-1]

    def add_seconds(self, work: Hashable, num_drafts: int, seconds: float) -> None:
        key = work, num_drafts
        self.num_trials[key] = self.num_trials.get(key, 0) + 1
        self.num_rounds += 1
        self.last_tried[key] = self.num_rounds
        if self.num_trials[key] > 1:
            self.seconds.setdefault(key, deque(maxlen=9)).append(seconds)

    def is_known(self, work: Hashable, num_drafts: int) -> bool:
        return self.num_trials.get((work, num_drafts), 0) >= NUM_TRIALS

    def cost(self, work: Hashable, num_drafts: int) -> float | None:
        """Seconds of a round: the least of late, for what else runs on the machine only adds to it.

        Between and beyond what was measured, on a line; `None` before there is one.
        """
        # A copy: another thread may add to it.
        known = {k: min(past) for (w, k), past in list(self.seconds.items()) if w == work}
        if num_drafts in known:
            return known[num_drafts]
        if len(known) < 2:
            return None
        first, second = sorted(sorted(known, key=lambda k: abs(k - num_drafts))[:2])
        slope = max((known[second] - known[first]) / (second - first), 0.0)
        return known[first] + slope * (num_drafts - first)

    def add_accepted(self, num_drafts: int, num_accepted: int) -> None:
        for position in range(num_drafts):
            self.tried[position] *= MEMORY
            self.passed[position] *= MEMORY
            if num_accepted >= position:
                self.tried[position] += 1
                self.passed[position] += num_accepted > position

    def tokens(self, num_drafts: int) -> float:
        """Expected tokens of a round, bonus token included."""
        total = reached = 1.0
        share = 0.7
        for position in range(num_drafts):
            share = (self.passed[position] + PRIOR * share) / (self.tried[position] + PRIOR)
            reached *= share
            total += reached
        return total


class AdaptiveSchedule(ConstantSchedule):
    """The K that has promised most tokens a second, among the counts up to `num_assistant_tokens`.

    Costs are wall times of this run, so which K is chosen, and with it the noise that a sampled batch draws, can
    differ from run to run; a greedy text, or a single sampled one, cannot.
    """

    is_adaptive = True

    def __init__(self, num_assistant_tokens: int, costs: RoundCosts):
        super().__init__(num_assistant_tokens)
        self.counts = [count for count in COUNTS if count <= num_assistant_tokens]
        self.costs = costs

    def rate(self, work: Hashable, num_drafts: int) -> float:
        cost = self.costs.cost(work, num_drafts)
        return self.costs.tokens(num_drafts) / cost if cost else 0.0

    def choose(self, work: Hashable) -> int:
        # The two ends first: everything between them can then be told from a line.
        for count in (self.most, 0):
            if not self.costs.is_known(work, count):
                return count
        rates = {count: self.rate(work, count) for count in self.counts}
        best = max(rates, key=lambda count: rates[count])
        num_looks, rest = divmod(self.costs.num_rounds, LOOK_EVERY)
        if rest == LOOK_EVERY - 1:
            least = LOOK_SHARE * rates[best] if num_looks % 4 else 0.0
            others = [count for count in self.counts if count != best and rates[count] >= least]
            if others:
                return min(others, key=lambda count: self.costs.last_tried.get((work, count), 0))
        return best

    def record(self, work: Hashable, num_drafts: int, seconds: float | None, num_accepted: list[int]) -> None:
        if seconds is not None:
            self.costs.add_seconds(work, num_drafts, seconds)
        for count in num_accepted:
            self.costs.add_accepted(num_drafts, count)
