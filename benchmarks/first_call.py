"""What compiling costs a first call, and what rounds cost after it: layer by layer, the whole model, and eagerly.

    python benchmarks/first_call.py --target smollm2 --draft smollm2 --output first_call.json

Each way runs in a process of its own, with an empty folder for what torch keeps on disk: seconds until the first token
and until full speed, which is when the round that compiled has ended; seconds of compiling and processor seconds of
the call; the same for a text in the next cache size. Steady rounds come from one further process, in which the ways
take turns with what was compiled before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from itertools import pairwise
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CompileConfig

from pard_hf.tokens import encode_prompt
from script import add_pair, command, finish, in_own_process, load_pair_of, parser_of, run_metadata

PROMPT = "Write a Python function that returns the n-th Fibonacci number, then explain it line by line."
NEXT_SIZE = 280  # Tokens of the prompt that needs a cache of the second size.
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"disable_compile": True},
    "layers": {"compile_config": CompileConfig(fullgraph=False)},
    "whole": {"compile_config": CompileConfig(fullgraph=True)},
}
CACHE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def main() -> None:
    parser = parser_of(__doc__)
    add_pair(parser)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--prompt-lookup-num-tokens", type=int, help="propose without the draft, this deep")
    parser.add_argument("--assistant-tree-size", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--part", choices=[*WAYS, "steady"], help="what runs in a process of its own")
    args = parser.parse_args()
    if args.part is None:
        finish(all_parts(args), args.output)
    else:
        finish(steady(args) if args.part == "steady" else first_calls(args), None)


def all_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Run each way in its own process, then steady rounds over what they compiled."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if value is not None]
    words = [word for word in words if not word.startswith("--output")]
    result: dict[str, Any] = {"ways": {}}
    with TemporaryDirectory() as compiled:
        for way in WAYS:
            with TemporaryDirectory() as folder:
                result["ways"][way] = in_own_process(*words, f"--part={way}", **{CACHE_FOLDER: folder})
                shutil.copytree(folder, compiled, dirs_exist_ok=True)
        result["steady"] = in_own_process(*words, "--part=steady", **{CACHE_FOLDER: compiled})
    metadata = result["steady"].pop("metadata")
    layers, whole = (result["ways"][way] for way in ("layers", "whole"))
    ratios = {
        "compile_seconds": layers["first"]["compile_seconds"] / whole["first"]["compile_seconds"],
        "cpu_seconds": layers["first"]["cpu_seconds"] / whole["first"]["cpu_seconds"],
        "further_shape": layers["further"]["compile_seconds"] / layers["first"]["compile_seconds"],
    }
    return {
        **metadata,
        "command": command(),
        "repeats": args.repeats,
        **result,
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
    }


class Clock:
    """A streamer that notes when tokens arrive."""

    def __init__(self) -> None:
        self.start, self.arrivals = time.perf_counter(), []

    def put(self, value: torch.Tensor) -> None:
        self.arrivals.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass

    def after_longest_wait(self) -> float:
        """Return when the token arrived that was waited for longest, the first aside."""
        waits = [(later - earlier, later) for earlier, later in pairwise(self.arrivals[1:])]
        return max(waits)[1]


class Calls:
    """Calls of one pair with the options of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.target, self.draft, tokenizer = load_pair_of(args)
        self.ids = torch.tensor([encode_prompt(tokenizer, PROMPT)], device=self.target.device)
        self.longer = self.ids.repeat(1, -(-NEXT_SIZE // self.ids.shape[1]))[:, :NEXT_SIZE]
        self.options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
        self.options |= {"eos_token_id": None, "pad_token_id": 0, "assistant_tree_size": args.assistant_tree_size}
        if args.prompt_lookup_num_tokens:
            self.options["prompt_lookup_num_tokens"] = args.prompt_lookup_num_tokens
        else:
            self.options |= {"assistant_model": self.draft, "num_assistant_tokens": args.num_assistant_tokens}

    def __call__(self, way: str, ids: torch.Tensor, **options: Any) -> Any:
        mask = torch.ones_like(ids)
        return self.target.generate(ids, attention_mask=mask, **self.options, **WAYS[way], **options)


def first_calls(args: argparse.Namespace) -> dict[str, Any]:
    """Time the first call of this process, and the first of the next cache size."""
    calls = Calls(args)
    return {"first": timed(calls, args.part, calls.ids), "further": timed(calls, args.part, calls.longer)}


def timed(calls: Calls, way: str, ids: torch.Tensor) -> dict[str, Any]:
    before, clock = os.times(), Clock()
    output = calls(way, ids, streamer=clock)
    after = os.times()
    times = {
        "first_token_seconds": clock.arrivals[1],  # The prompt arrives first.
        "full_speed_seconds": clock.after_longest_wait() if output.compile_seconds else clock.arrivals[1],
        "call_seconds": clock.arrivals[-1],
        "compile_seconds": output.compile_seconds,
        "cpu_seconds": sum(after[:4]) - sum(before[:4]),  # Of this process and of the compilers that it ran.
    }
    return {name: round(value, 2) for name, value in times.items()}


def steady(args: argparse.Namespace) -> dict[str, Any]:
    """Let the ways take turns; return milliseconds of a round and its steps, and ratios repeat by repeat."""
    calls = Calls(args)
    texts = {way: calls(way, calls.ids).sequences for way in WAYS}
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            output = calls(way, calls.ids, measure_rounds=True)
            texts[way] = output.sequences
            runs[way].append(output.round_times)
    rounds = {way: [milliseconds(times) for times in found] for way, found in runs.items()}
    totals = {way: [sum(steps.values()) for steps in found] for way, found in rounds.items()}
    return {
        "metadata": run_metadata(calls.target),
        "identical": all(torch.equal(text, texts["eager"]) for text in texts.values()),
        "milliseconds": {
            way: {s: round(median(r[s] for r in found), 3) for s in found[0]} for way, found in rounds.items()
        },
        "layers_over_whole": ratio(totals["layers"], totals["whole"]),
        "eager_over_layers": ratio(totals["eager"], totals["layers"]),
    }


def milliseconds(times: Any) -> dict[str, float]:
    """Milliseconds of the steps of a round: propose, verify, and accept with the loop around."""
    return {step: 1000 * getattr(times, step) / times.num_rounds for step in ("draft", "verify", "loop")}


def ratio(ones: list[float], others: list[float]) -> float:
    return round(median(one / other for one, other in zip(ones, others, strict=True)), 3)


if __name__ == "__main__":
    main()
