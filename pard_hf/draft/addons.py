"""What lies beside a draft checkpoint: a correction head, a trimmed vocabulary.

Each has a folder with a safetensors file and a JSON file of its own, so the checkpoint stays the ordinary PARD one
that vLLM and TensorRT-LLM load: they take every safetensors file in its folder for the
draft's, and look into no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from .correction_head import CorrectionHead
from .vocabulary import TrimmedVocabulary

CORRECTION_HEAD, TRIMMED_VOCABULARY = PARTS = "correction_head", "trimmed_vocabulary"
SETTINGS_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PART_FILES = tuple(f"{part}/{name}" for part in PARTS for name in (SETTINGS_FILE, WEIGHTS_FILE))
HEAD_SETTINGS = ("vocab_size", "hidden_size", "rank", "num_candidates")
# How close a draft's hidden states must be to those a head was trained on: 16 bit and quantization change them little.
LEAST_COSINE = 0.97
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@contextmanager
def without_parts(draft: Any) -> Iterator[None]:
    """Take the parts off a draft for a while: what runs meanwhile sees the ordinary model."""
    parts = {part: getattr(draft, part) for part in PARTS}
    for part in PARTS:
        setattr(draft, part, None)
    try:
        yield
    finally:
        for part, module in parts.items():
            setattr(draft, part, module)


def is_of_part(name: str) -> bool:
    """Whether a weight belongs to a part rather than to the draft's own checkpoint."""
    return name.partition(".")[0] in PARTS


@torch.no_grad()
def signature_of(draft: Any) -> list[float]:
    """A few of the draft's last hidden states for fixed tokens and two masks: what tells it from other drafts."""
    was_training = draft.training
    mask = draft.mask_token_id
    ids = torch.tensor([[1, 2, 3, 4, mask, mask]], device=draft.get_input_embeddings().weight.device)
    hidden = draft.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
    draft.train(was_training)
    return [float(f"{value:.4g}") for value in hidden[0, -2:, :32].float().flatten().tolist()]


def save_parts(draft: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the parts a draft has into the folder of its checkpoint, and remove those it does not have.

    Args:
        weights (`dict[str, torch.Tensor]`, *optional*):
            Names and tensors of the whole draft, parts included, where they are not in the draft itself.
    """
    fit_parts(draft)
    for part in PARTS:
        files = [folder / part / name for name in (SETTINGS_FILE, WEIGHTS_FILE)]
        if getattr(draft, part) is None:
            for file in files:
                file.unlink(missing_ok=True)
            continue
        files[0].parent.mkdir(exist_ok=True)
        settings, tensors = CONTENTS[part](draft)
        given = {name.partition(".")[2]: t for name, t in (weights or {}).items() if name.startswith(f"{part}.")}
        if part == CORRECTION_HEAD and given:
            tensors = given
        files[0].write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, files[1], {"format": "pt"})
        files[1].chmod(files[0].stat().st_mode)


def fit_parts(draft: Any) -> None:
    """Give the parts the draft's number of rows, where that has changed; a trimmed vocabulary stays trimmed."""
    num_rows = draft.config.get_text_config().vocab_size
    head, vocabulary = draft.correction_head, draft.trimmed_vocabulary
    if head is not None and head.vocab_size != num_rows:
        draft.correction_head = head.resized(num_rows).train(head.training)
    if vocabulary is not None and vocabulary.vocab_size != num_rows:
        draft.trimmed_vocabulary = TrimmedVocabulary(draft, vocabulary.token_ids[vocabulary.token_ids < num_rows])


def contents_of_head(draft: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    head = draft.correction_head
    settings = {name: getattr(head, name) for name in HEAD_SETTINGS}
    return {**settings, "base_signature": signature_of(draft)}, head.state_dict()


def contents_of_vocabulary(draft: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    vocabulary = draft.trimmed_vocabulary
    settings = {"vocab_size": vocabulary.vocab_size, "num_kept": len(vocabulary.token_ids)}
    return settings, {"token_ids": vocabulary.token_ids}


CONTENTS = {CORRECTION_HEAD: contents_of_head, TRIMMED_VOCABULARY: contents_of_vocabulary}


# What reading a damaged part ends in.
BROKEN = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError, SafetensorError)


def settings_of_part(name: str, part: str, **arguments: Any) -> str | None:
    """The file of settings of a part that lies beside a checkpoint, a folder or a Hub id; `None` where none does."""
    return cached_file(
        name, f"{part}/{SETTINGS_FILE}", **arguments,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


def load_parts(draft: Any, name: str, wanted: tuple[str, ...] = PARTS, **kwargs: Any) -> None:
    """Give a draft the parts that lie beside its checkpoint, where there are any.

    Args:
        name (`str`):
            Folder or Hub id of the checkpoint.
        kwargs:
            Of `from_pretrained`; those of the Hub count.

    Raises:
        ValueError: A part belongs to a draft of another shape or vocabulary, or to other weights.
    """
    arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    for part in wanted:
        found = settings_of_part(name, part, **arguments)
        if found is None:
            setattr(draft, part, None)
            continue
        weights = cached_file(name, f"{part}/{WEIGHTS_FILE}", **arguments)
        try:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
            tensors = load_file(weights)
            LOADERS[part](draft, settings, tensors)
        except BROKEN as error:
            raise ValueError(
                f"Expected `{part}/{SETTINGS_FILE}` and `{part}/{WEIGHTS_FILE}` as `save_pretrained` writes them, "
                f"got others ({type(error).__name__}: {error}). Save them again, or load the draft without its "
                f"{part.replace('_', ' ')} (`{part}=False`)."
            ) from error


def load_head(draft: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config = draft.config.get_text_config()
    for size in ("vocab_size", "hidden_size"):
        if settings[size] != getattr(config, size):
            raise ValueError(
                f"Expected a correction head for a {size} of {getattr(config, size)}, got one for {settings[size]}. "
                "It belongs to another draft: take that draft's folder, remove this one's `correction_head`, or pass "
                "`correction_head=False`."
            )
    head = CorrectionHead(**{name: settings[name] for name in HEAD_SETTINGS})
    head.load_state_dict(tensors)
    devices = [parameter.device for parameter in draft.parameters()]
    real = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    draft.correction_head = head.to(real, draft.dtype).eval()
    expected = torch.tensor(settings["base_signature"])
    if any(device.type == "meta" for device in devices):  # Offloaded, or without weights: nothing to compare with.
        return
    got = torch.tensor(signature_of(draft))
    if torch.nn.functional.cosine_similarity(expected, got, dim=0) < LEAST_COSINE:
        draft.correction_head = None
        raise ValueError(
            "Expected a correction head that was trained on this draft's weights, got one of another draft of the "
            "same shape. Load the draft it was saved with, remove the folder `correction_head` or pass "
            "`correction_head=False`, or train a head with `pard train --correction-head`."
        )


def load_vocabulary(draft: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    vocab_size = draft.config.get_text_config().vocab_size
    if settings["vocab_size"] != vocab_size:
        raise ValueError(
            f"Expected a trimmed vocabulary of {vocab_size} tokens, got one of {settings['vocab_size']}. It belongs "
            "to another draft: trim this one's, or pass `trimmed_vocabulary=False`."
        )
    draft.trimmed_vocabulary = TrimmedVocabulary(draft, tensors["token_ids"])


LOADERS = {CORRECTION_HEAD: load_head, TRIMMED_VOCABULARY: load_vocabulary}


def needs_hidden_states(draft: PreTrainedModel) -> bool:
    """Whether proposals are made from a draft's last hidden states and not from its logits alone."""
    return any(getattr(draft, part, None) is not None for part in PARTS)
