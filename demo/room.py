"""Whether a model fits on the disk and into the memory: what does not would end the demo for everybody."""

from __future__ import annotations

import math
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from pard_hf import doctor
from pard_hf.loading import PairPaths, default_device, weight_dtype

# A tensor of a checkpoint may become several of the model, as of fused projections.
MOST_SPLITS = 8
# What a model may have besides: what is tied, or shared with a target.
FEW_TENSORS = 8


def check_disk(name: str, num_bytes: int) -> None:
    """Raise an `OSError` where a download does not fit."""
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"Expected room for {num_bytes / 1e9:.1f} GB of `{name}`, got {free / 1e9:.1f} GB of free disk. Make "
            "room, or choose a smaller model."
        )


def needed_memory(paths: PairPaths, device: str | None) -> int:
    """Bytes of the weights of a pair as its configs describe them, counted before any weight is read.

    Raises:
        ValueError: A config describes more than the device can hold at all, or other weights than lie beside it.
    """
    device = device or default_device()
    most = total_memory(device)
    size = weight_dtype(paths.target, "auto", device).itemsize
    needed = sum(max(num_weights(folder), num_described(folder, most // size)) for folder in map(Path, paths)) * size
    if needed > most:
        raise ValueError(too_large(needed, most))
    return needed


def too_large(needed: float, most: float) -> str:
    return (
        f"Expected models of less than the {most / 1e9:.1f} GB of memory that there are, got {needed / 1e9:.1f} GB of "
        "weights or more. Choose smaller ones."
    )


def num_weights(folder: Path) -> int:
    """The numbers in a checkpoint's safetensors files, by their headers."""
    return sum(math.prod(shape) for shape in shapes(folder))


def shapes(folder: Path) -> list[list[int]]:
    """The shapes in a checkpoint's safetensors files."""
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    return found


def num_described(folder: Path, most: int) -> int:
    """The numbers in the model that a config describes, which is made without memory for them.

    Args:
        most (`int`):
            Twice as many, tied weights counted twice, end the making.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with limited(2 * most, MOST_SPLITS * (len(shapes(folder)) + FEW_TENSORS)), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(values.numel() for values in chain(model.parameters(), model.buffers()))


@contextmanager
def limited(most: int, most_tensors: int) -> Iterator[None]:
    """Raise a `ValueError` where this thread makes modules of more numbers, or more tensors of them, than this.

    Modules take memory even where their tensors have none: a million small layers would take gigabytes.
    """
    thread, counts = threading.get_ident(), [0, 0]

    def count(module: Any, name: str, parameter: torch.Tensor | None) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        counts[:] = counts[0] + parameter.numel(), counts[1] + 1
        if counts[0] > most:
            raise ValueError(
                f"Expected models that fit the memory, got a config of {counts[0] / 1e9:.0f} billion "
                "parameters or more. Choose smaller ones."
            )
        if counts[1] > most_tensors:
            raise ValueError(
                "Expected weights for all layers of the config, got fewer tensors. Download or save the model again."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def available_memory(device: str) -> int:
    """Bytes that can be taken on a device; without bound where the system does not tell."""
    return or_unbounded(doctor.available_memory(device))


def total_memory(device: str) -> int:
    """Bytes that a device has; without bound where the system does not tell."""
    on_cuda = device.startswith("cuda")
    return torch.cuda.mem_get_info(device)[1] if on_cuda else or_unbounded(doctor.in_meminfo("MemTotal"))


def or_unbounded(num_bytes: int | None) -> int:
    return sys.maxsize if num_bytes is None else num_bytes
