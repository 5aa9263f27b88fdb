"""Draw the plots of the documentation: `python docs/figures.py`.

Measured metrics come from `benchmarks/results`, rules from the package's own functions; a formula is labelled as one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from pard_hf.training.cod import attention_mask, keep_rows

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
from plots import draw_speedups  # noqa: E402

FOLDER = Path(__file__).parent / "figures"
RESULTS = BENCHMARKS / "results"
ACCENT, PALE, GREY, DARK = "#0b7a4b", "#cfe5da", "#8a8a8a", "#303030"
# Text stays text, and nothing in the file depends on when, where or in which process it was drawn.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "pard-hf", "font.size": 9, "font.family": "DejaVu Sans"}
# The routes of the table in `benchmarks/README.md`, in its words; `choosing-k.md` has one of the adaptive ones.
ROUTE_NAMES = {
    "ar": "plain generate",
    "ar_plus": "plain generate, compiled",
    "ad": "same draft token by token",
    "pld": "prompt lookup",
    "tier1": "untouched target",
    "tier2": "our loop",
    "tier2_compiled": "our loop, compiled",
}
# Of the COD plot: a text whose first tokens are a prompt, and the rates of the paper.
NUM_TOKENS, NUM_PROMPT_TOKENS, K_TRAIN, RATE, LEAST_RATE, SEED = 20, 5, 6, 0.7, 0.2, 6


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def conditions(result: dict[str, Any]) -> str:
    """Format what a plot was measured with, for its caption."""
    versions = f"torch {result['versions']['torch']} · transformers {result['versions']['transformers']}"
    return f"{result['device']} · {result['dtype']} · {result['decoding']} · {versions}"


def new_figure(width: float, height: float, caption: str = "", columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """Make a figure with panels side by side, without spines at the top and right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **kwargs)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    if caption:
        figure.supxlabel(caption, fontsize=7, color=DARK)
    return figure, panels


def draw_round() -> Figure:
    """Draw one round on a small text: K = 4, three proposals accepted, then the bonus token."""
    text, masks = ["def", "add", "(", "a"], ["mask"] * 3
    lines = [
        ("draft reads", 0, text + masks, [PALE] * 4 + ["white"] * 3),
        ("draft proposes", 4, [",", "b", ")", "->"], [PALE] * 4),
        ("target reads", 3, ["a", ",", "b", ")", "->"], ["white"] + [PALE] * 4),
        ("target chooses", 4, [",", "b", ")", ":", "\\n"], ["white"] * 5),
        ("emitted", 4, [",", "b", ")", ":"], [ACCENT] * 3 + ["white"]),
    ]
    figure, (panel,) = new_figure(8.4, 3.6)
    for row, (name, start, words, colours) in enumerate(lines):
        panel.text(-0.75, -row, name, ha="right", va="center")
        for column, (word, colour) in enumerate(zip(words, colours, strict=True), start):
            ink = "white" if colour == ACCENT else GREY if word == "mask" or (row, column) == (3, 8) else DARK
            box = {"boxstyle": "square,pad=0.35", "facecolor": colour, "edgecolor": ACCENT, "linewidth": 0.8}
            panel.text(column, -row, word, ha="center", va="center", color=ink, family="monospace", bbox=box)
    for row, starts in ((0, range(3, 7)), (2, range(3, 8))):
        for column in starts:
            ends = {"xy": (column + 0.8, -row - 0.72), "xytext": (column + 0.2, -row - 0.28)}
            panel.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": GREY, "linewidth": 0.8})
    notes = (
        (-0.5, "one forward of the draft: K = 4 proposals"),
        (-2.5, "one forward of the target: K + 1 choices"),
        (-4, "3 accepted, then the bonus token"),
    )
    for height, note in notes:
        panel.text(8.6, height, note, va="center", fontsize=8, color=DARK)
    panel.set(xlim=(-2.6, 12.6), ylim=(-4.6, 0.6), xticks=range(9), yticks=[])
    panel.set_xlabel("position in the text (tokens)", loc="left")
    panel.spines["left"].set_visible(False)
    panel.spines["bottom"].set_bounds(0, 8)
    return figure


def draw_cod() -> Figure:
    """Draw the training rows that conditional drop-token keeps of one text, and their attention mask."""
    is_label = torch.arange(NUM_TOKENS) >= NUM_PROMPT_TOKENS
    all_rows = keep_rows(is_label, K_TRAIN, 1.0, 1.0)
    kept = keep_rows(is_label, K_TRAIN, RATE, LEAST_RATE, torch.Generator().manual_seed(SEED))
    pairs = [list(zip(*(tensor.tolist() for tensor in rows), strict=True)) for rows in (all_rows, kept)]
    dropped = [row for row in pairs[0] if row not in pairs[1]]
    caption = (
        f"{NUM_TOKENS} tokens, the first {NUM_PROMPT_TOKENS} a prompt without loss · K_train = {K_TRAIN}, r = {RATE}, "
        f"r_min = {LEAST_RATE}, seed {SEED} · computed by pard_hf.training.cod"
    )
    figure, (rows, mask) = new_figure(9.6, 4.2, caption, columns=2, width_ratios=[1.1, 1])
    rows.scatter(*zip(*dropped, strict=True), marker="s", s=46, facecolors="none", edgecolors=GREY, label="dropped")
    rows.scatter(*zip(*pairs[1], strict=True), marker="s", s=46, color=ACCENT, label="kept")
    rows.set(
        title=f"{len(pairs[1])} of {len(pairs[0])} rows are kept",
        xlabel="anchor a: the last real token a row reads (index)",
        ylabel="depth d: masks a row reads (number)",
        xticks=range(0, NUM_TOKENS, 2),
    )
    rows.legend(frameon=False, loc="upper left", fontsize=8)
    rows.set_ylim(-0.5, K_TRAIN + 0.4)
    reads, column = attention_mask(*kept).nonzero().T.tolist()
    mask.scatter(column, reads, marker="s", s=5, color=ACCENT, linewidths=0)
    for depth in range(1, K_TRAIN):
        first = int((kept[1] < depth).sum()) - 0.5
        mask.axhline(first, color=GREY, linewidth=0.5)
        mask.axvline(first, color=GREY, linewidth=0.5)
    mask.set(
        title="which kept row (line) attends to which",
        xlabel="row that is read (index, by depth, then anchor)",
        ylabel="row that reads (index)",
        xlim=(-0.5, len(pairs[1]) - 0.5),
        ylim=(len(pairs[1]) - 0.5, -0.5),
        aspect="equal",
    )
    return figure


def draw_acceptance() -> Figure:
    """Plot the acceptance of each position of the bundled pair's proposals."""
    result = read("bundled_pair.json")
    caption = f"bundled pair, K = {result['num_assistant_tokens']} · {conditions(result)} · bundled_pair.json"
    figure, (single, total) = new_figure(8.4, 3.3, caption, columns=2)
    for (name, found), colour, marker in zip(result["sets"].items(), (ACCENT, GREY), "os", strict=True):
        shares = found["acceptance"]["position_acceptance"]
        style = {"color": colour, "marker": marker, "markersize": 4, "label": name}
        single.plot(range(1, len(shares) + 1), shares, **style)
        total.plot(range(len(shares) + 1), [1 + sum(shares[:i]) for i in range(len(shares) + 1)], **style)
    single.set(xlabel="position i of the proposal", ylabel="position acceptance (share of rounds)", ylim=(0, 1))
    total.set(xlabel="positions counted", ylabel="tokens a round (1 + sum of shares)", ylim=(0, None))
    single.legend(frameon=False, fontsize=8)
    return figure


def draw_ideal() -> Figure:
    """Plot the formula of an ideal speedup; nothing here is measured."""
    figure, (panel,) = new_figure(5.6, 3.4, "a formula, not a measurement")
    lengths = [1, 8]
    for ratio, line in zip((0.0, 0.1, 0.25, 0.5, 1.0), ("-", "--", "-.", ":", (0, (1, 3))), strict=True):
        speedups = [length / (1 + ratio) for length in lengths]
        colour = ACCENT if ratio in (0.0, 0.1, 0.25) else GREY
        panel.plot(lengths, speedups, linestyle=line, color=colour, label=f"t_draft / t_target = {ratio:g}")
    panel.axhline(1, color=DARK, linewidth=0.6)
    panel.set(xlabel="acceptance length τ (tokens a round)", ylabel="ideal speedup τ / (1 + t_draft / t_target)")
    panel.set(xlim=(1, 8), ylim=(0, 8))
    panel.legend(frameon=False, fontsize=8)
    return figure


def draw_speedup() -> Figure:
    """Plot the speedup of the routes over plain `generate`, with the range over the repeats."""
    result = read("bundled_routes.json")
    cells = result["cells"]
    shown = f"bundled pair, batch 1, K = {cells[0]['num_assistant_tokens']}"
    caption = f"{shown} · {conditions(result)} · bundled_routes.json"
    figure, panels = new_figure(9.0, 3.4, caption, columns=len(cells), sharey=True)
    for panel, cell in zip(panels, cells, strict=True):
        draw_speedups(panel, cell["routes"], ROUTE_NAMES)
        panel.set_title(f"{cell['prompts']}, {cell['num_prompts']} prompts")
        panel.set_xlabel("speedup over plain generate (ratio)")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "round": draw_round,
    "cod": draw_cod,
    "acceptance": draw_acceptance,
    "ideal": draw_ideal,
    "speedup": draw_speedup,
}


def draw_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
