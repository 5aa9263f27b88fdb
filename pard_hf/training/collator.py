"""From tokenized texts to a batch of kept training rows (anchor, depth); packing of several texts in one sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from zlib import crc32

import numpy as np
import torch
from transformers import TrainerCallback

from .cod import build_rows, keep_rows
from .settings import MethodSettings, check_ranges
from .token_file import TOP_LOGITS

# Values of padding rows: they have no label, and no real row attends to them.
PADDING = {"input_ids": 0, "position_ids": 0, "labels": -100, "anchors": -1, "depths": 0, "starts": 0}


def pack_rows(examples: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Pack texts into sequences of at most `length` tokens; to what `tokenize_rows` makes it adds `text_lengths`."""
    bins = choose_bins([len(example["input_ids"]) for example in examples], length)
    return [joined([examples[index] for index in chosen]) for chosen in bins]


def choose_bins(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Choose which texts go into a sequence of `length` tokens: longest first, each where it leaves the least room.

    Best-fit decreasing, https://huggingface.co/papers/2404.10830: no text is cut (one longer than `length` stays
    alone), and little of a sequence is empty. Returns the texts' indices for each sequence.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # Tokens each sequence still takes, and its index; sorted.
    for text in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        size = lengths[text]
        best = bisect_left(rooms, (size, -1))
        room, index = rooms.pop(best) if best < len(rooms) else (length, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(text)
        if room - size > 1:  # A text has at least two tokens.
            insort(rooms, (room - size, index))
    return bins


def joined(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join texts into one packed example."""
    return {
        **{name: [one for text in texts for one in text[name]] for name in ("input_ids", "loss_mask")},
        **{name: np.concatenate([text[name] for text in texts]) for name in TOP_LOGITS if name in texts[0]},
        "text_lengths": [len(text["input_ids"]) for text in texts],
        "source": "; ".join(text.get("source", "?") for text in texts),
    }


@dataclass
class DataCollatorForPard(TrainerCallback):
    """Build the training rows that conditional drop-token keeps, and no others; as a callback, follow the epoch.

    Args:
        mask_token_id (`int`):
            Id fed where a token is not known yet.
        num_draft_tokens (`int`, *optional*, defaults to 8):
            K_train: depths 0 … K_train - 1. At inference K may be larger; 1 is ordinary language modeling.
        retention_rate (`float`, *optional*, defaults to 0.7) and min_retention_rate (`float`, defaults to 0.2):
            Depth `d` keeps `max(r ** d, r_min)` of its rows.
        seed (`int`, *optional*, defaults to 0):
            Seed, epoch and text decide which rows are dropped, in a resumed run and on more devices, too.
        multiple (`int`, *optional*, defaults to 1):
            The number of rows is padded to a multiple of this.
        max_anchors (`int`, *optional*):
            Most anchors of a text that have mask rows.
    """

    mask_token_id: int
    num_draft_tokens: int = MethodSettings.num_draft_tokens
    retention_rate: float = MethodSettings.retention_rate
    min_retention_rate: float = MethodSettings.min_retention_rate
    seed: int = 0
    multiple: int = 1
    max_anchors: int | None = None

    def __post_init__(self) -> None:
        # Shared memory: workers that outlive an epoch must see the next one begin.
        self.shared_epoch = torch.zeros((), dtype=torch.long).share_memory_()
        check_ranges(vars(self))

    @property
    def epoch(self) -> int:
        """Pass over the texts; each drops other rows."""
        return int(self.shared_epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.shared_epoch.fill_(epoch)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and, optionally, `loss_mask` (1 = learn this token) and `text_lengths`.

        Returns:
            `input_ids`, `position_ids`, `labels`, `anchors`, `depths` and `starts` of shape `(batch_size, num_rows)`,
            real tokens first; labels are already shifted. `sources` lists where the examples came from. What a
            teacher says of each real token, if it is stored, is `(batch_size, num_tokens, k)`.

        Raises:
            ValueError: A text is shorter than 2 tokens or its loss mask is of another length.
        """
        batch = [self.rows_of(example) for example in examples]
        padded: dict[str, Any] = {
            name: torch.nn.utils.rnn.pad_sequence([rows[name] for rows in batch], True, value)
            for name, value in PADDING.items()
        }
        if room := -padded["input_ids"].shape[1] % self.multiple:
            for name, value in PADDING.items():
                padded[name] = torch.nn.functional.pad(padded[name], (0, room), value=value)
        for name in TOP_LOGITS if TOP_LOGITS[0] in examples[0] else ():
            values = [torch.tensor(example[name]) for example in examples]
            padded[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return {**padded, "sources": [example.get("source") for example in examples]}

    def rows_of(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Build the kept rows of one example: the real tokens of all its texts in order, then their mask rows."""
        ids = example["input_ids"]
        lengths, loss_mask = example.get("text_lengths") or [len(ids)], example.get("loss_mask") or [1] * len(ids)
        if min(lengths) < 2 or len(loss_mask) != len(ids):
            raise ValueError(
                f"Expected texts of at least 2 tokens and a loss mask of their length, got one of {min(lengths)} "
                f"tokens and a mask of {len(loss_mask)} for {len(ids)}. Drop such rows."
            )
        texts = [
            self.rows_of_text(ids[start : start + length], loss_mask[start : start + length], start)
            for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False)
        ]
        joined = {name: torch.cat([text[name] for text in texts]) for name in PADDING}
        # Real tokens come first, in order, where the teacher reads them; then mask rows by anchor, so that rows that
        # attend to the same stand together, as attention in blocks wants them.
        order = (joined["anchors"] + len(ids) * (joined["depths"] > 0)).argsort(stable=True)
        return {name: values[order] for name, values in joined.items()}

    def rows_of_text(self, token_ids: list[int], loss_mask: list[int], start: int) -> dict[str, torch.Tensor]:
        """Build the kept rows of one text, whose first token has the anchor `start` in its example."""
        ids, is_label = torch.tensor(token_ids, dtype=torch.long), torch.tensor(loss_mask, dtype=torch.bool)
        seed = crc32(ids.numpy().tobytes(), crc32(f"{self.seed} {self.epoch}".encode()))
        generator = torch.Generator().manual_seed(seed)
        settings = (self.num_draft_tokens, self.retention_rate, self.min_retention_rate)
        anchors, depths = keep_rows(is_label, *settings, generator, self.max_anchors)
        rows = build_rows(ids, is_label, anchors, depths, self.mask_token_id)
        return {**rows, "anchors": anchors + start, "depths": depths, "starts": torch.full_like(anchors, start)}
