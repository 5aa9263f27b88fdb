"""`pard bench` in the page: the same run, table, figures and JSON as on the shell."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.plots import write_plots
from pard_hf.draft.known_drafts import known_draft_for
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings, run_metadata
from pard_hf.evaluation.prompts import NAMED_SETS, load_prompts
from pard_hf.evaluation.report import SPEED_HEADINGS, difference_sentence, speed_row
from pard_hf.evaluation.routes import ROUTES
from pard_hf.loading import Pair

from .html import message, table
from .job import Job
from .pairs import BUNDLED, NAMED, SMOLLM2, PairName, PairShelf
from .settings import Settings, whole

MOST_PROMPTS = 32
# What compiles takes minutes on a CPU before anything is shown: left to visitors who want to wait.
FIRST_ROUTES = ("ar", "pld", "ad", "tier1", "tier2", "adaptive", "lookup", "every_source")


class BenchJob(Job):
    """One run of `pard bench`.

    Args:
        prompts (`str`):
            A named set or a `.jsonl` file.
        routes (`Sequence[str]`):
            Names in `ROUTES`.

    Raises:
        ValueError: The set cannot be read, or a setting is out of range.
    """

    def __init__(
        self,
        pair: Pair,
        name: PairName,
        prompts: str,
        routes: Sequence[str],
        limit: Any,
        repeats: Any,
        settings: Settings,
    ):
        super().__init__(self.measure)
        for route in routes or ("no route",):
            if route not in ROUTES:
                raise ValueError(f"Expected routes among {', '.join(ROUTES)}, got {route!r}. Choose some of these.")
        chosen = BenchmarkSettings(
            routes=tuple(routes),
            num_assistant_tokens=(settings.num_assistant_tokens,),
            repeats=whole("Repeats", repeats, 1, 5),
            max_new_tokens=settings.max_new_tokens,
            limit=whole("Prompts", limit, 1, MOST_PROMPTS),
            **({"tree_size": settings.tree_size} if settings.tree_size else {}),
        )
        words = [
            *("bench", "--prompts", prompts, "--limit", str(chosen.limit)),
            *("--repeats", str(chosen.repeats), "--max-new-tokens", str(chosen.max_new_tokens)),
            *("--num-assistant-tokens", str(settings.num_assistant_tokens)),
            *(("--assistant-tree-size", str(chosen.tree_size)) if settings.tree_size else ()),
            *("--routes", ",".join(routes)),
        ]
        models: tuple[str, str] | tuple[()] = ()
        if name.kind == SMOLLM2:
            models = NAMED[SMOLLM2], NAMED[SMOLLM2]
            words += [f"--pair={NAMED[SMOLLM2]}"]
        elif name.kind != BUNDLED:
            models = name.target, name.draft or known_draft_for(pair.target).name
            words += [f"--{role}={model}" for role, model in zip(("target", "draft"), models, strict=True)]
        self.sets = dict([load_prompts(prompts)])
        self.benchmark = Benchmark(pair, chosen, self.advance)
        self.conditions = run_metadata(pair, chosen, words, *models)
        self.share, self.doing = 0.0, "Beginning …"
        self.cells: list[dict[str, Any]] = []

    def advance(self, share: float, text: str) -> None:
        """Told before each run of a route; the job is stopped here."""
        self.check()
        self.share, self.doing = self.share + share, text

    def measure(self) -> None:
        self.benchmark.run(self.sets, keep=self.cells.append)

    @property
    def result(self) -> dict[str, Any]:
        return {**self.conditions, "cells": self.cells}


def prompt_sets(shelf: PairShelf) -> list[str]:
    """Named sets, and the `.jsonl` files below the folder the demo was started with."""
    files = sorted(shelf.folder.rglob("*.jsonl")) if shelf.folder is not None else []
    return [*NAMED_SETS, *(str(file.relative_to(shelf.folder)) for file in files if shelf.folder is not None)]


def prompt_file(shelf: PairShelf, name: Any, upload: str | None) -> str:
    """The set to measure: an uploaded file, a named set, or a file below the start folder.

    Raises:
        ValueError: There is no such set.
    """
    if upload:
        return upload
    if name not in prompt_sets(shelf):
        raise ValueError(f"Expected a prompt set of the list, got {name!r}. Choose one, or bring a .jsonl file.")
    return name if name in NAMED_SETS else str(shelf.folder / name)


def progress(job: BenchJob) -> str:
    """How far a run is."""
    share = min(job.share, 1.0)
    return (
        f'{message(job.doing)}<progress max="1" value="{share:.3f}" aria-label="progress of the benchmark">'
        f"{share:.0%}</progress>"
    )


def report(job: BenchJob) -> str:
    """Table and figures of what was measured, and the command that measures it again."""
    result = job.result
    tables = "".join(cell_table(cell) for cell in result["cells"])
    with tempfile.TemporaryDirectory() as folder:
        plots = [(file.stem, file.read_bytes()) for file in write_plots(result, Path(folder) / "bench.json")]
    figures = "".join(
        f'<img alt="{escape(name.removeprefix("bench_").replace("_", " "))} of each route, in the table above" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(content).decode()}">'
        for name, content in plots
    )
    command = escape(result["command"])
    return f'{tables}<div class="pard-plots">{figures}</div><p>On the shell: <code>{command}</code></p>'


def cell_table(cell: dict[str, Any]) -> str:
    """What each route reached on one set."""
    rows = [("", [ROUTES[route["route"]].title, *speed_row(route)]) for route in cell["routes"]]
    left = [f"{ROUTES[name].title}: not served: {reason}" for name, reason in cell["not_served"].items()]
    wrong = [difference_sentence(r["route"], r["difference"]) for r in cell["routes"] if "difference" in r]
    title = f"{cell['prompts']}: {cell['num_prompts']} prompts, K = {cell['num_assistant_tokens']}"
    return table(title, ("route", *SPEED_HEADINGS), rows) + "".join(message(text, True) for text in [*left, *wrong])
