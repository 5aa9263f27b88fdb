"""SDPA with a boolean mask against FlexAttention with a block mask, for one verify of K + 1 rows over a long cache.

    python benchmarks/attention.py --output benchmarks/results/attention.json

As the slot cache needs it: each query sees the slots up to its own position, and the cache is longer than the text.
The two run interleaved; the mask, which a round makes once for all layers, is timed apart.
"""

from __future__ import annotations

from datetime import date
from statistics import median
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pard_hf.generation.stats import now
from pard_hf.io import commit, device_name
from script import command, finish, parser_of

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 64


def compare(length: int, num_queries: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Take medians of both kinds over a cache of the next power of two."""
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

    flex = torch.compile(flex_attention, dynamic=False)
    kinds = {
        "sdpa mask": lambda: (slots <= positions[:, None])[None, None],
        "flex mask": lambda: create_block_mask(may_see, 1, None, num_queries, num_slots, device=device),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True),
        "flex": lambda: flex(query, key, value, block_mask=blocks, enable_gqa=True),
    }
    mask, blocks = kinds["sdpa mask"](), kinds["flex mask"]()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.no_grad():
        difference = (kinds["sdpa"]() - kinds["flex"]()).abs().max().item()  # The first run compiles.
        for _ in range(repeats + 3):
            for name, function in kinds.items():
                start = now(query.device)
                function()
                seconds[name].append(now(query.device) - start)
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
