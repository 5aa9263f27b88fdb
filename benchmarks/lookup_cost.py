"""What proposing without a draft costs: milliseconds of matching, and the share of a round that is no forward.

    python benchmarks/lookup_cost.py --target smollm2 --output lookup_cost.json

Matching is timed alone, on a text of random tokens of each length. A round is timed on a model that answers a short
prompt: `propose` finds matches and grows the tree, `rest` accepts and remembers. Medians of repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from pard_hf.generation.memory import AssistantMemory
from pard_hf.generation.sources import MAX_MATCH_LENGTH, find_matches
from pard_hf.generation.stats import now
from pard_hf.tokens import encode_prompt
from script import add_pair, finish, load_pair_of, parser_of, run_metadata

PROMPT = "Write a Python function that returns the n-th Fibonacci number, then explain it line by line."


def main() -> None:
    parser = parser_of(__doc__)
    add_pair(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tree-sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--prompt-lookup-num-tokens", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    target, _, tokenizer = load_pair_of(args)
    inputs = torch.tensor([encode_prompt(tokenizer, PROMPT)], device=target.device)
    rounds = {
        str(size): round_shares(
            args.repeats,
            target,
            inputs,
            assistant_tree_size=size,
            max_new_tokens=args.max_new_tokens,
            prompt_lookup_num_tokens=args.prompt_lookup_num_tokens,
        )
        for size in args.tree_sizes
    }
    matching = {str(n): matching_ms(n, args.prompt_lookup_num_tokens, target.device) for n in args.lengths}
    result = {
        **run_metadata(target),
        "repeats": args.repeats,
        "num_prompt_tokens": inputs.shape[1],
        "matching_ms": matching,
        "memory_bytes": AssistantMemory(target).num_bytes,
        "rounds": rounds,
    }
    finish(result, args.output)


def matching_ms(length: int, num_depths: int, device: torch.device) -> float:
    """Time one search of a text whose tokens often match."""
    tokens = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    lengths, none = torch.tensor([length], device=device), torch.full((1, 1), -1, device=device)
    search = partial(find_matches, none, tokens, lengths, num_depths, MAX_MATCH_LENGTH)
    return round(1000 * median(seconds(search, device) for _ in range(31)), 4)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    start = now(device)
    function()
    return now(device) - start


def round_shares(repeats: int, target: Any, inputs: torch.Tensor, **arguments: Any) -> dict[str, float]:
    """Return milliseconds of each step of a round, medians over calls, and the share outside of the forward."""
    times = []
    for _ in range(repeats + 1):
        output = target.generate(
            inputs, do_sample=False, return_dict_in_generate=True, measure_rounds=True, **arguments
        )
        times.append(output.round_times)
    names = {"draft": "propose", "verify": "verify", "loop": "rest"}
    steps = {
        name: round(1000 * median(getattr(time, step) / time.num_rounds for time in times[1:]), 4)
        for step, name in names.items()
    }
    total = sum(steps.values())
    return {**steps, "share_outside_forward": round((steps["propose"] + steps["rest"]) / total, 4)}


if __name__ == "__main__":
    main()
