"""The cells of a run that is not finished yet, in a file: one JSON object a line, the settings first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_whole
from .results import CellResult


class PartialFile:
    """Keeps what is finished, so that an interrupted run can go on.

    Args:
        path (`Path`):
            The result's own path; the file lies beside it.
        settings (`dict[str, Any]`):
            What must be the same for cells to belong together.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path.with_name(f"{path.name}.partial.jsonl")
        self.settings = json.loads(json.dumps(settings))

    def begin(self, resume: bool) -> list[CellResult]:
        """Read back what is finished; nothing is written before the first cell.

        Raises:
            ValueError: There is a file and `resume` is not set, or its settings are others.
        """
        if self.path.exists() and not resume:
            raise ValueError(
                f"Expected no unfinished run, got `{self.path}`. Pass `--resume` to go on with it, or remove the file."
            )
        rows = read_whole_lines(self.path) if self.path.exists() else []
        if not rows:
            return []
        self.check(rows[0])
        # Its last line may have been cut off: what is added now begins a line of its own.
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return [CellResult.from_dict(row) for row in rows[1:]]

    def check(self, header: dict[str, Any]) -> None:
        settings = header.get("settings", {})
        for name in sorted({*settings, *self.settings}):
            if settings.get(name) != self.settings.get(name):
                raise ValueError(
                    f"Expected `{self.path}` to be of a run with {name} {self.settings.get(name)!r}, got "
                    f"{settings.get(name)!r}. Go back to that for `--resume`, or remove the file to begin anew."
                )

    def append(self, cell: CellResult) -> None:
        """Add a finished cell, on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [cell.to_dict()] if self.path.exists() else [{"settings": self.settings}, cell.to_dict()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON lines in `{path}`, got: {error}. Remove the file to begin anew.") from None
