"""Whether a model fits on the disk and into the memory: what does not would end the demo for everybody."""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import safe_open

from pard_hf.loading import PairPaths, default_device, weight_dtype


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


def check_memory(paths: PairPaths, device: str | None) -> None:
    """Raise a `ValueError` where the weights of a pair do not fit."""
    device = device or default_device()
    dtype = weight_dtype(paths.target, "auto", device)
    num_bytes = dtype.itemsize * sum(num_weights(Path(path)) for path in paths)
    available = available_memory(device)
    if num_bytes > available:
        raise ValueError(
            f"Expected models of less than the {available / 1e9:.1f} GB of memory that are free, got "
            f"{num_bytes / 1e9:.1f} GB of weights. Choose smaller ones."
        )


def num_weights(folder: Path) -> int:
    """The numbers in a checkpoint's safetensors files, by their headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return count


def available_memory(device: str) -> int:
    """Bytes that can be taken on a device; without bound where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(
        r"^MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "", flags=re.MULTILINE
    )
    return int(found[1]) * 1024 if found else sys.maxsize
