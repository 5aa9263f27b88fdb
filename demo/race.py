"""Plain `generate` and ours on one prompt, one after the other at full speed, each on a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from pard_hf.generation.sources import COMPONENTS
from pard_hf.generation.stats import DecodingStats
from pard_hf.host import CACHE_NAME
from pard_hf.loading import Pair

from .job import Job, Ticket
from .settings import Settings, encoded_prompt


@dataclass(frozen=True)
class Node:
    """One proposal of a round: its token, the column of the one before it (-1 for none), probability and source."""

    token: int
    parent: int
    probability: float
    source: str


@dataclass(frozen=True)
class Round:
    """Tokens of one round: proposals that the target accepted, what proposed each of them, then its own token."""

    accepted: tuple[int, ...]
    bonus: int
    sources: tuple[str, ...]
    seconds: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.accepted, self.bonus)

    @property
    def runs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Accepted tokens that follow each other and are of one source, each run with its source."""
        runs = groupby(zip(self.sources, self.accepted, strict=True), key=lambda sourced: sourced[0])
        return [(source, tuple(token for _, token in run)) for source, run in runs]


def tokens_of(rounds: Iterable[Round]) -> list[int]:
    """All that was said in some rounds."""
    return [token for round_ in rounds for token in round_.tokens]


@dataclass
class Lane:
    """A streamer of `generate()` that keeps rounds, their clocks and their trees. Plain ones have rounds of one token.

    Args:
        check (`Callable[[], None]`, *optional*):
            Called after each round; what it raises ends the generation.
    """

    check: Callable[[], None] = lambda: None
    rounds: list[Round] = field(default_factory=list)
    trees: list[Any] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    has_prompt: bool = False
    start: float = 0.0
    compile_seconds: float = 0.0
    stats: DecodingStats | None = None

    def run(self, pair: Pair, ids: list[int], settings: Settings, proposing: dict[str, Any], **arguments: Any) -> Any:
        """Return what `generate()` gives for token ids, seeded; `proposing` is empty for the plain one."""
        torch.manual_seed(settings.seed)
        inputs = torch.tensor([ids], device=pair.target.device)
        call = {**settings.arguments(), **proposing, **arguments, "return_dict_in_generate": True}
        self.start = time.perf_counter()
        output = pair.target.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=self, **call)
        self.compile_seconds = getattr(output, "compile_seconds", None) or 0.0
        self.stats = getattr(output, "stats", None)
        return output

    def put(self, value: Any) -> None:
        """Take the prompt at first, then the target's own tokens; the stock assisted loop hands over whole rounds."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.close(self.accepted + value.flatten().tolist())
        self.check()

    def put_accepted(self, value: Any, source: str = "draft") -> None:
        """Take accepted tokens of a source."""
        self.accepted += value.flatten().tolist()
        self.sources += [source] * value.numel()

    def put_proposals(self, proposals: Any) -> None:
        """Take what a round proposes; compiled steps write the next round into the same memory."""
        tree = proposals.tree
        self.trees.append(tree and [part if part is None else part[0].clone() for part in tree[:5]])

    def end(self) -> None:
        """Close a last round that ended with an accepted token."""
        if self.accepted:
            self.close(self.accepted)

    def close(self, tokens: list[int]) -> None:
        """Add a round."""
        *accepted, bonus = tokens
        sources = [*self.sources, *["draft"] * len(accepted)][: len(accepted)]  # The stock loop names none.
        seconds = time.perf_counter() - self.start
        self.rounds.append(Round(tuple(accepted), bonus, tuple(sources), seconds))
        self.accepted, self.sources = [], []

    @property
    def tokens(self) -> list[int]:
        return tokens_of(list(self.rounds))

    def clock(self, round_: Round) -> float:
        """When a round ended, in seconds, compiling not counted."""
        return max(round_.seconds - self.compile_seconds, 0.0)

    @property
    def seconds(self) -> float:
        return self.clock(self.rounds[-1]) if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Prefill included; 0 before the first token."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tau so far."""
        return len(self.tokens) / len(self.rounds) if self.rounds else 0.0

    def nodes(self, number: int) -> list[Node]:
        """The tree of a round, from 1; nodes after those they follow."""
        if number > len(self.trees) or not self.trees[number - 1]:
            return []
        tokens, parents, _, logprobs, shares = self.trees[number - 1]
        sources = ["draft"] * len(tokens)
        if shares is not None:
            sources = [COMPONENTS[component] for component in shares.argmax(-1).tolist()]
        columns = tokens.tolist(), (parents - 1).tolist(), logprobs.exp().tolist(), sources
        return [Node(*values) for values in zip(*columns, strict=True)]


class Race(Job):
    """One prompt through both routes. Nothing is remembered from an earlier race: the same text again is no faster."""

    def __init__(self, pair: Pair, prompt: str, settings: Settings, ticket: Ticket | None = None):
        super().__init__(ticket)
        self.pair, self.prompt, self.settings = pair, prompt, settings
        self.plain, self.ours = Lane(self.check), Lane(self.check)
        self.is_done = False

    def work(self) -> None:
        with self.traced():
            ids = encoded_prompt(self.pair, self.prompt, self.settings)
        proposing = self.settings.proposing(self.pair)
        for lane, name, arguments in ((self.plain, "plain generate", {}), (self.ours, "PARD", proposing)):
            self.doing = f"{name} runs, alone and at full speed."
            lane.run(self.pair, ids, self.settings, arguments)[CACHE_NAME] = None
            self.check()
        self.is_done = True

    @property
    def is_identical(self) -> bool:
        return self.plain.tokens == self.ours.tokens

    @property
    def speedup(self) -> float:
        """Tokens a second of ours over those of plain `generate`."""
        return self.ours.tokens_per_second / self.plain.tokens_per_second
