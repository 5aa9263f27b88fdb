"""SDPA with a boolean mask against FlexAttention with a block mask, for one verify of K + 1 rows over a long cache.

    python benchmarks/attention.py --output benchmarks/results/attention.json

What the slot cache needs of attention: each query of a row sees the slots up to its own position, and the cache is
longer than the text. The two run interleaved; the making of the mask, once a round and shared by all layers, is timed
apart. The last line of standard output is the result as one JSON object, which `--output` also writes to a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from statistics import median
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.script import command, finish, parser_of
from pard_hf.io import commit, device_name

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 64


def seconds_of(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(length: int, num_queries: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Medians of both kinds over a cache of the next power of two."""
    num_slots = 1 << length.bit_length()
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    query = torch.randn(1, NUM_HEADS, num_queries, HEAD_DIM, **options)
    # Token-major storage, as in our cache.
    key, value = (torch.randn(1, num_slots, NUM_KV_HEADS, HEAD_DIM, **options).transpose(1, 2) for _ in range(2))
    positions = torch.arange(length - num_queries, length, device=device)
    slots = torch.arange(num_slots, device=device)

    def may_see(batch: Any, head: Any, row: Any, slot: Any) -> Any:
        return slot <= positions[row]

    def boolean_mask() -> torch.Tensor:
        return (slots <= positions[:, None])[None, None]

    def block_mask() -> Any:
        return create_block_mask(may_see, 1, None, num_queries, num_slots, device=device)

    flex = torch.compile(flex_attention, dynamic=False)
    mask, blocks = boolean_mask(), block_mask()
    parts = {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True),
        "flex": lambda: flex(query, key, value, block_mask=blocks, enable_gqa=True),
        "sdpa mask": boolean_mask,
        "flex mask": block_mask,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with torch.no_grad():
        difference = (parts["sdpa"]() - parts["flex"]()).abs().max().item()  # The first run compiles.
        for _ in range(repeats + 3):
            for name, part in parts.items():
                seconds[name].append(seconds_of(part, device))
    times = {name: round(median(past[3:]) * 1e3, 4) for name, past in seconds.items()}
    return {"length": length, "num_slots": num_slots, "milliseconds": times, "largest_difference": difference}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype, num_queries = getattr(torch, args.dtype), args.num_assistant_tokens + 1
    result = {
        "command": command(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {"torch": torch.__version__},
        "device": device_name(torch.device(args.device)),
        "dtype": args.dtype,
        "num_queries": num_queries,
        "num_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "repeats": args.repeats,
        "lengths": [compare(length, num_queries, dtype, args.device, args.repeats) for length in args.lengths],
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
