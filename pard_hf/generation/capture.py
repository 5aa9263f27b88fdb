"""Capture what a step launches on a CUDA device once, and replay it: the kernels of eager code, without its launches.

Capturing takes as long as one eager call, compiling a hundred times as long; what is replayed are eager kernels, more
and slower ones than a compiler makes. Every tensor that a capture reads or writes keeps its address: static buffers
are written in place, anything else is copied to where the capture found it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .sources import Sources

# In place of a backend of torch.compile: `CompileConfig(backend=CAPTURE)`.
CAPTURE = "capture"


class CapturedStep:
    """A step that runs eagerly at its first call, is captured at its second, and replayed from then on.

    The first call loads kernels and sets up libraries, which must not happen while a device captures. Results are the
    same tensors at every call. What cannot be captured runs eagerly; `on_failure` is told why.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device, on_failure: Callable[[str], None]):
        self.step, self.device, self.on_failure = step, device, on_failure
        self.is_warm = self.is_eager = False
        self.inputs: list[torch.Tensor] = []
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.is_warm and self.replay is None and not self.is_eager:
            self.capture(args)
        self.is_warm = True
        if self.replay is None:
            return self.step(*args)
        given: list[torch.Tensor] = []
        with_tensors(args, given.append)
        for mine, value in zip(self.inputs, given, strict=True):
            if mine is not value:
                mine.copy_(value)
        return self.replay()

    def capture(self, args: tuple[Any, ...]) -> None:
        own = with_tensors(args, self.keep)
        try:
            self.replay = captured(lambda: self.step(*own), self.device)
        except RuntimeError as error:  # Something in the step waits for the device; nothing has run.
            self.is_eager = True
            self.on_failure(str(error).strip().partition("\n")[0])

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """Keep a tensor for the step to read; results of other captured steps are always the same ones."""
        self.inputs.append(value if hasattr(value, "is_captured") else value.clone())
        return self.inputs[-1]


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return what replays a function of tensors and returns its results, the same tensors each time.

    On other devices than CUDA, which capture nothing, it is called again and its results are copied.
    """
    if device.type != "cuda":
        return Repeated(function)
    # A memory pool of its own: in a common one a capture could write over the results of a later one.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    with_tensors(result, mark)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def mark(result: Any) -> None:
    result.is_captured = True


class Repeated:
    """A function that is called again, its results in the tensors of the first call."""

    def __init__(self, function: Callable[[], Any]):
        self.function, self.results, self.result = function, list[torch.Tensor](), None

    def __call__(self) -> Any:
        result, found = self.function(), list[torch.Tensor]()
        with_tensors(result, found.append)
        if self.result is None:
            self.results, self.result = found, result
            with_tensors(result, mark)
        for mine, value in zip(self.results, found, strict=True):
            mine.copy_(value)
        return self.result


def with_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return arguments or results with their tensors changed, but for those in buffers that stay where they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [with_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Sources):  # Texts to copy from belong to the call.
        return replace(value, references=change(value.references))
    return value
