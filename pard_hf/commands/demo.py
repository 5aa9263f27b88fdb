"""`pard demo`: plain `generate` against PARD on a few prompts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .models import add_pair_arguments, load
from .streamer import RESET, UNDERLINE


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="plain generate and ours on real prompts", description="Race plain generate against PARD."
    )
    add_pair_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a prompt and route (default: 3)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.batches import pad_left, pad_token_id
    from ..evaluation.prompts import DEMO_PROMPTS, encode_prompt
    from ..evaluation.race import race

    pair = load(args)
    device, dtype = pair.target.device, str(pair.target.dtype).removeprefix("torch.")
    print(f"K = {args.num_assistant_tokens} · {dtype} · {device} · greedy · up to {args.max_new_tokens} new tokens\n")
    results = []
    for number, prompt in enumerate(DEMO_PROMPTS, start=1):
        print(f"[{number}/{len(DEMO_PROMPTS)}] {prompt.rstrip()}")
        inputs = pad_left([encode_prompt(pair.tokenizer, prompt)], pad_token_id(pair.target))
        settings = args.num_assistant_tokens, args.max_new_tokens, args.repeats, args.assistant_tree_size
        result = race(pair, inputs, *settings)
        results.append(result)
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}plain generate{RESET if sys.stdout.isatty() else ''}")
        print(result.plain_text.rstrip())
        print(f"\n{UNDERLINE if sys.stdout.isatty() else ''}with the draft{RESET if sys.stdout.isatty() else ''}")
        print(result.pard_text.rstrip())
        print(
            f"\n  identical: {'yes' if result.is_identical else 'NO'} · {result.num_new_tokens} tokens · plain "
            f"{result.plain_rate:.0f} tokens/s · PARD {result.pard_rate:.0f} tokens/s · "
            f"τ {result.stats.acceptance_length:.2f} · speedup {result.speedup:.2f}\n",
            flush=True,
        )
    total = sum(results[1:], results[0])
    print(
        f"all prompts: identical {sum(r.is_identical for r in results)}/{len(results)} · plain "
        f"{total.plain_rate:.0f} tokens/s · PARD {total.pard_rate:.0f} tokens/s · "
        f"τ {total.stats.acceptance_length:.2f} · speedup {total.speedup:.2f}"
    )
    if args.target is None:
        print("The bundled pair is a stand-in to see the mechanism, not a useful assistant.")
    return 0
