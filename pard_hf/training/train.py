"""Adapt a base model on files of rows into a finished draft, as `pard train` does.

Names, ids, lengths, templates and rows are checked before any weight is loaded.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, GenerationConfig

from .. import __version__
from ..draft.addons import CORRECTION_HEAD, TRIMMED_VOCABULARY, addon_settings
from ..draft.layers import base_from_layers, check_layers
from ..draft.mask_token import check_mask_token, choose_mask_token, ids_named_in
from ..draft.model import PardDraftModel
from ..host import compare_tokenizers, num_positions
from ..io import conditions_of, read_text, sha256_of, shown_model, write_whole
from ..loading import named_dtype
from .collator import choose_bins, joined
from .data import has_marks, read_rows, tokenize_rows
from .responses import manifest_path
from .settings import ARGUMENTS, IDENTITY, RECORDED, TrainingSettings
from .token_file import TokenFile, write_token_file
from .trainer import Evaluator, PardTrainer, PardTrainingArguments, last_checkpoint

logger = logging.getLogger(__name__)

# Bytes of rows from which it pays to start processes that tokenize them, and the most that are started by default.
SHARED_BYTES = 2**24
MOST_TOKENIZING, MOST_COLLATING = 16, 4
SHORT_DTYPES = ("bfloat16", "float16")

Provenance = dict[str, Any]
CardMaker = Callable[[Provenance], str]


def train_draft(
    settings: TrainingSettings,
    prepare_evaluator: Callable[[TrainingSettings, Any, int], Callable[[Any], Evaluator]] | None = None,
    make_card: CardMaker | None = None,
) -> Path:
    """Adapt a base model into a draft; returns `settings.output`, its folder. A run continues its last checkpoint.

    Args:
        prepare_evaluator (`Callable`, *optional*):
            Reads `settings.eval_prompts`, given the settings, the tokenizer and the positions that both models have;
            returns a function from the loaded target to the evaluator of [`PardTrainer`].
        make_card (`Callable`, *optional*):
            From the provenance of a checkpoint to the text of its model card; by default none is written.

    Raises:
        ValueError: A row is broken (its file and line are named), the mask token is one the tokenizer produces, the
            target has another tokenizer, or a setting does not fit the base model.
    """
    args = training_arguments(settings)
    configs = [AutoConfig.from_pretrained(name) for name in (settings.base, settings.target) if name]
    tokenizer = load_tokenizer(settings)
    check_base(settings, configs[0], tokenizer)
    check_template(tokenizer)
    has_stored = check_teacher(settings)
    warn_of_dropped_addons(settings)
    mask_token_id = mask_token_of(settings, configs, tokenizer)
    make_evaluator = None
    if settings.eval_prompts and prepare_evaluator is not None:
        make_evaluator = prepare_evaluator(settings, tokenizer, min(map(num_positions, configs)))
    rows = training_rows(settings, args, tokenizer, mask_token_id)
    counts = {"num_rows": rows.num_texts, "num_tokens": rows.num_tokens}
    draft = load_base(settings, mask_token_id, args.correction_head is not None)
    target = None
    if settings.target and (make_evaluator or args.objective != "ce" and not has_stored):
        dtype = settings.target_dtype or ("float32" if args.device.type == "cpu" else "auto")
        target = AutoModelForCausalLM.from_pretrained(settings.target, dtype=dtype, use_safetensors=True)
    evaluator = make_evaluator(target) if make_evaluator else None
    trainer = PardTrainer(draft, args, target, evaluator, train_dataset=rows, processing_class=tokenizer)
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    log_choices(settings, args)
    content = provenance_of(settings, trainer, counts, target)
    trainer.provenance = partial(write_provenance, content, make_card)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(settings, trainer, content["identity"]))
    trainer.save_model(str(settings.output))
    return settings.output


def training_rows(
    settings: TrainingSettings, args: PardTrainingArguments, tokenizer: Any, mask_token_id: int
) -> TokenFile:
    """Tokenize the rows of a run, or read what an earlier run with the same rows, tokenizer and settings wrote.

    One process of a machine writes; the file lies in `tokens` beside the checkpoints.
    """
    file = settings.output / "tokens" / f"{token_key(settings, tokenizer, mask_token_id)}.safetensors"
    with args.main_process_first(desc="tokenization"):
        if not file.exists():
            for other in file.parent.glob("*"):  # Of other rows or settings.
                other.unlink()
            write_rows(settings, tokenizer, mask_token_id, file)
    return TokenFile(file)


def token_key(settings: TrainingSettings, tokenizer: Any, mask_token_id: int) -> str:
    """Return a digest of all that decides the token ids of a run."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        *(sha256_of(Path(file)).hexdigest() for file in settings.data),
        repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str(),
        tokenizer.chat_template,
        (tokenizer.eos_token_id, mask_token_id, __version__),
        (settings.max_length, settings.overlong, settings.pack, settings.skip_bad_rows),
    )
    return sha256(repr(parts).encode()).hexdigest()[:16]


def write_rows(settings: TrainingSettings, tokenizer: Any, mask_token_id: int, file: Path) -> None:
    """Tokenize rows into a file, packed where the settings say so."""
    texts = (row for path in settings.data for row in read_rows(path, settings.skip_bad_rows))
    is_large = sum(Path(path).stat().st_size for path in settings.data) >= SHARED_BYTES
    workers = settings.workers if settings.workers is not None else min(num_cores(), MOST_TOKENIZING) * is_large
    rows = tokenize_rows(
        tokenizer, texts, settings.max_length, settings.skip_bad_rows, settings.overlong, mask_token_id, workers
    )
    first = next(rows, None)
    if first is None:
        raise ValueError(f"Expected training rows in {', '.join(map(str, settings.data))}, got none.")
    rows = itertools.chain([first], rows)
    if not settings.pack:
        write_token_file(rows, file)
        return
    unpacked = file.with_suffix(".unpacked")  # Under the name of `file` it would be taken for packed.
    write_token_file(rows, unpacked)
    alone = TokenFile(unpacked)
    bins = choose_bins(alone.text_lengths.tolist(), settings.max_length)
    write_token_file((joined([alone[index] for index in chosen]) for chosen in bins), file)
    unpacked.unlink()
    logger.warning("Packed %d rows into %d sequences.", alone.num_texts, len(bins))


def training_arguments(settings: TrainingSettings) -> PardTrainingArguments:
    """Make the trainer's arguments; with evaluations the draft with the largest acceptance length is kept."""
    known = {field.name for field in fields(PardTrainingArguments) if field.init} - {"output_dir"}
    unknown = sorted(settings.training_arguments.keys() - known)
    if unknown:
        raise ValueError(f"Expected training arguments of `PardTrainingArguments`, got {', '.join(unknown)}.")
    given = {argument: getattr(settings, name) for name, argument in ARGUMENTS.items() if argument in known}
    given = {argument: value for argument, value in given.items() if value is not None and value is not False}
    given |= settings.training_arguments
    defaults: dict[str, Any] = {"use_cpu": settings.device == "cpu", "save_total_limit": 2}
    if torch.cuda.is_available() and not (defaults | given)["use_cpu"]:
        workers = given.get("dataloader_num_workers", min(num_cores(), MOST_COLLATING))
        defaults |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        defaults |= {"bf16": torch.cuda.is_bf16_supported() and not given.get("fp16")}
    else:
        defaults["dataloader_pin_memory"] = False
    if settings.eval_prompts:
        defaults |= {"eval_strategy": "steps", "eval_steps": given["save_steps"], "load_best_model_at_end": True}
    return PardTrainingArguments(str(settings.output / "checkpoints"), **(defaults | given))


def log_choices(settings: TrainingSettings, args: PardTrainingArguments) -> None:
    """Log what decides how a run learns, most of which nobody named."""
    warmup = args.warmup_steps
    logger.warning(
        "Learning rate: up to %g, after a warm-up of %s, then %s. Weights in %s, computed in %s.",
        args.learning_rate, f"{warmup:.0%} of the steps" if warmup < 1 else f"{warmup:.0f} steps",
        str.lower(args.lr_scheduler_type), settings.dtype,
        "bfloat16" if args.bf16 else "float16" if args.fp16 else settings.dtype,
    )  # fmt: skip
    if settings.dtype in SHORT_DTYPES:
        logger.warning(
            "Weights in %s lose updates smaller than their last bit: take `--dtype float32` with `--bf16`, unless "
            "memory forbids it.", settings.dtype,
        )  # fmt: skip


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_tokenizer(settings: TrainingSettings) -> Any:
    """Load the base model's tokenizer with the given chat template, or with the target's where it has none."""
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    if settings.chat_template is not None:
        tokenizer.chat_template = read_text(settings.chat_template)
    if settings.target is None:
        return tokenizer
    of_target = AutoTokenizer.from_pretrained(settings.target)
    conflict, num_own, num_foreign = compare_tokenizers(tokenizer, of_target)
    if conflict or num_own or num_foreign:
        raise ValueError(
            f"Expected one tokenizer for the base model and the target `{settings.target}`, got others: "
            f"{conflict or f'{num_own + num_foreign} ids are in one of them only'}. Adapt a base of its family."
        )
    if tokenizer.chat_template is None and of_target.chat_template is not None:
        logger.warning("The base model has no chat template: the target's is taken.")
        tokenizer.chat_template = of_target.chat_template
    return tokenizer


def load_base(settings: TrainingSettings, mask_token_id: int, with_head: bool) -> PardDraftModel:
    """Load the base model as a draft, or make it of some of the target's layers."""
    loading: dict[str, Any] = {"dtype": settings.dtype, "attn_implementation": settings.attention}
    if settings.chosen_layers is None:
        return PardDraftModel.from_pretrained(
            settings.base, mask_token_id=mask_token_id, correction_head=with_head, trimmed_vocabulary=False, **loading
        )
    target = AutoModelForCausalLM.from_pretrained(settings.base, use_safetensors=True, **loading)
    return PardDraftModel.from_causal_lm(base_from_layers(target, settings.chosen_layers), mask_token_id)


def check_base(settings: TrainingSettings, config: Any, tokenizer: Any) -> None:
    """Raise a `ValueError` for a base model, dtypes or lengths that the run cannot use."""
    base, vocab_size, positions = settings.base, config.get_text_config().vocab_size, num_positions(config)
    if config.is_encoder_decoder:
        raise ValueError(f"Expected a decoder-only base model, got the encoder-decoder `{base}`.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"Expected an embedding for each id of the tokenizer, got ids up to {largest} for {vocab_size} rows in "
            f"`{base}`. Take the model's own tokenizer, or call `model.resize_token_embeddings`."
        )
    if settings.chosen_layers is not None:
        check_layers(settings.chosen_layers, config.get_text_config().num_hidden_layers)
    if settings.max_length > positions:
        raise ValueError(
            f"Expected `--max-length` within the {positions} positions of the base, got {settings.max_length}."
        )
    for dtype in {settings.dtype, settings.target_dtype or "auto"} - {"auto"}:
        named_dtype(dtype)
    if settings.correction_head == "frozen" and getattr(config, "pard_token", None) is None:
        raise ValueError(
            f"Expected a draft as the base of a frozen correction head, got `{base}`, whose config has no "
            "`pard_token`. Adapt it first, or train both with `--correction-head joint`."
        )


def check_template(tokenizer: Any) -> None:
    """Raise a `ValueError` for a chat template that neither marks answers nor keeps the prompt before an answer."""
    if tokenizer.chat_template is None or has_marks(tokenizer):
        return
    remedy = "Mark answers by `{% generation %}…{% endgeneration %}` in a copy and pass it with `--chat-template`."
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    try:
        before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # Chat templates raise errors of many kinds.
        raise ValueError(f"Expected a chat template for a question and an answer, got: {error}. {remedy}") from error
    if not whole.startswith(before) or "an answer" not in whole[len(before) :]:
        raise ValueError(
            f"Expected a chat template with the same prompt before an answer, got {before!r} and {whole!r}: where the "
            f"answer begins cannot be told. {remedy}"
        )


def check_teacher(settings: TrainingSettings) -> bool:
    """Return whether the rows store a teacher's top logits; a `ValueError` if the objective has no teacher at all."""
    first: dict[str, Any] = next((row for path in settings.data for row in read_rows(path, True)), {})
    has_stored = "top_logits" in first and settings.objective != "ce"
    if settings.objective != "ce" and settings.target is None and not has_stored:
        raise ValueError(
            f"Expected a target for the objective {settings.objective!r}, got none. Name it with `--target`, or train "
            "on answers that `pard data --top-logits` wrote."
        )
    if has_stored:
        logger.warning("The rows store their teacher's top logits: no target runs in the steps.")
    return has_stored


def warn_of_dropped_addons(settings: TrainingSettings) -> None:
    """Warn of add-ons of the base that the new draft will not have."""
    if settings.correction_head is None and addon_settings(settings.base, CORRECTION_HEAD):
        logger.warning(
            "The base's correction head is left off, since its hidden states are about to change. Train it along with "
            "`--correction-head joint`, or a new one on the finished draft with `--correction-head frozen`."
        )
    if addon_settings(settings.base, TRIMMED_VOCABULARY):
        logger.warning("The base's trimmed vocabulary is left off: trim the finished draft (`draft.trim_vocabulary`).")


def mask_token_of(settings: TrainingSettings, configs: list[Any], tokenizer: Any) -> int:
    """Return the named mask token if it is free, that of a base which is a draft, or choose one."""
    named, vocab_size = settings.mask_token_id, configs[0].get_text_config().vocab_size
    if named is None and getattr(configs[0], "pard_token", None) is not None:
        return configs[0].pard_token
    all_configs = [*configs, *(config.get_text_config() for config in configs)]
    for name in filter(None, (settings.base, settings.target)):
        with suppress(OSError):
            all_configs.append(GenerationConfig.from_pretrained(name))
    ids_in_use = ids_named_in(*all_configs)
    if named is None:
        chosen, reason = choose_mask_token(tokenizer, vocab_size, ids_in_use)
        logger.warning("Mask token %d: %s.", chosen, reason)
        return chosen
    if not 0 <= named < vocab_size:
        raise ValueError(f"Expected `--mask-token-id` to be an id in [0, {vocab_size}) or `auto`, got {named}.")
    check_mask_token(tokenizer, named, ids_in_use)
    return named


def provenance_of(settings: TrainingSettings, trainer: PardTrainer, counts: dict[str, int], target: Any) -> Provenance:
    """Return what `provenance.json` holds of every checkpoint of a run; paths are never recorded."""
    args = trainer.args
    recorded = {
        **{ARGUMENTS[name]: getattr(args, ARGUMENTS[name], getattr(settings, name)) for name in RECORDED},
        "mask_token_id": trainer.model.mask_token_id,
        "target_dtype": None if target is None else str(target.dtype).removeprefix("torch."),
        "lr_scheduler_type": args.lr_scheduler_type,
        "world_size": args.world_size,
    }
    files = []
    for file in map(Path, settings.data):
        manifest = manifest_path(file)  # Written by `pard data`.
        text = manifest.read_text(encoding="utf-8") if manifest.exists() else "null"
        files.append({"file": file.name, "sha256": sha256_of(file).hexdigest(), "manifest": json.loads(text)})
    models = {"base": shown_model(settings.base), "target": shown_model(settings.target) if settings.target else None}
    identity = {
        "base": models["base"],
        "teacher": None if args.objective == "ce" else models["target"],
        "data": sorted(file["sha256"] for file in files),
        **{name: recorded[name] for name in IDENTITY},
    }
    run = {"command": settings.command, **conditions_of(trainer.model), **models}
    return {**run, "identity": identity, "settings": recorded, "counts": counts, "data": files}


def write_provenance(
    content: Provenance, make_card: CardMaker | None, folder: Path, step: int, metrics: dict[str, Any]
) -> None:
    """Write `provenance.json` and a first model card into the folder of a saved draft."""
    content = {**content, "step": step, "metrics": metrics}
    write_whole(folder / "provenance.json", json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    if make_card is not None:
        write_whole(folder / "README.md", make_card(content))


def checkpoint_to_resume(settings: TrainingSettings, trainer: PardTrainer, identity: dict[str, Any]) -> str | None:
    """Find the checkpoint to continue from, if there is one; with `settings.restart` move the old ones aside.

    A `ValueError` names settings that differ from the checkpoint's. How a step is spread (batch size, accumulation,
    devices), the number of steps and the learning rate may change.
    """
    folder = settings.output / "checkpoints"
    if settings.restart and folder.is_dir() and any(folder.iterdir()) and trainer.is_world_process_zero():
        names = (folder.with_name(f"checkpoints.{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
    trainer.accelerator.wait_for_everyone()
    last = last_checkpoint(folder)
    if last is None:
        return None
    file = Path(last) / "provenance.json"
    before = json.loads(file.read_text(encoding="utf-8"))["identity"] if file.exists() else {}
    now = json.loads(json.dumps(identity, default=str))
    changed = [f"{name} was {old!r} and is {now.get(name)!r}" for name, old in before.items() if old != now.get(name)]
    if changed:
        raise ValueError(
            f"Expected the settings of `{Path(last).name}`, but {'; '.join(changed)}. Give them again, choose another "
            "`--output`, or pass `--restart` to move its checkpoints aside."
        )
    logger.warning("Continuing from %s; pass --restart to begin anew.", last)
    return last
