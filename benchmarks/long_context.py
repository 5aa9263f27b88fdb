"""What a round costs after a long prompt, and how much of that is attention itself.

    python benchmarks/long_context.py --output benchmarks/results/long_context.json

The loop must not grow with the text. Rounds of the enlarged bundled pair are timed after a short and a long prompt of
the same text, and so is every attention call inside them; the ratio of what is left shows what else grows.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch

from pard_hf import load_pair
from pard_hf.evaluation.prompts import DEMO_PROMPTS
from scaling import enlarge_pair
from script import finish, parser_of, run_metadata


class TimedAttention:
    """Add up the wall time of scaled dot product attention over few queries: that of rounds, not of the prefill."""

    def __init__(self, most_queries: int):
        self.seconds, self.most_queries = 0.0, most_queries
        self.attend = torch.nn.functional.scaled_dot_product_attention

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        output = self.attend(query, *args, **kwargs)
        if query.shape[-2] <= self.most_queries:
            self.seconds += time.perf_counter() - start
        return output


def measure(pair: Any, text: torch.Tensor, length: int, new_tokens: int) -> dict[str, Any]:
    """Measure seconds a round after the first `length` tokens of `text`, and those of attention inside it."""
    attention = TimedAttention(2 * pair.draft.num_assistant_tokens)
    with patch("torch.nn.functional.scaled_dot_product_attention", attention):
        output = pair.target.generate(
            text[:, :length],
            attention_mask=torch.ones_like(text[:, :length]),
            assistant_model=pair.draft,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            measure_rounds=True,
        )
    times = output.round_times
    seconds = times.draft + times.verify + times.loop
    return {
        "num_rounds": times.num_rounds,
        "round": seconds / times.num_rounds,
        "attention": attention.seconds / times.num_rounds,
        "loop": times.loop / times.num_rounds,
        "prefill": times.prefill,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs=2, default=[512, 8192], metavar=("SHORT", "LONG"))
    parser.add_argument("--shapes", nargs=2, default=["cpu-1.2b", "cpu-0.15b"], metavar=("TARGET", "DRAFT"))
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    pair = enlarge_pair(load_pair(dtype=args.dtype), *args.shapes)
    words = pair.tokenizer("".join(DEMO_PROMPTS), return_tensors="pt")["input_ids"]
    text = words.repeat(1, max(args.lengths) // words.shape[1] + 1)
    short, long = (measure(pair, text, length, args.new_tokens) for length in args.lengths)
    rest = [part["round"] - part["attention"] for part in (short, long)]
    result = {
        **run_metadata(pair.target),
        "shapes": args.shapes,
        "num_assistant_tokens": pair.draft.num_assistant_tokens,
        "lengths": args.lengths,
        "seconds": [{name: round(value, 5) for name, value in part.items()} for part in (short, long)],
        "round_ratio": round(long["round"] / short["round"], 3),
        "round_ratio_without_attention": round(rest[1] / rest[0], 3),
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
