"""How many tokens to propose in a round, and whether as a chain or as a tree.

Knows counts and seconds; knows nothing of models and tensors. `adaptive` weighs what a round of so many proposals has
cost on this machine at this batch size against how many of them have been accepted lately; K = 0 is plain decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from math import log
from typing import NamedTuple

COUNTS = (0, 2, 4, 8, 12, 16)
TREE_SIZES = (0, 4, 8, 16, 32, 64)
# Trees are for many rows; with few, depths below this one are a chain's.
SHALLOWEST_TREE = 4
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


class Choice(NamedTuple):
    """What a round proposes: K tokens one behind the other, or a tree of N nodes up to K deep."""

    num_drafts: int
    tree_size: int = 0

    @property
    def num_proposals(self) -> int:
        """Rows that the target verifies beside the last known token."""
        return self.tree_size or self.num_drafts

    def at_most(self, num_drafts: int) -> Choice:
        """The same with paths no longer than that."""
        return Choice(min(self.num_drafts, num_drafts), self.tree_size if num_drafts > 0 else 0)


def always(choice: Choice) -> bool:
    """Every choice runs without being compiled first."""
    return True


class ConstantSchedule:
    """The same choice every round.

    Args:
        num_assistant_tokens (`int`) and tree_size (`int`, *optional*, defaults to 0):
            K and N.
    """

    is_adaptive = False

    def __init__(self, num_assistant_tokens: int, tree_size: int = 0):
        self.largest = Choice(num_assistant_tokens, tree_size)

    def choose(self, work: Hashable, is_ready: Callable[[Choice], bool] = always) -> Choice:
        """What the next round proposes.

        Args:
            work (`Hashable`):
                Rounds of equal work cost about the same.
            is_ready (`Callable`, *optional*):
                Whether a choice runs without being compiled first.
        """
        return self.largest

    def record(self, work: Hashable, choice: Choice, seconds: float | None, num_accepted: list[int]) -> None:
        """Learn from a round: its wall time (`None` = not typical) and what unfinished rows accepted."""


class RoundCosts:
    """What is known of a pair from call to call: seconds of rounds, and acceptance by tree size and depth."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[Hashable, Choice], deque[float]] = {}
        self.num_trials: dict[tuple[Hashable, Choice], int] = {}
        self.last_tried: dict[tuple[Hashable, Choice], int] = {}
        self.num_rounds = 0
        # Of each tree size (0 = chain): rounds that got as far as a depth, and those that got past it.
        self.tried: dict[int, list[float]] = {}
        self.passed: dict[int, list[float]] = {}

    def add_seconds(self, work: Hashable, choice: Choice, seconds: float) -> None:
        key = work, choice
        self.num_trials[key] = self.num_trials.get(key, 0) + 1
        self.num_rounds += 1
        self.last_tried[key] = self.num_rounds
        if self.num_trials[key] > 1:
            self.seconds.setdefault(key, deque(maxlen=9)).append(seconds)

    def is_known(self, work: Hashable, choice: Choice) -> bool:
        return self.num_trials.get((work, choice), 0) >= NUM_TRIALS

    def cost(self, work: Hashable, choice: Choice) -> float | None:
        """Seconds of a round: the least of late, for what else runs on the machine only adds to it.

        Between and beyond what was measured, on a line over the rows that are verified; `None` before there is one.
        """
        # A copy: another thread may add to it.
        known = {known: min(past) for (w, known), past in list(self.seconds.items()) if w == work}
        if choice in known:
            return known[choice]
        by_rows: dict[int, float] = {}
        for other, seconds in known.items():
            by_rows[other.num_proposals] = min(seconds, by_rows.get(other.num_proposals, seconds))
        num_rows = choice.num_proposals
        if num_rows in by_rows:
            return by_rows[num_rows]
        if len(by_rows) < 2:
            return None
        first, second = sorted(sorted(by_rows, key=lambda rows: abs(rows - num_rows))[:2])
        slope = max((by_rows[second] - by_rows[first]) / (second - first), 0.0)
        return by_rows[first] + slope * (num_rows - first)

    def add_accepted(self, choice: Choice, num_accepted: int) -> None:
        tried = self.tried.setdefault(choice.tree_size, [0.0] * COUNTS[-1])
        passed = self.passed.setdefault(choice.tree_size, [0.0] * COUNTS[-1])
        for depth in range(min(choice.num_drafts, COUNTS[-1])):
            tried[depth] *= MEMORY
            passed[depth] *= MEMORY
            if num_accepted >= depth:
                tried[depth] += 1
                passed[depth] += num_accepted > depth

    def shares(self, tree_size: int) -> list[float]:
        """Of a tree size, the share of rounds reaching each depth that get past it; a guess where none was tried."""
        shares, share, nothing = [], 0.7, [0.0] * COUNTS[-1]
        tried_and_passed = (counts.get(tree_size, nothing) for counts in (self.tried, self.passed))
        for tried, passed in zip(*tried_and_passed, strict=True):
            share = (passed + PRIOR * share) / (tried + PRIOR)
            shares.append(share)
        return shares

    def tokens(self, choice: Choice) -> float:
        """Expected tokens of a round, bonus token included; of other tree sizes, between the nearest that were tried.

        What one more doubling of a tree adds falls slowly, so tree sizes count by their logarithm.
        """
        sizes = sorted(self.tried) or [0]
        below = max((size for size in sizes if size <= choice.tree_size), default=sizes[0])
        above = min((size for size in sizes if size >= choice.tree_size), default=sizes[-1])
        weight = 0.0
        if above > below:
            weight = log((1 + choice.tree_size) / (1 + below)) / log((1 + above) / (1 + below))
        total = reached = 1.0
        for low, high in list(zip(self.shares(below), self.shares(above), strict=True))[: choice.num_drafts]:
            reached *= low + weight * (high - low)
            total += reached
        return total


class AdaptiveSchedule(ConstantSchedule):
    """The K and the tree that have promised most tokens a second, up to `num_assistant_tokens` and `tree_size`.

    Costs are wall times of this run, so what is chosen, and with it the noise that a sampled batch draws, can differ
    from run to run; a greedy text, or a single sampled one, cannot.
    """

    is_adaptive = True

    def __init__(self, num_assistant_tokens: int, costs: RoundCosts, tree_size: int = 0):
        super().__init__(num_assistant_tokens, tree_size)
        self.costs = costs
        chains = [Choice(count) for count in COUNTS if count <= num_assistant_tokens]
        deep = [chain.num_drafts for chain in chains if chain.num_drafts >= SHALLOWEST_TREE]
        sizes = [size for size in TREE_SIZES[1:] if size < tree_size] + ([tree_size] if tree_size else [])
        self.choices = chains + [Choice(depth, size) for size in sizes for depth in deep or [num_assistant_tokens]]

    def rate(self, work: Hashable, choice: Choice) -> float:
        cost = self.costs.cost(work, choice)
        return self.costs.tokens(choice) / cost if cost else 0.0

    def choose(self, work: Hashable, is_ready: Callable[[Choice], bool] = always) -> Choice:
        # The ends first: everything between them can then be told from a line.
        for choice in (self.largest, Choice(self.largest.num_drafts), Choice(0)):
            if not self.costs.is_known(work, choice):
                return choice
        rates = {choice: self.rate(work, choice) for choice in self.choices}
        best = max(rates, key=lambda choice: rates[choice])
        num_looks, rest = divmod(self.costs.num_rounds, LOOK_EVERY)
        if rest == LOOK_EVERY - 1:
            least = LOOK_SHARE * rates[best] if num_looks % 4 else 0.0
            # What promises most is worth compiling; what is only looked at again is not.
            others = [c for c in self.choices if c != best and rates[c] >= least and is_ready(c)]
            if others:
                return min(others, key=lambda choice: self.costs.last_tried.get((work, choice), 0))
        return best

    def record(self, work: Hashable, choice: Choice, seconds: float | None, num_accepted: list[int]) -> None:
        if seconds is not None:
            self.costs.add_seconds(work, choice, seconds)
        for count in num_accepted:
            self.costs.add_accepted(choice, count)
