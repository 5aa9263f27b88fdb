"""`pard train`: adapt a small causal LM into a parallel draft."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adapt a small causal LM into a parallel draft",
        description="Adapt a small causal LM into a parallel draft. Rows: {text}, {prompt, response} or {messages}.",
    )
    parser.add_argument("--base", required=True, help="folder or Hub id of a small causal LM of the target's family")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="training rows, .jsonl or .jsonl.gz")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the finished draft")
    parser.add_argument("--mask-token-id", required=True, type=int, help="id the tokenizer never produces")
    parser.add_argument("--num-draft-tokens", type=int, default=8, help="K_train, depths trained (default: 8, paper)")
    parser.add_argument("--retention-rate", type=float, default=0.7, help="r of COD (default: 0.7, paper)")
    parser.add_argument("--min-retention-rate", type=float, default=0.2, help="r_min of COD (default: 0.2, paper)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a row is cut at (default: 512)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (default: 1)")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step and device (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="(default: 3e-5, paper, Qwen2.5)")
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--dtype", default="float32", help="weights and compute (default: float32)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps off the GPU")
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave broken rows out instead of stopping")
    parser.add_argument("--restart", action="store_true", help="move checkpoints in --output aside and begin anew")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..training.run import train_draft

    draft_dir = train_draft(
        base=args.base,
        data=args.data,
        output=args.output,
        mask_token_id=args.mask_token_id,
        max_length=args.max_length,
        dtype=args.dtype,
        skip_bad_rows=args.skip_bad_rows,
        restart=args.restart,
        num_draft_tokens=args.num_draft_tokens,
        retention_rate=args.retention_rate,
        min_retention_rate=args.min_retention_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        save_steps=args.save_steps,
        seed=args.seed,
        use_cpu=args.device == "cpu",
    )
    print(json.dumps({"draft": str(draft_dir)}))
    return 0
