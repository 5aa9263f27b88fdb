"""Plot results of `pard bench`, next to their files: `python benchmarks/plots.py results/bench.json`."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pard_hf.evaluation.routes import ROUTES

ACCENT, GREY, DARK = "#0b7a4b", "#8a8a8a", "#404040"  # Our routes have the accent colour, the others are grey.
LINES = ("-", "--", ":", "-.")
MARKERS = "osv^D*Px"
# What is swept, at the smallest of which other setting, the metric, and the labels of both axes.
SWEEPS = (
    ("batch_size", "num_assistant_tokens", "tokens_per_second", ("batch size", "tokens/s, all batch rows")),
    ("num_assistant_tokens", "batch_size", "speedup", ("K, proposals a round", "speedup over eager plain generate")),
)
Cell = dict[str, Any]


def write_plots(result: dict[str, Any], path: Path) -> list[Path]:
    """Write every plot that the cells can fill, next to the result at `path`; return the files."""
    cells = result["cells"]
    plots = {"speedup": plot_speedups(result)}
    if any("position_acceptance" in route for cell in cells for route in cell["routes"]):
        plots["position_acceptance"] = plot_position_acceptance(result)
    for swept, fixed, metric, labels in SWEEPS:
        if len({cell[swept] for cell in cells}) > 1:
            plots[swept] = plot_sweep(result, swept, fixed, metric, labels)
    files = [path.with_name(f"{path.stem}_{name}.svg") for name in plots]
    for file, plot in zip(files, plots.values(), strict=True):
        plot.savefig(file)
    return files


def plot_speedups(result: dict[str, Any]) -> Figure:
    """Draw bars of speedup over plain `generate`, a panel a cell."""
    cells = result["cells"]
    figure, panels = make_panels(result, len(cells), 0.6 + 0.3 * max(len(cell["routes"]) for cell in cells))
    for panel, cell in zip(panels, cells, strict=True):
        draw_speedups(panel, cell["routes"], {name: route.title for name, route in ROUTES.items()})
        panel.set_title(title_of(cell), fontsize=9)
        panel.set_xlabel("speedup over eager plain generate (median and range of repeats)", fontsize=8)
    return figure


def draw_speedups(panel: Any, routes: list[dict[str, Any]], titles: dict[str, str]) -> None:
    """Draw bars of the speedups of routes that have a title, the first on top, with the range of the repeats."""
    routes = [route for route in routes if route["route"] in titles][::-1]
    panel.barh(
        [titles[route["route"]] for route in routes],
        [route["speedup"] for route in routes],
        xerr=[[abs(route["speedup_range"][end] - route["speedup"]) for route in routes] for end in (0, 1)],
        color=[colour(route["route"]) for route in routes],
        error_kw={"ecolor": DARK, "capsize": 2, "elinewidth": 0.8},
    )
    panel.axvline(1, color=DARK, linewidth=0.8)


def plot_position_acceptance(result: dict[str, Any]) -> Figure:
    """Draw the shares of rounds that accepted position i; a panel a set, at its first batch size and largest K."""
    first = first_cells(result, lambda cell: (cell["batch_size"], -cell["num_assistant_tokens"]))
    figure, panels = make_panels(result, len(first), 2.4)
    for panel, cell in zip(panels, first, strict=True):
        for line, route in enumerate(route for route in cell["routes"] if route.get("position_acceptance")):
            shares = route["position_acceptance"]
            draw_line(panel, route["route"], line, range(1, len(shares) + 1), shares)
        finish(panel, title_of(cell), "position of the proposal", "share of rounds that accepted it")
        panel.set_ylim(0, 1)
    return figure


def plot_sweep(result: dict[str, Any], swept: str, fixed: str, metric: str, labels: tuple[str, str]) -> Figure:
    """Draw lines of `metric` over `swept`, with `fixed` at its smallest; a panel a set and a line a route."""
    first = first_cells(result, lambda cell: (cell[fixed], cell[swept]))
    figure, panels = make_panels(result, len(first), 2.4)
    for panel, least in zip(panels, first, strict=True):
        cells = [c for c in result["cells"] if (c["prompts"], c[fixed]) == (least["prompts"], least[fixed])]
        cells = sorted(cells, key=lambda cell: cell[swept])
        points: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            for route in cell["routes"]:
                points.setdefault(route["route"], []).append((cell[swept], route[metric]))
        for line, name in enumerate(name for name in ROUTES if name in points):
            draw_line(panel, name, line, *zip(*points[name], strict=True))
        panel.set_xticks([cell[swept] for cell in cells])
        finish(panel, least["prompts"], *labels)
        panel.set_ylim(bottom=0)
    return figure


def first_cells(result: dict[str, Any], key: Callable[[Cell], Any]) -> list[Cell]:
    """Return the first cell of each set by `key`."""
    names = dict.fromkeys(cell["prompts"] for cell in result["cells"])
    return [min((cell for cell in result["cells"] if cell["prompts"] == name), key=key) for name in names]


def make_panels(result: dict[str, Any], number: int, height: float) -> tuple[Figure, list[Any]]:
    """Make a figure of panels below each other, with conditions and command as its caption."""
    conditions = (result.get(name) for name in ("device", "dtype", "decoding", "command"))
    caption = textwrap.fill(" · ".join(str(value) for value in conditions if value), width=120)
    figure = Figure(figsize=(7.5, number * (height + 0.7) + 0.15 * caption.count("\n") + 0.4), layout="constrained")
    panels = figure.subplots(number, 1, squeeze=False)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.supxlabel(caption, fontsize=6, color=DARK)
    return figure, list(panels)


def draw_line(panel: Any, name: str, line: int, x: Any, y: Any) -> None:
    style = {"linestyle": LINES[line % len(LINES)], "marker": MARKERS[line % len(MARKERS)], "markersize": 4}
    panel.plot(x, y, color=colour(name), label=ROUTES[name].title, linewidth=1.2, **style)


def finish(panel: Any, title: str, x_label: str, y_label: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x_label, fontsize=8)
    panel.set_ylabel(y_label, fontsize=8)
    panel.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def colour(name: str) -> str:
    return ACCENT if ROUTES[name].is_pard else GREY


def title_of(cell: Cell) -> str:
    return f"{cell['prompts']} · batch {cell['batch_size']} · K = {cell['num_assistant_tokens']}"


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        for file in write_plots(json.loads(path.read_text(encoding="utf-8")), path):
            print(file)


if __name__ == "__main__":
    main(sys.argv[1:])
