"""`pard bench`: every route on the same prompts, as tables, JSON and figures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .models import EXIT_DIFFERENT, add_model_arguments

# What must agree before a run may go on with an earlier one's cells; its sets, batch sizes and K may be others.
RESUMED = (
    *("target", "draft", "scale", "commit", "versions", "device", "dtype", "decoding"),
    *("routes", "repeats", "max_new_tokens", "limit", "seed", "context", "assistant_tree_size"),
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure speed and acceptance of every way to generate",
        description="Measure plain generate, its rivals and PARD on the same prompts, interleaved. The last line of "
        "standard output is the result as one JSON object.",
        epilog="Ends with 3 where a text differs from plain generate's in float32.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=["demo"],
        help=".jsonl files with `prompt`, `demo`, or Hub data sets as hub:org/name[:split[:field]] (default: demo)",
    )
    parser.add_argument("--limit", type=int, default=16, help="prompts a set (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts of a set (default: 0)")
    parser.add_argument("--context", type=int, help="put other text before prompts up to so many tokens")
    parser.add_argument("--routes", nargs="+", help="what to compare with plain generate (default: all that apply)")
    parser.add_argument(
        "--num-assistant-tokens", nargs="+", type=int, help="K, draft tokens proposed a round (default: the draft's)"
    )
    parser.add_argument(
        "--assistant-tree-size", type=int, default=64, help="N, nodes of a round's tree where a route drafts one"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1], help="texts at a time (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each route (default: 3)")
    parser.add_argument(
        "--scale", nargs=2, metavar=("TARGET_SHAPE", "DRAFT_SHAPE"), help="enlarge the pair to these shapes first"
    )
    parser.add_argument("--output", type=Path, help="write the JSON here: a .json file, or a folder")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run's --output")
    parser.add_argument("--plots", action="store_true", help="draw figures beside --output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.plots import need_matplotlib
    from ..evaluation.prompts import load_prompts
    from ..evaluation.report import make_console

    if args.output is None and (args.resume or args.plots):
        raise ValueError(
            f"Expected `--output` with `--{'resume' if args.resume else 'plots'}`, got none. Name a file."
        )
    if args.output is not None and args.output.suffix != ".json":
        args.output = args.output / "bench.json"
    console = make_console()
    if args.plots:
        need_matplotlib()
    prompt_sets: dict[str, Any] = {}
    for source in args.prompts:
        name, rows = load_prompts(source)
        if name in prompt_sets:
            raise ValueError(f"Expected prompt sets of different names, got `{name}` twice. Rename one of the files.")
        prompt_sets[name] = rows
    return measure(args, prompt_sets, console)


def measure(args: argparse.Namespace, prompt_sets: dict[str, Any], console: Any) -> int:
    """Measure, show and write everything; returns the exit code."""
    from ..evaluation.benchmark import Benchmark, PartialFile, differences, is_exact
    from ..evaluation.metrics import BenchmarkResult, CellResult
    from ..evaluation.plots import write_plots
    from ..evaluation.report import difference_sentence, progress_bar, show_cell
    from ..io import write_whole

    settings = settings_of(args)
    pair = load_for_benchmark(args)
    conditions = conditions_for(args, pair)
    partial, finished = None, []
    if args.output is not None:
        partial = PartialFile(args.output, {name: conditions.get(name) for name in RESUMED})
        finished = partial.begin(args.resume)

    def keep(cell: CellResult) -> None:
        if partial is not None:
            partial.append(cell)
        show_cell(console, cell)

    with progress_bar(console) as advance:
        result = BenchmarkResult(conditions, Benchmark(pair, settings, advance).run(prompt_sets, finished, keep))
    if partial is not None:
        write_whole(args.output, result.to_json())
        partial.remove()
    if args.plots:
        write_plots(result, args.output)
    different = differences(result.cells) if is_exact(pair.target.dtype) else []
    for route, difference in different[:1]:
        print(f"pard bench: {difference_sentence(route, difference)}", file=sys.stderr)
    print(json.dumps(result.to_dict(), ensure_ascii=False))
    return EXIT_DIFFERENT if different else 0


def settings_of(args: argparse.Namespace) -> Any:
    from ..evaluation.benchmark import BenchmarkSettings
    from ..evaluation.routes import ROUTES

    return BenchmarkSettings(
        routes=tuple(args.routes or ROUTES),
        batch_sizes=tuple(args.batch_sizes),
        num_assistant_tokens=tuple(args.num_assistant_tokens or ()),
        repeats=args.repeats,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        seed=args.seed,
        context=args.context,
        tree_size=args.assistant_tree_size,
    )


def load_for_benchmark(args: argparse.Namespace) -> Any:
    """Load the pair that the flags name, enlarged where `--scale` asks for it."""
    from transformers.utils import logging

    from ..host import num_positions
    from ..loading import check_device, default_device, load_pair, weight_dtype

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # The stock loop warns of its own defaults in every call.
    if args.scale is None:
        return load_pair(args.target, args.draft, args.dtype, args.device)
    from benchmarks.scaling import enlarge_pair

    device = args.device or default_device()
    check_device(device)
    small = load_pair(args.target, args.draft, "float32", "cpu")
    dtype = weight_dtype(small.target.name_or_path, args.dtype, device)
    # Rotary positions go on as far as anyone asks; without `--context` the enlarged pair has plenty.
    positions = None
    if args.context is not None:
        positions = max(args.context + args.max_new_tokens, num_positions(small.target.config))
    return enlarge_pair(small, *args.scale, dtype=dtype, device=device, max_position_embeddings=positions)


def conditions_for(args: argparse.Namespace, pair: Any) -> dict[str, Any]:
    """What the result says of itself; file names only, never folders."""
    from ..io import conditions_of, shown_command, shown_model

    conditions = {
        "command": shown_command(args.words),
        "target": shown_model(args.target),
        "draft": shown_model(args.draft),
        "scale": args.scale,
        **conditions_of(pair.target),
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
        "limit": args.limit,
        "seed": args.seed,
        "context": args.context,
        "assistant_tree_size": args.assistant_tree_size,
        "routes": args.routes,
    }
    return {name: value for name, value in conditions.items() if value is not None}
