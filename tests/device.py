"""Where the suites run: on the device that `PARD_TEST_DEVICE` names, `cpu` by default.

`fake-cuda` is the stand-in of `fake_device.py`, for which nothing is compiled. Suites that make tensors by hand say
`from device import torch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch as real_torch
from fake_device import FakeCuda

NAME = os.environ.get("PARD_TEST_DEVICE", "cpu")
IS_FAKE = NAME == "fake-cuda"
DEVICE = real_torch.device("cuda" if IS_FAKE else NAME)
CONSTRUCTORS = {"arange", "empty", "eye", "full", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


class TorchOnDevice(ModuleType):
    """`torch`, whose constructors make their tensors on the CPU and move them to the device.

    So random numbers are the same everywhere; and a default device would also move what the package forgets to.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(real_torch, name)
        return on_device(value) if name in CONSTRUCTORS else value

    def get_rng_state(self) -> real_torch.Tensor:
        return real_torch.get_device_module(DEVICE).default_generators[0].get_state()


def on_device(constructor: Callable[..., real_torch.Tensor]) -> Callable[..., real_torch.Tensor]:
    def make(*args: Any, requires_grad: bool = False, **kwargs: Any) -> real_torch.Tensor:
        tensor = constructor(*args, **kwargs)
        if "device" not in kwargs:
            tensor = tensor.to(DEVICE)
        return tensor.requires_grad_(requires_grad)

    return make


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch, or whatever of it is a tensor, on the device."""
    return {name: part.to(DEVICE) if isinstance(part, real_torch.Tensor) else part for name, part in batch.items()}


torch: Any = real_torch if DEVICE.type == "cpu" else TorchOnDevice("torch")

if IS_FAKE:  # To the end: suites make tensors while they are collected, too.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    FakeCuda().__enter__()
