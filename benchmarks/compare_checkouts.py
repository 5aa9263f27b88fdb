"""Compare two checkouts on the bundled pair, interleaved: seconds a round, τ and texts.

    python benchmarks/compare_checkouts.py ../before . --output benchmarks/results/rounds_before_after.json

Each checkout runs in a process of its own; they take turns call by call, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

PROMPTS = (
    "def is_even(n):\n",
    "def fibonacci(n):\n",
    "Question: Tom has 3 apples and buys 5 more. How many apples does he have?\nAnswer:",
    "def factorial(n):\n",
)
CALLS: dict[str, dict[str, Any]] = {
    "chain": {},
    "tree of 16 nodes": {"assistant_tree_size": 16},
    "batch of 4": {"batch": True},
    "stop string": {"stop_strings": ["never said"]},
}


def serve() -> None:
    """Answer calls, one JSON line each, until the input ends."""
    import torch

    from pard_hf import load_pair

    torch.set_num_threads(1)  # rounds of a small pair: the loop is what is compared
    target, draft, tokenizer = load_pair(dtype="float32")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for line in sys.stdin:
        kwargs = json.loads(line)
        prompts = list(PROMPTS) if kwargs.pop("batch", False) else [PROMPTS[kwargs.pop("prompt")]]
        kwargs.pop("prompt", None)
        if "stop_strings" in kwargs:
            kwargs["tokenizer"] = tokenizer
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        settings = {"do_sample": False, "max_new_tokens": 96, "eos_token_id": None, "num_assistant_tokens": 8}
        start = time.perf_counter()
        output = target.generate(
            **inputs, assistant_model=draft, return_dict_in_generate=True, pad_token_id=0, **settings, **kwargs
        )
        answer = {
            "seconds": time.perf_counter() - start,
            "rounds": output.stats.num_rounds / len(prompts),
            "acceptance_length": output.stats.acceptance_length,
            "text": output.sequences.tolist(),
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class Checkout:
    """A process that runs the package of one folder."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )
        self.commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()

    def call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(kwargs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(before: Checkout, after: Checkout, kwargs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Medians over the repeats of one kind of call; the first of each prompt warms up and is not counted."""
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    lengths: dict[str, list[float]] = {"before": [], "after": []}
    are_same = True
    for repeat in range(repeats + 1):
        for prompt in range(1 if kwargs.get("batch") else len(PROMPTS)):
            order = [("before", before), ("after", after)]
            answers = {name: one.call(kwargs | {"prompt": prompt}) for name, one in order[:: (-1) ** repeat]}
            are_same &= answers["before"]["text"] == answers["after"]["text"]
            for name, answer in answers.items() if repeat else ():
                seconds[name].append(answer["seconds"] / answer["rounds"])
                lengths[name].append(answer["acceptance_length"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [new / old for old, new in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "milliseconds_a_round": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "after_over_before": round(statistics.median(ratios), 3),
        "acceptance_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "same_texts": are_same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="the checkout before and the one after")
    parser.add_argument("--repeats", type=int, default=10, help="of each prompt (default: 10)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    if len(args.folders) != 2:
        parser.error(f"Expected two folders, got {len(args.folders)}.")
    before, after = map(Checkout, args.folders)
    result = {
        "command": f"python benchmarks/compare_checkouts.py BEFORE AFTER --repeats {args.repeats}",
        "commits": {"before": before.commit, "after": after.commit},
        "conditions": conditions(),
        "calls": {name: compare(before, after, kwargs, args.repeats) for name, kwargs in CALLS.items()},
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    sys.stdout.write(text)


def conditions() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "device": f"CPU, 1 thread, {torch.backends.cpu.get_cpu_capability()}",
        "dtype": "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
