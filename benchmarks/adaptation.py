"""Adapt one base model in several ways on the same training rows, and compare acceptance lengths.

    python benchmarks/adaptation.py cod --base BASE --data answers.jsonl --prompts a.jsonl b.jsonl --output cod.json

Experiments: `cod` (retention rates and K_train, seconds to the acceptance length of training without dropping),
`objectives` (all of them at equal steps), `first-position` (what adaptation does to the next token, and to the
base model's own autoregressive blocks), `targets` (one run on each file of `--data`, measured with every target: what
a draft is worth to a target whose text it never saw), `correction-head` (a head on the draft `--base`, trained alone,
jointly, and the draft trained on without one; each measured as a chain, with the head, and with a tree).

Every run starts from the same weights, sees its rows in the order of its seed, and is measured by the decoding loop.
Seconds are steps times the median seconds of a step, timed apart: one step of each run in turn, so that all meet the
same machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments, bundled_pair
from pard_hf.draft.mask_token import choose_mask_token
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.evaluation.prompts import choose_rows, load_prompts
from pard_hf.tokens import encode_prompt
from pard_hf.training.data import read_rows, tokenize_rows
from replay import autoregressive, next_token_accuracy, replay
from script import finish, parser_of, run_metadata, write

EXPERIMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "cod": {
        "no dropping": {"retention_rate": 1.0},
        "paper": {},
        "r = 0.5": {"retention_rate": 0.5},
        "r = 0.9": {"retention_rate": 0.9},
        "r_min = 0": {"min_retention_rate": 0.0},
        "r_min = 0.1": {"min_retention_rate": 0.1},
        "K_train = 4": {"num_draft_tokens": 4},
        "K_train = 16": {"num_draft_tokens": 16},
    },
    "objectives": {name: {"objective": name} for name in ("ce", "kd", "cat", "tv", "lk")},
    "first-position": {"loss on answers": {}, "loss on all tokens": {"whole_text": True}},
    "targets": {},
    "correction-head": {
        "frozen": {"correction_head": "frozen"}, "joint": {"correction_head": "joint"}, "no head": {},
    },
}  # fmt: skip
PAPER = {"num_draft_tokens": 8, "retention_rate": 0.7, "min_retention_rate": 0.2}
REFERENCE = "no dropping"
# How a draft with a correction head is measured.
WAYS: dict[str, dict[str, Any]] = {
    " chain": {"uses_head": False, "tree_size": 0},
    " head": {"tree_size": 0},
    " tree 64": {"uses_head": False, "tree_size": 64},
    " head, tree 64": {"tree_size": 64},
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--base", required=True, help="the model that is adapted")
    parser.add_argument("--target", nargs="+", default=["bundled"], help="targets; the first is the teacher (bundled)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="rows that the targets answered")
    parser.add_argument("--prompts", nargs="+", required=True, help="held-out prompt sets")
    parser.add_argument("--whole-text", action="store_true", help="learn prompts as well, as the paper's trainer does")
    parser.add_argument("--limit", type=int, default=32, help="prompts of each set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of the order of rows and what is dropped")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--timed-steps", type=int, default=5, help="rounds of step timing; 0 leaves seconds out")
    numbers = {"steps": 120, "eval-steps": 30, "batch-size": 16, "max-length": 320, "max-new-tokens": 100}
    for name, default in {**numbers, "num-assistant-tokens": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    result = Adaptation(args).measure()
    finish(result, args.output, {run["run"]: run["points"][-1]["acceptance_length"] for run in result["runs"]})
    if args.output:
        plot(result, args.output.with_suffix(".png"))


class Adaptation:
    """Run one experiment: `runs` are its settings by name, `rows` the training rows of each file."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tokenizer = args, AutoTokenizer.from_pretrained(args.base)
        self.rows = {file.stem: self.rows_of(file) for file in args.data}
        runs = EXPERIMENTS[args.experiment] or {name: {"data": name} for name in self.rows}
        self.runs = {
            name if len(args.seeds) == 1 else f"{name}, seed {seed}": {**PAPER, **settings, "seed": seed}
            for seed in args.seeds
            for name, settings in runs.items()
        }
        sets = {}
        for name, rows in map(load_prompts, args.prompts):
            chosen = choose_rows(rows, args.limit, seed=0)
            sets[name] = [encode_prompt(self.tokenizer, rows[index]["prompt"]) for index in chosen]
        ways = WAYS if args.experiment == "correction-head" else {"": {}}
        self.evaluators = {}
        for name in args.target:
            target = load(bundled_pair().target if name == "bundled" else name).eval()
            for way, settings in ways.items():
                self.evaluators[Path(name).name + way] = AcceptanceEvaluator(
                    target, sets, args.num_assistant_tokens, args.max_new_tokens, **settings
                )

    def rows_of(self, file: Path) -> list[dict[str, Any]]:
        rows = list(tokenize_rows(self.tokenizer, read_rows(file), self.args.max_length, skip_bad_rows=True))
        random.Random(0).shuffle(rows)
        return rows

    def measure(self) -> dict[str, Any]:
        """Adapt in each way, and time the steps of all; the result so far is written after each run."""
        args, base = self.args, load(self.args.base)
        names = ("steps", "batch_size", "learning_rate", "num_assistant_tokens")
        result: dict[str, Any] = {
            **run_metadata(next(iter(self.evaluators.values())).target),
            "base": Path(args.base).name,
            "base_parameters": base.num_parameters(),
            "num_rows": {name: len(rows) for name, rows in self.rows.items()},
            **{name: getattr(args, name) for name in names},
            "unadapted": {name: self.unadapted(base, evaluator) for name, evaluator in self.evaluators.items()},
            "runs": [],
        }
        for name, settings in self.runs.items():
            print(name, file=sys.stderr, flush=True)
            result["runs"].append({"run": name, **settings, "points": self.adapt(settings)})
            write(result, args.output)
        if args.timed_steps:
            self.time_steps(result["runs"])
        return result

    def unadapted(self, base: Any, evaluator: AcceptanceEvaluator) -> dict[str, Any]:
        """Measure the base model as an ordinary draft, token by token, and its next-token accuracy, of each set."""
        # Any draft brings out the target's answers.
        evaluator(PardDraftModel.from_causal_lm(load(self.args.base), 0))
        found = {}
        for name, prompts in evaluator.prompts.items():
            stats = replay(autoregressive(base.eval(), self.args.num_assistant_tokens), prompts, evaluator.texts[name])
            share = {"repeated_4gram_share": round(evaluator.repeated_4gram_share(name), 4)}
            found[name] = {**stats.to_dict(), **accuracies(base, prompts, evaluator.texts[name]), **share}
        return found

    def trainer(self, settings: dict[str, Any], points: list[dict[str, Any]]) -> PardTrainer:
        """Make the trainer of a run; what its evaluations measure is appended to `points`."""
        set_seed(0)
        args, settings = self.args, dict(settings)
        rows = self.rows[settings.pop("data", next(iter(self.rows)))]
        if settings.pop("whole_text", args.whole_text):
            rows = [{**row, "loss_mask": [1] * len(row["input_ids"])} for row in rows]
        base = load(args.base)
        mask_token_id, _ = choose_mask_token(self.tokenizer, base.config.vocab_size)
        arguments = PardTrainingArguments(
            tempfile.mkdtemp(), **settings, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(20, args.steps // 4), eval_strategy="steps", eval_steps=args.eval_steps,
            logging_steps=args.eval_steps, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        teacher = next(iter(self.evaluators.values())).target if settings.get("objective", "ce") != "ce" else None
        draft = PardDraftModel.from_causal_lm(base, mask_token_id, args.num_assistant_tokens)
        evaluate = partial(self.evaluate, points)
        return PardTrainer(draft, arguments, target=teacher, evaluator=evaluate, train_dataset=rows)

    def evaluate(self, points: list[dict[str, Any]], draft: Any, _: Any) -> dict[str, Any]:
        """Measure a draft with all targets; called by the trainer."""
        stats, accuracy = {}, {}
        for target, evaluator in self.evaluators.items():
            stats |= {f"{target}_{name}": value for name, value in evaluator(draft).items()}
            for name, prompts in evaluator.prompts.items():
                accuracy[f"{target}_{name}"] = accuracies(draft.eval(), prompts, evaluator.texts[name])
        draft.train()
        positions = {name: [round(a, 4) for a in value.position_acceptance] for name, value in stats.items()}
        lengths = {name: round(value.acceptance_length, 4) for name, value in stats.items()}
        points.append(
            {"acceptance_length": lengths, "position_acceptance": positions, "next_token_accuracy": accuracy}
        )
        return stats

    def adapt(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Train one run; returns its evaluations, with the steps, tokens and kept rows before each."""
        points: list[dict[str, Any]] = []
        trainer = self.trainer(settings, points)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "eval_acceptance_length" in entry]
        counts = ({name: entry[name] for name in ("step", "num_tokens", "num_rows")} for entry in history)
        return [{**count, **point} for count, point in zip(counts, points, strict=True)]

    def time_steps(self, found: list[dict[str, Any]]) -> None:
        """Time a step of each run, interleaved; add each point's seconds, and those to the reference's τ."""
        rows, size = next(iter(self.rows.values())), self.args.batch_size
        trainers = {name: self.trainer(settings, []) for name, settings in self.runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in self.runs}
        for turn in range(self.args.timed_steps + 1):
            first = turn % self.args.timed_steps * size
            for name, trainer in trainers.items():
                trainer.create_optimizer()
                start = time.perf_counter()
                trainer.training_step(trainer.model, trainer.data_collator(rows[first : first + size]))
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                seconds[name].append(time.perf_counter() - start)
        for run in found:
            run["step_seconds"] = [round(s, 4) for s in seconds[run["run"]][1:]]  # The first warms up.
            for point in run["points"]:
                point["seconds"] = round(point["step"] * median(run["step_seconds"]), 2)
        last = next((run["points"][-1] for run in found if run["run"] == REFERENCE), None)
        for run in found if last else ():
            run["seconds_to_reference"] = {
                name: {"reference": last["seconds"], "seconds": seconds_to(run["points"], name, length)}
                for name, length in last["acceptance_length"].items()
            }


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def accuracies(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """Measure a model's next-token accuracy on held-out prompts and on the target's answers to them."""
    of_prompts, of_answers = next_token_accuracy(model, prompts, answers)
    return {"prompt_accuracy": round(of_prompts, 4), "answer_accuracy": round(of_answers, 4)}


def seconds_to(points: list[dict[str, Any]], name: str, length: float) -> float | None:
    """Interpolate the seconds at which a run reaches an acceptance length; `None` if it does not."""
    before = (0.0, 1.0)
    for point in points:
        now = (point["seconds"], point["acceptance_length"][name])
        if now[1] >= length:
            share = (length - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 0.0
            return round(before[0] + share * (now[0] - before[0]), 2)
        before = now
    return None


def plot(result: dict[str, Any], file: Path) -> None:
    """Plot acceptance lengths over seconds (over steps where none were timed), one panel a prompt set."""
    from matplotlib.figure import Figure

    names = list(result["runs"][0]["points"][0]["acceptance_length"])
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for run in result["runs"]:
            unit = "seconds" if "seconds" in run["points"][0] else "step"
            points = [(point[unit], point["acceptance_length"][name]) for point in run["points"]]
            axis.plot(*zip(*points, strict=True), marker=".", label=run["run"])
        axis.set_title(name, fontsize=9)
        axis.set(xlabel=unit, ylabel="acceptance length")
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
