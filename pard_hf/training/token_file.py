"""Training rows as token ids in one memory-mapped file, so that memory and start do not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from ..io import whole_file


class TokenFile(Dataset[dict[str, Any]]):
    """Examples for [`DataCollatorForPard`], as [`write_token_file`] wrote them.

    Args:
        file (`str` or `Path`):
            The file; its tensors stay on disk until an example is read.
    """

    def __init__(self, file: str | Path):
        tensors = load_file(file)
        self.ids, self.loss_mask, self.text_lengths = (tensors[n] for n in ("ids", "loss_mask", "text_lengths"))
        self.token_ends, self.text_ends = tensors["token_ends"], tensors["text_ends"]

    def __len__(self) -> int:
        return len(self.token_ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index of {len(self)} examples, got {index}.")
        index %= len(self)
        tokens, texts = (
            slice(int(ends[index - 1]) if index else 0, int(ends[index])) for ends in (self.token_ends, self.text_ends)
        )
        return {
            "input_ids": self.ids[tokens].tolist(),
            "loss_mask": self.loss_mask[tokens].tolist(),
            "text_lengths": self.text_lengths[texts].tolist(),
            "source": f"example {index}",
        }


def write_token_file(examples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write examples with `input_ids`, `loss_mask` and, of packed ones, `text_lengths`; the file appears whole."""
    ids, loss_mask, text_lengths = list[torch.Tensor](), list[torch.Tensor](), list[int]()
    token_ends, text_ends = [0], [0]
    for example in examples:
        lengths = example.get("text_lengths") or [len(example["input_ids"])]
        ids.append(torch.tensor(example["input_ids"], dtype=torch.int32))
        loss_mask.append(torch.tensor(example["loss_mask"], dtype=torch.uint8))
        text_lengths += lengths
        token_ends.append(token_ends[-1] + sum(lengths))
        text_ends.append(text_ends[-1] + len(lengths))
    tensors = {"ids": torch.cat(ids), "loss_mask": torch.cat(loss_mask), "text_lengths": torch.tensor(text_lengths)}
    tensors |= {"token_ends": torch.tensor(token_ends[1:]), "text_ends": torch.tensor(text_ends[1:])}
    with whole_file(file) as written:
        save_file(tensors, written)
