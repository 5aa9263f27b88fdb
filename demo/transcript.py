"""What a generation has said so far, round by round, as a streamer of `generate()` sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Round:
    """Tokens of one round: proposals that the target accepted, what proposed each of them, then its own token."""

    accepted: tuple[int, ...]
    bonus: int
    sources: tuple[str, ...]

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
class Transcript:
    """A streamer that keeps rounds. Plain `generate` has rounds of one token.

    Args:
        between_rounds (`Callable[[], None]`, *optional*):
            Called after each round; what it raises ends the generation.
    """

    between_rounds: Callable[[], None] = lambda: None
    rounds: list[Round] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    has_prompt: bool = False

    def put(self, value: Any) -> None:
        """Take the prompt at first, then the target's own tokens; the stock assisted loop hands over whole rounds."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.close(self.accepted + value.flatten().tolist())
        self.between_rounds()

    def put_accepted(self, value: Any, source: str = "draft") -> None:
        """Take accepted tokens of a source."""
        self.accepted += value.flatten().tolist()
        self.sources += [source] * value.numel()

    def end(self) -> None:
        """Close a last round that ended with an accepted token."""
        if self.accepted:
            self.close(self.accepted)

    def close(self, tokens: list[int]) -> None:
        """Add a round."""
        *accepted, bonus = tokens
        sources = [*self.sources, *["draft"] * len(accepted)][: len(accepted)]  # The stock loop names none.
        self.rounds.append(Round(tuple(accepted), bonus, tuple(sources)))
        self.accepted, self.sources = [], []

    @property
    def tokens(self) -> list[int]:
        return tokens_of(list(self.rounds))
