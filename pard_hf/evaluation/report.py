"""Results for the eye: a progress bar and tables on the terminal.

Shows figures as they are; computes none. Everything goes to standard error, whose other stream belongs to the JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .benchmark import GAP
from .metrics import CellResult, Difference, Regrouped, RouteResult
from .routes import ROUTES

SPEED_HEADINGS = (
    "tokens/s",
    "after first",
    "TTFT ms",
    "speedup ÷ AR",
    "÷ AR+",
    "τ",
    "α",
    "identical",
    "compile s",
    "peak MiB",
)


def make_console() -> Any:
    """A rich console on standard error.

    Raises:
        ValueError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ValueError("Expected the package `rich`, got none. Do `pip install 'pard-hf[bench]'`.") from None
    # In a file or a pipe there is no width to keep to, and a table is to stay whole.
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 170)


@contextmanager
def progress_bar(console: Any) -> Iterator[Callable[[float, str], None]]:
    """Show a bar; yields a function that takes the share of all work that begins now, and what it is."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def advance(share: float, text: str) -> None:
            progress.update(task, advance=share, description=text)

        yield advance


def show_cell(console: Any, cell: CellResult) -> None:
    """Print a cell's tables."""
    references = cell.repeated_4gram_share_of_references
    beside = "" if references is None else f" (references {references:.1%})"
    left_out = f" · {cell.num_left_out} too long, left out" if cell.num_left_out else ""
    console.print(
        f"\n{cell.prompts} · batch {cell.batch_size} · K = {cell.num_assistant_tokens} · {cell.num_prompts} prompts "
        f"of {cell.mean_prompt_tokens:.0f} tokens{left_out} · {cell.mean_new_tokens:.1f} new tokens · "
        f"repeated 4-grams {cell.repeated_4gram_share:.1%}{beside}",
        style="bold",
        markup=False,
    )
    console.print(speed_table(cell))
    if cell.regrouped is not None:
        console.print(rounding_sentence(cell, cell.regrouped), markup=False)
    if any(route.draft_seconds is not None for route in cell.routes):
        console.print(round_table(cell))
    for name, reason in cell.not_served.items():
        console.print(f"{ROUTES[name].title}: not served: {reason}", markup=False)


def speed_table(cell: CellResult) -> Any:
    """What each route reaches."""
    return table(SPEED_HEADINGS, {ROUTES[route.route].title: speed_row(route) for route in cell.routes})


def speed_row(route: RouteResult) -> list[str]:
    return [
        f"{route.tokens_per_second:.1f} [{ranged(route.tokens_per_second_range, '.1f')}]",
        shown(route.decode_tokens_per_second, ".1f"),
        f"{route.time_to_first_token * 1000:.1f}",
        f"{route.speedup:.2f} [{ranged(route.speedup_range, '.2f')}]",
        shown(route.speedup_over_ar_plus, ".2f")
        + (f" [{ranged(bounds, '.2f')}]" if (bounds := route.speedup_over_ar_plus_range) else ""),
        shown(route.acceptance_length, ".2f"),
        shown(route.acceptance_rate, ".2f"),
        agreement(route),
        shown(route.compile_seconds, ".1f"),
        shown(None if route.peak_memory is None else route.peak_memory / 2**20, ".0f"),
    ]


def agreement(found: RouteResult | Regrouped) -> str:
    """The share of identical texts, and the largest gap of the others."""
    return f"{found.identical_share:.0%}" + (f" gap {max(found.logit_gaps):.2g}" if found.logit_gaps else "")


def rounding_sentence(cell: CellResult, regrouped: Regrouped) -> str:
    """Say how far plain `generate` agrees with itself in 16 bit, which is what other routes are to be held against."""
    sizes = sorted((cell.batch_size, regrouped.batch_size))
    compiled = cell.route("ar_plus")
    beside = "" if compiled is None else f" · eager against compiled: identical {agreement(compiled)}"
    return (
        f"plain generate against itself: one row against a batch of {sizes[1]}: identical {agreement(regrouped)}"
        f"{beside} ({GAP})"
    )


def round_table(cell: CellResult) -> Any:
    """Where the time of a round goes, and what bounds it."""
    headings = (
        "draft ms",
        "verify ms",
        "loop ms",
        "verify ÷ step",
        "ideal",
        "of ideal",
        "of ideal, decode",
        "of bandwidth",
    )
    rows = {ROUTES[r.route].title: round_row(r) for r in cell.routes if r.draft_seconds is not None}
    steps = [
        f"a step of {ROUTES[route.route].title} {route.plain_step_seconds * 1000:.2f} ms · "
        for route in cell.routes
        if route.plain_step_seconds is not None
    ]
    caption = (
        f"{''.join(steps)}{cell.bytes_per_round / 1e6:.0f} MB a round · copies at {cell.copy_bandwidth / 1e9:.1f} GB/s"
    )
    return table(headings, rows, caption)


def round_row(route: RouteResult) -> list[str]:
    parts = [
        f"{seconds * 1000:.2f} ({share:.0%})"
        for seconds, share in (
            (route.draft_seconds, route.draft_share),
            (route.verify_seconds, route.verify_share),
            (route.loop_seconds, route.loop_share),
        )
        if seconds is not None and share is not None
    ]
    return [
        *parts,
        shown(route.verify_ratio, ".2f"),
        shown(route.ideal_speedup, ".2f") + (f" × {ROUTES[route.baseline].title}" if route.baseline else ""),
        shown(route.ideal_share, ".0%"),
        shown(route.decode_ideal_share, ".0%"),
        shown(route.bandwidth_share, ".0%"),
    ]


def table(headings: tuple[str, ...], rows: dict[str, list[str]], caption: str | None = None) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, caption=caption, caption_justify="left", pad_edge=False)
    made.add_column("route", no_wrap=True)
    for heading in headings:
        made.add_column(heading, justify="right")
    for title, cells in rows.items():
        made.add_row(title, *cells, style="green" if title.startswith("PARD") else None)
    return made


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash where nobody measured one."""
    return "–" if value is None else format(value, form)


def ranged(bounds: list[float], form: str) -> str:
    return f"{bounds[0]:{form}}–{bounds[1]:{form}}"


def difference_sentence(route: str, difference: Difference) -> str:
    """Say where a route left plain `generate`, and how near the choice was."""
    gap = "" if difference.logit_gap is None else f", its logit {difference.logit_gap:.2g} below the best"
    return (
        f"Expected the tokens of plain `generate` from {ROUTES[route].title}, got others: set {difference.prompts}, "
        f"prompt {difference.prompt_index}, new token {difference.position}: {difference.expected!r} expected, "
        f"{difference.got!r} said{gap}."
    )
