"""Acceptance, repetition and identity of the bundled pair over whole prompt sets.

    python benchmarks/bundled_pair.py --prompts heldout_code_functions.jsonl gsm8k_test.jsonl

Texts are compared with those of plain `generate`. `pard bench` measures speed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.script import finish, parser_of, run_metadata
from pard_hf import load_pair
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.metrics import repeated_share
from pard_hf.evaluation.prompts import choose_rows, encode_answer, make_batches, read_prompts
from pard_hf.host import end_token_ids, num_positions, pad_token_id
from pard_hf.tokens import encode_prompt


def acceptance(pair: Any, rows: list[dict[str, Any]], args: Any) -> dict[str, Any]:
    """Statistics of one set, in batches of prompts of like length."""
    prompts = [encode_prompt(pair.tokenizer, row["prompt"]) for row in rows]
    evaluator = AcceptanceEvaluator(
        pair.target, {"set": prompts}, args.num_assistant_tokens, args.max_new_tokens, args.batch_size
    )
    stats = evaluator(pair.draft)["set"]
    plain: dict[int, list[int]] = {}
    config = pair.target.generation_config
    for batch in make_batches(prompts, args.batch_size, pad_token_id(config), pair.target.device):
        sequences = pair.target.generate(**batch.inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        plain |= batch.new_texts(sequences, end_token_ids(config))
        print(f"  {len(plain)}/{len(prompts)} prompts", file=sys.stderr, flush=True)
    texts = [plain[index] for index in range(len(prompts))]
    answers = (encode_answer(pair.tokenizer, row, args.max_new_tokens) for row in rows)
    identical = sum(ours == theirs for ours, theirs in zip(evaluator.texts["set"], texts, strict=True))
    return {
        "num_prompts": len(rows),
        **stats.to_dict(),
        "identical_share": identical / len(rows),
        "repeated_4gram_share": round(repeated_share(texts), 4),
        "repeated_4gram_share_of_references": round(repeated_share(a for a in answers if a is not None), 4),
        "ended_share": round(sum(len(text) < args.max_new_tokens for text in texts) / len(texts), 4),
        "mean_new_tokens": round(sum(map(len, texts)) / len(texts), 2),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="jsonl files, with answers")
    parser.add_argument("--target", help="default: the bundled target")
    parser.add_argument("--draft", help="default: the bundled draft")
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="prompts a set (default: all)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    pair = load_pair(args.target, args.draft, args.dtype)
    longest = num_positions(pair.target.config) - args.max_new_tokens
    sets: dict[str, Any] = {}
    for path in args.prompts:
        print(path.stem, file=sys.stderr, flush=True)
        rows = [row for row in read_prompts(path) if len(encode_prompt(pair.tokenizer, row["prompt"])) <= longest]
        rows = [rows[index] for index in choose_rows(rows, args.limit, seed=0)]
        sets[path.stem] = {"acceptance": acceptance(pair, rows, args)}
    settings = {"num_assistant_tokens": args.num_assistant_tokens, "max_new_tokens": args.max_new_tokens}
    finish({**run_metadata(pair.target), **settings, "sets": sets}, args.output)


if __name__ == "__main__":
    main()
