"""Choose how many tokens to propose in a round, and whether as a chain or as a tree.

The adaptive schedule weighs the cost of a round of so many proposals on this machine at this batch size against how
many of them were accepted recently; K = 0 is plain decoding.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Callable, Hashable
from math import inf, log
from typing import NamedTuple

SCHEDULES = ("constant", "adaptive")
# What the adaptive schedule chooses among, up to the K and N of a call; trees are of at least `MIN_TREE_DEPTH`.
COUNTS, TREE_SIZES = (0, 2, 4, 8, 12, 16), (4, 8, 16, 32, 64)
MIN_TREE_DEPTH = 4
# Rounds of a choice before its cost is believed; the first is thrown away, for it pays for new shapes.
NUM_TRIALS = 3
# Every so many rounds another choice is explored that promises at least this share of the best rate; every fourth time
# any other, since what it promises may date from a moment when the machine was busy.
EXPLORE_EVERY, EXPLORE_MIN_RATE = 48, 0.7
# Weight of past acceptance when one more round comes in, and rounds' worth of belief that a position is accepted as
# often as the one before it, the first one as often as `FIRST_ACCEPTANCE`.
MEMORY, PRIOR, FIRST_ACCEPTANCE = 0.98, 2.0, 0.7


def check_schedule(name: str, num_assistant_tokens: int | None, has_chains: bool = True) -> None:
    """Raise a `ValueError` for a schedule we do not have, or a K of chains that it cannot choose."""
    if name not in SCHEDULES:
        raise ValueError(
            f"Expected `num_assistant_tokens_schedule` to be one of {SCHEDULES}, got {name!r}. Drop it for a constant "
            "number of proposals."
        )
    if name == "adaptive" and has_chains and num_assistant_tokens not in COUNTS:
        raise ValueError(
            f"Expected `num_assistant_tokens` to be one of {COUNTS[1:]} with the adaptive schedule, which chooses "
            f"among these up to it, got {num_assistant_tokens}."
        )


class Choice(NamedTuple):
    """What a round proposes: K tokens in a chain, or a tree of N nodes up to K deep."""

    num_drafts: int
    tree_size: int = 0

    @property
    def num_proposals(self) -> int:
        """Count the target's queries after the last known token."""
        return self.tree_size or self.num_drafts

    def at_most(self, num_drafts: int) -> Choice:
        """Return the same choice with paths of at most `num_drafts` tokens."""
        return Choice(min(self.num_drafts, num_drafts), self.tree_size if num_drafts > 0 else 0)


class Trials:
    """Rounds of one choice under one kind of work: how many, the latest of all rounds, seconds of the last few."""

    def __init__(self) -> None:
        self.count = self.latest = 0
        self.seconds: deque[float] = deque(maxlen=9)


class RoundCosts:
    """Measurements of a pair from call to call: seconds of rounds, and acceptance by tree size and depth."""

    def __init__(self) -> None:
        self.trials: dict[tuple[Hashable, Choice], Trials] = {}
        self.num_rounds = 0
        # By tree size (0 = chain) and depth: rounds that got as far, and those that got past it.
        self.reached: dict[int, list[list[float]]] = {}

    def add_seconds(self, work: Hashable, choice: Choice, seconds: float) -> None:
        self.num_rounds += 1
        trials = self.trials.setdefault((work, choice), Trials())
        trials.count, trials.latest = trials.count + 1, self.num_rounds
        if trials.count > 1:
            trials.seconds.append(seconds)

    def trials_of(self, work: Hashable, choice: Choice) -> Trials:
        return self.trials.get((work, choice), Trials())

    def cost(self, work: Hashable, choice: Choice) -> float | None:
        """Estimate seconds of a round: the minimum of recent rounds, since other load on the machine only adds.

        Unmeasured choices are interpolated over the number of proposals; `None` before anything was measured.
        """
        if self.trials_of(work, choice).seconds:
            return min(self.trials_of(work, choice).seconds)
        measured: dict[float, float] = {}
        for (kind, other), trials in list(self.trials.items()):  # A copy: another thread may add to it.
            if kind == work and trials.seconds:
                measured[other.num_proposals] = min(measured.get(other.num_proposals, inf), *trials.seconds)
        return on_line(measured, choice.num_proposals) if measured else None

    def add_accepted(self, choice: Choice, num_accepted: int) -> None:
        reached = self.reached.setdefault(choice.tree_size, [[0.0, 0.0] for _ in range(COUNTS[-1])])
        for depth, counts in enumerate(reached[: choice.num_drafts]):
            counts[0] = MEMORY * counts[0] + (num_accepted >= depth)
            counts[1] = MEMORY * counts[1] + (num_accepted > depth)

    def tokens(self, choice: Choice) -> float:
        """Estimate the expected tokens of a round, bonus token included.

        The gain of a doubling of the tree falls slowly, so sizes not tried are interpolated over their logarithms.
        """
        sizes = list(self.reached) or [choice.tree_size]
        lengths = {log(1 + size): self.expected_length(size, choice.num_drafts) for size in sizes}
        return on_line(lengths, log(1 + choice.tree_size))

    def expected_length(self, tree_size: int, num_drafts: int) -> float:
        share, probability, length = FIRST_ACCEPTANCE, 1.0, 1.0
        for tried, passed in self.reached.get(tree_size, [[0.0, 0.0]] * num_drafts)[:num_drafts]:
            share = (passed + PRIOR * share) / (tried + PRIOR)
            probability *= share
            length += probability
        return length


def on_line(known: dict[float, float], x: float) -> float:
    """Return the value at `x`: a known one, or that of the line through its neighbors, which does not fall."""
    points = sorted(known)
    if x in known or len(points) == 1:
        return known.get(x, known[points[0]])
    above = min(max(bisect(points, x), 1), len(points) - 1)
    low, high = points[above - 1], points[above]
    return known[low] + max(known[high] - known[low], 0.0) * (x - low) / (high - low)


class Schedule:
    """Choose what each round proposes: K and N or, with the costs of a pair, what promises most tokens a second.

    Costs are wall times of this run, so what is chosen, and with it the noise that a sampled batch draws, can differ
    from run to run; a greedy text, or a single sampled one, cannot. An adaptive schedule stays at or below K and N.
    """

    def __init__(
        self,
        num_assistant_tokens: int,
        tree_size: int = 0,
        costs: RoundCosts | None = None,
        has_chains: bool = True,
    ):
        self.largest, self.costs = Choice(num_assistant_tokens, tree_size), costs
        counts = COUNTS if has_chains else COUNTS[:1]
        chains = [Choice(count) for count in counts if count <= num_assistant_tokens]
        self.longest_chain = chains[-1]
        depths = [chain.num_drafts for chain in chains if chain.num_drafts >= MIN_TREE_DEPTH]
        sizes = [size for size in TREE_SIZES if size < tree_size] + ([tree_size] if tree_size else [])
        self.choices = chains + [Choice(depth, size) for size in sizes for depth in depths or [num_assistant_tokens]]

    @property
    def is_adaptive(self) -> bool:
        return self.costs is not None

    def choose(self, work: Hashable, is_ready: Callable[[Choice], bool] = lambda choice: True) -> Choice:
        """Choose for a round whose cost depends on `work`; `is_ready` tells what runs without being compiled first."""
        costs = self.costs
        if costs is None:
            return self.largest
        # The ends first: everything between them can then be told from a line.
        for choice in (self.largest, self.longest_chain, Choice(0)):
            if costs.trials_of(work, choice).count < NUM_TRIALS:
                return choice
        rates = {choice: costs.tokens(choice) / (costs.cost(work, choice) or inf) for choice in self.choices}
        best = max(rates, key=lambda choice: rates[choice])
        number, rest = divmod(costs.num_rounds, EXPLORE_EVERY)
        if rest == EXPLORE_EVERY - 1:
            least = EXPLORE_MIN_RATE * rates[best] if number % 4 else 0.0
            # What promises most is worth compiling; what is only explored is not.
            others = [c for c in self.choices if c != best and rates[c] >= least and is_ready(c)]
            return min(others, key=lambda choice: costs.trials_of(work, choice).latest, default=best)
        return best

    def record(self, work: Hashable, choice: Choice, seconds: float | None, num_accepted: list[int]) -> None:
        """Record a round: its wall time (`None` = not typical) and what unfinished rows accepted."""
        if self.costs is None:
            return
        if seconds is not None:
            self.costs.add_seconds(work, choice, seconds)
        for count in num_accepted:
            self.costs.add_accepted(choice, count)
