"""Text on the terminal as it is generated."""

from __future__ import annotations

import sys
from typing import Any

GREEN, UNDERLINE, RESET = "\033[32m", "\033[4m", "\033[0m"


class TintedStreamer:
    """Prints tokens as they come; accepted draft tokens are tinted, the target's own are plain."""

    def __init__(self, tokenizer: Any, is_tinted: bool):
        self.tokenizer = tokenizer
        self.is_tinted = is_tinted
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.show(value, "")

    def put_accepted(self, value: Any) -> None:
        self.show(value, GREEN if self.is_tinted else "")

    def show(self, value: Any, tint: str) -> None:
        self.ids.extend(value.tolist())
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return  # A character whose bytes are not all here yet.
        new, self.shown = text[len(self.shown) :], text
        sys.stdout.write(f"{tint}{new}{RESET}" if tint and new else new)
        sys.stdout.flush()
        if text.endswith("\n"):  # Decode no more than a line again and again; the break keeps its neighbour's space.
            self.ids = self.ids[-1:]
            self.shown = self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def end(self) -> None:
        sys.stdout.write("\n")
