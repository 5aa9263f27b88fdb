"""Adapts one base model in several ways on the same rows, and says how long the blocks become.

    python benchmarks/adaptation.py cod --base BASE --data answers.jsonl --prompts a.jsonl b.jsonl --output cod.json

Experiments: `cod` (retention rates and K_train, seconds to the acceptance length of training without dropping),
`objectives` (ce, kd and cat at equal steps), `first-position` (what adaptation does to the next token, and to the
base model's own autoregressive blocks), `targets` (one run on each file of `--data`, measured with every target: what
a draft is worth to a target whose text it never saw), `correction-head` (a head on the draft `--base`, trained alone,
jointly, and the draft trained on without one; each measured as a chain, with the head, and with a tree). Every run
starts from the same weights, sees its rows in the same order, and is measured against the real targets through the
real decoding loop. Seconds are steps times the median seconds of a step, which are measured apart: one step of each
run in turn, again and again, so that all runs meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.replay import autoregressive, next_token_accuracy, replay
from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments, bundled_pair
from pard_hf.draft.mask_token import choose_mask_token
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.prompts import choose_rows, load_prompts
from pard_hf.io import conditions_of, shown_command
from pard_hf.tokens import encode_prompt
from pard_hf.training.data import read_rows, tokenize_rows

PAPER = {"num_draft_tokens": 8, "retention_rate": 0.7, "min_retention_rate": 0.2}
EXPERIMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "cod": {
        "no dropping": {**PAPER, "retention_rate": 1.0},
        "paper": PAPER,
        "r = 0.5": {**PAPER, "retention_rate": 0.5},
        "r = 0.9": {**PAPER, "retention_rate": 0.9},
        "r_min = 0": {**PAPER, "min_retention_rate": 0.0},
        "r_min = 0.1": {**PAPER, "min_retention_rate": 0.1},
        "K_train = 4": {**PAPER, "num_draft_tokens": 4},
        "K_train = 16": {**PAPER, "num_draft_tokens": 16},
    },
    "objectives": {name: {**PAPER, "objective": name} for name in ("ce", "kd", "cat")},
    "first-position": {"loss on answers": PAPER, "loss on all tokens": {**PAPER, "whole_text": True}},
    "targets": {},
    "correction-head": {
        "frozen": {**PAPER, "correction_head": "frozen"},
        "joint": {**PAPER, "correction_head": "joint"},
        "no head": PAPER,
    },
}
REFERENCE = "no dropping"
# How a draft with a correction head is measured.
WAYS: dict[str, dict[str, Any]] = {
    " chain": {"uses_head": False, "tree_size": 0},
    " head": {"tree_size": 0},
    " tree 64": {"uses_head": False, "tree_size": 64},
    " head, tree 64": {"tree_size": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--base", required=True, help="the model that is adapted")
    parser.add_argument("--target", nargs="+", help="targets to measure with; the first is the teacher (bundled)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="rows that the targets answered")
    parser.add_argument("--prompts", nargs="+", required=True, help="held-out prompt sets")
    parser.add_argument("--whole-text", action="store_true", help="learn prompts as well, as the paper's trainer does")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval-steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=32, help="prompts of each set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--timed-steps", type=int, default=5, help="rounds of step timing; 0 leaves seconds out")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = measure(args)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.output.with_suffix(".png"))
    print(json.dumps({run["run"]: run["points"][-1]["acceptance_length"] for run in result["runs"]}))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    names = args.target or ["bundled"]
    targets = {Path(name).name: load_target(name) for name in names}
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ways = WAYS if args.experiment == "correction-head" else {"": {}}
    evaluators = {
        f"{name}{way}": evaluator(args, target, tokenizer, **arguments)
        for name, target in targets.items()
        for way, arguments in ways.items()
    }
    files = {file.stem: rows_of(args, file, tokenizer) for file in args.data}
    runs = EXPERIMENTS[args.experiment] or {name: {**PAPER, "data": name} for name in files}
    result: dict[str, Any] = {
        "command": shown_command(sys.argv[1:], "python benchmarks/adaptation.py"),
        **conditions_of(next(iter(targets.values()))),
        "base": Path(args.base).name,
        "base_parameters": AutoModelForCausalLM.from_pretrained(args.base).num_parameters(),
        "num_rows": {name: len(rows) for name, rows in files.items()},
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "num_assistant_tokens": args.num_assistant_tokens,
        "unadapted": {name: unadapted(args, evaluator) for name, evaluator in evaluators.items()},
        "runs": [],
    }
    for name, settings in runs.items():
        print(name, file=sys.stderr, flush=True)
        points = adapt(args, settings, files, tokenizer, evaluators)
        result["runs"].append({"run": name, **settings, "points": points})
        args.output.with_suffix(".partial.json").write_text(json.dumps(result, indent=1))
    if args.timed_steps:
        time_steps(args, result["runs"], runs, files, tokenizer, evaluators)
    args.output.with_suffix(".partial.json").unlink(missing_ok=True)
    return result


def rows_of(args: argparse.Namespace, file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows to train on, in one order for all runs."""
    rows = tokenize_rows(tokenizer, read_rows(file), args.max_length, skip_bad_rows=True)
    random.Random(0).shuffle(rows)
    return rows


def load_target(name: str) -> Any:
    folder = bundled_pair().target if name == "bundled" else name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluator(args: argparse.Namespace, target: Any, tokenizer: Any, **arguments: Any) -> AcceptanceEvaluator:
    sets = {}
    for source in args.prompts:
        name, rows = load_prompts(source)
        sets[name] = [encode_prompt(tokenizer, rows[i]["prompt"]) for i in choose_rows(rows, args.limit, seed=0)]
    return AcceptanceEvaluator(target, sets, args.num_assistant_tokens, args.max_new_tokens, **arguments)


def unadapted(args: argparse.Namespace, evaluator: AcceptanceEvaluator) -> dict[str, Any]:
    """The base model as an ordinary draft, token by token: its blocks and its next-token accuracy, of each set."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    # Any draft brings out the target's answers.
    evaluator(PardDraftModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32), 0))
    found = {}
    for name, prompts in evaluator.prompts.items():
        answers = evaluator.texts[name]
        stats = replay(autoregressive(base, args.num_assistant_tokens), prompts, answers)
        found[name] = {
            **stats.to_dict(),
            **accuracies(base, prompts, answers),
            "repeated_4gram_share": round(evaluator.repeated_4gram_share(name), 4),
        }
    return found


def make_trainer(
    args: argparse.Namespace, settings: dict[str, Any], files: Any, tokenizer: Any, evaluators: Any
) -> Any:
    set_seed(0)
    settings = dict(settings)
    rows = files[settings.pop("data", next(iter(files)))]
    if settings.pop("whole_text", args.whole_text):
        rows = [{**row, "loss_mask": [1] * len(row["input_ids"])} for row in rows]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    mask_token_id, _ = choose_mask_token(tokenizer, base.config.vocab_size)
    arguments = PardTrainingArguments(
        tempfile.mkdtemp(),
        **settings,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(20, args.steps // 4),
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        logging_steps=args.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    targets = [evaluator.target for evaluator in evaluators.values()]
    return PardTrainer(
        PardDraftModel.from_causal_lm(base, mask_token_id, args.num_assistant_tokens),
        arguments,
        target=targets[0] if settings.get("objective", "ce") != "ce" else None,
        evaluator=Points(evaluators),
        train_dataset=rows,
    )


def accuracies(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """A model's next-token accuracy on held-out prompts and on the target's answers to them."""
    of_prompts, of_answers = next_token_accuracy(model, prompts, answers)
    return {"prompt_accuracy": round(of_prompts, 4), "answer_accuracy": round(of_answers, 4)}


class Points:
    """An evaluator for all targets, which keeps what it measured."""

    def __init__(self, evaluators: dict[str, AcceptanceEvaluator]):
        self.evaluators, self.found = evaluators, []

    def __call__(self, draft: Any, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
        stats = {f"{target}_{name}": value for target, evaluator in self.evaluators.items()
                 for name, value in evaluator(draft, part).items()}  # fmt: skip
        accuracy = {}
        for target, evaluator in self.evaluators.items():
            for name, prompts in evaluator.prompts.items():
                accuracy[f"{target}_{name}"] = accuracies(draft.eval(), prompts, evaluator.texts[name])
        draft.train()
        self.found.append(
            {
                "acceptance_length": {name: round(value.acceptance_length, 4) for name, value in stats.items()},
                "position_acceptance": {
                    name: [round(a, 4) for a in value.position_acceptance] for name, value in stats.items()
                },
                "next_token_accuracy": accuracy,
            }
        )
        return stats


def adapt(
    args: argparse.Namespace, settings: dict[str, Any], files: Any, tokenizer: Any, evaluators: Any
) -> list[Any]:
    """One run; what was measured on the way, with the steps, tokens and kept rows that it took."""
    trainer = make_trainer(args, settings, files, tokenizer, evaluators)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_acceptance_length" in entry]
    counts = ({name: entry[name] for name in ("step", "num_tokens", "num_rows")} for entry in history)
    return [{**count, **point} for count, point in zip(counts, trainer.evaluator.found, strict=True)]


def time_steps(args: argparse.Namespace, found: Any, runs: Any, files: Any, tokenizer: Any, evaluators: Any) -> None:
    """Median seconds of a step of each run, interleaved; then each point's seconds, and those to the reference's τ."""
    trainers = {name: make_trainer(args, settings, files, tokenizer, evaluators) for name, settings in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rows = next(iter(files.values()))
    batches = cycle(
        [rows[i : i + args.batch_size] for i in range(0, args.batch_size * args.timed_steps, args.batch_size)]
    )
    for _ in range(args.timed_steps + 1):
        batch = next(batches)
        for name, trainer in trainers.items():
            trainer.create_optimizer()
            start = time.perf_counter()
            trainer.training_step(trainer.model, trainer.data_collator(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
    for run in found:
        run["step_seconds"] = [round(s, 4) for s in seconds[run["run"]][1:]]  # The first warms up.
        for point in run["points"]:
            point["seconds"] = round(point["step"] * median(run["step_seconds"]), 2)
    reference = next((run for run in found if run["run"] == REFERENCE), None)
    for run in found if reference else ():
        run["seconds_to_reference"] = {
            name: {"reference": reference["points"][-1]["seconds"], "seconds": reaching(run["points"], name, length)}
            for name, length in reference["points"][-1]["acceptance_length"].items()
        }


def reaching(points: list[dict[str, Any]], name: str, length: float) -> float | None:
    """Seconds at which a run first has blocks of `length`, between two points as a straight line; `None` = not yet."""
    before = (0.0, 1.0)
    for point in points:
        now = (point["seconds"], point["acceptance_length"][name])
        if now[1] >= length:
            share = (length - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 0.0
            return round(before[0] + share * (now[0] - before[0]), 2)
        before = now
    return None


def plot(result: dict[str, Any], file: Path) -> None:
    """Acceptance length of each run over seconds (over steps where none were measured), one panel a prompt set."""
    from matplotlib.figure import Figure

    names = list(result["runs"][0]["points"][0]["acceptance_length"])
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for run in result["runs"]:
            unit = "seconds" if "seconds" in run["points"][0] else "step"
            points = [(point[unit], point["acceptance_length"][name]) for point in run["points"]]
            axis.plot(*zip(*points, strict=True), marker=".", label=run["run"])
            axis.set_xlabel(unit)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("acceptance length")
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
