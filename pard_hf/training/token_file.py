"""Training rows as token ids in one memory-mapped file, so that memory and start do not grow with their number."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from ..io import whole_file

# What a teacher says of each token, where that is stored.
TOP_LOGITS = ("top_ids", "top_logprobs")
DTYPES = defaultdict(
    lambda: "int64", ids="int32", loss_mask="uint8", sources="uint8", top_ids="int32", top_logprobs="float16"
)


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
        self.top_logits = {name: tensors[name].view(len(self.ids), -1) for name in TOP_LOGITS if name in tensors}

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
            **{name: values[tokens].numpy() for name, values in self.top_logits.items()},
            "source": self.sources[source].numpy().tobytes().decode(),
        }


class Column:
    """Values that are written to a file as they come, and read back as a tensor that stays on disk."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype, self.length = path, dtype, 0
        self.file = path.open("wb", buffering=2**20)

    def extend(self, values: Any) -> None:
        written = np.asarray(values, dtype=self.dtype)
        self.file.write(written.tobytes())
        self.length += written.size

    def tensor(self) -> torch.Tensor:
        self.file.close()
        return torch.from_numpy(np.memmap(self.path, dtype=self.dtype, mode="r+"))


def write_token_file(examples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write examples as `tokenize_rows` and `pack_rows` make them; all or nothing.

    Raises:
        ValueError: There is no example, or some have other `top_logits` than the first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as folder:
        ends = {"ids": "token_ends", "text_lengths": "text_ends", "sources": "source_ends"}
        columns = {
            name: Column(Path(folder, name), DTYPES[name])
            for name in ("loss_mask", *TOP_LOGITS, *ends, *ends.values())
        }
        width = None
        for example in examples:
            width = num_top(example) if width is None else width
            if num_top(example) != width:
                raise ValueError(
                    f"Expected `top_logits` of {width} tokens in all rows, as in the first, got {num_top(example)} in "
                    f"{example.get('source', '?')}. Keep answers with other `--top-logits` in a run of their own."
                )
            columns["ids"].extend(example["input_ids"])
            columns["loss_mask"].extend(example["loss_mask"])
            columns["text_lengths"].extend(example.get("text_lengths") or [len(example["input_ids"])])
            columns["sources"].extend(list(example.get("source", "?").encode()))
            for name in TOP_LOGITS:
                columns[name].extend(example.get(name, ()))
            for name, end in ends.items():
                columns[end].extend([columns[name].length])
        if not columns["ids"].length:
            raise ValueError("Expected examples to write, got none.")
        with whole_file(file) as written:
            save_file({name: one.tensor() for name, one in columns.items() if one.length}, written)


def num_top(example: dict[str, Any]) -> int:
    """Return how many tokens of its teacher an example has at each of its own."""
    return example["top_ids"].shape[1] if "top_ids" in example else 0
