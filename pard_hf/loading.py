"""A target and its draft, loaded together: the bundled pair, a folder or a Hub id each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .draft.model import PardDraftModel
from .generation.mixin import with_pard


class PairPaths(NamedTuple):
    """Where a target and its draft are."""

    target: str
    draft: str


class Pair(NamedTuple):
    """A loaded target (with the mixin), its draft (or `None`) and their tokenizer."""

    target: Any
    draft: Any
    tokenizer: Any


def bundled_pair() -> PairPaths:
    """The folders of the small target and draft that ship inside the package.

    >>> target_path, draft_path = bundled_pair()
    """
    folder = Path(__file__).parent / "bundled"
    return PairPaths(str(folder / "target"), str(folder / "draft"))


def load_pair(
    target: str | None = None, draft: str | None = None, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Pair:
    """Load a target and its draft for `generate(assistant_model=draft)`.

    Args:
        target (`str`, *optional*) and draft (`str`, *optional*):
            Folder or Hub id; both default to the bundled pair, and go together.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of both models. `"auto"` is what the target's checkpoint says; on a CPU it is float32, in which texts are
            exactly those of plain `generate`.
        device (`str`, *optional*):
            Defaults to the first CUDA device, or the CPU.

    Raises:
        OSError: There is no such model, the Hub keeps it closed, or it cannot be reached.
        ValueError: Only one of the two was named, or the dtype is unknown.
    """
    if (target is None) != (draft is None):
        raise ValueError(
            f"Expected a target and its draft, got only {'a draft' if target is None else 'a target'}. Name both, or "
            "neither for the bundled pair."
        )
    paths = bundled_pair() if target is None or draft is None else PairPaths(target, draft)
    device = device or default_device()
    model, tokenizer = load_target(paths.target, dtype, device)
    drafting = PardDraftModel.from_pretrained(paths.draft, dtype=model.dtype, trust_remote_code=False)
    return Pair(model, drafting.to(device).eval(), tokenizer)


def load_target(target: str, dtype: str | torch.dtype = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a target (with the mixin) and its tokenizer; dtype and device as for [`load_pair`]."""
    device = device or default_device()
    check_device(device)
    dtype = weight_dtype(target, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return with_pard(model.to(device).eval()), tokenizer


def default_device() -> str:
    """The first CUDA device, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise a `ValueError` for a device torch cannot put a tensor on."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Expected a device this machine has, such as 'cpu', got {device!r}: {error}") from error


def weight_dtype(target: str, dtype: str | torch.dtype, device: str) -> torch.dtype:
    """The dtype that [`load_pair`] gives both models; a checkpoint that states none counts as float32.

    Raises:
        OSError: There is no such model.
        ValueError: The dtype is unknown.
    """
    if dtype == "auto":
        if device.startswith("cpu"):
            return torch.float32
        return AutoConfig.from_pretrained(target, trust_remote_code=False).dtype or torch.float32
    return named_dtype(dtype) if isinstance(dtype, str) else dtype


def named_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as `"float32"`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"Expected a dtype such as 'float32', 'bfloat16' or 'auto', got {name!r}.")
    return dtype
