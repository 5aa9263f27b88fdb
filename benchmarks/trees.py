"""How many tokens a round emits as a chain, as trees of several sizes, with the correction head, and with both.

    python benchmarks/trees.py --prompts heldout_code_functions.jsonl gsm8k_test.jsonl --output trees.json

Acceptance by the real decoding loop, greedy, over whole prompt sets; texts are the same in every way of drafting, and
compared. Nothing is timed: `pard bench` does that.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.script import finish, parser_of, run_metadata
from pard_hf import load_pair
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.metrics import repeated_share
from pard_hf.evaluation.prompts import choose_rows, encode_answer, load_prompts
from pard_hf.host import num_positions
from pard_hf.tokens import encode_prompt


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
    longest = num_positions(pair.target.config) - args.max_new_tokens
    sets, references = {}, {}
    for source in args.prompts:
        name, rows = load_prompts(source)
        rows = [rows[index] for index in choose_rows(rows, args.limit, seed=0)]
        encoded = [(encode_prompt(pair.tokenizer, row["prompt"]), row) for row in rows]
        encoded = [(ids, row) for ids, row in encoded if len(ids) <= longest]
        sets[name] = [ids for ids, _ in encoded]
        answers = (encode_answer(pair.tokenizer, row, args.max_new_tokens) for _, row in encoded)
        references[name] = [answer for answer in answers if answer is not None]
    result = {
        **run_metadata(pair.target),
        "num_assistant_tokens": args.num_assistant_tokens,
        "max_new_tokens": args.max_new_tokens,
        "correction_head_parameters": sum(p.numel() for p in pair.draft.correction_head.parameters()),
        "draft_parameters": sum(p.numel() for n, p in pair.draft.named_parameters() if "correction_head" not in n),
        "sets": measure(args, pair, sets, references),
    }
    lengths = {name: found["acceptance_lengths"] for name, found in result["sets"].items()}
    finish(result, args.output, lengths)


def measure(args: Any, pair: Any, sets: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    """Statistics of every way of drafting on every set."""
    found: dict[str, Any] = {name: {"num_prompts": len(prompts), "ways": {}} for name, prompts in sets.items()}
    texts: dict[str, Any] = {}
    for tree_size in (0, *args.tree_sizes):
        for uses_head in (False, True):
            way = " + ".join([f"tree {tree_size}" if tree_size else "chain", *(["head"] if uses_head else [])])
            print(way, file=sys.stderr, flush=True)
            evaluator = AcceptanceEvaluator(
                pair.target,
                sets,
                args.num_assistant_tokens,
                args.max_new_tokens,
                args.batch_size,
                tree_size,
                uses_head,
            )
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
