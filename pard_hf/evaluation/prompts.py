"""Prompt files, and what to say about the texts that come back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_prompts(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read a `.jsonl` file of objects with a `prompt`; other fields are kept.

    Raises:
        ValueError: A line is no JSON object with a `prompt`; the message names the line.
    """
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected JSON in line {number} of `{path}`, got: {error.msg}. Mend the line.") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"Expected an object with a `prompt` string in line {number} of `{path}`. Mend the line.")
        prompts.append(row)
    return prompts


def repeated_share(texts: Iterable[Sequence[int]], size: int = 4) -> float:
    """Share of n-grams that a text has said before, over all texts: loops look like high acceptance.

    Args:
        texts (`Iterable[Sequence[int]]`):
            Token ids of each text; n-grams do not cross texts.
        size (`int`, *optional*, defaults to 4):
            Tokens of an n-gram.
    """
    repeated = total = 0
    for text in texts:
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
