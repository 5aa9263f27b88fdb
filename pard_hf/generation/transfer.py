"""The one way from the device to the host while a call is decoded.

Every look at a value makes the host wait for the device, so rounds make one, here; a test fails at any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; what is returned waits until it is there, and hands it over."""
    if tensor.device.type != "cuda":
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        return lambda: copy
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    # Of the tensor's device, which need not be the current one.
    event = torch.cuda.current_stream(tensor.device).record_event()

    def arrived() -> torch.Tensor:
        event.synchronize()
        return pinned

    return arrived
