"""What a generation has said so far, round by round, as a streamer of `generate()` sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Round:
    """Tokens of one round: those the draft proposed and the target accepted, then the target's own."""

    accepted: tuple[int, ...]
    bonus: int

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.accepted, self.bonus)


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
    has_prompt: bool = False

    def put(self, value: Any) -> None:
        """Take the prompt at first, then the target's own tokens; the stock assisted loop hands over whole rounds."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        *accepted, bonus = value.flatten().tolist()
        self.rounds.append(Round((*self.accepted, *accepted), bonus))
        self.accepted = []
        self.between_rounds()

    def put_accepted(self, value: Any) -> None:
        """Take accepted draft tokens."""
        self.accepted += value.flatten().tolist()

    def end(self) -> None:
        """Close a last round that ended with an accepted token."""
        if self.accepted:
            *accepted, bonus = self.accepted
            self.rounds.append(Round(tuple(accepted), bonus))
            self.accepted = []

    @property
    def tokens(self) -> list[int]:
        return tokens_of(list(self.rounds))
