"""Thousands of compiled calls of changing shapes from two threads: do memory and compiled steps stop growing?

    python benchmarks/soak.py --output benchmarks/results/soak.json

Each backend runs in a process of its own, on a tiny pair made on the spot. A call draws batch size, K, tree, lengths
and sampling from a seed; few shapes come often and many come rarely. Every tenth call is compared with plain
`generate`. Standard output ends with a summary, `--output` takes the whole result. Exit code 1 where something keeps
growing, or a text differs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from pard_hf import PardDraftModel, with_pard
from pard_hf.generation import compilation
from script import finish, in_own_process, parser_of, run_metadata

MASK_TOKEN_ID = 99
NUM_THREADS = 2
COMPARE_EVERY = 10
# Inductor takes seconds to minutes for a step: it gets few shapes.
BATCH_SIZES = {"eager": (1, 2, 4), "inductor": (1, 2)}
COUNTS = {"eager": (1, 3, 6), "inductor": (4,)}
TREE_SIZES = {"eager": (0, 6), "inductor": (0, 8)}
LONGEST_PROMPT = {"eager": 300, "inductor": 100}
# Growth of the last quarter of a run that counts as none: what allocators keep varies from call to call.
MOST_GROWTH = 0.05


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=MASK_TOKEN_ID + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Soak:
    """Calls of one pair with one backend, and what the process held after some of them."""

    def __init__(self, backend: str, seed: int):
        self.target = with_pard(make_model(0))
        self.draft = PardDraftModel.from_causal_lm(make_model(7), MASK_TOKEN_ID)
        self.backend, self.random, self.lock = backend, random.Random(seed), threading.Lock()
        batch_sizes, counts, tree_sizes = (choices[backend] for choices in (BATCH_SIZES, COUNTS, TREE_SIZES))
        self.shapes = [(b, k, n) for b in batch_sizes for k in counts for n in tree_sizes]
        self.random.shuffle(self.shapes)
        self.num_compared = self.num_different = self.num_compiled_calls = 0
        self.samples: list[dict[str, Any]] = []

    def draw(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw the arguments of a call, and those of the draft."""
        weights = [1 / (1 + rank) for rank in range(len(self.shapes))]
        batch_size, count, tree_size = self.random.choices(self.shapes, weights)[0]
        longest = self.random.randint(1, LONGEST_PROMPT[self.backend])
        lengths = [longest, *(self.random.randint(1, longest) for _ in range(batch_size - 1))]
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        ids = torch.randint(3, MASK_TOKEN_ID, (batch_size, longest), generator=generator)
        mask = (torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)).long()
        sampling = self.random.choice([{}, {}, {"temperature": 0.7}, {"top_p": 0.9, "repetition_penalty": 1.2}])
        arguments = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "max_new_tokens": self.random.randint(1, 16),
            "do_sample": bool(sampling),
            **sampling,
            **self.random.choice([{}, {"eos_token_id": [5]}]),
        }
        return arguments, {"num_assistant_tokens": count, "assistant_tree_size": tree_size}

    def call(self, is_compared: bool) -> None:
        """Run one call; compare a greedy one with plain `generate` if asked."""
        with self.lock:
            arguments, of_draft = self.draw()
        output = self.target.generate(
            **arguments,
            **of_draft,
            assistant_model=self.draft,
            cache_implementation="static",
            compile_config=CompileConfig(backend=self.backend, mode="default"),
            return_dict_in_generate=True,
        )
        is_compared &= not arguments["do_sample"]
        differs = is_compared and not torch.equal(output.sequences, self.target.generate(**arguments))
        with self.lock:
            self.num_compared += is_compared
            self.num_different += differs
            self.num_compiled_calls += bool(output.compile_seconds)

    def sample(self, number: int) -> None:
        """Record what the process holds between two compiled calls."""
        kept = compilation.compile_cache_of(self.target, self.draft)
        with kept.lock:
            slots = [cache.num_slots * key[1] for key, cache in kept.caches.items()]
            sample = {
                "call": number,
                "resident_bytes": resident_bytes(),
                "steps_kept": len(kept.steps),
                "caches_kept": len(slots),
                "slots_kept": sum(slots),
                "steps_compiled": counters["stats"]["unique_graphs"],
            }
        with self.lock:
            self.samples.append(sample)

    def run(self, num_calls: int, sample_every: int) -> dict[str, Any]:
        """Run all calls from two threads; raise what a call raises."""

        def call(number: int) -> None:
            self.call(number % COMPARE_EVERY == 0)
            if number % sample_every == 0:
                self.sample(number)

        start = time.perf_counter()
        pool = ThreadPoolExecutor(NUM_THREADS)
        try:
            list(pool.map(call, range(1, num_calls + 1)))
        finally:
            pool.shutdown(cancel_futures=True)
        self.samples.sort(key=lambda sample: sample["call"])
        return {
            "backend": self.backend,
            "calls": num_calls,
            "shapes": len(self.shapes),
            "seconds": round(time.perf_counter() - start, 1),
            "calls_that_compiled": self.num_compiled_calls,
            "all_steps_compile": compilation.compile_cache_of(self.target, self.draft).failure is None,
            "compared": self.num_compared,
            "different": self.num_different,
            "growth": growth(self.samples),
            "samples": self.samples,
        }


def resident_bytes() -> int:
    """Read the resident memory of this process from Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the last quarter of a run with the one before it: means of memory, the most of steps."""
    quarter = max(len(samples) // 4, 1)
    quarters = samples[-2 * quarter : -quarter], samples[-quarter:]
    memory = [sum(sample["resident_bytes"] for sample in part) / len(part) for part in quarters]
    return {
        "resident_megabytes": [round(size / 2**20, 1) for size in memory],
        "resident_share": round(memory[1] / memory[0] - 1, 4),
        "most_steps": max(sample["steps_kept"] for sample in samples),
        "most_steps_allowed": compilation.MOST_STEPS,
        "caches_kept": [max(sample["caches_kept"] for sample in part) for part in quarters],
    }


def has_stopped(result: dict[str, Any]) -> bool:
    """Whether nothing keeps growing, no step ran eagerly instead, and no text differed."""
    grown = result["growth"]
    is_bounded = grown["most_steps"] <= grown["most_steps_allowed"] and grown["resident_share"] <= MOST_GROWTH
    return is_bounded and result["all_steps_compile"] and not result["different"]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--calls", type=int, default=2000, help='with backend="eager"')
    parser.add_argument("--inductor-calls", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "CALLS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        backend, num_calls = args.one[0], int(args.one[1])
        print(json.dumps(Soak(backend, args.seed).run(num_calls, max(num_calls // 40, 1))))
        return 0
    runs = []
    for backend, num_calls in (("eager", args.calls), ("inductor", args.inductor_calls)):
        if num_calls:
            words = ("--seed", str(args.seed), "--one", backend, str(num_calls))
            # A cache of its own: files that another process is writing there would be read half.
            with TemporaryDirectory() as folder:
                runs.append(in_own_process(*words, TORCHINDUCTOR_CACHE_DIR=folder))
    result = {
        **run_metadata(make_model(0)),
        "models": "one layer of 32 each, 100 tokens, made at random",
        "threads": NUM_THREADS,
        "seed": args.seed,
        "has_stopped": all(map(has_stopped, runs)),
        "runs": runs,
    }
    finish(result, args.output, {run["backend"]: {**run["growth"], "different": run["different"]} for run in runs})
    return int(not result["has_stopped"])


if __name__ == "__main__":
    sys.exit(main())
