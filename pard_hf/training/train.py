"""What can be known to fail before any weight is loaded; every message says what to do.

Where a checkpoint comes from, written beside it: command, versions, commit, data, settings, last evaluation.

From a base model and files of rows to a finished draft: what `pard train` runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, GenerationConfig
from transformers.trainer_utils import get_last_checkpoint

from ..draft.addons import CORRECTION_HEAD, TRIMMED_VOCABULARY, addon_settings, load_addons
from ..draft.correction_head import CorrectionHead
from ..draft.mask_token import check_mask_token, choose_mask_token, ids_named_in
from ..draft.model import DEFAULT_NUM_ASSISTANT_TOKENS, PardDraftModel
from ..host import num_positions
from ..hub.model_card import draft_card
from ..io import conditions_of, read_text, sha256_of, shown_model, write_whole
from ..loading import named_dtype
from .collator import DataCollatorForPard, pack_rows
from .data import has_marks, read_rows, tokenize_rows
from .objective import Objective
from .responses import manifest_path
from .trainer import Evaluator, PardTrainer, PardTrainingArguments, is_adapted
from .trainer import check_mode as check_head_mode

logger = logging.getLogger(__name__)


PROBE = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]


def check_base(base: str, tokenizer: Any, max_length: int) -> int:
    """Raise a `ValueError` where a base model cannot read its tokenizer's ids or such rows; returns its vocabulary."""
    config = AutoConfig.from_pretrained(base)
    if config.is_encoder_decoder:
        raise ValueError(f"Expected a decoder-only base model, got the encoder-decoder `{base}`.")
    vocab_size = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"Expected a base model that knows every id of its tokenizer, got ids up to {largest} for {vocab_size} "
            f"rows in `{base}`. The tokenizer is another model's, or tokens were added without "
            "`model.resize_token_embeddings`."
        )
    if max_length > num_positions(config):
        raise ValueError(
            f"Expected `--max-length` within the {num_positions(config)} positions of the base model, got "
            f"{max_length}."
        )
    return vocab_size


def check_lengths(num_draft_tokens: int, max_length: int) -> None:
    """Raise a `ValueError` where no row could be as long as a chain of masks."""
    if num_draft_tokens >= max_length:
        raise ValueError(
            f"Expected `--num-draft-tokens` below `--max-length`, got {num_draft_tokens} and {max_length}: the "
            "deepest mask rows would never be built. 8 is the paper's K_train."
        )


def check_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Raise a `ValueError` where a target reads other ids than the draft."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    example = different[0]
    raise ValueError(
        f"Expected one tokenizer for the base model and the target `{name}`, got {len(different)} tokens with other "
        f"ids ({example!r} is {ours.get(example)} and {theirs.get(example)}). Adapt a base of the target's family."
    )


def check_template(tokenizer: Any) -> None:
    """Raise a `ValueError` where a chat template does not tell where an answer begins.

    It does with `{% generation %}` marks around answers; without them, what it writes up to an answer must be the
    beginning of what it writes with it.
    """
    if tokenizer.chat_template is None or has_marks(tokenizer):
        return
    way_out = (
        "Mark answers with `{% generation %}…{% endgeneration %}` in a copy of the template and pass it with "
        "`--chat-template`."
    )
    try:
        before = tokenizer.apply_chat_template(PROBE[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except Exception as error:
        raise ValueError(
            f"Expected a chat template for a question and an answer, but it fails: {error}. {way_out}"
        ) from error
    if not whole.startswith(before) or PROBE[1]["content"] not in whole[len(before) :]:
        raise ValueError(
            "Expected a chat template that writes what comes before an answer alike with and without it, got "
            f"{before!r} and {whole!r}: where the answer begins cannot be told. {way_out}"
        )


SETTINGS_OF_A_RUN = (
    "mask_token_id", "max_length", "overlong", "pack", "num_draft_tokens", "retention_rate", "min_retention_rate",
    "objective", "cross_entropy_weight", "divergence_weight", "distillation_temperature", "correction_head",
    "correction_head_rank", "seed",
)  # fmt: skip


@dataclass
class Provenance:
    """Writes `provenance.json` and a draft of a model card into each checkpoint.

    Args:
        conditions (`dict`):
            Command, date, commit, versions and device, as `conditions.py` names them.
        models (`dict`):
            Names of the base model and, where there is one, of the target; never a folder's full path.
        data (`Sequence[Path]`):
            Files of rows. Digests are taken once; a manifest beside a file is taken along.
        settings (`dict`):
            Of the training run.
        counts (`dict`):
            Rows and tokens that are trained on.
    """

    conditions: dict[str, Any]
    models: dict[str, Any]
    data: Sequence[Path]
    settings: dict[str, Any]
    counts: dict[str, int]
    files: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.files = [describe(Path(file)) for file in self.data]

    def identity(self) -> dict[str, Any]:
        """What must not change where a run is resumed."""
        settings = {name: self.settings.get(name) for name in SETTINGS_OF_A_RUN}
        teacher = None if self.settings.get("objective") == "ce" else self.models.get("target")
        digests = sorted(file["sha256"] for file in self.files)
        return {"base": self.models.get("base"), "teacher": teacher, "data": digests, **settings}

    def __call__(self, folder: Path, step: int, metrics: dict[str, Any]) -> None:
        """Write both files into `folder`, each whole or not at all."""
        content = {
            **self.conditions,
            **self.models,
            "step": step,
            "identity": self.identity(),
            "settings": self.settings,
            "counts": self.counts,
            "data": self.files,
            "metrics": metrics,
        }
        write_whole(folder / "provenance.json", json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        write_whole(folder / "README.md", draft_card(content))


def check_same_run(checkpoint: Path, provenance: Provenance) -> None:
    """Raise a `ValueError` where a checkpoint was trained with other settings than those it would go on with.

    How a step is spread (batch size, accumulation, devices), its number and the learning rate may change.
    """
    file = checkpoint / "provenance.json"
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8")).get("identity", {})
    now = json.loads(json.dumps(provenance.identity(), default=str))
    changed = [
        f"{name} was {before[name]!r} and is {now.get(name)!r}" for name in before if before[name] != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"Expected the settings of `{checkpoint.name}` to go on from it, but {'; '.join(changed)}. Give them "
            "again, choose another `--output`, or pass `--restart` to move its checkpoints aside."
        )


def describe(file: Path) -> dict[str, Any]:
    """Name and digest of a file of rows, and the manifest that `pard data` left beside it."""
    manifest = manifest_path(file)
    return {
        "file": file.name,
        "sha256": sha256_of(file).hexdigest(),
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None,
    }


@dataclass
class TrainingSpec:
    """What one run adapts, on what, into where.

    Args:
        base (`str`):
            Folder or Hub id of a small causal LM of the target's family.
        data (`Sequence[Path]`):
            Files of rows, `.jsonl` or `.jsonl.gz`.
        output (`Path`):
            Folder of the finished draft; checkpoints lie in its `checkpoints`.
        mask_token_id (`int`, *optional*):
            Chosen by `choose_mask_token` by default, and why is said in the log.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of the longest row; `overlong` says whether longer ones are cut (`"truncate"`) or left out
            (`"drop"`).
        pack (`bool`, *optional*, defaults to `False`):
            Fill sequences of `max_length` tokens with rows that do not see each other.
        target (`str`, *optional*):
            Folder or Hub id of the target: the teacher of `"kd"` and `"cat"`, and what evaluations decode with.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the draft's weights.
        target_dtype (`str`, *optional*):
            Of the target's; by default what its checkpoint says, and float32 on a CPU.
        chat_template (`Path`, *optional*):
            A file with the chat template to train with, instead of the base model's own.
        early_stopping_patience (`int`, *optional*):
            Evaluations in a row without a better acceptance length after which the run ends.
        command (`str`, *optional*):
            The command line, kept in the provenance.
    """

    base: str
    data: Sequence[Path]
    output: Path
    mask_token_id: int | None = None
    max_length: int = 512
    overlong: str = "truncate"
    pack: bool = False
    target: str | None = None
    dtype: str = "float32"
    target_dtype: str | None = None
    attention: str = "sdpa"
    chat_template: Path | None = None
    early_stopping_patience: int | None = None
    skip_bad_rows: bool = False
    restart: bool = False
    command: str | None = None


class Evaluation(Protocol):
    """What a run measures on the way, known before weights are."""

    def prepare(self, tokenizer: Any, longest: int) -> Callable[[Any], Evaluator]:
        """Check prompts against texts of `longest` tokens, and return how to measure with a loaded target."""
        ...


def train_draft(
    spec: TrainingSpec,
    evaluation: Evaluation | None = None,
    **arguments: Any,
) -> Path:
    """Adapt a base model into a draft; the finished draft and its tokenizer are written to `spec.output`.

    Everything that can be wrong with names, ids, lengths, templates and rows is checked before weights are loaded. A
    run that finds a checkpoint goes on from it; with `spec.restart` checkpoints are moved aside.

    Args:
        evaluation ([`Evaluation`], *optional*):
            What is measured on the way; without it nothing is.
        arguments:
            Anything [`PardTrainingArguments`] takes.

    Raises:
        ValueError: A row is broken (its file and line are named), the mask token is one the tokenizer produces, the
            target has another tokenizer, or a setting does not fit the base model.
    """
    tokenizer = AutoTokenizer.from_pretrained(spec.base)
    if spec.chat_template is not None:
        tokenizer.chat_template = read_text(spec.chat_template)
    args = training_arguments(spec, evaluation is not None, arguments)
    mask_token_id = check_before_loading(spec, tokenizer, args)
    make_evaluator = evaluation.prepare(tokenizer, longest_text(spec)) if evaluation else None
    rows = tokenize_rows(
        tokenizer,
        (row for file in spec.data for row in read_rows(file, spec.skip_bad_rows)),
        spec.max_length,
        spec.skip_bad_rows,
        spec.overlong,
        mask_token_id,
    )
    if not rows:
        raise ValueError(f"Expected training rows in {', '.join(map(str, spec.data))}, got none.")
    counts = {"num_rows": len(rows), "num_tokens": sum(len(row["input_ids"]) for row in rows)}
    if spec.pack:
        rows = pack_rows(rows, spec.max_length)
        logger.warning("Packed %d rows into %d sequences.", counts["num_rows"], len(rows))
    base = load(spec.base, spec.dtype, attn_implementation=spec.attention)
    target = None
    if spec.target and (make_evaluator or args.objective != "ce"):
        target = load(spec.target, spec.target_dtype or ("float32" if args.device.type == "cpu" else "auto"))
    trainer = PardTrainer(
        draft_of(spec, base, mask_token_id, args),
        args,
        target=target,
        evaluator=make_evaluator(target) if make_evaluator else None,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    provenance = trainer.provenance = provenance_of(spec, trainer, counts, target)
    if spec.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(spec.early_stopping_patience))
    return run(spec, trainer, provenance)


def draft_of(spec: TrainingSpec, base: Any, mask_token_id: int, args: PardTrainingArguments) -> PardDraftModel:
    """The base model as a draft; one that is a draft already keeps its K, and the head that is to be trained on."""
    num_drafts = base.generation_config.num_assistant_tokens if is_adapted(base.config) else None
    draft = PardDraftModel.from_causal_lm(base, mask_token_id, num_drafts or DEFAULT_NUM_ASSISTANT_TOKENS)
    if args.correction_head is not None and is_adapted(base.config):
        load_addons(draft, spec.base, (CORRECTION_HEAD,))
    return draft


def training_arguments(spec: TrainingSpec, is_evaluated: bool, arguments: dict[str, Any]) -> PardTrainingArguments:
    """The host's arguments; with an evaluator, the checkpoint of the longest blocks is the one that is kept."""
    known = {field.name for field in fields(PardTrainingArguments) if field.init} - {"output_dir"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(f"Expected training arguments of `PardTrainingArguments`, got {', '.join(unknown)}.")
    has_gpu = torch.cuda.is_available() and not arguments.get("use_cpu")
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": has_gpu}
    if is_evaluated:
        save_steps = arguments.get("save_steps", 200)
        defaults |= {"eval_strategy": "steps", "eval_steps": save_steps, "load_best_model_at_end": True}
    elif spec.early_stopping_patience is not None or "eval_steps" in arguments:
        raise ValueError("Expected something to evaluate, got none. Give a target and evaluation prompts.")
    return PardTrainingArguments(str(spec.output / "checkpoints"), **{**defaults, **arguments})


def check_before_loading(spec: TrainingSpec, tokenizer: Any, args: PardTrainingArguments) -> int:
    """Everything that can be known from configs and tokenizers; returns the mask token's id."""
    if spec.output.resolve() == Path(spec.base).resolve():
        raise ValueError(
            f"Expected an `--output` beside the base model, got `{spec.output}` for both: the finished draft would be "
            "written over the base. Name another folder."
        )
    vocab_size = check_base(spec.base, tokenizer, spec.max_length)
    check_lengths(args.num_draft_tokens, spec.max_length)
    if spec.dtype == "auto":
        raise ValueError("Expected the dtype of the draft's weights by name, got 'auto'. 'float32' trains best.")
    for dtype in {spec.dtype, spec.target_dtype} - {None, "auto"}:
        named_dtype(str(dtype))
    if spec.target is not None:
        target_tokenizer = AutoTokenizer.from_pretrained(spec.target)
        check_same_tokenizer(tokenizer, target_tokenizer, spec.target)
        if tokenizer.chat_template is None and target_tokenizer.chat_template is not None:
            logger.warning("The base model has no chat template: the target's is taken.")
            tokenizer.chat_template = target_tokenizer.chat_template
    check_template(tokenizer)
    # What these refuse is refused now.
    Objective(
        args.objective,
        args.cross_entropy_weight,
        args.divergence_weight,
        args.distillation_temperature,
        target=spec.target,  # Its name will do.
    )
    check_head_mode(args.correction_head)
    CorrectionHead(1, 1, args.correction_head_rank)
    config = AutoConfig.from_pretrained(spec.base)
    if args.correction_head == "frozen" and not is_adapted(config):
        raise ValueError(
            f"Expected a draft as the base of a frozen correction head, got `{spec.base}`, whose config has no "
            "`pard_token`. Adapt it first, or train both with `--correction-head joint`."
        )
    say_what_is_left_off(spec.base, args.correction_head)
    DataCollatorForPard(0, args.num_draft_tokens, args.retention_rate, args.min_retention_rate)
    if spec.mask_token_id is None and is_adapted(config):
        return config.pard_token
    named_ids = ids_named_in(*(c for name in (spec.base, spec.target) if name for c in configs_of(name)))
    if spec.mask_token_id is None:
        mask_token_id, why = choose_mask_token(tokenizer, vocab_size, named_ids)
        logger.warning("Mask token %d: %s.", mask_token_id, why)
        return mask_token_id
    if not 0 <= spec.mask_token_id < vocab_size:
        raise ValueError(
            f"Expected `--mask-token-id` to be an id in [0, {vocab_size}), got {spec.mask_token_id}. `auto` "
            "chooses one."
        )
    check_mask_token(tokenizer, spec.mask_token_id, named_ids)
    return spec.mask_token_id


def say_what_is_left_off(base: str, head_mode: str | None) -> None:
    """Warn of what lies beside a draft and will not lie beside the one that is trained from it."""
    if head_mode is None and addon_settings(base, CORRECTION_HEAD):
        logger.warning(
            "The base's correction head is left off: it belongs to the hidden states of a draft that is about to "
            "change. Train it along with `--correction-head joint`, or a new one on the finished draft with "
            "`--correction-head frozen`."
        )
    if addon_settings(base, TRIMMED_VOCABULARY):
        logger.warning(
            "The base's trimmed vocabulary is left off: training takes all rows. Trim the finished draft again "
            "(`draft.trim_vocabulary`)."
        )


def configs_of(name: str) -> Iterator[Any]:
    """The configs of a checkpoint, of the model and of generation, where it has that."""
    config = AutoConfig.from_pretrained(name)
    yield config
    yield config.get_text_config()
    with contextlib.suppress(OSError):
        yield GenerationConfig.from_pretrained(name)


def longest_text(spec: TrainingSpec) -> int:
    """Positions that both the base model and the target have."""
    names = [spec.base, *([spec.target] if spec.target else [])]
    return min(num_positions(AutoConfig.from_pretrained(name)) for name in names)


def load(name: str, dtype: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **kwargs)


def provenance_of(spec: TrainingSpec, trainer: PardTrainer, counts: dict[str, int], target: Any) -> Provenance:
    """What is written beside every checkpoint of a run."""
    args = trainer.args
    settings = {
        "mask_token_id": trainer.model.mask_token_id,
        "max_length": spec.max_length,
        "overlong": spec.overlong,
        "pack": spec.pack,
        "target_dtype": None if target is None else str(target.dtype).removeprefix("torch."),
        **{
            name: getattr(args, name)
            for name in (
                "num_draft_tokens", "retention_rate", "min_retention_rate", "objective", "cross_entropy_weight",
                "divergence_weight", "distillation_temperature", "correction_head", "correction_head_rank",
                "correction_head_learning_rate", "learning_rate", "lr_scheduler_type", "max_steps",
                "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed",
            )
        },
    }  # fmt: skip
    conditions = {"command": spec.command, **conditions_of(trainer.model)}
    models = {"base": shown_model(spec.base), "target": shown_model(spec.target) if spec.target else None}
    return Provenance(conditions, models, spec.data, settings, counts)


def run(spec: TrainingSpec, trainer: PardTrainer, provenance: Provenance) -> Path:
    """Train, from the last checkpoint where there is one, and write the draft."""
    checkpoints = spec.output / "checkpoints"
    has_old = checkpoints.is_dir() and any(checkpoints.iterdir())
    if spec.restart and has_old and trainer.is_world_process_zero():
        checkpoints.rename(free_name(checkpoints))  # Nothing is lost, and nothing of it is gone on from.
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None:
        check_same_run(Path(last), provenance)
        logger.warning("Going on from %s; pass --restart to begin anew.", last)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(spec.output))
    return spec.output


def free_name(folder: Path) -> Path:
    """The first of `folder.1`, `folder.2`, … that does not exist."""
    return next(name for n in itertools.count(1) if not (name := folder.with_name(f"{folder.name}.{n}")).exists())
