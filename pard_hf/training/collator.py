"""Several tokenized rows in one training sequence, none of which sees another.

From tokenized rows to a batch of kept (anchor, depth) rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from zlib import crc32

import torch
from transformers import TrainerCallback

from .cod import build_rows, keep_rows


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


# What stands in a row that only pads its example to the length of the longest: no label, and no real row sees it.
PADDING = {"input_ids": 0, "position_ids": 0, "labels": -100, "anchors": -1, "depths": 0, "starts": 0}


@dataclass
class DataCollatorForPard:
    """Builds the rows that conditional drop-token keeps, and nothing else.

    Args:
        mask_token_id (`int`):
            Id fed where a token is not known yet.
        num_draft_tokens (`int`, *optional*, defaults to 8):
            K_train: depths 0 … K_train - 1. At inference K may be larger; 1 is ordinary language modeling.
        retention_rate (`float`, *optional*, defaults to 0.7) and min_retention_rate (`float`, defaults to 0.2):
            Depth `d` keeps `max(r ** d, r_min)` of its rows.
        seed (`int`, *optional*, defaults to 0):
            Which rows are dropped follows from the seed, the epoch and the text, whatever the batch it stands in: a
            resumed run drops the same ones, and so does one on more devices.
    """

    mask_token_id: int
    num_draft_tokens: int = 8
    retention_rate: float = 0.7
    min_retention_rate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        # Workers that outlive an epoch must see the next one begin.
        self.shared_epoch = torch.zeros((), dtype=torch.long).share_memory_()
        if self.num_draft_tokens < 1:
            raise ValueError(f"Expected `num_draft_tokens` of at least 1, got {self.num_draft_tokens}.")
        for name in ("retention_rate", "min_retention_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected `{name}` in [0, 1], got {getattr(self, name)}.")

    @property
    def epoch(self) -> int:
        """The pass over the rows; each drops others."""
        return int(self.shared_epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.shared_epoch.fill_(epoch)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples as `tokenize_rows` or `pack_rows` makes them.

        Each has `input_ids` and, optionally, `loss_mask` (1 = learn this token; all by default) and `text_lengths`,
        where several texts stand in one example (one text by default).

        Returns:
            `input_ids`, `position_ids`, `labels`, `anchors`, `depths` and `starts` of shape `(batch_size, num_rows)`;
            `attention_mask(anchors, depths, starts)` says who sees whom. Labels are already shifted: one stands at
            the row that predicts it. `places` lists where the examples came from, if they say.

        Raises:
            ValueError: An example is shorter than 2 tokens or its loss mask is of another length.
        """
        rows = [self.rows_of(example) for example in examples]
        longest = max(len(row["anchors"]) for row in rows)
        batch: dict[str, Any] = {
            name: torch.stack(
                [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
            )
            for name, value in PADDING.items()
        }
        return {**batch, "places": [example.get("place") for example in examples]}

    def rows_of(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The kept rows of one example: the real tokens of all its texts in order, then their mask rows."""
        lengths = example.get("text_lengths") or [len(example["input_ids"])]
        is_label = example.get("loss_mask") or [1] * len(example["input_ids"])
        if min(lengths) < 2 or len(is_label) != len(example["input_ids"]):
            raise ValueError(
                f"Expected training texts of at least 2 tokens and a loss mask of their length, got {min(lengths)} "
                f"tokens at the least and a mask of {len(is_label)} for {len(example['input_ids'])}. Drop such rows "
                "(`pard train` reports their lines)."
            )
        starts = [0, *accumulate(lengths[:-1])]
        texts = [
            self.rows_of_text(example["input_ids"][start : start + length], is_label[start : start + length], start)
            for start, length in zip(starts, lengths, strict=True)
        ]
        joined = {name: torch.cat([text[name] for text in texts]) for name in PADDING}
        # Stable, so real tokens stay in order and stand first, where a teacher reads them.
        order = (joined["depths"] > 0).long().argsort(stable=True)
        return {name: values[order] for name, values in joined.items()}

    def rows_of_text(self, token_ids: list[int], is_label: list[int], start: int) -> dict[str, torch.Tensor]:
        """The kept rows of one text, whose first token has the anchor `start` in its example."""
        ids, labels = torch.tensor(token_ids, dtype=torch.long), torch.tensor(is_label, dtype=torch.bool)
        labels[0] = False
        generator = torch.Generator().manual_seed(
            crc32(ids.numpy().tobytes(), crc32(f"{self.seed} {self.epoch}".encode()))
        )
        settings = (self.num_draft_tokens, self.retention_rate, self.min_retention_rate)
        anchors, depths = keep_rows(labels, *settings, generator)
        rows = build_rows(ids, labels, anchors, depths, self.mask_token_id)
        return {**rows, "anchors": anchors + start, "depths": depths, "starts": torch.full_like(anchors, start)}


class EpochOfCollator(TrainerCallback):
    """Tells the collator which pass over the rows it is in, so that each drops others."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.collator, "epoch"):
            self.collator.epoch = int(state.epoch or 0)
