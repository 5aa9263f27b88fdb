"""Training rows as token ids in one memory-mapped file, so that memory and start do not grow with their number."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from ..io import whole_file

DTYPES = defaultdict(lambda: torch.int64, ids=torch.int32, loss_mask=torch.uint8, sources=torch.uint8)


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
        self.sources, self.source_ends = tensors["sources"], tensors["source_ends"]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_texts(self) -> int:
        """Count the rows before packing."""
        return len(self.text_lengths)

    def __len__(self) -> int:
        return len(self.token_ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index of {len(self)} examples, got {index}.")
        index %= len(self)
        tokens, texts, source = (
            slice(int(ends[index - 1]) if index else 0, int(ends[index]))
            for ends in (self.token_ends, self.text_ends, self.source_ends)
        )
        is_packed = self.num_texts > len(self)
        return {
            "input_ids": self.ids[tokens].tolist(),
            "loss_mask": self.loss_mask[tokens].tolist(),
            **({"text_lengths": self.text_lengths[texts].tolist()} if is_packed else {}),
            "source": self.sources[source].numpy().tobytes().decode(),
        }


def write_token_file(examples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write examples with `input_ids`, `loss_mask`, `source` and, of packed ones, `text_lengths`; all or nothing.

    Raises:
        ValueError: There is no example.
    """
    ids, loss_mask, text_lengths, sources = array("i"), array("B"), array("q"), bytearray()
    ends = {name: array("q") for name in ("token_ends", "text_ends", "source_ends")}
    for example in examples:
        ids.extend(example["input_ids"])
        loss_mask.extend(example["loss_mask"])
        text_lengths.extend(example.get("text_lengths") or [len(example["input_ids"])])
        sources.extend(example.get("source", "?").encode())
        for name, values in zip(ends, (ids, text_lengths, sources), strict=True):
            ends[name].append(len(values))
    if not ids:
        raise ValueError("Expected examples to write, got none.")
    arrays = {"ids": ids, "loss_mask": loss_mask, "text_lengths": text_lengths, "sources": sources, **ends}
    tensors = {name: torch.frombuffer(values, dtype=DTYPES[name]) for name, values in arrays.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as written:
        save_file(tensors, written)
