"""`pard bench`: every route on the same prompts, as tables and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .models import EXIT_DIFFERENT, add_model_arguments


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
    parser.add_argument("--output", type=Path, help="write the JSON here: a .json file, or a folder")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run's --output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..evaluation.benchmark import Benchmark, differences, is_exact, run_benchmark, run_metadata
    from ..evaluation.prompts import load_prompts
    from ..evaluation.report import difference_sentence, make_console, progress_bar, show_cell
    from ..loading import load_pair

    if args.output is None and args.resume:
        raise ValueError("Expected `--output` with `--resume`, got none. Name a file.")
    if args.output is not None and args.output.suffix != ".json":
        args.output = args.output / "bench.json"
    console = make_console()
    prompt_sets: dict[str, Any] = {}
    for source in args.prompts:
        name, rows = load_prompts(source)
        if name in prompt_sets:
            raise ValueError(f"Expected prompt sets of different names, got `{name}` twice. Rename one of the files.")
        prompt_sets[name] = rows
    settings = settings_of(args)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # The stock loop warns of its own defaults in every call.
    pair = load_pair(args.target, args.draft, args.dtype, args.device)
    metadata = run_metadata(pair, settings, args.words, args.target, args.draft)
    with progress_bar(console) as advance:
        benchmark = Benchmark(pair, settings, advance)
        show = partial(show_cell, console)
        result = run_benchmark(benchmark, prompt_sets, metadata, args.output, args.resume, show)
    different = differences(result["cells"]) if is_exact(pair.target.dtype) else []
    for route, difference in different[:1]:
        print(f"pard bench: {difference_sentence(route, difference)}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False))
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
