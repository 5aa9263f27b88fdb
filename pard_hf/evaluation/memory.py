"""What a device has to hold and to read: peak memory, bytes of a round, copy bandwidth."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..host import cache_of

# Bytes copied at a time, far beyond any cache of the device, and how often; the median counts.
NUM_COPIED = {"cpu": 2**28, "cuda": 2**30}
NUM_COPIES = 9
# Where Linux takes the number 5 for "forget this process's peak".
FORGET_PEAK = Path("/proc/self/clear_refs")


class MemoryGauge:
    """Reads the highest memory use since [`start`]; `kind` says of what.

    On a CPU that is the whole process, models included, and since its own start where the system cannot forget an
    earlier peak (Linux can).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kind = "ru_maxrss of the process, so far"
        self.start()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "max_memory_allocated, during the route"
            return
        try:
            FORGET_PEAK.write_text("5")
            self.kind = "ru_maxrss of the process, during the route"
        except OSError:
            pass

    def read(self) -> int | None:
        """Bytes; `None` where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ModuleNotFoundError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one forward reads: every parameter once, but of an input embedding only single rows.

    An embedding that is the language-model head as well is read whole, as the head. All experts of a mixture count.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    skipped = () if is_tied else (id(embedding.weight),)
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skipped)


@dataclass(frozen=True)
class CacheLayerSize:
    """Bytes that a layer's keys and values take for each token, and how many tokens it looks back over."""

    bytes_per_token: int
    window: int | None


@torch.no_grad()
def cache_layer_sizes(model: PreTrainedModel) -> list[CacheLayerSize]:
    """The size of every layer's cache, as one forward over a single token shows it."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = cache_of(model(input_ids=token, use_cache=True)).layers
    return [
        CacheLayerSize(
            sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)),
            getattr(layer, "sliding_window", None),
        )
        for layer in layers
        if getattr(layer, "keys", None) is not None
    ]


def cache_bytes(sizes: list[CacheLayerSize], length: float) -> float:
    """Bytes that attention reads for one text of `length` tokens."""
    return sum(s.bytes_per_token * (length if s.window is None else min(length, s.window)) for s in sizes)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second while a tensor too big for any cache is copied on the device."""
    source = torch.ones(NUM_COPIED.get(device.type, 2**28), dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    seconds = []
    for _ in range(NUM_COPIES + 1):
        start = now(device)
        copied.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() / median(seconds[1:])  # The first touches new memory.


def now(device: Any) -> float:
    """The time, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
