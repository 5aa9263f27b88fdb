"""`pard train`: adapt a small causal LM into a parallel draft."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COUNTS = ("max_length", "eval_steps", "save_steps", "batch_size", "gradient_accumulation_steps")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adapt a small causal LM into a parallel draft",
        description="Adapt a small causal LM into a parallel draft. Rows: {text}, {prompt, response} or {messages}.",
    )
    parser.add_argument("--base", required=True, help="folder or Hub id of a small causal LM of the target's family")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="training rows, .jsonl or .jsonl.gz")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the finished draft")
    add_rows(parser.add_argument_group("rows"))
    add_method(parser.add_argument_group("method"))
    add_evaluation(parser.add_argument_group("evaluation"))
    add_run(parser.add_argument_group("run"))
    parser.set_defaults(run=run)


def add_rows(group: Any) -> None:
    group.add_argument("--max-length", type=int, default=512, help="tokens of the longest row (default: 512)")
    group.add_argument(
        "--overlong", choices=("truncate", "drop"), default="truncate", help="cut longer rows, or leave them out"
    )
    group.add_argument("--pack", action="store_true", help="fill sequences with rows that do not see each other")
    group.add_argument("--chat-template", type=Path, help="file with a chat template, instead of the base model's own")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave broken rows out instead of stopping")


def add_method(group: Any) -> None:
    group.add_argument(
        "--mask-token-id", type=mask_token_id, help="id the tokenizer never produces, or auto (default: auto)"
    )
    group.add_argument("--num-draft-tokens", type=int, default=8, help="K_train, depths trained (default: 8, paper)")
    group.add_argument("--retention-rate", type=float, default=0.7, help="r of COD (default: 0.7, paper)")
    group.add_argument("--min-retention-rate", type=float, default=0.2, help="r_min of COD (default: 0.2, paper)")
    group.add_argument(
        "--objective",
        choices=("ce", "kd", "cat"),
        default="ce",
        help="cross-entropy; with the target's distribution; the same weighted by confidence (default: ce)",
    )
    group.add_argument("--cross-entropy-weight", type=float, help="(default: 1 for ce, else 0.1)")
    group.add_argument("--divergence-weight", type=float, help="(default: 0 for ce, else 1)")
    group.add_argument("--distillation-temperature", type=float, default=1.0, help="of kd and cat (default: 1)")
    group.add_argument(
        "--correction-head",
        nargs="?",
        const="frozen",
        choices=("frozen", "joint"),
        help="train a correction head on a draft that stays as it is (the default where none is named), or with it",
    )
    group.add_argument("--correction-head-rank", type=int, default=128, help="width of the head (default: 128)")
    group.add_argument(
        "--correction-head-learning-rate", type=float, default=3e-3, help="it begins from nothing (default: 3e-3)"
    )


def add_evaluation(group: Any) -> None:
    group.add_argument("--target", help="folder or Hub id: teacher of kd and cat, and what evaluations decode with")
    group.add_argument(
        "--eval-prompts",
        nargs="+",
        metavar="PROMPTS",
        help="files or hub:org/name of held-out prompts; needs --target",
    )
    group.add_argument(
        "--eval-steps", type=int, help="steps between evaluations, the best is saved (default: --save-steps)"
    )
    group.add_argument("--eval-limit", type=int, default=32, help="prompts of each set (default: 32)")
    group.add_argument("--eval-batch-size", type=int, default=8, help="texts at a time (default: 8)")
    group.add_argument("--eval-max-new-tokens", type=int, default=128, help="of each answer (default: 128)")
    group.add_argument("--num-assistant-tokens", type=int, help="K of evaluations (default: --num-draft-tokens)")
    group.add_argument("--early-stopping-patience", type=int, help="evaluations without a longer block before the end")


def add_run(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (default: 1)")
    group.add_argument("--max-steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    group.add_argument("--batch-size", type=int, default=8, help="sequences a step and device (default: 8)")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches a step (default: 1)")
    group.add_argument("--learning-rate", type=float, default=3e-5, help="(default: 3e-5, paper, Qwen2.5)")
    group.add_argument(
        "--save-steps", type=int, default=200, help="steps between checkpoints, the best draft's apart (default: 200)"
    )
    group.add_argument("--dtype", default="float32", help="of the draft's weights (default: float32)")
    group.add_argument("--target-dtype", help="of the target's (default: its checkpoint's; float32 on a CPU)")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights stay as they are")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward")
    group.add_argument("--attention", choices=("sdpa", "eager", "flex_attention"), default="sdpa")
    group.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps off the GPU")
    group.add_argument("--report-to", default="none", help="wandb, tensorboard, … (default: none)")
    group.add_argument("--seed", type=int, default=42, help="(default: 42)")
    group.add_argument("--restart", action="store_true", help="move checkpoints in --output aside and begin anew")
    group.add_argument(
        "--training-arguments",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="anything else that TrainingArguments takes: warmup_steps=100 lr_scheduler_type=cosine",
    )


def check_count(args: argparse.Namespace, name: str) -> None:
    """Raise a `ValueError` that names the flag where a number of things is below 1."""
    if getattr(args, name) is not None and getattr(args, name) < 1:
        raise ValueError(f"Expected `--{name.replace('_', '-')}` of at least 1, got {getattr(args, name)}.")


def mask_token_id(text: str) -> int | None:
    return None if text == "auto" else int(text)


def other_arguments(words: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` words as keyword arguments; values are JSON where they are, else text."""
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"Expected `--training-arguments NAME=VALUE`, got {word!r}. Write `name=value`.")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def run(args: argparse.Namespace) -> int:
    from ..io import shown_command
    from ..training.train import TrainingSpec, train_draft

    for name in COUNTS:
        check_count(args, name)
    if args.eval_prompts and not args.target:
        raise ValueError("Expected a target that evaluations decode with, got none. Name it with `--target`.")
    spec = TrainingSpec(
        base=args.base,
        data=args.data,
        output=args.output,
        mask_token_id=args.mask_token_id,
        max_length=args.max_length,
        overlong=args.overlong,
        pack=args.pack,
        target=args.target,
        dtype=args.dtype,
        target_dtype=args.target_dtype,
        attention=args.attention,
        chat_template=args.chat_template,
        early_stopping_patience=args.early_stopping_patience,
        skip_bad_rows=args.skip_bad_rows,
        restart=args.restart,
        command=shown_command(args.words),
    )
    arguments = {
        "num_draft_tokens": args.num_draft_tokens,
        "retention_rate": args.retention_rate,
        "min_retention_rate": args.min_retention_rate,
        "objective": args.objective,
        "cross_entropy_weight": args.cross_entropy_weight,
        "divergence_weight": args.divergence_weight,
        "distillation_temperature": args.distillation_temperature,
        "correction_head": args.correction_head,
        "correction_head_rank": args.correction_head_rank,
        "correction_head_learning_rate": args.correction_head_learning_rate,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "save_steps": args.save_steps,
        "bf16": args.bf16,
        "report_to": args.report_to,
        "seed": args.seed,
        "use_cpu": args.device == "cpu",
        **({} if args.eval_steps is None else {"eval_steps": args.eval_steps}),
        **({"gradient_checkpointing": True} if args.gradient_checkpointing else {}),
        **other_arguments(args.training_arguments),
    }
    draft_dir = train_draft(spec, EvaluationPrompts(args) if args.eval_prompts else None, **arguments)
    print(json.dumps({"draft": str(draft_dir)}))
    return 0


class EvaluationPrompts:
    """The prompt sets of a command line: read at once, measured when a target is there."""

    def __init__(self, args: argparse.Namespace):
        from ..evaluation.prompts import choose_rows, load_prompts

        for name in ("eval_limit", "eval_batch_size", "eval_max_new_tokens"):
            check_count(args, name)
        self.args, self.sets = args, dict[str, list[str]]()
        for source in args.eval_prompts:
            name, rows = load_prompts(source)
            if name in self.sets:
                raise ValueError(f"Expected prompt sets of different names, got {name!r} twice. Rename a file.")
            self.sets[name] = [rows[index]["prompt"] for index in choose_rows(rows, args.eval_limit, args.seed)]
            if not all(prompt.strip() for prompt in self.sets[name]) or not self.sets[name]:
                raise ValueError(f"Expected prompts with words to evaluate on in {source!r}, got an empty one.")

    def prepare(self, tokenizer: Any, longest: int) -> Any:
        """Encode the prompts; returns how to make the evaluator of a target."""
        from ..evaluation.acceptance import AcceptanceEvaluator
        from ..evaluation.prompts import encode_prompt

        args, num_drafts = self.args, self.args.num_assistant_tokens
        prompts = {name: [encode_prompt(tokenizer, prompt) for prompt in rows] for name, rows in self.sets.items()}
        most = max(len(ids) for rows in prompts.values() for ids in rows)
        if most + args.eval_max_new_tokens > longest:
            raise ValueError(
                f"Expected evaluation prompts and answers within the {longest} positions of both models, got a prompt "
                f"of {most} tokens and `--eval-max-new-tokens {args.eval_max_new_tokens}`. Shorten either."
            )
        num_drafts = args.num_draft_tokens if num_drafts is None else num_drafts
        return lambda target: AcceptanceEvaluator(
            target, prompts, num_drafts, args.eval_max_new_tokens, args.eval_batch_size
        )
