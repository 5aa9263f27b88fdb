"""Train a parallel draft with the `Trainer` of transformers."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from ..draft.addons import CORRECTION_HEAD, WEIGHTS_FILE, is_addon_weight
from ..draft.correction_head import CorrectionHead
from ..draft.model import PardDraftModel, check_loadable
from ..draft.vocabulary import check_head
from ..generation.stats import DecodingStats
from ..io import whole_file
from .collator import DataCollatorForPard
from .objective import Objective, check_attention
from .settings import MethodSettings, setting

logger = logging.getLogger(__name__)

# Kernels of attention take masks whose rows are aligned, and few shapes are easier on the allocator.
CUDA_ROW_MULTIPLE = 128
# What a step spends its time on, in order; the head's backward pass is taken with its loss, in the forward.
STEP_PARTS = ("fetch", "forward", "backward", "optimizer")
# From a draft, and the share `(i, n)` of the prompts that process i of n decodes, to statistics of each prompt set.
Evaluator = Callable[[PardDraftModel, tuple[int, int]], dict[str, DecodingStats]]


@dataclass
class PardTrainingArguments(MethodSettings, TrainingArguments):
    """`TrainingArguments` with the settings of PARD, whose defaults are the paper's; warm-up and cosine are ours."""

    # The collator reads columns that no model's forward names.
    remove_unused_columns: bool = setting(False, "keep False: rows are built of all columns")
    restore_callback_states_from_checkpoint: bool = setting(True, "continue the clock and patience of a resumed run")
    lr_scheduler_type: str = setting("cosine", "how the learning rate falls after the warm-up")
    warmup_steps: float = setting(0.03, "steps, or below 1 the share of steps, until the learning rate is reached")

    def __post_init__(self) -> None:
        self.check(MethodSettings)
        if self.max_minutes is not None:
            self.num_train_epochs = 1e6
        if self.label_smoothing_factor:
            raise ValueError("Expected no `label_smoothing_factor`, which these objectives do not have. Leave it out.")
        if self.metric_for_best_model is None:
            self.metric_for_best_model: str | None = "acceptance_length"
            self.greater_is_better = True
        # transformers requires saves to fall on evaluations; `_determine_best_metric` saves every new best draft.
        keeps_best: bool = self.load_best_model_at_end
        self.load_best_model_at_end: bool = False
        super().__post_init__()
        self.load_best_model_at_end = keeps_best
        if keeps_best and self.eval_strategy == "no":
            raise ValueError("Expected evaluations to keep the best draft by, got none. Give an `eval_strategy`.")
        if self.n_gpu > 1:
            logger.warning("One of %d GPUs is used; for all, `accelerate launch -m pard_hf.cli train …`.", self.n_gpu)
            self._n_gpu = 1


class PardTrainer(Trainer):
    """Adapt a [`PardDraftModel`] on the kept (anchor, depth) rows; everything else is as in [`Trainer`].

    `metrics.csv` and `curves.png` next to the checkpoints follow the run. A loss that is not finite ends it and leaves
    the names of the batch's rows in `not_finite.{process}.json`.

    Args:
        model ([`PardDraftModel`]):
            The draft; `PardDraftModel.from_causal_lm` makes one of any small causal LM.
        target ([`PreTrainedModel`], *optional*):
            The teacher, for all objectives but `"ce"`, unless rows hold what it said (`pard data --top-logits`).
        evaluator (`Callable`, *optional*):
            Such as an [`AcceptanceEvaluator`]: called with the draft and the share `(i, n)` of the prompts that
            process i of n decodes, returns [`DecodingStats`] of each prompt set.
        provenance (`Callable[[Path, int, dict], None]`, *optional*):
            Writes files into the folder of a saved draft, given its step and the metrics of its evaluation.
        train_dataset:
            Rows with `input_ids` and, optionally, `loss_mask`, as `tokenize_rows` and `pack_rows` make them.

    >>> draft = PardDraftModel.from_causal_lm(model, mask_token_id=151665)
    >>> PardTrainer(draft, PardTrainingArguments("out"), train_dataset=rows).train()
    """

    # The objective divides by the labels of the whole step.
    loss_is_scaled_for_ga = True
    lr_scheduler: Any
    loaded_step: int | None = None  # Step of the best checkpoint, once the draft has its weights.

    def __init__(
        self,
        model: PardDraftModel,
        args: PardTrainingArguments,
        target: PreTrainedModel | None = None,
        evaluator: Evaluator | None = None,
        provenance: Callable[[Path, int, dict[str, Any]], None] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, PardDraftModel):
            name = type(model).__name__
            raise ValueError(f"Expected a `PardDraftModel`, got `{name}`. Take `PardDraftModel.from_causal_lm`.")
        if args.eval_strategy != "no" and evaluator is None:
            raise ValueError("Expected an `evaluator` with an `eval_strategy`, got none. Pass one, or take 'no'.")
        check_loadable(model)
        set_seed(args.seed)  # The correction head is initialized before `Trainer` sets the seed.
        prepare_trained(model, args)
        example: dict[str, Any] = next(iter(kwargs.get("train_dataset") or ()), {})
        is_stored = "top_ids" in example and args.objective != "ce"
        self.objective = Objective(
            args.objective, args.cross_entropy_weight, args.divergence_weight, args.distillation_temperature, target,
            args.depth_decay, is_stored,
        )  # fmt: skip
        if "data_collator" not in kwargs:
            seed = args.seed if args.data_seed is None else args.data_seed
            method = (args.num_draft_tokens, args.retention_rate, args.min_retention_rate)
            multiple = CUDA_ROW_MULTIPLE if args.device.type == "cuda" else 1
            settings = (*method, seed, multiple, args.max_anchors)
            kwargs["data_collator"] = DataCollatorForPard(model.mask_token_id, *settings)
        check_attention(model, device=args.device)
        check_head(model)
        if target is not None and args.objective != "ce" and not is_stored:
            check_head(target.eval().requires_grad_(False))
            if "text_lengths" in example:
                check_attention(target, is_teacher=True)
        # `Trainer` requires a data set wherever it evaluates; the evaluator has its own.
        super().__init__(model, args, eval_dataset=() if evaluator else None, **kwargs)
        if args.correction_head is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Expected whole weights on each device for a correction head, got sharded ones. Take DDP."
            )
        self.model_accepts_loss_kwargs = True  # Labels are counted over the step, and handed to `compute_loss`.
        self._loss_shifts_labels = False
        self.evaluator, self.provenance = evaluator, provenance
        if target is not None and self.place_model_on_device:
            if not hasattr(target, "hf_device_map") and not any(p.is_meta for p in target.parameters()):
                target.to(args.device)
        # The clock comes last: it restarts after tables and plots are written.
        for callback in (self.data_collator, MetricsFiles(), TrainingClock()):
            if isinstance(callback, TrainerCallback):
                self.add_callback(callback)

    @property
    def clock(self) -> TrainingClock:
        """Find the clock, which a resumed run replaces by the checkpoint's."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, TrainingClock))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        sources = inputs.pop("sources", None)
        loss = model(objective=self.objective, batch=inputs, num_items=num_items_in_batch)
        if not torch.isfinite(loss):
            self.stop_at(loss, sources)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # Labels were counted over all; gradients are averaged.
        if model.training:
            self.clock.count(inputs["anchors"], inputs["depths"])
            self.clock.end("forward")
        return (loss, {}) if return_outputs else loss

    def stop_at(self, loss: torch.Tensor, sources: Any) -> None:
        """Save the sources of the batch whose loss is not finite, and end the run."""
        file, step = (
            Path(self.args.output_dir, f"not_finite.{self.args.process_index}.json"),
            self.state.global_step + 1,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step": step, "loss": str(loss.item()), "rows": sources}), encoding="utf-8")
        raise FloatingPointError(
            f"Expected a finite loss in step {step}, got {loss.item()}. Lower the learning rate, or look at the rows "
            f"named in `{file}`; checkpoints before this step are good."
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.correction_head is not None:
            set_learning_rate(optimizer, self.model.correction_head, self.args.correction_head_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow the clock where the run is limited in time."""
        if self.args.max_minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: self.warmup_share(step) * (1 + math.cos(math.pi * self.clock.share)) / 2,
            )
        return self.lr_scheduler

    def warmup_share(self, step: int) -> float:
        """Return the share of the warm-up that is over, up to 1, in a run that is limited in time."""
        warmup = self.args.warmup_steps
        return min(self.clock.share / warmup if 0 < warmup < 1 else (step + 1) / max(warmup, 1), 1.0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.clock.metrics()}, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure acceptance by the evaluator.

        Returns:
            `eval_acceptance_length` (mean over prompt sets), and of each `eval_{set}_acceptance_length` and
            `eval_{set}_position_acceptance_{i}`.
        """
        if self.evaluator is None:
            raise ValueError("Expected an `evaluator`, got none. Pass one to `PardTrainer`.")
        draft = whole_draft(self.accelerator.unwrap_model(self.model), self.model_wrapped)
        share = self.evaluator(draft, (self.args.process_index, self.args.world_size))
        sets = {name: sum(gather_object([stats]), DecodingStats()) for name, stats in share.items()}
        lengths = {name: stats.acceptance_length for name, stats in sets.items()}
        values = {"acceptance_length": sum(lengths.values()) / max(len(sets), 1)}
        for name, stats in sets.items():
            values[f"{name}_acceptance_length"] = lengths[name]
            values |= {f"{name}_position_acceptance_{i}": a for i, a in enumerate(stats.position_acceptance, start=1)}
        metrics = {f"{metric_key_prefix}_{name}": round(value, 4) for name, value in values.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`Trainer`] does; `True` resumes from the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"Expected a complete checkpoint in `{self.args.output_dir}`, got none.")
        if resume_from_checkpoint:
            self.load_head(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self.load_head(self.state.best_model_checkpoint)
            self.loaded_step = self.state.best_global_step
        return output

    def load_head(self, folder: str) -> None:
        """Load the weights of a checkpoint's correction head; `Trainer` loads the draft's own."""
        if self.args.correction_head is not None:
            weights = load_file(f"{folder}/{CORRECTION_HEAD}/{WEIGHTS_FILE}")
            self.accelerator.unwrap_model(self.model).correction_head.load_state_dict(weights)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if not is_addon_weight(name)]
        super()._issue_warnings_after_load(load_result)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # A pickle that names folders; nothing reads it.
        if self.provenance is not None:
            step = self.state.global_step if self.loaded_step is None else self.loaded_step
            history = [e for e in self.state.log_history if "eval_acceptance_length" in e and e["step"] <= step]
            self.provenance(folder, step, (history or [{}])[-1])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # How torch and safetensors report a disk that is full.
            raise OSError(
                f"Expected room for a checkpoint in `{self.args.output_dir}`, got: {error}. Make room and repeat the "
                "command."
            ) from error


def prepare_trained(draft: PardDraftModel, args: MethodSettings) -> None:
    """Prepare the correction head and freeze what is not trained, before an optimizer is made."""
    prepare_head(draft, args.correction_head, args.correction_head_rank)
    if args.freeze_embeddings:
        for module in (draft.get_input_embeddings(), draft.get_output_embeddings()):
            module.requires_grad_(False)


def prepare_head(draft: PardDraftModel, mode: str | None, rank: int) -> None:
    """Attach the correction head that is to be trained, and freeze the draft for `"frozen"`; detach it for `None`."""
    if draft.trimmed_vocabulary is not None:
        raise ValueError(
            "Expected a draft with its whole vocabulary, got a trimmed one. Load it with `trimmed_vocabulary=False` "
            "and trim it afterwards."
        )
    head = draft.correction_head
    if mode is None:
        if head is not None:
            logger.warning(
                "The draft's correction head is left off, since the hidden states it belongs to are about to change. "
                'Train it along with `correction_head="joint"`, or a new one on the finished draft.'
            )
            draft.correction_head = None
        if not any(parameter.requires_grad for parameter in draft.parameters()):
            draft.requires_grad_(True)  # An earlier run froze it to train its head.
        return
    if head is not None and head.rank != rank:
        raise ValueError(
            f"Expected a correction head of rank {rank}, got {head.rank}. Pass that rank, or load the draft with "
            "`correction_head=False` to begin a new one."
        )
    if head is None:
        config = draft.config.get_text_config()
        head = CorrectionHead(config.vocab_size, config.hidden_size, rank).to(draft.device, draft.dtype)
    draft.correction_head = head
    draft.requires_grad_(mode == "joint")
    head.requires_grad_(True)


def set_learning_rate(optimizer: torch.optim.Optimizer, module: torch.nn.Module, learning_rate: float) -> None:
    """Give the parameters of a module groups with their own learning rate."""
    own, groups = {id(parameter) for parameter in module.parameters()}, []
    for group in optimizer.param_groups:
        for is_own, rate in ((False, group["lr"]), (True, learning_rate)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in own) == is_own]
            groups += [{**group, "params": parameters, "lr": rate}] if parameters else []
    optimizer.param_groups[:] = groups


def whole_draft(draft: PardDraftModel, wrapped: Any) -> PardDraftModel:
    """Return the draft, or a copy with all weights where `wrapped`, the wrapper around it, has sharded them by FSDP.

    All processes call this together; they then decode in different numbers of rounds, without each other's shards.
    """
    is_sharded = isinstance(wrapped, FSDPModule | FullyShardedDataParallel)
    if not is_sharded:
        return draft
    weights: dict[str, Any] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    copy = AutoModelForCausalLM.from_config(draft.config, dtype=draft.dtype)
    copy.load_state_dict(weights)
    whole = PardDraftModel.from_causal_lm(copy, draft.mask_token_id, draft.num_assistant_tokens)
    return whole.to(next(iter(weights.values())).device).eval()


def last_checkpoint(folder: str | Path) -> str | None:
    """Find the last complete checkpoint; `Trainer` writes `trainer_state.json` last."""
    steps = []
    for file in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):  # The file itself was cut short.
            steps.append(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    return f"{folder}/checkpoint-{max(steps)}" if steps else None


class TrainingClock(TrainerCallback, ExportableState):
    """Count seconds of training by part of a step, tokens and rows; a resumed run continues them.

    Evaluations and saving are left out. On a CUDA device a part is the time until its kernels are launched, and waits
    for them fall into whichever part reads a result. A run of `max_minutes` ends with the step that reaches them.
    """

    max_minutes: float | None = None

    def __init__(self, parts: dict[str, float] | None = None, num_tokens: int = 0, num_rows: int = 0):
        self.parts = dict.fromkeys(STEP_PARTS, 0.0) | (parts or {})
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self.last: float | None = None
        self.pending: torch.Tensor | None = None  # Tokens and rows, counted on the device and not read yet.

    def count(self, anchors: torch.Tensor, depths: torch.Tensor) -> None:
        """Count the tokens and kept rows of a batch on its device, without waiting for it."""
        is_row = anchors >= 0
        counts = torch.stack([(is_row & (depths == 0)).sum(), is_row.sum()])
        self.pending = counts if self.pending is None else self.pending + counts

    def counts(self) -> dict[str, int]:
        """Return the tokens and rows so far; waits for the device."""
        if self.pending is not None:
            num_tokens, num_rows = self.pending.tolist()
            self.num_tokens, self.num_rows = self.num_tokens + num_tokens, self.num_rows + num_rows
            self.pending = None
        return {"num_tokens": self.num_tokens, "num_rows": self.num_rows}

    def metrics(self) -> dict[str, float]:
        """Return what is logged, of this process and the whole run so far."""
        counts, seconds = self.counts(), self.seconds
        rates = {f"{n}_per_second": round(counts[f"num_{n}"] / seconds, 1) for n in ("tokens", "rows") if seconds}
        parts = {f"{part}_seconds": round(spent, 3) for part, spent in self.parts.items()}
        return {"train_seconds": round(seconds, 3), **parts, **counts, **rates}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"parts": self.parts, **self.counts()}}

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return sum(self.parts.values())

    def end(self, part: str) -> None:
        """Count the time since the last part ended for this one."""
        now = time.perf_counter()
        self.parts[part] += now - (self.last or now)
        self.last = now

    @property
    def share(self) -> float:
        """Return how much of a run of `max_minutes` is over, up to 1."""
        return 0.0 if self.max_minutes is None else min(self.seconds / (60 * self.max_minutes), 1.0)

    def on_train_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
        self.max_minutes = args.max_minutes
        self.last = time.perf_counter()

    on_evaluate = on_save = on_train_begin

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.end("fetch")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.end("backward")

    on_pre_optimizer_step = on_substep_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end("optimizer")
        control.should_training_stop |= self.share == 1


class MetricsFiles(TrainerCallback):
    """Write `metrics.csv` and `curves.png` next to the checkpoints, from the whole history of the run."""

    num_written = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A step is often both evaluated and saved; the second event adds nothing.
        if state.is_world_process_zero and len(state.log_history) != self.num_written:
            self.num_written = len(state.log_history)
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_table(state.log_history, folder / "metrics.csv")
            plot_curves(state.log_history, folder / "curves.png")

    on_save = on_train_end = on_evaluate


def write_table(history: list[dict[str, Any]], file: Path) -> None:
    """Write a row for each logging event and a column for each metric, empty where it was not logged."""
    columns = list(dict.fromkeys(["step", "epoch", *(name for entry in history for name in entry)]))
    with whole_file(file) as written, written.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(history)


def plot_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Plot the loss, and the acceptance length of each prompt set, over steps."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("No plot at %s: matplotlib is not installed; `metrics.csv` has the numbers.", file)
        return
    ending = "_acceptance_length"
    lengths = dict.fromkeys(name for entry in history for name in entry if name.endswith(ending))
    plot = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, title, names in zip(
        plot.subplots(1, 2), ("loss", "acceptance length"), (["loss"], lengths), strict=True
    ):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            label = name.removeprefix("eval").removesuffix(ending).removeprefix("_") or "mean"
            axis.plot([step for step, _ in points], [value for _, value in points], label=label, marker=".")
        axis.set(xlabel="step", ylabel=title)
        if axis.lines:
            axis.legend()
    with whole_file(file) as written:
        plot.savefig(written, dpi=120, format="png")
