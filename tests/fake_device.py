"""A CUDA device for machines without one: tensors that say `cuda`, compute on the CPU and refuse the CPU's tensors.

Stands in for the device below autograd, so code under test runs as it is. What a real device refuses is refused here:
operands on different devices, but for the scalars and indices that CUDA kernels take from the CPU. Inside
[`watch`] every way in which a value reaches the host, the size of a result that depends on values included, is
an error as well, unless it leads through one named function. No model of speed, streams or memory, and not for
loading and saving: to torch's C++ it is the device `meta`, which loading needs for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# What torch's C++ is told: the one device beside the CPU that every build has, so that it asks for no driver.
STAND_IN = torch.device("meta")
# Kernels that fetch a value, or the size of their result, to the host.
FETCHING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Kernels that write equal indices in an order of their own on a device.
COPYING = {aten.index_copy_.default, aten.index_copy.default}
SCATTERING = {aten.scatter_.src, aten.scatter.src}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class MixedDevicesError(RuntimeError):
    """Operands on two devices."""


class HostTransferError(AssertionError):
    """A value reached the host by another way than the one that is allowed."""


class FakeCudaTensor(torch.Tensor):
    """Says that it is on the device; its values lie in `held`, an ordinary tensor."""

    held: torch.Tensor
    device = DEVICE
    is_cuda, is_meta = True, False

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> FakeCudaTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=STAND_IN, **layout)
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:  # Refused for subclasses before it is dispatched.
            return args[0].cpu().tolist()
        if func is torch.Tensor.__format__:
            return format(args[0].cpu(), *args[1:])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # Lists become tensors on the way.
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        if func is torch.nn.functional.scaled_dot_product_attention:  # Its choice of a kernel would ask the device.
            return attention(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return f"FakeCudaTensor({self.held!r})"


def moved(tensor: torch.Tensor, *args: Any, move: Any = torch.Tensor.to, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, which asks for the real device before anything is dispatched."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda":
        return move(tensor, *args, copy=copy, **kwargs)
    dtype = dtype or tensor.dtype
    if is_on_device(tensor) and dtype == tensor.dtype and not copy:
        return tensor
    return move(tensor, STAND_IN, dtype, non_blocking, memory_format=memory_format)


def made(make: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor`, likewise."""

    def on_device(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        tensor = make(data, **kwargs)
        return tensor if device is None else tensor.to(device)

    return on_device


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """`scaled_dot_product_attention` in elementary operations."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]


def is_on_device(thing: Any) -> bool:
    return isinstance(thing, FakeCudaTensor)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation on what its tensors hold; the result is where a real device would put it."""
    tensors = list(tensors_in((*args, *kwargs.values())))
    wrappers = {id(tensor.held): tensor for tensor in tensors if is_on_device(tensor)}
    device = kwargs.get("device")
    lands_here = device.type in ("cuda", "meta") if device is not None else bool(wrappers)
    if func is aten.copy_.default:
        lands_here = is_on_device(args[0])
    elif func is not aten._to_copy.default and 0 < len(wrappers) and not all(map(is_on_device, tensors)):
        check_devices(func, args, kwargs)
    if wrappers and (not lands_here or fetches(func, args)):
        check_transfer(func)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if func is aten.histc.default and not args[0].is_floating_point():  # CUDA counts integers.
        return run(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
    if torch.Tag.inplace_view in func.tags:  # As `squeeze_`: what the tensor says of itself changes as well.
        with no_dispatch():
            func(*args, **kwargs)
    held = mapped(held_by, args)
    if lands_here and func in COPYING | SCATTERING:
        held = backwards(func, *held)
    result = func(*held, **{name: mapped(held_by, value) for name, value in kwargs.items()})
    if not lands_here:
        return result
    # What was changed in place is the tensor it was.
    return mapped(lambda held: wrappers[id(held)] if id(held) in wrappers else FakeCudaTensor(held), result)


def held_by(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if is_on_device(tensor) else tensor


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument, or of all: operations take lists of them, and no other structures."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same with a function of every tensor in the place of each."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(mapped(function, part) for part in value) if isinstance(value, list | tuple) else value


def backwards(func: Any, tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of a kernel that writes the other way round: of equal indices the first comes last."""
    if func in COPYING:
        return tensor, dim, index.flip(0), source.flip(dim)
    source = source[tuple(map(slice, index.shape))]  # It may be larger than the index.
    return tensor, dim, index.flip(dim), source.flip(dim)


def fetches(func: Any, args: Any) -> bool:
    """Whether an operation waits for a value: it returns one, or the size of its result depends on some."""
    if func in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is aten.isin.Tensor_Tensor:  # Of many elements it sorts the unique ones.
        return args[1].numel() >= 10 * args[0].numel() ** 0.145
    return bool(FETCHING.intersection(func.tags))


def check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse operands of the CPU beside those of the device, but for what CUDA kernels take from there."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if func in INDEXING and is_on_device(args[0]):
        given["indices"] = [index for index in given["indices"] if index is not None and index.is_meta]
    for argument in func._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_scalar_taken = torch.Tag.pointwise in func.tags or func in INDEXING
        for tensor in tensors_in(given.get(argument.name)):
            if not is_on_device(tensor) and (is_written or tensor.dim() or not is_scalar_taken):
                raise MixedDevicesError(
                    f"Expected all tensors to be on the same device, but {func} got `{argument.name}` of shape "
                    f"{tuple(tensor.shape)} on the CPU beside others on {DEVICE}."
                )


# The function in whose frames transfers are looked for, and the one that may make them.
watched: list[tuple[Callable[..., Any], Callable[..., Any]]] = []


@contextmanager
def watch(inside: Callable[..., Any], through: Callable[..., Any]) -> Iterator[None]:
    """Let values leave the device, while `inside` runs, through one function only."""
    watched.append((inside, through))
    try:
        yield
    finally:
        watched.pop()


def check_transfer(func: Any) -> None:
    frame, codes = sys._getframe(1), set()
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back
    for inside, through in watched:
        if inside.__code__ in codes and through.__code__ not in codes:
            raise HostTransferError(
                f"Expected values to leave the device inside `{inside.__qualname__}` through `{through.__qualname__}` "
                f"only, but {func} fetches one."
            )


class FakeEvent:
    """Nothing is ever under way."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class FakeStream:
    def record_event(self, event: Any = None) -> FakeEvent:
        return FakeEvent()


class FakeCuda(TorchDispatchMode):
    """While it lasts, `device="cuda"` is this device.

    >>> with FakeCuda():
    ...     torch.arange(3, device="cuda") + torch.arange(3)  # MixedDevicesError
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __enter__(self) -> FakeCuda:
        _device_constructors()  # Looked up once in a process, so not while one of them is another.
        self.patches = ExitStack()
        for owner, name, stand_in in (
            (torch.Tensor, "to", moved),
            (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(DEVICE)),
            (torch, "tensor", made(torch.tensor)),
            (torch, "as_tensor", made(torch.as_tensor)),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "current_stream", lambda device=None: FakeStream()),
            # Too old for kernels that models would choose on newer ones.
            (torch.cuda, "get_device_capability", lambda device=None: (7, 0)),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "default_generators", (torch.default_generator,)),
            (torch.cuda, "Event", FakeEvent),
        ):
            self.patches.enter_context(mock.patch.object(owner, name, stand_in))
        # Parameters move in place, as on a real device: tied weights stay tied.
        self.swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self.swaps)
        self.patches.close()
