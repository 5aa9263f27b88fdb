"""Training rows as token ids in one memory-mapped file, so that memory and start do not grow with their number."""

from __future__ import annotations

import tempfile
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
TYPECODES = {torch.int32: "i", torch.int64: "q", torch.uint8: "B"}
# Values that are collected in memory before they are written.
NUM_COLLECTED = 2**16


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


class Column:
    """Values that are written to a file as they come, and read back as a tensor that stays on disk."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.path, self.dtype, self.length = path, dtype, 0
        self.file, self.values = path.open("wb"), array(TYPECODES[dtype])

    def extend(self, values: Iterable[int]) -> None:
        collected = len(self.values)
        self.values.extend(values)
        self.length += len(self.values) - collected
        if len(self.values) >= NUM_COLLECTED:
            self.flush()

    def flush(self) -> None:
        self.values.tofile(self.file)
        del self.values[:]

    def tensor(self) -> torch.Tensor:
        self.flush()
        self.file.close()
        return torch.from_file(str(self.path), size=self.length, dtype=self.dtype)


def write_token_file(examples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write examples with `input_ids`, `loss_mask`, `source` and, of packed ones, `text_lengths`; all or nothing.

    Raises:
        ValueError: There is no example.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as folder:
        ends = {"ids": "token_ends", "text_lengths": "text_ends", "sources": "source_ends"}
        columns = {name: Column(Path(folder, name), DTYPES[name]) for name in ("loss_mask", *ends, *ends.values())}
        for example in examples:
            columns["ids"].extend(example["input_ids"])
            columns["loss_mask"].extend(example["loss_mask"])
            columns["text_lengths"].extend(example.get("text_lengths") or [len(example["input_ids"])])
            columns["sources"].extend(example.get("source", "?").encode())
            for name, end in ends.items():
                columns[end].extend([columns[name].length])
        if not columns["ids"].length:
            raise ValueError("Expected examples to write, got none.")
        with whole_file(file) as written:
            save_file({name: column.tensor() for name, column in columns.items()}, written)
