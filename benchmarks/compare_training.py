"""Compare the training steps of two checkouts, interleaved: rows a second of a draft in the size of SmolLM2's.

    python benchmarks/compare_training.py ../before . --output benchmarks/results/training_before_after.json

Each checkout trains in a process of its own, from the same weights and on the same packed batch, and they take turns
step by step, so that both see the same machine. A step is the trainer's own: forward, loss and backward.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compare_checkouts import Checkout, conditions_of_comparison

LENGTH, BATCH_SIZE, MASK_TOKEN_ID = 512, 4, 16
# SmolLM2-135M with 4 layers.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def serve() -> None:
    """Take steps, one for each line of the input; `{"bf16": true}` computes in bfloat16."""
    from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments  # Those of the checkout.

    rows, trainers = packed_rows(), {}
    for line in sys.stdin:
        bf16 = json.loads(line)["bf16"]
        if bf16 not in trainers:
            torch.manual_seed(0)
            draft = PardDraftModel.from_causal_lm(LlamaForCausalLM(LlamaConfig(**SHAPE)), MASK_TOKEN_ID, 8)
            arguments = PardTrainingArguments(tempfile.mkdtemp(), bf16=bf16, use_cpu=True, report_to="none", seed=0)
            trainers[bf16] = PardTrainer(draft, arguments, train_dataset=rows)
            trainers[bf16].create_optimizer()
        trainer = trainers[bf16]
        batch = trainer.data_collator(rows)
        num_rows = int((batch["anchors"] >= 0).sum())
        start = time.perf_counter()
        loss = trainer.training_step(trainer.model, batch)
        seconds = time.perf_counter() - start
        trainer.model.zero_grad()
        answer = {"rows_per_second": num_rows / seconds, "loss": loss.item(), "num_rows": num_rows}
        print(json.dumps(answer | {"parameters": trainer.model.num_parameters()}), flush=True)


def packed_rows() -> list[dict[str, Any]]:
    """Make sequences that three texts fill, all of which is learned."""
    chosen, texts = random.Random(0), (200, 200, LENGTH - 400)
    return [
        {
            "input_ids": [chosen.randrange(100, SHAPE["vocab_size"]) for _ in range(LENGTH)],
            "loss_mask": [1] * LENGTH,
            "text_lengths": list(texts),
        }
        for _ in range(BATCH_SIZE)
    ]


def compare(checkouts: dict[str, Checkout], bf16: bool, repeats: int) -> dict[str, Any]:
    """Take medians over the steps of both; the first step of each warms up."""
    steps = {name: list[dict[str, Any]]() for name in checkouts}
    for repeat in range(repeats + 1):
        for name in list(checkouts)[:: (-1) ** repeat]:
            steps[name].append(checkouts[name].call({"bf16": bf16}))
            print(name, steps[name][-1], file=sys.stderr, flush=True)
    rates = {name: [step["rows_per_second"] for step in found[1:]] for name, found in steps.items()}
    ratios = [new / old for old, new in zip(rates["before"], rates["after"], strict=True)]
    return {
        "parameters": steps["after"][0]["parameters"],
        "num_rows": {name: found[0]["num_rows"] for name, found in steps.items()},
        "loss": {name: found[0]["loss"] for name, found in steps.items()},
        "rows_per_second": {name: round(median(values), 1) for name, values in rates.items()},
        "after_over_before": round(median(ratios), 3),
    }


def main() -> None:
    from script import finish, parser_of

    parser = parser_of(__doc__)
    parser.add_argument("folders", nargs=2, type=Path, help="the checkout before and the one after")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each (default: 5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    args = parser.parse_args()
    checkouts = {
        name: Checkout(folder, __file__) for name, folder in zip(("before", "after"), args.folders, strict=True)
    }
    result = {
        "command": f"python benchmarks/compare_training.py BEFORE AFTER --repeats {args.repeats}",
        **conditions_of_comparison(checkouts, torch.get_num_threads()),
        "length": LENGTH,
        "batch_size": BATCH_SIZE,
        "steps": {dtype: compare(checkouts, dtype == "bfloat16", args.repeats) for dtype in args.dtypes},
    }
    finish(result, args.output)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
