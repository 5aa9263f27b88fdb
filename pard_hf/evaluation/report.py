"""Show results on the terminal: a progress bar, and tables that fit 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .routes import ROUTES

GAP = "gap: how far the plain model prefers its best token where texts first differ, the largest"
# What is looked at first stands first.
SPEED_HEADINGS = ("speedup ÷ AR", "÷ AR+", "identical", "tokens/s", "τ", "α")
TIME_HEADINGS = ("TTFT ms", "after first", "ideal", "of ideal", "compile s", "peak MiB")
ROUND_HEADINGS = ("draft ms", "verify ms", "loop ms", "verify ÷ step", "of copying")


def make_console(is_error: bool = False) -> Any:
    """Make a console for tables on standard output, or for progress, and for tables beside JSON, on standard error."""
    from rich.console import Console

    # A file or a pipe has no width, and tables must not be folded there.
    is_terminal = (sys.stderr if is_error else sys.stdout).isatty()
    return Console(stderr=is_error, highlight=False, width=None if is_terminal else 120)


@contextmanager
def progress_bar(console: Any) -> Iterator[Callable[[float, str], None]]:
    """Show a bar; yield a function that takes the share of all work that begins now, and its name."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        *(BarColumn(bar_width=16), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.description}"),
    )
    # Tables on a terminal go above the bar, those on a file or a pipe go there.
    is_shared = sys.stdout.isatty()
    shown: dict[str, Any] = {"disable": not console.is_terminal, "transient": True, "redirect_stdout": is_shared}
    with Progress(*columns, console=console, **shown) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, advance=share, description=text)


def show_cell(console: Any, cell: dict[str, Any]) -> None:
    references = shown(cell, "repeated_4gram_share_of_references", ".1%", "")
    references = f" (references {references})" if references else ""
    left_out = f" · {cell['num_left_out']} too long, left out" if cell["num_left_out"] else ""
    console.print(
        f"\n{cell['prompts']} · batch {cell['batch_size']} · K = {cell['num_assistant_tokens']} · "
        f"{cell['num_prompts']} prompts of {cell['mean_prompt_tokens']:.0f} tokens{left_out} · "
        f"{cell['mean_new_tokens']:.1f} new tokens · repeated 4-grams {cell['repeated_4gram_share']:.1%}{references}",
        style="bold",
        markup=False,
    )
    routes = cell["routes"]
    console.print(table(SPEED_HEADINGS, {route["route"]: speed_row(route) for route in routes}))
    console.print(table(TIME_HEADINGS, {route["route"]: time_row(route) for route in routes}))
    if "regrouped" in cell:
        console.print(rounding_sentence(cell), markup=False)
    rounds = {route["route"]: round_row(route) for route in routes if "draft_seconds" in route}
    if rounds:
        plain = [route for route in routes if "plain_step_seconds" in route]
        steps = [f"a step of {ROUTES[r['route']].title} {r['plain_step_seconds'] * 1000:.2f} ms · " for r in plain]
        copied = f"{cell['bytes_per_round'] / 1e6:.0f} MB a round · copies at {cell['copy_bandwidth'] / 1e9:.1f} GB/s"
        console.print(table(ROUND_HEADINGS, rounds, "".join(steps) + copied))
    for name, reason in cell["not_served"].items():
        console.print(f"{ROUTES[name].title}: not served: {reason}", markup=False)


def speed_row(route: dict[str, Any]) -> list[str]:
    """Format what a route reaches, under `SPEED_HEADINGS`."""
    return [
        ranged(route, "speedup", ".2f"),
        shown(route, "speedup_over_ar_plus", ".2f"),
        agreement(route),
        f"{route['tokens_per_second']:.1f}",
        shown(route, "acceptance_length", ".2f"),
        shown(route, "acceptance_rate", ".2f"),
    ]


def time_row(route: dict[str, Any]) -> list[str]:
    """Format the first token and those after it, what the speed is bound by and what it takes, by `TIME_HEADINGS`."""
    return [
        f"{route['time_to_first_token'] * 1000:.1f}",
        shown(route, "decode_tokens_per_second", ".1f"),
        f"{route['ideal_speedup']:.2f} × {ROUTES[route['baseline']].title}" if "ideal_speedup" in route else "–",
        shown(route, "ideal_share", ".0%"),
        shown(route, "compile_seconds", ".1f"),
        f"{route['peak_memory'] / 2**20:.0f}" if "peak_memory" in route else "–",
    ]


def round_row(route: dict[str, Any]) -> list[str]:
    """Format the cost of a round by step, and what bounds it, under `ROUND_HEADINGS`."""
    steps = (f"{route[f'{s}_seconds'] * 1000:.2f} ({route[f'{s}_share']:.0%})" for s in ("draft", "verify", "loop"))
    return [
        *steps,
        shown(route, "verify_ratio", ".2f"),
        shown(route, "bandwidth_share", ".0%"),
    ]


def agreement(found: dict[str, Any]) -> str:
    """Format the share of identical texts, and the largest logit gap of the others."""
    gaps = found.get("logit_gaps")
    return f"{found['identical_share']:.0%}" + (f" gap {max(gaps):.2g}" if gaps else "")


def rounding_sentence(cell: dict[str, Any]) -> str:
    """Describe how far plain `generate` agrees with itself in 16 bit, to compare other routes with."""
    size = max(cell["batch_size"], cell["regrouped"]["batch_size"])
    compiled = next((agreement(route) for route in cell["routes"] if route["route"] == "ar_plus"), None)
    of_compiled = f" · eager against compiled: identical {compiled}" if compiled else ""
    return (
        f"plain generate against itself: one row against a batch of {size}: identical {agreement(cell['regrouped'])}"
        f"{of_compiled} ({GAP})"
    )


def table(headings: tuple[str, ...], rows: dict[str, list[str]], caption: str | None = None) -> Any:
    """Make a table of routes by name, ours in green."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, caption=caption, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("route")
    for heading in headings:
        made.add_column(
            heading, justify="right", min_width=max(len(row[len(made.columns) - 1]) for row in rows.values())
        )
    for name, cells in rows.items():
        made.add_row(ROUTES[name].title, *cells, style="green" if ROUTES[name].is_pard else None)
    return made


def shown(values: dict[str, Any], name: str, form: str, absent: str = "–") -> str:
    return format(values[name], form) if name in values else absent


def ranged(route: dict[str, Any], name: str, form: str) -> str:
    if name not in route:
        return "–"
    low, high = route[f"{name}_range"]
    return f"{route[name]:{form}} [{low:{form}}–{high:{form}}]"


def difference_sentence(route: str, difference: dict[str, Any]) -> str:
    gap = shown(difference, "logit_gap", ".2g", "")
    gap = f", its logit {gap} below the best" if gap else ""
    return (
        f"Expected the tokens of plain `generate` from {ROUTES[route].title}, got others: set "
        f"{difference['prompts']}, prompt {difference['prompt_index']}, new token {difference['position']}: "
        f"{difference['expected']!r} expected, {difference['got']!r} emitted{gap}."
    )
