"""A conversation with one target: its messages, and the token ids and the cache that the next turn goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tokens import next_prompt


class Conversation:
    """Turns in the target's chat template; earlier ones keep their token ids, and their cache where it still fits."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.past: list[int] = []
        self.answer: list[int] = []
        self.cache: Any = None

    def prompt(self, tokenizer: Any, text: str) -> list[int]:
        """Return the token ids up to where the answer to `text` begins."""
        return next_prompt(tokenizer, [*self.messages, {"role": "user", "content": text}], self.past, self.answer)

    def take_cache(self, ids: Sequence[int]) -> Any:
        """Hand the cache over if it is of the first of these ids: a call that is interrupted spoils it."""
        cache, self.cache = self.cache, None
        length = 0 if cache is None else cache.get_seq_length()
        return cache if 0 < length < len(ids) and ids[:length] == (self.past + self.answer)[:length] else None

    def keep(self, tokenizer: Any, text: str, ids: list[int], answer: list[int], cache: Any = None) -> None:
        """Add a turn: what was asked, the ids it was asked with, those of the answer, and the cache of both."""
        content = tokenizer.decode(answer, skip_special_tokens=True)
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": content}]
        self.messages = [*self.messages, *turn]
        self.past, self.answer, self.cache = ids, answer, cache
