"""What the bundled pair shows, in one run: acceptance and repetition per prompt set, and the speed of every route.

    python benchmarks/bundled_pair.py --prompts heldout_code_functions.jsonl gsm8k_test.jsonl

Routes run interleaved on the same prompts, batch 1, after one warm-up each; the medians over repeats are compared. The
last line of standard output is the result as one JSON object, which `--output` also writes to a file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import pard_hf
from pard_hf import DecodingStats, load_pair, without_pard
from pard_hf.evaluation.prompts import encode_answer, encode_prompt, read_prompts, repeated_share
from pard_hf.io import conditions_of, shown_command


def until(end: int, answer: list[int]) -> list[int]:
    return answer[: answer.index(end)] if end in answer else answer


def acceptance(pair: Any, rows: list[dict[str, Any]], drafts: int, new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Acceptance, repetition and identity over a whole prompt set, in batches sorted by length."""
    tokenizer, end = pair.tokenizer, pair.tokenizer.eos_token_id
    encoded = sorted((encode_prompt(tokenizer, row["prompt"]) for row in rows), key=len)
    stats, texts, identical = DecodingStats(), [], 0
    for start in range(0, len(encoded), batch_size):
        batch = tokenizer.pad(
            {"input_ids": encoded[start : start + batch_size]}, return_tensors="pt", padding_side="left"
        )
        common = {**batch, "max_new_tokens": new_tokens, "do_sample": False}
        output = pair.target.generate(
            **common, assistant_model=pair.draft, num_assistant_tokens=drafts, return_dict_in_generate=True
        )
        plain = pair.target.generate(**common)
        stats += output.stats
        columns = batch["input_ids"].shape[1]
        ours, theirs = ([until(end, row) for row in s[:, columns:].tolist()] for s in (output.sequences, plain))
        identical += sum(a == b for a, b in zip(ours, theirs, strict=True))
        texts.extend(theirs)
        print(f"  {min(start + batch_size, len(encoded))}/{len(encoded)} prompts", file=sys.stderr, flush=True)
    return {
        "num_prompts": len(rows),
        **stats.to_dict(),
        "identical_share": identical / len(rows),
        "repeated_4gram_share": round(repeated_share(texts), 4),
        "repeated_4gram_share_of_references": round(
            repeated_share(encode_answer(tokenizer, row, new_tokens) for row in rows), 4
        ),
        "ended_share": round(sum(len(text) < new_tokens for text in texts) / len(texts), 4),
        "mean_new_tokens": round(sum(map(len, texts)) / len(texts), 2),
    }


class ForwardClock:
    """Adds up the wall time inside a model's forward calls."""

    def __init__(self, *models: torch.nn.Module):
        self.seconds, self.calls = 0.0, 0
        for model in models:
            model.register_forward_pre_hook(self.begin)
            model.register_forward_hook(self.finish)

    def begin(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def finish(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        self.calls += 1

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


def speed(args: argparse.Namespace, pair: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Wall time of every route on the same prompts, batch 1, interleaved prompt by prompt."""
    stock = load_pair(args.target, args.draft, pair.target.dtype)  # untouched by the mixin: tier 1 and the baselines
    untouched = without_pard(stock.target)
    from transformers import AutoModelForCausalLM

    draft_path = args.draft or pard_hf.bundled_pair().draft
    autoregressive = AutoModelForCausalLM.from_pretrained(draft_path, dtype=pair.target.dtype).eval()
    drafts = args.num_assistant_tokens
    routes: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (untouched, {}),
        "prompt lookup, stock loop": (untouched, {"prompt_lookup_num_tokens": drafts}),
        "autoregressive draft, stock loop, K = 4": (untouched, {"assistant_model": autoregressive, "K": 4}),
        f"autoregressive draft, stock loop, K = {drafts}": (
            untouched,
            {"assistant_model": autoregressive, "K": drafts},
        ),
        "PARD tier 1": (untouched, {"assistant_model": stock.draft, "K": drafts}),
        "PARD tier 2": (pair.target, {"assistant_model": pair.draft, "num_assistant_tokens": drafts}),
    }
    target_clock, draft_clock, untouched_clock = (
        ForwardClock(pair.target),
        ForwardClock(pair.draft),
        ForwardClock(untouched),
    )
    totals = {name: [0.0] * args.repeats for name in routes}
    parts = {"draft": [0.0] * args.repeats, "verify": [0.0] * args.repeats}
    tokens, rounds, identical = 0, dict.fromkeys(routes, 0), dict.fromkeys(routes, 0)
    for number, row in enumerate(rows, start=1):
        inputs = {"input_ids": torch.tensor([encode_prompt(pair.tokenizer, row["prompt"])])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = None
        for repeat in range(-1, args.repeats):
            for name, (model, arguments) in routes.items():
                arguments = dict(arguments)
                if "K" in arguments:
                    arguments["assistant_model"].generation_config.num_assistant_tokens = arguments.pop("K")
                for clock in (target_clock, draft_clock, untouched_clock):
                    clock.reset()
                start = time.perf_counter()
                output = model.generate(**inputs, **arguments, max_new_tokens=args.max_new_tokens, do_sample=False)
                seconds = time.perf_counter() - start
                if repeat < 0:  # Warm-up: not timed; outputs and rounds are the same every time.
                    expected = output if expected is None else expected
                    identical[name] += torch.equal(output, expected)
                    rounds[name] += (target_clock if model is pair.target else untouched_clock).calls
                    continue
                totals[name][repeat] += seconds
                if name == "PARD tier 2":
                    parts["draft"][repeat] += draft_clock.seconds
                    parts["verify"][repeat] += target_clock.seconds
        tokens += expected.shape[1] - inputs["input_ids"].shape[1]
        print(f"  {number}/{len(rows)} prompts", file=sys.stderr, flush=True)
    plain, ours = totals["plain"], totals["PARD tier 2"]
    loop = [1 - (d + v) / t for d, v, t in zip(parts["draft"], parts["verify"], ours, strict=True)]
    return {
        "num_prompts": len(rows),
        "num_new_tokens": tokens,
        "repeats": args.repeats,
        "routes": {
            name: {
                "tokens_per_second": round(tokens / median(seconds), 2),
                "tokens_per_second_of_repeats": [round(tokens / s, 2) for s in seconds],
                "speedup": round(median(p / s for p, s in zip(plain, seconds, strict=True)), 3),
                "acceptance_length": round(tokens / rounds[name], 4),
                "identical_share": identical[name] / len(rows),
            }
            for name, seconds in totals.items()
        },
        "tier_2_share_of_time": {
            "draft": round(median(d / t for d, t in zip(parts["draft"], ours, strict=True)), 4),
            "verify": round(median(v / t for v, t in zip(parts["verify"], ours, strict=True)), 4),
            "loop": round(median(loop), 4),
        },
    }


def conditions(args: argparse.Namespace, pair: Any) -> dict[str, Any]:
    return {
        "command": shown_command(sys.argv[1:], "python benchmarks/bundled_pair.py"),
        **conditions_of(pair.target),
        "num_assistant_tokens": args.num_assistant_tokens,
        "max_new_tokens": args.max_new_tokens,
        "timing": "batch 1, eager, prefill included, routes interleaved prompt by prompt, median over repeats",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="jsonl files with `prompt` and an answer"
    )
    parser.add_argument("--target", help="default: the bundled target")
    parser.add_argument("--draft", help="default: the bundled draft")
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="prompts a set for acceptance (default: all)")
    parser.add_argument("--speed-prompts", type=int, default=12, help="prompts a set for timing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32, help="for acceptance only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    pair = load_pair(args.target, args.draft, args.dtype)
    result: dict[str, Any] = {**conditions(args, pair), "sets": {}}
    for path in args.prompts:
        longest = pair.target.config.max_position_embeddings - args.max_new_tokens
        rows = [row for row in read_prompts(path) if len(encode_prompt(pair.tokenizer, row["prompt"])) <= longest]
        random.Random(0).shuffle(rows)
        print(path.stem, file=sys.stderr, flush=True)
        result["sets"][path.stem] = {
            "acceptance": acceptance(
                pair, rows[: args.limit], args.num_assistant_tokens, args.max_new_tokens, args.batch_size
            ),
            "speed": speed(args, pair, rows[: args.speed_prompts]) if args.speed_prompts else None,
        }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
