"""Plain `generate` and ours on one prompt, side by side: in turns, each on a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pard_hf.generation.stats import DecodingStats
from pard_hf.host import CACHE_NAME
from pard_hf.loading import Pair

from .baton import Baton
from .generate import generate
from .job import Job
from .settings import Settings
from .transcript import Round, Transcript, tokens_of
from .visitor import Visitor

PLAIN, PARD = 0, 1


@dataclass(frozen=True)
class Lane:
    """One route at one moment: what it has said, in how many seconds of its own."""

    rounds: tuple[Round, ...]
    seconds: float
    is_done: bool

    @property
    def tokens(self) -> list[int]:
        return tokens_of(self.rounds)

    @property
    def tokens_per_second(self) -> float:
        """Prefill included; 0 before the first token."""
        num_tokens = len(self.tokens)
        return num_tokens / self.seconds if num_tokens and self.seconds else 0.0


@dataclass(frozen=True)
class RaceView:
    """A race at one moment.

    Args:
        stats ([`DecodingStats`], *optional*):
            Of ours, once it is done.
        compile_seconds (`float`):
            What ours spent compiling, which its clock leaves out once it is done.
    """

    plain: Lane
    pard: Lane
    stats: DecodingStats | None = None
    compile_seconds: float = 0.0
    is_stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.plain.is_done and self.pard.is_done

    @property
    def is_identical(self) -> bool:
        return self.plain.tokens == self.pard.tokens

    @property
    def acceptance_length(self) -> float:
        """Tau so far."""
        return len(self.pard.tokens) / len(self.pard.rounds) if self.pard.rounds else 0.0

    @property
    def speedup(self) -> float:
        """Tokens a second of ours over those of plain `generate`, so far; 0 before both have said something."""
        plain = self.plain.tokens_per_second
        return self.pard.tokens_per_second / plain if plain else 0.0


class Race(Job):
    """One prompt through both routes.

    Args:
        ids (`list[int]`):
            Token ids of the prompt.
        visitor ([`Visitor`], *optional*):
            Whose race it is.
    """

    def __init__(self, pair: Pair, ids: list[int], settings: Settings, visitor: Visitor | None = None):
        super().__init__(*(partial(self.run_lane, lane) for lane in (PLAIN, PARD)))
        self.pair, self.ids, self.settings, self.visitor = pair, ids, settings, visitor
        self.baton = Baton(2)
        self.transcripts = [Transcript(partial(self.baton.pause, lane)) for lane in (PLAIN, PARD)]
        self.outputs: list[Any] = [None, None]

    def run_lane(self, lane: int) -> None:
        """Generate by one route, whenever it is its turn."""
        try:
            self.baton.take(lane)
            call = self.pair, self.ids, self.settings, self.visitor
            output = generate(*call, is_ours=lane == PARD, streamer=self.transcripts[lane])
            output[CACHE_NAME] = None  # Not continued from here, and the race is shown for a while.
            self.outputs[lane] = output
        finally:
            self.baton.release(lane, has_finished=True)

    def stop(self) -> None:
        super().stop()
        self.baton.stop()

    def view(self) -> RaceView:
        """How things stand."""
        plain, pard = (
            Lane(tuple(self.transcripts[lane].rounds), self.baton.seconds(lane), self.outputs[lane] is not None)
            for lane in (PLAIN, PARD)
        )
        output = self.outputs[PARD]
        compile_seconds = getattr(output, "compile_seconds", None) or 0.0
        return RaceView(
            plain=plain,
            pard=replace(pard, seconds=pard.seconds - compile_seconds),
            stats=getattr(output, "stats", None),
            compile_seconds=compile_seconds,
            is_stopped=self.is_over and not (plain.is_done and pard.is_done),
        )
