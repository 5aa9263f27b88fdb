"""Optional modules of a draft, saved in subfolders of its checkpoint: correction head and trimmed vocabulary.

vLLM and TensorRT-LLM read every safetensors file next to `config.json` as the draft's weights, but no subfolders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from .correction_head import CorrectionHead
from .known_drafts import optional_file
from .vocabulary import TrimmedVocabulary

CORRECTION_HEAD, TRIMMED_VOCABULARY = ADDONS = "correction_head", "trimmed_vocabulary"
SETTINGS_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ADDON_FILES = tuple(f"{addon}/{name}" for addon in ADDONS for name in (SETTINGS_FILE, WEIGHTS_FILE))
HEAD_SETTINGS = ("vocab_size", "hidden_size", "rank", "num_candidates")
# Least cosine of a draft's hidden states with those it had when its head was saved; 16 bit and quantization exceed it.
LEAST_COSINE = 0.97
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
DAMAGED = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError, SafetensorError)


def is_addon_weight(name: str) -> bool:
    """Return whether a key of the state dict belongs to an add-on."""
    return name.partition(".")[0] in ADDONS


@contextmanager
def without_addons(draft: Any) -> Iterator[None]:
    """Detach the add-ons inside the context."""
    addons = {addon: getattr(draft, addon) for addon in ADDONS}
    for addon in ADDONS:
        setattr(draft, addon, None)
    try:
        yield
    finally:
        for addon, module in addons.items():
            setattr(draft, addon, module)


def save_addons(draft: Any, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a draft's add-ons into the folder of its checkpoint, and remove the files of absent ones.

    `weights` is the state dict given to `save_pretrained`, which holds a head that training has sharded.
    """
    fit_addons(draft)
    head, vocabulary = draft.correction_head, draft.trimmed_vocabulary
    contents: dict[str, tuple[dict[str, Any], Mapping[str, torch.Tensor]]] = {}
    if head is not None:
        given = {n.partition(".")[2]: tensor for n, tensor in weights.items() if n.startswith(f"{CORRECTION_HEAD}.")}
        settings = {name: getattr(head, name) for name in HEAD_SETTINGS} | {"base_signature": signature_of(draft)}
        contents[CORRECTION_HEAD] = settings, given or head.state_dict()
    if vocabulary is not None:
        settings = {"vocab_size": vocabulary.vocab_size, "num_kept": len(vocabulary.token_ids)}
        contents[TRIMMED_VOCABULARY] = settings, {"token_ids": vocabulary.token_ids}
    for addon in ADDONS:
        settings_file, weights_file = folder / addon / SETTINGS_FILE, folder / addon / WEIGHTS_FILE
        if addon in contents:
            settings, tensors = contents[addon]
            settings_file.parent.mkdir(exist_ok=True)
            settings_file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, weights_file, {"format": "pt"})
        else:
            settings_file.unlink(missing_ok=True)
            weights_file.unlink(missing_ok=True)


def fit_addons(draft: Any) -> None:
    """Resize the add-ons to the draft's vocabulary, which `resize_token_embeddings` may have changed."""
    num_rows = draft.config.get_text_config().vocab_size
    head, vocabulary = draft.correction_head, draft.trimmed_vocabulary
    if head is not None and head.vocab_size != num_rows:
        draft.correction_head = head.resized(num_rows).train(head.training)
    if vocabulary is not None and vocabulary.vocab_size != num_rows:
        draft.trimmed_vocabulary = TrimmedVocabulary(draft, vocabulary.token_ids[vocabulary.token_ids < num_rows])


def addon_settings(name: str, addon: str, **arguments: Any) -> str | None:
    """Find the settings file of an add-on in a folder or Hub repository; `None` where there is none."""
    return optional_file(name, f"{addon}/{SETTINGS_FILE}", **arguments)


def load_addons(draft: Any, name: str, wanted: tuple[str, ...] = ADDONS, **kwargs: Any) -> None:
    """Load the wanted add-ons of the checkpoint `name`, a folder or a Hub id; `kwargs` are `from_pretrained`'s.

    Raises:
        ValueError: An add-on is damaged, or belongs to a draft of another shape, vocabulary or other weights.
    """
    arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    for addon in wanted:
        settings_file = addon_settings(name, addon, **arguments)
        if settings_file is None:
            setattr(draft, addon, None)
            continue
        weights_file = cached_file(name, f"{addon}/{WEIGHTS_FILE}", **arguments)
        load = load_head if addon == CORRECTION_HEAD else load_vocabulary
        try:
            load(draft, json.loads(Path(settings_file).read_text(encoding="utf-8")), load_file(weights_file))
        except DAMAGED as error:
            raise ValueError(
                f"Expected `{addon}/{SETTINGS_FILE}` and `{addon}/{WEIGHTS_FILE}` as `save_pretrained` writes them, "
                f"got others ({type(error).__name__}: {error}). Save them again, or load the draft without its "
                f"{addon.replace('_', ' ')} (`{addon}=False`)."
            ) from error


def load_head(draft: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Attach a saved correction head that fits the draft's shape and hidden states."""
    config = draft.config.get_text_config()
    for size in ("vocab_size", "hidden_size"):
        if settings[size] != getattr(config, size):
            raise ValueError(
                f"Expected a correction head for a {size} of {getattr(config, size)}, got one for {settings[size]}. "
                "Load the draft it belongs to, or pass `correction_head=False`."
            )
    head = CorrectionHead(**{name: settings[name] for name in HEAD_SETTINGS})
    head.load_state_dict(tensors)
    devices = [parameter.device for parameter in draft.parameters()]
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    draft.correction_head = head.to(device, draft.dtype).eval()
    if any(device.type == "meta" for device in devices):  # Offloaded, or without weights: nothing to compare with.
        return
    expected, got = torch.tensor(settings["base_signature"]), torch.tensor(signature_of(draft))
    if torch.nn.functional.cosine_similarity(expected, got, dim=0) < LEAST_COSINE:
        draft.correction_head = None
        raise ValueError(
            "Expected a correction head that was trained on this draft's weights, got one of another draft of the "
            "same shape. Load the draft it was saved with, remove the folder `correction_head` or pass "
            "`correction_head=False`, or train a head with `pard train --correction-head`."
        )


@torch.no_grad()
def signature_of(draft: Any) -> list[float]:
    """Return a few last hidden states for fixed tokens and two masks, which differ between drafts."""
    was_training = draft.training
    mask = draft.mask_token_id
    ids = torch.tensor([[1, 2, 3, 4, mask, mask]], device=draft.get_input_embeddings().weight.device)
    hidden = draft.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
    draft.train(was_training)
    return [float(f"{value:.4g}") for value in hidden[0, -2:, :32].float().flatten().tolist()]


def load_vocabulary(draft: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Attach a saved trimmed vocabulary with rows of the draft's LM head."""
    vocab_size = draft.config.get_text_config().vocab_size
    if settings["vocab_size"] != vocab_size:
        raise ValueError(
            f"Expected a trimmed vocabulary of {vocab_size} tokens, got one of {settings['vocab_size']}. Trim this "
            "draft's again, or pass `trimmed_vocabulary=False`."
        )
    draft.trimmed_vocabulary = TrimmedVocabulary(draft, tensors["token_ids"])
