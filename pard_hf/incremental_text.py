"""Text of tokens that come a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class IncrementalText:
    """Decodes tokens as they come; what it returns, joined, is the text of all.

    Decoded together, since a character may need bytes of several tokens: it is held back until they are all there.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def add(self, ids: Sequence[int]) -> str:
        """The text that more tokens complete."""
        self.ids += ids
        text = self.decoded()
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if text.endswith("\n"):  # Decode no more than a line again and again; the break keeps its neighbour's space.
            self.ids = self.ids[-1:]
            self.shown = self.decoded()
        return new

    def rest(self) -> str:
        """What is left of a text that was cut inside a character."""
        return self.decoded()[len(self.shown) :]
