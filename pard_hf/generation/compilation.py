"""Where the parts of a round run: as they stand, or compiled for their shapes.

A compiled part belongs to one (batch size, K, cache size) and is made once; what it reads and writes stays at the same
addresses from call to call, which is what CUDA graphs need. Knows nothing of tokens and of what a part computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from ..host import can_compile, warn_once
from .batch import Rows
from .cache import SlotCache
from .kernels import streamed_linear
from .schedule import RoundCosts, Schedule

logger = logging.getLogger(__name__)

# What torch raises when it cannot compile: no compiler at hand, a break in the graph, too many variants.
COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)

# Compiled steps that a pair keeps, those used last: three or four a shape, with the caches and rows of their shapes.
MOST_STEPS = 128


class EagerSteps:
    """Runs every part as it stands, on buffers made for one call."""

    # Whether shapes have to be the same from round to round.
    is_fixed = False
    # What else compiled parts and their buffers belong to; costs of rounds too.
    kind: tuple[Hashable, ...] = ()
    compile_seconds = 0.0

    def cache(self, name: str, model: PreTrainedModel, batch_size: int, num_slots: int) -> SlotCache:
        """An empty cache for one of the two models; `name` tells them apart."""
        return SlotCache.of(model, num_slots)

    def rows(self, rows: Rows) -> Rows:
        """The rows in buffers that rounds may use."""
        return rows

    def run(self, part: Callable[..., Any], key: Hashable, *args: Any) -> Any:
        """Call `part` with `args`; `key` holds every number among them that fixes a shape."""
        return part(*args)

    def is_ready(self, part: Callable[..., Any], key: Hashable) -> bool:
        """Whether `part` runs for these shapes without being compiled first."""
        return True

    def begin_round(self) -> None:
        """Say that results of earlier rounds are no longer needed."""


class Workspace:
    """Compiled parts and their buffers for one pair, kept on the target from call to call.

    One call at a time: another that comes meanwhile, from a second thread or from inside a streamer, runs eagerly.
    """

    def __init__(self) -> None:
        # By name, shape and kind; those used last at the end.
        self.parts: dict[tuple[str, Any, tuple[Hashable, ...]], Callable[..., Any]] = {}
        self.caches: dict[Hashable, SlotCache] = {}
        self.buffers: dict[tuple[Any, ...], Rows] = {}
        self.costs: dict[Hashable, RoundCosts] = {}
        # Why a part could not be compiled, the last time one could not.
        self.failure: str | None = None
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Drop what was used longest ago, and the caches and rows that no step is left for: shapes change for ever."""
        for key in list(self.parts)[: max(len(self.parts) - MOST_STEPS, 0)]:
            del self.parts[key]
        needed = set()
        for _, shape, kind in self.parts:
            sizes = dict(shape)
            for name in ("draft", "target"):
                needed.add((name, sizes["batch size"], sizes[f"{name} cache"], kind[0]))
        self.caches = {key: cache for key, cache in self.caches.items() if key in needed}
        self.buffers = {
            key: rows for key, rows in self.buffers.items() if ("draft", key[0], key[1] - 1, key[2]) in needed
        }


class Workspaces(WeakKeyDictionary):
    """The workspaces of a target, by draft; a copy of the model begins with none."""

    def __copy__(self) -> Workspaces:
        return Workspaces()

    def __deepcopy__(self, memo: Any) -> Workspaces:
        return Workspaces()

    def __reduce__(self) -> tuple[type[Workspaces], tuple[()]]:
        return Workspaces, ()


class CompiledSteps(EagerSteps):
    """Runs every part compiled, with `dynamic=False` and as one graph.

    Args:
        workspace ([`Workspace`]):
            Of the target.
        config ([`CompileConfig`]):
            Backend, mode and options; shapes are fixed and graphs whole whatever it says.
        model ([`PreTrainedModel`]):
            The target; one moved elsewhere, or to another dtype, gets other buffers.
    """

    is_fixed = True

    def __init__(self, workspace: Workspace, config: CompileConfig, model: PreTrainedModel):
        self.workspace, self.config = workspace, config
        self.place = (model.dtype, str(model.device), autocast_dtype(model.device))
        self.kind = (
            self.place,
            str(config.backend),
            config.mode,
            str(config.options),
            torch.is_inference_mode_enabled(),
        )
        self.compile_seconds = 0.0

    def cache(self, name: str, model: PreTrainedModel, batch_size: int, num_slots: int) -> SlotCache:
        key = (name, batch_size, num_slots, self.place)
        if key in self.workspace.caches:
            self.workspace.caches[key].clear()
        else:
            self.workspace.caches[key] = SlotCache.of(model, num_slots, is_static=True)
        return self.workspace.caches[key]

    def rows(self, rows: Rows) -> Rows:
        key = (*rows.tokens.shape, self.place)
        if key not in self.workspace.buffers:
            with torch.inference_mode(False):  # Later calls outside it write to them too.
                kept = Rows(**{name: tensor.clone() for name, tensor in rows.tensors().items()})
            for tensor in kept.tensors().values():
                torch._dynamo.mark_static_address(tensor)
            self.workspace.buffers[key] = kept
        kept = self.workspace.buffers[key]
        for name, tensor in rows.tensors().items():
            getattr(kept, name).copy_(tensor)
        return kept

    def is_ready(self, part: Callable[..., Any], key: Hashable) -> bool:
        return (part.__name__, key, self.kind) in self.workspace.parts

    def run(self, part: Callable[..., Any], key: Hashable, *args: Any) -> Any:
        name = (part.__name__, key, self.kind)
        compiled = self.workspace.parts.pop(name, None)
        if compiled is not None:
            self.workspace.parts[name] = compiled
            return compiled(*args)
        logger.warning("Compiling `%s` for %s: once for this shape, then kept in torch's cache.", part.__name__, key)
        start = time.perf_counter()
        compiled = self.workspace.parts[name] = compile_part(part, self.config)
        try:
            return compiled(*args)
        except COMPILE_ERRORS as error:  # Before anything ran: the part is as good as new.
            reason = str(error).strip().partition("\n")[0]
            logger.warning("`%s` cannot be compiled (%s); it runs without torch.compile.", part.__name__, reason)
            self.workspace.parts[name] = part
            self.workspace.failure = reason
            return part(*args)
        except BaseException:
            del self.workspace.parts[name]
            raise
        finally:
            self.compile_seconds += time.perf_counter() - start

    def begin_round(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on a device; `None` outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def compile_part(part: Any, config: CompileConfig) -> Callable[..., Any]:
    """Compile a function on its own.

    torch keeps what it compiled beside the code object and gives up after a few variants of one: every part gets code
    of its own, so that any number of shapes can live side by side and none is looked through for another.
    """
    own = FunctionType(part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__, part.__closure__)
    finalize(own, forget_code, own.__code__).atexit = False
    return torch.compile(
        own, fullgraph=True, dynamic=False, backend=config.backend, mode=config.mode, options=config.options
    )


def forget_code(code: CodeType) -> None:
    """Free what torch keeps beside a code object that nobody can call any more.

    What it keeps keeps the code alive in turn, and guards live as long as whatever they watch, a function of torch for
    one: for ever.
    """
    guards = [entry.guard_manager for entry in _debug_get_cache_entry_list(code)]
    reset_code(code)
    for guard in guards:
        vars(guard).update(root=None, diff_guard_root=None)


def workspace_of(target: PreTrainedModel, draft: PreTrainedModel) -> Workspace:
    """What the target keeps of a pair, made at the first call."""
    return target.__dict__.setdefault("_pard_workspaces", Workspaces()).setdefault(draft, Workspace())


def schedule_for(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    config: GenerationConfig,
    steps: EagerSteps,
    tree_size: int = 0,
) -> Schedule:
    """The schedule that a call names, with what earlier calls of the pair and kind taught it."""
    if config.num_assistant_tokens_schedule == "adaptive":
        costs = workspace_of(target, draft).costs.setdefault((target.dtype, target.device, steps.kind), RoundCosts())
        return Schedule(config.num_assistant_tokens, tree_size, costs)
    return Schedule(config.num_assistant_tokens, tree_size)


def wants_compilation(target: PreTrainedModel, config: GenerationConfig) -> bool:
    """Say whether a call asks for compiled rounds, in the host's words; on CUDA it need not ask.

    On a CPU they are faster too, but compiling takes longer than most calls do.
    """
    if config.disable_compile:
        return False
    is_asked = config.cache_implementation == "static" or config.compile_config is not None
    return is_asked or target.device.type == "cuda"


@contextmanager
def steps_for(target: PreTrainedModel, draft: PreTrainedModel, config: GenerationConfig) -> Iterator[EagerSteps]:
    """Where the rounds of one call run: compiled where that is wanted and possible, else as they stand."""
    workspace = acquire_workspace(target, draft) if wants_compilation(target, config) else None
    if workspace is None:
        with streamed_linear(target, draft):
            yield EagerSteps()
        return
    try:
        yield CompiledSteps(workspace, config.compile_config or CompileConfig(), target)
    finally:
        workspace.forget()
        workspace.lock.release()


def acquire_workspace(target: PreTrainedModel, draft: PreTrainedModel) -> Workspace | None:
    """The workspace of a pair, locked; `None`, with a word in the log, where there is none to be had."""
    reason = why_not_compiled(target, draft)
    if reason is not None:
        warn_once(f"{reason}; rounds run without torch.compile.")
        return None
    workspace = workspace_of(target, draft)
    if workspace.lock.acquire(blocking=False):
        return workspace
    logger.info("Another call uses the compiled rounds of this pair; this one runs without torch.compile.")
    return None


def why_not_compiled(target: PreTrainedModel, draft: PreTrainedModel) -> str | None:
    """Say why the rounds of a pair cannot be compiled; `None` when they can."""
    for model in (target, draft):
        if not can_compile(model):
            return f"`{type(model).__name__}` cannot be compiled as one graph"
        if any(parameter.is_meta for parameter in model.parameters()):
            return f"Parts of `{type(model).__name__}` are offloaded"
        placed = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if placed & {"cpu", "disk"} and len(placed) > 1 or "disk" in placed:
            return f"Parts of `{type(model).__name__}` are offloaded"
        if len(placed) > 1:
            return f"`{type(model).__name__}` is spread over several devices"
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_compileable:
            return f"The quantization of `{type(model).__name__}` cannot be compiled"
    if target.device != draft.device:
        return "Target and draft are on different devices"
    return None
