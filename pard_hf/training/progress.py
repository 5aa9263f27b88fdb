"""What a training run leaves beside its checkpoints: seconds and rows spent, a table of metrics, a plot."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..files import whole_file

logger = logging.getLogger(__name__)


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds of training, evaluations and saving left out, and the tokens and rows that went in; goes on on resuming.

    Collating counts: it is part of what a step costs.
    """

    def __init__(self, seconds: float = 0.0, num_tokens: int = 0, num_rows: int = 0):
        self.seconds, self.num_tokens, self.num_rows = seconds, num_tokens, num_rows
        self.last: float | None = None
        self.not_read: torch.Tensor | None = None  # Tokens and rows that only the device knows yet.

    def count(self, anchors: torch.Tensor, depths: torch.Tensor) -> None:
        """Count the real tokens and the kept rows of a batch, on its device: a step does not wait for the sum."""
        is_row = anchors >= 0
        counts = torch.stack([(is_row & (depths == 0)).sum(), is_row.sum()])
        self.not_read = counts if self.not_read is None else self.not_read + counts

    def read(self) -> tuple[int, int]:
        """The numbers of tokens and rows so far; waits for the device."""
        if self.not_read is not None:
            num_tokens, num_rows = self.not_read.tolist()
            self.num_tokens, self.num_rows = self.num_tokens + num_tokens, self.num_rows + num_rows
            self.not_read = None
        return self.num_tokens, self.num_rows

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - (self.last or now)
        self.last = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    on_save = on_evaluate

    def figures(self) -> dict[str, float]:
        """As metrics, of this process."""
        num_tokens, num_rows = self.read()
        return {"train_seconds": round(self.seconds, 3), "num_tokens": num_tokens, "num_rows": num_rows}

    def state(self) -> dict[str, Any]:
        num_tokens, num_rows = self.read()
        values = {"seconds": self.seconds, "num_tokens": num_tokens, "num_rows": num_rows}
        return {"args": {}, "attributes": values}


class MetricsFile(TrainerCallback):
    """Keeps `metrics.csv` and `curves.png` beside the checkpoints, whatever `report_to` says.

    Both are written from the run's whole history, which checkpoints carry: a resumed run has one table.
    """

    def __init__(self) -> None:
        self.num_written = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A step that is evaluated is often saved as well, and says nothing new then.
        if state.is_world_process_zero and len(state.log_history) != self.num_written:
            self.num_written = len(state.log_history)
            write_table(state.log_history, Path(args.output_dir) / "metrics.csv")
            plot_curves(state.log_history, Path(args.output_dir) / "curves.png")

    on_save = on_train_end = on_evaluate


def write_table(history: list[dict[str, Any]], file: Path) -> None:
    """One line for each logging event, one column for each metric; empty where it was not logged."""
    columns = list(dict.fromkeys(["step", "epoch", *(name for entry in history for name in entry)]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as written, written.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows(history)


def plot_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Loss, and acceptance length of each prompt set, over steps."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("No plot at %s: matplotlib is not installed; `metrics.csv` has the figures.", file)
        return
    ending = "_acceptance_length"
    sets = sorted({name for entry in history for name in entry if name.startswith("eval_") and name.endswith(ending)})
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = [(axes[0], "loss", "loss")]
    curves += [(axes[1], name, name.removeprefix("eval_").removesuffix(ending) or "mean") for name in sets]
    for axis, name, label in curves:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if axis is axes[1] else None)
    for axis, label in zip(axes, ("loss", "acceptance length"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend()
    with whole_file(file) as written:
        figure.savefig(written, dpi=120, format="png")
