"""Where a checkpoint comes from, written beside it: command, versions, commit, data, settings, last evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import sha256_of, write_whole
from ..hub.model_card import draft_card
from .answer_file import manifest_path

SETTINGS_OF_A_RUN = (
    "mask_token_id", "max_length", "overlong", "pack", "num_draft_tokens", "retention_rate", "min_retention_rate",
    "objective", "cross_entropy_weight", "divergence_weight", "distillation_temperature", "correction_head",
    "correction_head_rank", "seed",
)  # fmt: skip


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

    def identity(self) -> dict[str, Any]:
        """What must not change where a run is resumed."""
        settings = {name: self.settings.get(name) for name in SETTINGS_OF_A_RUN}
        teacher = None if self.settings.get("objective") == "ce" else self.models.get("target")
        digests = sorted(file["sha256"] for file in self.files)
        return {"base": self.models.get("base"), "teacher": teacher, "data": digests, **settings}

    def __call__(self, folder: Path, step: int, metrics: dict[str, Any]) -> None:
        """Write both files into `folder`, each whole or not at all."""
        content = {
            **self.conditions,
            **self.models,
            "step": step,
            "identity": self.identity(),
            "settings": self.settings,
            "counts": self.counts,
            "data": self.files,
            "metrics": metrics,
        }
        write_whole(folder / "provenance.json", json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        write_whole(folder / "README.md", draft_card(content))


def check_same_run(checkpoint: Path, provenance: Provenance) -> None:
    """Raise a `ValueError` where a checkpoint was trained with other settings than those it would go on with.

    How a step is spread (batch size, accumulation, devices), its number and the learning rate may change.
    """
    file = checkpoint / "provenance.json"
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8")).get("identity", {})
    now = json.loads(json.dumps(provenance.identity(), default=str))
    changed = [
        f"{name} was {before[name]!r} and is {now.get(name)!r}" for name in before if before[name] != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"Expected the settings of `{checkpoint.name}` to go on from it, but {'; '.join(changed)}. Give them "
            "again, choose another `--output`, or pass `--restart` to move its checkpoints aside."
        )


def describe(file: Path) -> dict[str, Any]:
    """Name and digest of a file of rows, and the manifest that `pard data` left beside it."""
    manifest = manifest_path(file)
    return {
        "file": file.name,
        "sha256": sha256_of(file).hexdigest(),
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None,
    }
