"""Declare the settings of `pard train` once: each field makes a flag, a training argument and a provenance entry.

Only the standard library is imported, so that building the command line loads neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ObjectiveName = Literal["ce", "kd", "cat", "tv", "lk"]
RATES = ("retention_rate", "min_retention_rate")
# Settings that are above 0 where they are given.
POSITIVE = ("depth_decay", "max_minutes")
# Settings that are at least 1 where they are given.
COUNTS = (
    "num_draft_tokens", "max_anchors", "correction_head_rank", "max_length", "eval_steps", "eval_limit",
    "eval_batch_size", "eval_max_new_tokens", "num_assistant_tokens", "batch_size", "gradient_accumulation_steps",
    "save_steps",
)  # fmt: skip


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a setting with a default, or with a type that makes one; [`TrainingSettings`] lists the `metadata`."""
    default = {"default_factory" if isinstance(default, type) else "default": default}
    return field(**default, metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class MethodSettings:
    """Settings of the method, for [`TrainingSettings`] and [`PardTrainingArguments`]; defaults are the paper's."""

    # `HfArgumentParser` hands this metadata to `argparse`, so it holds arguments of `add_argument` only.
    num_draft_tokens: int = setting(8, "K_train, the depths that are trained; at inference K may be larger")
    retention_rate: float = setting(0.7, "r of COD: depth d keeps max(r^d, r_min) of its rows; 1 drops nothing")
    min_retention_rate: float = setting(0.2, "r_min of COD, the smallest share that a depth keeps")
    max_anchors: int | None = setting(None, "most anchors of a text with mask rows, which bounds those of long ones")
    objective: ObjectiveName = setting(
        "ce",
        "cross-entropy (ce), with the target's distribution by KL divergence (kd), the same weighted by confidence "
        "(cat), by total variation (tv), or by the log of the acceptance (lk)",
    )
    cross_entropy_weight: float | None = setting(None, "weight of the cross-entropy; by default 1 for ce, else 0.1")
    divergence_weight: float | None = setting(
        None, "weight of the divergence; by default 0 for ce, 0.9 for tv, else 1"
    )
    distillation_temperature: float = setting(1.0, "temperature of both distributions where there is a teacher")
    depth_decay: float | None = setting(None, "weigh rows at depth d by e^(-d/this); by default all alike")
    correction_head: Literal["frozen", "joint"] | None = setting(
        None, "train a correction head alone (frozen) or with the draft (joint)", nargs="?", const="frozen"
    )
    correction_head_rank: int = setting(128, "rank of the correction head")
    correction_head_learning_rate: float = setting(3e-3, "learning rate of the correction head, which starts at zero")
    freeze_embeddings: bool = setting(False, "keep the embedding and the LM head as they are")
    max_minutes: float | None = setting(
        None, "minutes of training, or `max_steps` before; the learning rate follows them, a cosine after the warm-up"
    )

    def label(self, name: str) -> str:
        """Name a setting in a message."""
        return f"`{name}`"

    def check(self, declared_in: type) -> None:
        """Raise a `ValueError` for a field of `declared_in` outside its choices or its range."""
        kinds = get_type_hints(declared_in)
        for name, kind in kinds.items():
            value = getattr(self, name)
            literal = next((one for one in (kind, *get_args(kind)) if get_origin(one) is Literal), None)
            if literal and value not in (None, *get_args(literal)):
                choices = ", ".join(get_args(literal))
                raise ValueError(f"Expected {self.label(name)} to be one of {choices}, got {value!r}.")
        check_ranges({name: getattr(self, name) for name in kinds}, self.label)
        objective_weights(
            self.objective, self.cross_entropy_weight, self.divergence_weight, self.distillation_temperature
        )


def check_ranges(values: Mapping[str, Any], label: Callable[[str], str] = "`{}`".format) -> None:
    """Raise a `ValueError` for a number among named values that is outside the range of its name."""
    for name, value in values.items():
        if name in COUNTS and value is not None and value < 1:
            raise ValueError(f"Expected {label(name)} of at least 1, got {value}.")
        if name in POSITIVE and value is not None and value <= 0:
            raise ValueError(f"Expected {label(name)} above 0, got {value}.")
        if name in RATES and not 0 <= value <= 1:
            raise ValueError(f"Expected {label(name)} in [0, 1], got {value}.")


def objective_weights(
    objective: str, cross_entropy_weight: float | None, divergence_weight: float | None, temperature: float
) -> tuple[float, float]:
    """Fill in the default weights of cross-entropy and divergence: 1 and 0 for ce, else PARD-2's 0.1 and 1.

    Total variation has DSpark's 0.1 and 0.9.

    Raises:
        ValueError: A weight is negative, both are 0, ce has a divergence, or the temperature is not positive.
    """
    defaults = {"ce": (1.0, 0.0), "tv": (0.1, 0.9)}.get(objective, (0.1, 1.0))
    given = (cross_entropy_weight, divergence_weight)
    cross_entropy, divergence = (d if g is None else float(g) for d, g in zip(defaults, given, strict=True))
    if min(cross_entropy, divergence) < 0 or max(cross_entropy, divergence) == 0:
        raise ValueError(f"Expected weights of at least 0, one of them positive, got {(cross_entropy, divergence)}.")
    if objective == "ce" and divergence:
        raise ValueError("Expected no divergence weight for the objective 'ce', which has no teacher. Take 'kd'.")
    if temperature <= 0:
        raise ValueError(f"Expected a distillation temperature above 0, got {temperature}.")
    return cross_entropy, divergence


def name_and_value(word: str) -> tuple[str, Any]:
    """Split `NAME=VALUE`; a value that is no JSON is text."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"Expected `--training-arguments NAME=VALUE`, got {word!r}. Write `name=value`.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@dataclass
class TrainingSettings(MethodSettings):
    """The base model, data, folder and numbers of one run.

    A field with `help` is a flag of `pard train`: `max_length` is `--max-length`, a `bool` is a switch, a `list` or
    `dict` takes several values. A field that [`TrainingArguments`] has as well sets it there, under the name
    `argument` if it has one. Other metadata: `record` (the provenance holds it), `identity` (a resumed run must not
    change it), `none` (the word for `None` on the command line), `const` (the value of a flag without one) and `parse`
    (from a word of the command line to a value).
    """

    base: str = field(metadata={"help": "folder or Hub id of a small causal LM of the target's family"})
    data: list[Path] = field(metadata={"help": "training rows, .jsonl or .jsonl.gz"})
    output: Path = field(metadata={"help": "folder for checkpoints and the finished draft"})

    layers: str | None = setting(
        None, "train some layers of --base, the target: so many first ones (4), or a list (0,10,20)", identity=True
    )
    mask_token_id: int | None = setting(None, "id that no text has (default: auto)", none="auto", identity=True)
    max_length: int = setting(512, "tokens of the longest row", identity=True)
    overlong: Literal["truncate", "drop"] = setting("truncate", "cut longer rows, or drop them", identity=True)
    pack: bool = setting(False, "fill sequences with rows that do not see each other", identity=True)
    chat_template: Path | None = setting(None, "file with a chat template, instead of the base model's own")
    skip_bad_rows: bool = setting(False, "leave broken rows out instead of stopping")

    target: str | None = setting(None, "folder or Hub id: teacher of kd and cat, verifier of evaluations")
    eval_prompts: list[str] = setting(list, "files or hub:org/name of held-out prompts; needs --target")
    eval_steps: int | None = setting(
        None, "steps between evaluations, each saves a new best draft (default: --save-steps)"
    )
    eval_limit: int = setting(32, "prompts of each set")
    eval_batch_size: int = setting(8, "prompts at a time")
    eval_max_new_tokens: int = setting(128, "tokens of each answer")
    num_assistant_tokens: int | None = setting(None, "K of evaluations (default: --num-draft-tokens)")
    early_stopping_patience: int | None = setting(
        None, "end after so many evaluations without a larger acceptance length"
    )

    epochs: float = setting(1.0, "passes over the rows", argument="num_train_epochs", record=True)
    max_steps: int = setting(-1, "optimizer steps, instead of epochs", record=True)
    batch_size: int = setting(8, "sequences a step and device", argument="per_device_train_batch_size", record=True)
    gradient_accumulation_steps: int = setting(1, "batches a step", record=True)
    learning_rate: float = setting(3e-5, "peak learning rate; the paper's for Qwen2.5", record=True)
    save_steps: int = setting(200, "steps between checkpoints, the best draft's apart")
    dtype: str = setting("float32", "dtype of the draft's weights")
    target_dtype: str | None = setting(None, "dtype of the target (default: its checkpoint's; float32 on a CPU)")
    bf16: bool = setting(False, "compute in bfloat16, as GPUs do by default; weights keep their dtype")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, one more forward")
    attention: Literal["sdpa", "eager", "flex_attention"] = setting("sdpa", "attention implementation of the draft")
    device: Literal["auto", "cpu"] = setting("auto", "cpu keeps off the GPU")
    workers: int | None = setting(
        None, "processes that tokenize rows and build batches (default: by the cores; on a CPU they build none)",
        argument="dataloader_num_workers",
    )  # fmt: skip
    report_to: str = setting("none", "wandb, tensorboard, …")
    seed: int = setting(42, "seed of the run", identity=True)
    restart: bool = setting(False, "move checkpoints in --output aside and begin anew")
    training_arguments: dict[str, Any] = setting(
        dict, "NAME=VALUE of any other training argument: warmup_steps=100", parse=name_and_value
    )
    command: str | None = None  # The command line, for the provenance.

    @property
    def chosen_layers(self) -> int | list[int] | None:
        """Return the layers of the base that are trained: how many, or which; `None` for all."""
        if self.layers is None:
            return None
        try:
            numbers = [int(word) for word in self.layers.split(",")]
        except ValueError:
            raise ValueError(
                f"Expected `--layers` as a number (4) or a list (0,10,20), got {self.layers!r}."
            ) from None
        return numbers if "," in self.layers else numbers[0]

    def label(self, name: str) -> str:
        return f"`--{name.replace('_', '-')}`"

    def __post_init__(self) -> None:
        self.check(TrainingSettings)
        if self.num_draft_tokens >= self.max_length:
            raise ValueError(
                f"Expected `--num-draft-tokens` below `--max-length`, got {self.num_draft_tokens} and "
                f"{self.max_length}: the deepest mask rows would never be built. 8 is the paper's K_train."
            )
        if self.dtype == "auto":
            raise ValueError("Expected the dtype of the draft's weights by name, got 'auto'. 'float32' trains best.")
        if Path(self.output).resolve() == Path(self.base).resolve():
            raise ValueError(
                f"Expected an `--output` beside the base model, got `{self.output}` for both. Name another folder."
            )
        if self.eval_prompts and self.target is None:
            raise ValueError("Expected a target that evaluations decode with, got none. Name it with `--target`.")
        evaluations = (self.eval_steps, self.training_arguments.get("eval_steps"), self.early_stopping_patience)
        if not self.eval_prompts and any(value is not None for value in evaluations):
            raise ValueError("Expected something to evaluate, got none. Give `--target` and `--eval-prompts`.")


METHOD = tuple(one.name for one in fields(MethodSettings))
METADATA = {one.name: one.metadata for one in fields(TrainingSettings)}
# A resumed run must not change these: they decide what is learned.
IDENTITY = (
    *(name for name in METHOD if name not in ("correction_head_learning_rate", "max_minutes")),
    *(name for name, metadata in METADATA.items() if "identity" in metadata),
)
RECORDED = (*METHOD, *(name for name, metadata in METADATA.items() if {"record", "identity"} & metadata.keys()))
# Names of the settings in `TrainingArguments`.
ARGUMENTS = {name: metadata.get("argument", name) for name, metadata in METADATA.items()}
