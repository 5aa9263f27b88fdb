"""Results as figures: one accent colour for our routes, grey for the others, the command below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .metrics import BenchmarkResult, CellResult, RouteResult
from .routes import ROUTES

ACCENT, GREY = "#0b7a4b", "#8a8a8a"
LINES = ("-", "--", ":", "-.")
MARKERS = "osv^D*Px"


def need_matplotlib() -> None:
    """Raise a `ValueError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("Expected the package `matplotlib`, got none. Do `pip install 'pard-hf[bench]'`.") from None


def write_plots(result: BenchmarkResult, path: Path) -> list[Path]:
    """Write every figure that the cells can fill, beside the result at `path`; returns the files."""
    plots: dict[str, Callable[[BenchmarkResult], Any]] = {"speedup": plot_speedups}
    if any(route.position_acceptance for cell in result.cells for route in cell.routes):
        plots["position_acceptance"] = plot_position_acceptance
    if len({cell.batch_size for cell in result.cells}) > 1:
        plots["batch_size"] = plot_batch_sizes
    if len({cell.num_assistant_tokens for cell in result.cells}) > 1:
        plots["num_assistant_tokens"] = plot_num_assistant_tokens
    files = []
    for name, plot in plots.items():
        file = path.with_name(f"{path.stem}_{name}.svg")
        plot(result).savefig(file)
        files.append(file)
    return files


def plot_speedups(result: BenchmarkResult) -> Any:
    """Bars of speedup over plain `generate`, a panel a cell."""
    height = 0.6 + 0.3 * max(len(cell.routes) for cell in result.cells)
    figure, panels = make_panels(result, len(result.cells), height)
    for panel, cell in zip(panels, result.cells, strict=True):
        routes = cell.routes[::-1]
        low, high = zip(*(route.speedup_range for route in routes), strict=True)
        speedups = [route.speedup for route in routes]
        panel.barh(
            [ROUTES[route.route].title for route in routes],
            speedups,
            xerr=[
                [s - a for s, a in zip(speedups, low, strict=True)],
                [b - s for s, b in zip(speedups, high, strict=True)],
            ],
            color=[colour(route.route) for route in routes],
            error_kw={"ecolor": "#404040", "capsize": 2},
        )
        panel.axvline(1, color="#404040", linewidth=0.8)
        panel.set_title(cell_title(cell), fontsize=9)
        panel.set_xlabel("speedup over eager plain generate (median and range of repeats)", fontsize=8)
    return figure


def plot_position_acceptance(result: BenchmarkResult) -> Any:
    """Share of rounds whose i-th proposal was accepted; a panel a set, at its first batch size and largest K."""
    sets = first_cells(result, lambda cell: (cell.batch_size, -cell.num_assistant_tokens))
    figure, panels = make_panels(result, len(sets), 2.4)
    for panel, cell in zip(panels, sets, strict=True):
        for line, route in enumerate(route for route in cell.routes if route.position_acceptance):
            shares = route.position_acceptance or []
            draw(panel, route.route, line, range(1, len(shares) + 1), shares)
        finish(panel, cell_title(cell), "position of the proposal", "share of rounds that accepted it")
        panel.set_ylim(0, 1)
    return figure


def plot_batch_sizes(result: BenchmarkResult) -> Any:
    """Tokens a second over the batch size, a panel a set, at its smallest K."""
    smallest = {c.prompts: min(o.num_assistant_tokens for o in cells_of(result, c)) for c in result.cells}
    return plot_sweep(
        result,
        chosen=lambda cell: cell.num_assistant_tokens == smallest[cell.prompts],
        place=lambda cell: cell.batch_size,
        value=lambda route: route.tokens_per_second,
        labels=("batch size", "tokens/s, all rows"),
    )


def plot_num_assistant_tokens(result: BenchmarkResult) -> Any:
    """Speedup over K, a panel a set, at its smallest batch size."""
    smallest = {c.prompts: min(o.batch_size for o in cells_of(result, c)) for c in result.cells}
    return plot_sweep(
        result,
        chosen=lambda cell: cell.batch_size == smallest[cell.prompts],
        place=lambda cell: cell.num_assistant_tokens,
        value=lambda route: route.speedup,
        labels=("K, proposals a round", "speedup over eager plain generate"),
    )


def plot_sweep(
    result: BenchmarkResult,
    chosen: Callable[[CellResult], bool],
    place: Callable[[CellResult], int],
    value: Callable[[RouteResult], float],
    labels: tuple[str, str],
) -> Any:
    """Lines of `value` over `place`, a panel a set and a line a route."""
    sets = first_cells(result, place)
    figure, panels = make_panels(result, len(sets), 2.4)
    for panel, first in zip(panels, sets, strict=True):
        cells = sorted((cell for cell in cells_of(result, first) if chosen(cell)), key=place)
        names = [name for name in ROUTES if any(cell.route(name) for cell in cells)]
        for line, name in enumerate(names):
            points = [(place(cell), value(route)) for cell in cells if (route := cell.route(name)) is not None]
            draw(panel, name, line, *zip(*points, strict=True))
        panel.set_xticks([place(cell) for cell in cells])
        finish(panel, first.prompts, *labels)
        panel.set_ylim(bottom=0)
    return figure


def cells_of(result: BenchmarkResult, like: CellResult) -> list[CellResult]:
    """The cells of the same set."""
    return [cell for cell in result.cells if cell.prompts == like.prompts]


def first_cells(result: BenchmarkResult, key: Callable[[CellResult], Any]) -> list[CellResult]:
    """The first cell of each set by `key`."""
    names = dict.fromkeys(cell.prompts for cell in result.cells)
    return [min((cell for cell in result.cells if cell.prompts == name), key=key) for name in names]


def make_panels(result: BenchmarkResult, number: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels below each other, with the conditions as its caption."""
    from matplotlib.figure import Figure

    shown = [result.conditions.get(name) for name in ("device", "dtype", "decoding", "command")]
    caption = textwrap.fill(" · ".join(str(value) for value in shown if value), width=120)
    figure = Figure(figsize=(7.5, number * (height + 0.7) + 0.15 * caption.count("\n") + 0.4), layout="constrained")
    panels = figure.subplots(number, 1, squeeze=False)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.supxlabel(caption, fontsize=6, color="#404040")
    return figure, list(panels)


def draw(panel: Any, name: str, line: int, places: Any, values: Any) -> None:
    style = {"linestyle": LINES[line % len(LINES)], "marker": MARKERS[line % len(MARKERS)], "markersize": 4}
    panel.plot(places, values, color=colour(name), label=ROUTES[name].title, linewidth=1.2, **style)


def finish(panel: Any, title: str, x_label: str, y_label: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x_label, fontsize=8)
    panel.set_ylabel(y_label, fontsize=8)
    panel.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def colour(name: str) -> str:
    return ACCENT if ROUTES[name].is_pard else GREY


def cell_title(cell: CellResult) -> str:
    return f"{cell.prompts} · batch {cell.batch_size} · K = {cell.num_assistant_tokens}"
