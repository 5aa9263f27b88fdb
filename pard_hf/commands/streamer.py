"""Text on the terminal as it is generated."""

from __future__ import annotations

import sys
from typing import Any

from ..tokens import IncrementalDetokenizer

GREEN, UNDERLINE, RESET = "\033[32m", "\033[4m", "\033[0m"


class TintedStreamer:
    """Prints tokens as they come; accepted draft tokens are tinted, the target's own are plain."""

    def __init__(self, tokenizer: Any, is_tinted: bool):
        self.text = IncrementalDetokenizer(tokenizer)
        self.is_tinted = is_tinted
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.show(value, "")

    def put_accepted(self, value: Any) -> None:
        self.show(value, GREEN if self.is_tinted else "")

    def show(self, value: Any, tint: str) -> None:
        new = self.text.add(value.tolist())
        sys.stdout.write(f"{tint}{new}{RESET}" if tint and new else new)
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n")
