"""Several tokenized rows in one training sequence, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any


def pack_rows(rows: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Fill sequences of at most `length` tokens with rows, longest first, each where it leaves least room.

    Best-fit decreasing, https://huggingface.co/papers/2404.10830: no row is cut, and little of a sequence is left
    empty.

    Args:
        rows (`list[dict]`):
            As `tokenize_rows` makes them: `input_ids` and `loss_mask` of equal length, `place` optional.
        length (`int`):
            Tokens of a sequence; a longer row stays alone.

    Returns:
        Sequences with `input_ids`, `loss_mask` and `text_lengths`, the length of each row in it; `place` lists where
        they came from.
    """
    bins: list[list[dict[str, Any]]] = []
    rooms: list[tuple[int, int]] = []  # Tokens each sequence still takes, and its index; sorted.
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        size = len(row["input_ids"])
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, index = rooms.pop(place)
        else:
            bins.append([])
            room, index = length, len(bins) - 1
        bins[index].append(row)
        if room - size > 1:  # A text has at least two tokens.
            insort(rooms, (room - size, index))
    return [join(texts) for texts in bins]


def join(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One sequence of several rows."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "loss_mask": [keep for row in rows for keep in row["loss_mask"]],
        "text_lengths": [len(row["input_ids"]) for row in rows],
        "place": "; ".join(row.get("place", "?") for row in rows),
    }
