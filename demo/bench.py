"""`pard bench` in the page: the same run, table, figures and JSON as on the shell."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from pard_hf.draft.known_drafts import known_draft_for
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings, EncodedSet, run_metadata
from pard_hf.evaluation.prompts import NAMED_SETS, load_prompts
from pard_hf.evaluation.report import SPEED_HEADINGS, difference_sentence, speed_row
from pard_hf.evaluation.routes import ROUTES
from pard_hf.loading import Pair

from .html import message
from .job import Job, Ticket
from .pairs import BUNDLED, NAMED, SMOLLM2, PairName, PairShelf
from .settings import Settings, whole

MOST_PROMPTS = 32
HEADINGS = ["route", *SPEED_HEADINGS]
# What compiles takes minutes on a CPU before anything is shown: left to visitors who want to wait.
FIRST_ROUTES = ("ar", "pld", "ad", "tier1", "tier2", "adaptive", "lookup", "every_source")


class WatchedBenchmark(Benchmark):
    """A benchmark whose job can be ended inside a chat template too."""

    def __init__(self, job: BenchJob, *args: Any):
        super().__init__(*args)
        self.job = job

    def encode(self, name: str, rows: list[dict[str, Any]]) -> EncodedSet:
        with self.job.traced():
            return super().encode(name, rows)


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

    most_seconds = 1200.0  # Others wait for the device.

    def __init__(
        self,
        pair: Pair,
        name: PairName,
        prompts: str,
        routes: Sequence[str],
        limit: Any,
        repeats: Any,
        settings: Settings,
        ticket: Ticket | None = None,
    ):
        super().__init__(ticket)
        for route in routes or ("no route",):
            if route not in ROUTES:
                raise ValueError(f"Expected routes among {', '.join(ROUTES)}, got {route!r}. Choose some of these.")
        chosen = BenchmarkSettings(
            routes=tuple(routes),
            num_assistant_tokens=(settings.num_assistant_tokens,),
            repeats=whole("Repeats", repeats, 1, 5),
            max_new_tokens=settings.max_new_tokens,
            limit=whole("Prompts", limit, 1, MOST_PROMPTS),
            tree_size=settings.tree_size,
        )
        words = [
            *("bench", "--prompts", prompts, "--limit", str(chosen.limit)),
            *("--repeats", str(chosen.repeats), "--max-new-tokens", str(chosen.max_new_tokens)),
            *("--num-assistant-tokens", str(settings.num_assistant_tokens)),
            *("--assistant-tree-size", str(chosen.tree_size)),
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
        self.benchmark = WatchedBenchmark(self, pair, chosen, self.advance)
        self.conditions = run_metadata(pair, chosen, words, *models)
        self.share, self.doing = 0.0, "Beginning …"
        self.cells: list[dict[str, Any]] = []

    def advance(self, share: float, text: str) -> None:
        """Told before each run of a route; the job is stopped here."""
        self.check()
        self.share, self.doing = self.share + share, text

    def work(self) -> None:
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


def rows(result: dict[str, Any]) -> list[list[str]]:
    """What each route reached, under `HEADINGS`."""
    return [[ROUTES[r["route"]].title, *speed_row(r)] for cell in result["cells"] for r in cell["routes"]]


def remarks(result: dict[str, Any]) -> str:
    """What was not served, which texts differ, and the command that measures it again."""
    cells = result["cells"]
    said = [f"{ROUTES[name].title}: not served: {why}" for cell in cells for name, why in cell["not_served"].items()]
    routes = [route for cell in cells for route in cell["routes"] if "difference" in route]
    said += [difference_sentence(route["route"], route["difference"]) for route in routes]
    return (
        "".join(message(text, True) for text in said)
        + f"<p>On the shell: <code>{escape(result['command'])}</code></p>"
    )
