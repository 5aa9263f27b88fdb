"""A draft whose weights lie on several devices, whole on each: to draft with, which no wrapper knows how to do.

Training a correction head: on a draft that stays as it is, or together with it.

What a training run leaves beside its checkpoints: seconds and rows spent, a table of metrics, a plot.

Training a parallel draft with the host's `Trainer`.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ..draft.addons import CORRECTION_HEAD, WEIGHTS_FILE, is_addon_weight
from ..draft.correction_head import DEFAULT_RANK, CorrectionHead
from ..draft.model import PardDraftModel, check_loadable
from ..draft.vocabulary import check_head
from ..generation.stats import DecodingStats
from ..io import whole_file
from .collator import DataCollatorForPard, EpochOfCollator
from .objective import Objective, check_attention

logger = logging.getLogger(__name__)


def whole_draft(draft: PardDraftModel, wrapped: Any) -> PardDraftModel:
    """The draft itself, or a copy with all weights where FSDP has sharded them.

    Processes decode different prompts in different numbers of rounds, so none may wait for another's weights. Drafts
    are small: a copy costs less than it would to keep them in step. Every process must call this at the same time.

    Args:
        draft ([`PardDraftModel`]):
            The draft, without wrappers.
        wrapped (`torch.nn.Module`):
            What is trained: the draft, or the wrapper around it.
    """
    is_sharded = isinstance(wrapped, FSDPModule | FullyShardedDataParallel)
    if not is_sharded:
        return draft
    weights: dict[str, Any] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    copy = AutoModelForCausalLM.from_config(draft.config, dtype=draft.dtype)
    copy.load_state_dict(weights)
    whole = PardDraftModel.from_causal_lm(copy, draft.mask_token_id, draft.num_assistant_tokens)
    return whole.to(next(iter(weights.values())).device).eval()


MODES = ("frozen", "joint")


def is_adapted(config: PreTrainedConfig) -> bool:
    """Whether a base model is a draft already."""
    return getattr(config, "pard_token", None) is not None


def check_mode(mode: str | None) -> None:
    """Raise a `ValueError` for a way to train a head that we do not have."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"Expected `correction_head` to be one of {', '.join(MODES)}, got {mode!r}.")


def prepare_head(draft: PardDraftModel, mode: str | None, rank: int) -> None:
    """Give a draft the head that is to be trained, and say which weights are.

    A head the draft has already goes on; without `mode` it is left off, for its draft is about to change.

    Raises:
        ValueError: The mode is unknown, or the draft has a head of another rank or a trimmed vocabulary.
    """
    check_mode(mode)
    if draft.trimmed_vocabulary is not None:
        raise ValueError(
            "Expected a draft with its whole vocabulary, got a trimmed one, whose rows would not follow the training. "
            "Load it with `trimmed_vocabulary=False` and trim it afterwards."
        )
    if mode is None:
        if draft.correction_head is not None:
            logger.warning(
                "The draft's correction head is left off: the hidden states it belongs to are about to change. Train "
                'it along with `correction_head="joint"`, or a new one on the finished draft.'
            )
            draft.correction_head = None
        if not any(parameter.requires_grad for parameter in draft.parameters()):
            draft.requires_grad_(True)  # A frozen head was trained on it before.
        return
    config = draft.config.get_text_config()
    if draft.correction_head is None:
        head = CorrectionHead(config.vocab_size, config.hidden_size, rank)
        draft.correction_head = head.to(draft.device, draft.dtype)
    elif draft.correction_head.rank != rank:
        raise ValueError(
            f"Expected the draft's correction head to have the rank {rank}, got {draft.correction_head.rank}. Pass "
            "that rank, or load the draft with `correction_head=False` to begin a new head."
        )
    draft.requires_grad_(mode == "joint")
    draft.correction_head.requires_grad_(True)


def give_own_rate(optimizer: torch.optim.Optimizer, head: CorrectionHead, learning_rate: float) -> None:
    """Let a head learn at a rate of its own: it begins from nothing, the draft does not."""
    own = {id(parameter) for parameter in head.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts = [[p for p in group["params"] if (id(p) in own) == is_own] for is_own in (False, True)]
        groups += [
            {**group, "params": part, **({"lr": learning_rate} if is_own else {})}
            for part, is_own in zip(parts, (False, True), strict=True)
            if part
        ]
    optimizer.param_groups[:] = groups


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds of training, evaluations and saving left out, and the tokens and rows that went in; goes on on resuming.

    Collating counts: it is part of what a step costs.
    """

    def __init__(self, seconds: float = 0.0, num_tokens: int = 0, num_rows: int = 0):
        self.seconds, self.num_tokens, self.num_rows = seconds, num_tokens, num_rows
        self.last: float | None = None
        self.not_read: torch.Tensor | None = None  # Tokens and rows that only the device knows yet.

    def count(self, anchors: torch.Tensor, depths: torch.Tensor) -> None:
        """Count the real tokens and the kept rows of a batch, on its device: a step does not wait for the sum."""
        is_row = anchors >= 0
        counts = torch.stack([(is_row & (depths == 0)).sum(), is_row.sum()])
        self.not_read = counts if self.not_read is None else self.not_read + counts

    def read(self) -> tuple[int, int]:
        """The numbers of tokens and rows so far; waits for the device."""
        if self.not_read is not None:
            num_tokens, num_rows = self.not_read.tolist()
            self.num_tokens, self.num_rows = self.num_tokens + num_tokens, self.num_rows + num_rows
            self.not_read = None
        return self.num_tokens, self.num_rows

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - (self.last or now)
        self.last = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    on_save = on_evaluate

    def figures(self) -> dict[str, float]:
        """As metrics, of this process."""
        num_tokens, num_rows = self.read()
        return {"train_seconds": round(self.seconds, 3), "num_tokens": num_tokens, "num_rows": num_rows}

    def state(self) -> dict[str, Any]:
        num_tokens, num_rows = self.read()
        values = {"seconds": self.seconds, "num_tokens": num_tokens, "num_rows": num_rows}
        return {"args": {}, "attributes": values}


class MetricsFile(TrainerCallback):
    """Keeps `metrics.csv` and `curves.png` beside the checkpoints, whatever `report_to` says.

    Both are written from the run's whole history, which checkpoints carry: a resumed run has one table.
    """

    def __init__(self) -> None:
        self.num_written = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A step that is evaluated is often saved as well, and says nothing new then.
        if state.is_world_process_zero and len(state.log_history) != self.num_written:
            self.num_written = len(state.log_history)
            write_table(state.log_history, Path(args.output_dir) / "metrics.csv")
            plot_curves(state.log_history, Path(args.output_dir) / "curves.png")

    on_save = on_train_end = on_evaluate


def write_table(history: list[dict[str, Any]], file: Path) -> None:
    """One line for each logging event, one column for each metric; empty where it was not logged."""
    columns = list(dict.fromkeys(["step", "epoch", *(name for entry in history for name in entry)]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as written, written.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows(history)


def plot_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Loss, and acceptance length of each prompt set, over steps."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("No plot at %s: matplotlib is not installed; `metrics.csv` has the figures.", file)
        return
    ending = "_acceptance_length"
    sets = sorted({name for entry in history for name in entry if name.startswith("eval_") and name.endswith(ending)})
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = [(axes[0], "loss", "loss")]
    curves += [(axes[1], name, name.removeprefix("eval_").removesuffix(ending) or "mean") for name in sets]
    for axis, name, label in curves:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if axis is axes[1] else None)
    for axis, label in zip(axes, ("loss", "acceptance length"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend()
    with whole_file(file) as written:
        figure.savefig(written, dpi=120, format="png")


# From a draft (and the part `(i, n)` of the prompts that this of n processes takes) to statistics of each prompt set.
Evaluator = Callable[..., dict[str, DecodingStats]]


@dataclass
class PardTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of PARD; defaults are the paper's."""

    num_draft_tokens: int = field(
        default=8, metadata={"help": "K_train, depths that are trained; at inference K may be larger."}
    )
    retention_rate: float = field(
        default=0.7, metadata={"help": "Depth d keeps max(r**d, r_min) of its rows; 1 drops nothing."}
    )
    min_retention_rate: float = field(default=0.2, metadata={"help": "r_min, the least share any depth keeps."})
    objective: str = field(
        default="ce",
        metadata={"help": "ce (cross-entropy), kd (and the target's distribution), cat (kd, weighted by confidence)."},
    )
    cross_entropy_weight: float | None = field(default=None, metadata={"help": "Defaults to 1 for ce, else 0.1."})
    divergence_weight: float | None = field(default=None, metadata={"help": "Defaults to 0 for ce, else 1."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of both distributions in kd and cat."})
    correction_head: str | None = field(
        default=None, metadata={"help": "Train a correction head: frozen (the draft stays as it is) or joint."}
    )
    correction_head_rank: int = field(default=DEFAULT_RANK, metadata={"help": "Width of the correction head."})
    correction_head_learning_rate: float = field(
        default=3e-3, metadata={"help": "Of the correction head, which begins from nothing."}
    )
    # The collator reads columns that no model's forward names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: rows are built of all."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on with its clock, and with early stopping's patience."}
    )

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ValueError("Expected no `label_smoothing_factor`, which these objectives do not have. Leave it out.")
        if self.metric_for_best_model is None:
            self.metric_for_best_model: str | None = "acceptance_length"
            self.greater_is_better = True
        # The trainer saves the best draft when it finds it, so saves need not fall on evaluations as the host wants.
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
    """Adapts a [`PardDraftModel`] on the kept (anchor, depth) rows.

    Everything else (schedules, mixed precision, distributed training, resuming) is the host's. A checkpoint appears
    whole or not at all, `metrics.csv` and `curves.png` beside the checkpoints follow the run, and a loss that is not
    finite ends it with the names of the rows of the batch in `not_finite.json`.

    Args:
        model ([`PardDraftModel`]):
            The draft; `PardDraftModel.from_causal_lm` makes one of any small causal LM.
        args ([`PardTrainingArguments`]):
            Training arguments.
        target ([`PreTrainedModel`], *optional*):
            The teacher, for the objectives `"kd"` and `"cat"`.
        evaluator (`Callable`, *optional*):
            [`AcceptanceEvaluator`] or the like: what `evaluate` measures. `eval_acceptance_length` is the mean over
            its prompt sets; each set has its own beside it, and the acceptance of each position.
        provenance (`Callable[[Path, int, dict], None]`, *optional*):
            [`Provenance`] or the like: writes into a checkpoint's folder where it comes from, given the step and the
            last evaluation's metrics.
        train_dataset:
            Rows with `input_ids` and, optionally, `loss_mask`, as `tokenize_rows` and `pack_rows` make them.

    >>> draft = PardDraftModel.from_causal_lm(model, mask_token_id=151665)
    >>> PardTrainer(draft, PardTrainingArguments("out"), train_dataset=rows).train()
    """

    # The objective divides by the labels of the whole step.
    loss_is_scaled_for_ga = True
    loaded_step: int | None = None  # Of the best checkpoint, once its weights are the draft's.
    unfinished = ""  # The folder, inside the run's, that a checkpoint is written into.

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
            raise ValueError(
                f"Expected a `PardDraftModel`, got `{type(model).__name__}`. Make one with "
                "`PardDraftModel.from_causal_lm(model, mask_token_id=…)`."
            )
        if args.eval_strategy != "no" and evaluator is None:
            raise ValueError("Expected an `evaluator` with an `eval_strategy`, got none. Pass one, or take 'no'.")
        check_loadable(model)
        set_seed(args.seed)  # The host does so too, when the head is made already.
        prepare_head(model, args.correction_head, args.correction_head_rank)
        self.objective = Objective(
            args.objective, args.cross_entropy_weight, args.divergence_weight, args.distillation_temperature, target
        )
        kwargs.setdefault(
            "data_collator",
            DataCollatorForPard(
                model.mask_token_id,
                args.num_draft_tokens,
                args.retention_rate,
                args.min_retention_rate,
                seed=args.data_seed if args.data_seed is not None else args.seed,
            ),
        )
        is_packed = "text_lengths" in next(iter(kwargs.get("train_dataset") or ()), {})
        check_attention(model, is_packed, device=args.device)
        if target is not None and args.objective != "ce":
            check_attention(target.eval().requires_grad_(False), is_packed, is_teacher=True)
        # The host wants a data set wherever it evaluates; ours lies in the evaluator.
        super().__init__(model, args, eval_dataset=() if evaluator else None, **kwargs)
        if args.correction_head is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Expected a correction head to be trained with whole weights on each device, got FSDP or DeepSpeed. "
                "Take DDP: drafts are small."
            )
        self.model_accepts_loss_kwargs = True  # Labels are counted over the step, and handed to `compute_loss`.
        self._loss_shifts_labels = False
        self.evaluator, self.provenance = evaluator, provenance
        is_placed = target is None or hasattr(target, "hf_device_map") or any(p.is_meta for p in target.parameters())
        if target is not None and self.place_model_on_device and not is_placed:
            target.to(args.device)
        check_head(model)
        if target is not None and args.objective != "ce":
            check_head(target)
        # The clock comes last: it starts again when tables and plots are written.
        for callback in (EpochOfCollator(self.data_collator), MetricsFile(), TrainingClock()):
            self.add_callback(callback)

    @property
    def clock(self) -> TrainingClock:
        """The host replaces it by the checkpoint's when a run is resumed."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, TrainingClock))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        places = inputs.pop("places", None)
        loss = model(objective=self.objective, batch=inputs, num_items=num_items_in_batch)
        if not torch.isfinite(loss):
            self.stop_at(loss, places)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # Labels were counted over all; gradients are averaged.
        if model.training:
            self.clock.count(inputs["anchors"], inputs["depths"])
        return (loss, {}) if return_outputs else loss

    def stop_at(self, loss: torch.Tensor, places: Any) -> None:
        """End the run at a loss that is not finite, with the rows it came from saved."""
        file = Path(self.args.output_dir) / f"not_finite.{self.args.process_index}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step": self.state.global_step + 1, "loss": str(loss.item()), "rows": places}))
        raise FloatingPointError(
            f"Expected a finite loss in step {self.state.global_step + 1}, got {loss.item()}. Rows of the batch are "
            f"in `{file}`. Lower the learning rate, or look at these rows; checkpoints before this step are whole."
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.correction_head is not None:
            give_own_rate(optimizer, self.model.correction_head, self.args.correction_head_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.clock.figures()}, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Acceptance against the real target, by the real decoding loop.

        Returns:
            `eval_acceptance_length` (the mean over prompt sets), and of each set `eval_{set}_acceptance_length` and
            `eval_{set}_position_acceptance_{i}`.
        """
        if self.evaluator is None:
            raise ValueError("Expected an `evaluator`, got none. Pass one to `PardTrainer`.")
        draft = whole_draft(self.accelerator.unwrap_model(self.model), self.model_wrapped)
        share = self.evaluator(draft, (self.args.process_index, self.args.world_size))
        metrics = metrics_of({name: self.sum_over_processes(stats) for name, stats in share.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sum_over_processes(self, stats: DecodingStats) -> DecodingStats:
        """The statistics of all processes' prompts."""
        return sum(gather_object([stats]), DecodingStats())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # Between two saves it would be lost.
        return is_best

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.load_head(self.state.best_model_checkpoint)
        self.loaded_step = self.state.best_global_step

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if not is_addon_weight(name)]
        super()._issue_warnings_after_load(load_result)

    def load_head(self, folder: str) -> None:
        """Bring the correction head back, in place: it lies beside a checkpoint's weights."""
        if self.args.correction_head is not None:
            draft = self.accelerator.unwrap_model(self.model)
            draft.correction_head.load_state_dict(load_file(f"{folder}/{CORRECTION_HEAD}/{WEIGHTS_FILE}"))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / self.unfinished) if self.unfinished else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others and rename it when it is whole: a full disk or a kill leaves none half.

        The host writes into the run's folder, finds the best checkpoint there and deletes old ones from it; all three
        are done here once the new one has its name.
        """
        run_dir, limit = Path(super()._get_output_dir(trial)), self.args.save_total_limit
        if self.args.should_save:
            shutil.rmtree(run_dir / "unfinished", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.unfinished, self.args.save_total_limit = "unfinished", None
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # How torch and safetensors report a disk that is full.
            raise OSError(
                f"Expected room for a checkpoint in `{run_dir}`, got: {error}. Make room; the same command "
                "goes on from the checkpoint before."
            ) from error
        finally:
            self.unfinished, self.args.save_total_limit = "", limit
        self.accelerator.wait_for_everyone()
        name, best = f"checkpoint-{self.state.global_step}", f"checkpoint-{self.state.best_global_step}"
        if best == name or (run_dir / best).is_dir():
            self.state.best_model_checkpoint = str(run_dir / best)
        if self.args.should_save:
            self.state.save_to_json(str(run_dir / "unfinished" / name / "trainer_state.json"))
            shutil.rmtree(run_dir / name, ignore_errors=True)
            (run_dir / "unfinished" / name).rename(run_dir / name)
            (run_dir / "unfinished").rmdir()
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()


def metrics_of(sets: dict[str, DecodingStats]) -> dict[str, float]:
    """Statistics as flat metrics, as loggers want them; sets are averaged, their rounds never pooled."""
    metrics = {"acceptance_length": sum(stats.acceptance_length for stats in sets.values()) / max(len(sets), 1)}
    for name, stats in sets.items():
        metrics[f"{name}_acceptance_length"] = stats.acceptance_length
        metrics |= {f"{name}_position_acceptance_{i}": a for i, a in enumerate(stats.position_acceptance, start=1)}
    return {name: round(value, 4) for name, value in metrics.items()}
