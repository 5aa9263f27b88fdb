"""How many tokens a round emits as a chain, as trees of several sizes, with the correction head, and with both.

    python benchmarks/trees.py --prompts heldout_code_functions.jsonl gsm8k_test.jsonl --output trees.json

Acceptance by the real decoding loop, greedy, over whole prompt sets; texts are the same in every way of drafting, and
compared. Nothing is timed: `pard bench` does that.
"""

from __future__ import annotations

import sys
from typing import Any

from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings, EncodedSet
from pard_hf.evaluation.metrics import repeated_share
from pard_hf.evaluation.prompts import load_prompts
from pard_hf.loading import Pair, load_pair
from script import finish, parser_of, run_metadata


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", nargs="+", required=True, help="held-out prompt sets")
    parser.add_argument("--target", help="default: the bundled target")
    parser.add_argument("--draft", help="default: the bundled draft")
    parser.add_argument("--tree-sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--limit", type=int, help="prompts of each set (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    pair = load_pair(args.target, args.draft, "float32")
    if pair.draft.correction_head is None:
        parser.error("Expected a draft with a correction head. Train one with `pard train --correction-head`.")
    benchmark = Benchmark(pair, BenchmarkSettings(limit=args.limit, max_new_tokens=args.max_new_tokens))
    sets = [benchmark.encode(*load_prompts(source)) for source in args.prompts]
    result = {
        **run_metadata(pair.target),
        "num_assistant_tokens": args.num_assistant_tokens,
        "max_new_tokens": args.max_new_tokens,
        "correction_head_parameters": sum(p.numel() for p in pair.draft.correction_head.parameters()),
        "draft_parameters": sum(p.numel() for n, p in pair.draft.named_parameters() if "correction_head" not in n),
        "sets": measure(args, pair, sets),
    }
    lengths = {name: found["acceptance_lengths"] for name, found in result["sets"].items()}
    finish(result, args.output, lengths)


def measure(args: Any, pair: Pair, sets: list[EncodedSet]) -> dict[str, Any]:
    """Measure every way of drafting on every set."""
    found: dict[str, Any] = {prompts.name: {"num_prompts": len(prompts.ids), "ways": {}} for prompts in sets}
    prompts, references = {s.name: s.ids for s in sets}, {s.name: s.answers for s in sets}
    settings = (prompts, args.num_assistant_tokens, args.max_new_tokens, args.batch_size)
    texts: dict[str, Any] = {}
    for tree_size in (0, *args.tree_sizes):
        for uses_head in (False, True):
            way = " + ".join([f"tree {tree_size}" if tree_size else "chain", *(["head"] if uses_head else [])])
            print(way, file=sys.stderr, flush=True)
            evaluator = AcceptanceEvaluator(pair.target, *settings, tree_size, uses_head)
            for name, stats in evaluator(pair.draft).items():
                texts.setdefault(name, evaluator.texts[name])
                same = sum(a == b for a, b in zip(texts[name], evaluator.texts[name], strict=True))
                found[name]["ways"][way] = {**stats.to_dict(), "identical_share": same / len(texts[name])}
    for name, ways in found.items():
        lengths = {way: stats["acceptance_length"] for way, stats in ways["ways"].items()}
        ways["acceptance_lengths"] = lengths
        ways["ratios_over_chain"] = {way: round(length / lengths["chain"], 3) for way, length in lengths.items()}
        ways["repeated_4gram_share"] = round(repeated_share(texts[name]), 4)
        ways["repeated_4gram_share_of_references"] = round(repeated_share(references[name]), 4)
    return found


if __name__ == "__main__":
    main()
