"""Peak memory of one training step over the length of its text: kept rows, no dropping, and the dense mask.

    python benchmarks/training_memory.py --output training_memory.json

`kept rows` is what `pard train` does. `no dropping` is the same with a retention rate of 1. `dense mask` is what the
reference trainer does: the whole float32 mask of K·L x K·L entries first, then its kept rows and columns, and logits
of all rows at once. Every step runs in a process of its own; its peak is above what the process held before the step.

With `--vocabulary 128256` the draft has as many tokens, 4 layers and the width of SmolLM2's, random weights, and
`whole logits` takes the place of the other routes: kept rows, and the logits of all of them at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compare_training import SHAPE
from pard_hf import PardDraftModel, bundled_pair
from pard_hf.training.cod import attends
from pard_hf.training.collator import DataCollatorForPard
from pard_hf.training.objective import Objective, row_mask
from script import finish, in_own_process, parser_of, run_metadata

ROUTES = {"kept rows": 0.7, "no dropping": 1.0, "dense mask": 0.7, "whole logits": 0.7}
NUM_DRAFT_TOKENS = 8


def dense_loss(draft: PardDraftModel, batch: dict[str, Any], length: int) -> torch.Tensor:
    """Compute the loss as the reference trainer does: all depths, one dense mask, one matrix of logits."""
    anchors = torch.arange(length).repeat(NUM_DRAFT_TOKENS)
    depths = torch.arange(NUM_DRAFT_TOKENS).repeat_interleave(length)
    own = [values.unsqueeze(-1) for values in (anchors, depths, torch.zeros_like(anchors))]
    mask = torch.zeros(len(anchors), len(anchors))
    mask.masked_fill_(~attends(own, anchors.unsqueeze(-2), depths.unsqueeze(-2)), torch.finfo(torch.float32).min)
    kept = batch["depths"][0] * length + batch["anchors"][0]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = draft(**inputs, attention_mask=mask[kept][:, kept][None, None], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), batch["labels"][0])


def whole_logits_loss(draft: PardDraftModel, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the loss by one matrix of logits."""
    mask = row_mask(draft, *(batch[name] for name in ("anchors", "depths", "starts")))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = draft(**inputs, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), batch["labels"][0])


def draft_of(vocabulary: int | None) -> PardDraftModel:
    """Load the bundled draft, or make one of so many tokens."""
    if vocabulary is None:
        return PardDraftModel.from_pretrained(bundled_pair().draft, dtype=torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": vocabulary}))
    return PardDraftModel.from_causal_lm(model, vocabulary - 1, NUM_DRAFT_TOKENS)


def step(route: str, length: int, vocabulary: int | None) -> dict[str, Any]:
    """Run one forward and backward pass, in this process."""
    torch.manual_seed(0)
    draft = draft_of(vocabulary)
    collator = DataCollatorForPard(draft.mask_token_id, NUM_DRAFT_TOKENS, ROUTES[route])
    batch = collator([{"input_ids": torch.randint(3, 2000, (length,)).tolist()}])
    batch.pop("sources")
    # A first short step loads what every step needs.
    Objective()(draft, {name: values[:, :32] for name, values in batch.items()}).backward()
    before, start = peak(), time.perf_counter()
    if route == "dense mask":
        loss = dense_loss(draft, batch, length)
    else:
        loss = whole_logits_loss(draft, batch) if route == "whole logits" else Objective()(draft, batch)
    loss.backward()
    seconds = time.perf_counter() - start
    return {
        "route": route,
        "length": length,
        "num_rows": batch["anchors"].shape[1],
        "peak_bytes": peak() - before,
        "seconds": round(seconds, 3),
        "loss": round(loss.item(), 4),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--longest-other", type=int, default=2048, help="longest text of the two other routes")
    parser.add_argument("--vocabulary", type=int, help="tokens of a draft with random weights")
    parser.add_argument("--one", nargs=2, metavar=("ROUTE", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(step(args.one[0], int(args.one[1]), args.vocabulary)))
        return
    steps, others = [], {"no dropping", "dense mask"} if args.vocabulary is None else {"whole logits"}
    given = [] if args.vocabulary is None else ["--vocabulary", str(args.vocabulary)]
    for length in args.lengths:
        for route in ROUTES:
            if route == "kept rows" or route in others and length <= args.longest_other:
                steps.append(in_own_process("--one", route, str(length), *given))
                print(steps[-1], file=sys.stderr, flush=True)
    draft = draft_of(args.vocabulary)
    result = {
        **run_metadata(draft),
        "draft": "bundled" if args.vocabulary is None else f"random, {args.vocabulary} tokens",
        "num_parameters": draft.num_parameters(),
        "num_draft_tokens": NUM_DRAFT_TOKENS,
        "retention_rate": 0.7,
        "min_retention_rate": 0.2,
        "batch_size": 1,
        "measured": "ru_maxrss of the process after the step, above what it was before",
        "steps": steps,
    }
    finish(result, args.output, {f"{s['route']}, {s['length']}": s["peak_bytes"] for s in steps})


if __name__ == "__main__":
    main()
