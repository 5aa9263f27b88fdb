"""Prompts as left-padded batches of like length, and the texts that come back.

Knows token ids; knows nothing of models and of how a text was generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Rows of the batches that single rows are compared with.
REGROUPED_SIZE = 4


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts of a list: which ones, and their padded `input_ids` and `attention_mask` `[B, columns]`."""

    indices: tuple[int, ...]
    inputs: dict[str, torch.Tensor]

    @property
    def num_columns(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def new_texts(self, sequences: torch.Tensor, end_token_ids: Sequence[int]) -> dict[int, list[int]]:
        """New tokens of each row of `sequences` `[B, columns + new]`, up to and with the first end token."""
        rows = sequences[:, self.num_columns :].tolist()
        return {index: cut(row, end_token_ids) for index, row in zip(self.indices, rows, strict=True)}


def cut(text: list[int], end_token_ids: Sequence[int]) -> list[int]:
    """The text up to and with its first end token."""
    return next((text[: place + 1] for place, token in enumerate(text) if token in end_token_ids), text)


def make_batches(
    encoded: list[list[int]], batch_size: int, pad_token_id: int, device: torch.device | str
) -> list[PromptBatch]:
    """Batches of prompts of like length, longest first: the first batch shows whether memory and positions suffice."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    batches = []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = pad_left([encoded[index] for index in indices], pad_token_id)
        batches.append(PromptBatch(tuple(indices), {name: tensor.to(device) for name, tensor in inputs.items()}))
    return batches


def regroup(encoded: list[list[int]], batches: list[PromptBatch], pad_token_id: int) -> list[PromptBatch]:
    """Batches of other sizes: the rows of `batches` one at a time, or four at a time where each came alone.

    Rows that come alone in either way are left out; some come again to fill a batch.
    """
    device = batches[0].inputs["input_ids"].device
    together = [index for batch in batches if len(batch.indices) > 1 for index in batch.indices]
    size = 1 if together else REGROUPED_SIZE
    indices = together or [index % len(encoded) for index in range(len(encoded) + -len(encoded) % size)]
    made = make_batches([encoded[index] for index in indices], size, pad_token_id, device)
    return [PromptBatch(tuple(indices[place] for place in batch.indices), batch.inputs) for batch in made]


def pad_left(rows: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of ids as `input_ids` and `attention_mask`, padded on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def end_token_ids(model: Any) -> list[int]:
    """Every id that ends a text of `model`."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def pad_token_id(model: Any) -> int:
    """The id `model` pads with; an end token, or 0, where it names none."""
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else next(iter(end_token_ids(model)), 0)
