"""`pard demo`: plain `generate` against PARD on a few prompts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .models import EXIT_DIFFERENT, add_pair_arguments, load
from .streamer import RESET, UNDERLINE


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="plain generate and ours on real prompts",
        description="Race plain generate against PARD.",
        epilog="Ends with 3 where a text differs from plain generate's in float32.",
    )
    add_pair_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a prompt and route (default: 3)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="race compiled plain generate as well, which compiles first (default: on a GPU, where ours does)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.benchmark import is_exact
    from ..evaluation.prompts import DEMO_PROMPTS, encode_prompt
    from ..evaluation.race import PARD, compile_plain, race
    from ..evaluation.report import GAP
    from ..host import pad_left, pad_token_id

    pair = load(args)
    device, dtype = pair.target.device, str(pair.target.dtype).removeprefix("torch.")
    print(f"K = {args.num_assistant_tokens} · {dtype} · {device} · greedy · up to {args.max_new_tokens} new tokens\n")
    encoded = [encode_prompt(pair.tokenizer, prompt) for prompt in DEMO_PROMPTS]
    with_compiled = device.type != "cpu" if args.compiled is None else args.compiled
    if with_compiled:
        longest = pad_left([max(encoded, key=len)], pad_token_id(pair.target.generation_config))
        if (reason := compile_plain(pair, longest, args.max_new_tokens)) is not None:
            with_compiled = False
            print(f"Compiled plain generate is left out: {reason}.\n")
    results = []
    for number, (prompt, ids) in enumerate(zip(DEMO_PROMPTS, encoded, strict=True), start=1):
        print(f"[{number}/{len(DEMO_PROMPTS)}] {prompt.rstrip()}")
        inputs = pad_left([ids], pad_token_id(pair.target.generation_config))
        settings = args.num_assistant_tokens, args.max_new_tokens, args.repeats, args.assistant_tree_size
        result = race(pair, inputs, *settings, with_compiled)
        results.append(result)
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}plain generate{RESET if sys.stdout.isatty() else ''}")
        print(result.plain_text.rstrip())
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}with the draft{RESET if sys.stdout.isatty() else ''}")
        print(result.pard_text.rstrip())
        print(
            f"\n  identical: {'yes' if result.is_identical else 'NO'} · {result.num_new_tokens} tokens · plain "
            f"{result.plain_rate:.0f} tokens/s · PARD {result.pard_rate:.0f} tokens/s · "
            f"τ {result.stats.acceptance_length:.2f} · speedup {speedups(result)}\n",
            flush=True,
        )
    total = sum(results[1:], results[0])
    print(
        f"all prompts: identical {total.agreements[PARD]} · plain "
        f"{total.plain_rate:.0f} tokens/s · PARD {total.pard_rate:.0f} tokens/s · "
        f"τ {total.stats.acceptance_length:.2f} · speedup {speedups(total)}"
    )
    if not is_exact(pair.target.dtype):
        itself = [f"{name}: identical {agreed}" for name, agreed in total.agreements.items() if name != PARD]
        print(f"plain generate against itself: {' · '.join(itself)} ({GAP})")
    if args.target is None:
        print("The bundled pair is a stand-in to see the mechanism, not a useful assistant.")
    if is_exact(pair.target.dtype) and not total.is_identical:
        print(
            f"pard demo: Expected the texts of plain `generate` in {dtype}, got {total.agreements[PARD]} identical. "
            "Please report the pair of models and the versions.",
            file=sys.stderr,
        )
        return EXIT_DIFFERENT
    return 0


def speedups(result: Any) -> str:
    """The speedup over eager plain `generate` and, where it ran, over compiled."""
    over_compiled = result.speedup_over_compiled
    return f"{result.speedup:.2f}" + ("" if over_compiled is None else f" ({over_compiled:.2f} over compiled plain)")
