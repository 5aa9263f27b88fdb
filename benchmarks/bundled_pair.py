"""Acceptance, repetition and identity of the bundled pair over whole prompt sets.

    python benchmarks/bundled_pair.py --prompts heldout_code_functions.jsonl gsm8k_test.jsonl

Texts are compared with those of plain `generate`. `pard bench` measures speed.
"""

from __future__ import annotations

import sys
from typing import Any

from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings, EncodedSet
from pard_hf.evaluation.metrics import repeated_share
from pard_hf.evaluation.prompts import load_prompts, make_batches
from pard_hf.host import end_token_ids, pad_token_id
from pard_hf.loading import Pair, load_pair
from script import add_pair, finish, parser_of, run_metadata


def acceptance(pair: Pair, prompts: EncodedSet, args: Any) -> dict[str, Any]:
    """Measure one set, in batches of prompts of like length."""
    settings = (args.num_assistant_tokens, args.max_new_tokens, args.batch_size)
    evaluator = AcceptanceEvaluator(pair.target, {"set": prompts.ids}, *settings)
    stats = evaluator(pair.draft)["set"]
    plain: dict[int, list[int]] = {}
    config = pair.target.generation_config
    for batch in make_batches(prompts.ids, args.batch_size, pad_token_id(config), pair.target.device):
        sequences = pair.target.generate(**batch.inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        plain |= batch.new_texts(sequences, end_token_ids(config))
        print(f"  {len(plain)}/{len(prompts.ids)} prompts", file=sys.stderr, flush=True)
    texts = [plain[index] for index in range(len(plain))]
    identical = sum(ours == theirs for ours, theirs in zip(evaluator.texts["set"], texts, strict=True))
    return {
        "num_prompts": len(texts),
        **stats.to_dict(),
        "identical_share": identical / len(texts),
        "repeated_4gram_share": round(repeated_share(texts), 4),
        "repeated_4gram_share_of_references": round(repeated_share(prompts.answers), 4),
        "ended_share": round(sum(len(text) < args.max_new_tokens for text in texts) / len(texts), 4),
        "mean_new_tokens": round(sum(map(len, texts)) / len(texts), 2),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", nargs="+", required=True, help="jsonl files, with answers")
    add_pair(parser)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="prompts a set (default: all)")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    pair = load_pair(args.target, args.draft, args.dtype)
    benchmark = Benchmark(pair, BenchmarkSettings(limit=args.limit, max_new_tokens=args.max_new_tokens))
    sets: dict[str, Any] = {}
    for source in args.prompts:
        prompts = benchmark.encode(*load_prompts(source))
        print(prompts.name, file=sys.stderr, flush=True)
        sets[prompts.name] = {"acceptance": acceptance(pair, prompts, args)}
    settings = {"num_assistant_tokens": args.num_assistant_tokens, "max_new_tokens": args.max_new_tokens}
    finish({**run_metadata(pair.target), **settings, "sets": sets}, args.output)


if __name__ == "__main__":
    main()
