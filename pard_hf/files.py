"""Files that are there in whole or not at all, and what tells one from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which is given the name `path` when it is written: readers see the old file or the new."""
    written = path.with_name(f"{path.name}.partial")
    yield written
    written.replace(path)


def read_text(path: Path) -> str:
    """The text of a file; a `ValueError` names one that is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected UTF-8 text in `{path}`, got byte {error.start} of another encoding. Save the file as UTF-8."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there in whole or not at all."""
    with whole_file(path) as written:
        written.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> Any:
    """The SHA-256 of a file, ready for more."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256
