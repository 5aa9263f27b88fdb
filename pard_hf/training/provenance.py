"""Where a checkpoint comes from, written beside it: command, versions, commit, data, settings, last evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hub.model_card import draft_card


@dataclass
class Provenance:
    """Writes `provenance.json` and a draft of a model card into each checkpoint.

    Args:
        conditions (`dict`):
            Command, date, commit, versions and device, as `conditions.py` names them.
        models (`dict`):
            Names of the base model and, where there is one, of the target; never a folder's full path.
        data (`Sequence[Path]`):
            Files of rows. Digests are taken once; a manifest beside a file is taken along.
        settings (`dict`):
            Of the training run.
        counts (`dict`):
            Rows and tokens that are trained on.
    """

    conditions: dict[str, Any]
    models: dict[str, Any]
    data: Sequence[Path]
    settings: dict[str, Any]
    counts: dict[str, int]
    files: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.files = [describe(Path(file)) for file in self.data]

    def __call__(self, folder: Path, step: int, metrics: dict[str, Any]) -> None:
        """Write both files into `folder`, each whole or not at all."""
        content = {
            **self.conditions,
            **self.models,
            "step": step,
            "settings": self.settings,
            "counts": self.counts,
            "data": self.files,
            "metrics": metrics,
        }
        write_whole(folder / "provenance.json", json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        write_whole(folder / "README.md", draft_card(content))


def describe(file: Path) -> dict[str, Any]:
    """Name and digest of a file of rows, and the manifest that `pard data` left beside it."""
    with file.open("rb") as content:
        digest = (
            hashlib.file_digest(content, "sha256")
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(content.read())
        )
    manifest = file.with_name(file.name + ".manifest.json")
    return {
        "file": file.name,
        "sha256": digest.hexdigest(),
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None,
    }


def write_whole(file: Path, text: str) -> None:
    """Write a text file, then give it its name."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
