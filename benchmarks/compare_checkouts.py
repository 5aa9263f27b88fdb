"""Compare two checkouts on the bundled pair, interleaved: seconds a round, τ and texts.

    python benchmarks/compare_checkouts.py ../before . --output benchmarks/results/rounds_before_after.json

Each checkout runs in a process of its own; they take turns call by call, so that both see the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers

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
    from pard_hf import load_pair  # That of the checkout, which may have no `benchmarks.script`.

    torch.set_num_threads(1)  # Rounds of a small pair: the loop is what is compared.
    target, draft, tokenizer = load_pair(dtype="float32")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for line in sys.stdin:
        kwargs = json.loads(line)
        prompt = PROMPTS[kwargs.pop("prompt")]
        prompts = list(PROMPTS) if kwargs.pop("batch", False) else [prompt]
        if "stop_strings" in kwargs:
            kwargs["tokenizer"] = tokenizer
        kwargs |= {"do_sample": False, "max_new_tokens": 96, "eos_token_id": None, "num_assistant_tokens": 8}
        kwargs |= {"assistant_model": draft, "return_dict_in_generate": True, "pad_token_id": 0}
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        output = target.generate(**inputs, **kwargs)
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "rounds": output.stats.num_rounds / len(prompts),
            "acceptance_length": output.stats.acceptance_length,
            "text": output.sequences.tolist(),
        }
        print(json.dumps(answer), flush=True)


class Checkout:
    """A process that runs a script with the package of one folder."""

    def __init__(self, folder: Path, script: str = __file__) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(script).resolve()), "--serve"]
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, bufsize=1, cwd=folder, env=environment
        )
        git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()

    def call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(kwargs), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(checkouts: dict[str, Checkout], kwargs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Take medians over the repeats of one kind of call; the first of each prompt warms up and is not counted.

    The least CPU time of a prompt is what other programs on the machine disturb least; it is averaged over prompts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    cpu_seconds: dict[str, dict[int, float]] = {name: {} for name in checkouts}
    lengths: dict[str, list[float]] = {name: [] for name in checkouts}
    are_same = True
    for repeat in range(repeats + 1):
        for prompt in range(1 if kwargs.get("batch") else len(PROMPTS)):
            order = list(checkouts)[:: (-1) ** repeat]
            answers = {name: checkouts[name].call(kwargs | {"prompt": prompt}) for name in order}
            are_same &= answers["before"]["text"] == answers["after"]["text"]
            for name, answer in answers.items() if repeat else ():
                seconds[name].append(answer["seconds"] / answer["rounds"])
                least = cpu_seconds[name].get(prompt, float("inf"))
                cpu_seconds[name][prompt] = min(least, answer["cpu_seconds"] / answer["rounds"])
                lengths[name].append(answer["acceptance_length"])
    ratios = [new / old for old, new in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "milliseconds_a_round": {name: round(1e3 * median(values), 3) for name, values in seconds.items()},
        "after_over_before": round(median(ratios), 3),
        "least_cpu_milliseconds_a_round": {
            name: round(1e3 * mean(least.values()), 3) for name, least in cpu_seconds.items()
        },
        "acceptance_length": {name: mean(values) for name, values in lengths.items()},
        "same_texts": are_same,
    }


def conditions_of_comparison(checkouts: dict[str, Checkout], num_threads: int) -> dict[str, Any]:
    device = f"CPU, {num_threads} thread{'s' * (num_threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "commits": {name: checkout.commit for name, checkout in checkouts.items()},
        "conditions": {
            "date": date.today().isoformat(),
            "device": device,
            "dtype": "float32",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    }


def main() -> None:
    from script import finish, parser_of

    parser = parser_of(__doc__)
    parser.add_argument("folders", nargs=2, type=Path, help="the checkout before and the one after")
    parser.add_argument("--repeats", type=int, default=10, help="of each prompt (default: 10)")
    args = parser.parse_args()
    checkouts = dict(zip(("before", "after"), map(Checkout, args.folders), strict=True))
    result = {
        "command": f"python benchmarks/compare_checkouts.py BEFORE AFTER --repeats {args.repeats}",
        **conditions_of_comparison(checkouts, num_threads=1),
        "calls": {name: compare(checkouts, kwargs, args.repeats) for name, kwargs in CALLS.items()},
    }
    finish(result, args.output)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
