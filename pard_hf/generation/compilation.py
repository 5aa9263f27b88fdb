"""Run decoding steps with `torch.compile`: one graph for each step and shape, kept from call to call.

What a compiled step reads and writes stays at the same addresses, as CUDA graphs need it.

Compiling stops the loop, as torch cannot do it in a thread beside one: when it has compiled, it puts the process's
random states back to what they were, so that noise drawn meanwhile comes again, and while it traces, every module of
the process is called through its tracer. So a shape whose compiling nobody asked to wait for is compiled late.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from ..host import can_compile, warn_once
from .batch import CachedModel
from .cache import SlotCache
from .capture import CAPTURE, CapturedStep
from .kernels import MIN_PARAMETERS
from .layers import Step, after_layers, before_layers, cut_of, run_layer
from .recurrent import cache_for, is_hybrid
from .schedule import Choice, RoundCosts, Schedule
from .sources import Tables
from .steps import grow_depth, verify_step

logger = logging.getLogger(__name__)

# What torch raises when it cannot compile: no compiler at hand, a break in the graph, too many variants.
COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)
# Compiled steps that a pair keeps, those used last: three or four a shape, with the caches and rows of their shapes.
MOST_STEPS = 128
# Sizes of caches that share what is compiled. Where code asks for a size, torch compiles it anew, eight times at most.
MOST_SIZES = 6
# Eager rounds of a shape, in earlier calls, that promise to repay compiling it: that takes as long as hundreds of
# rounds of a small model.
ROUNDS_BEFORE_COMPILING = 512
# Rounds of a shape, eager and compiled, of which the median is compared.
NUM_TIMED = 9


class CompileCache:
    """Compiled steps and static buffers of one pair, kept on the target from call to call.

    One call at a time: another that comes meanwhile, from a second thread or from inside a streamer, runs eagerly.
    """

    def __init__(self) -> None:
        # By name, shape and kind; those used last at the end.
        self.steps: dict[tuple[str, Any, tuple[Hashable, ...]], Callable[..., Any]] = {}
        self.caches: dict[Hashable, SlotCache] = {}
        self.rows: dict[tuple[Any, ...], Any] = {}
        self.tables: dict[Hashable, Tables] = {}
        self.costs: dict[Hashable, RoundCosts] = {}
        self.eager_rounds: Counter[Hashable] = Counter()  # By what has to be compiled for.
        # Seconds of the latest rounds, eager and compiled ones, and what turned out to be no faster compiled.
        self.seconds: defaultdict[tuple[Hashable, bool], deque[float]] = defaultdict(lambda: deque(maxlen=NUM_TIMED))
        self.no_faster: set[Hashable] = set()
        # Whether a step may be cut at the layers of its model, by the step's name and kind.
        self.can_cut: dict[tuple[str, tuple[Hashable, ...]], bool] = {}
        # The last error of torch for a step that could not be compiled.
        self.failure: str | None = None
        self.lock = threading.Lock()

    def evict(self) -> None:
        """Drop the steps used longest ago, and caches and rows that no step is left for."""
        for key in list(self.steps)[: max(len(self.steps) - MOST_STEPS, 0)]:
            del self.steps[key]
        needed = set()
        for _, shape, kind in self.steps:
            sizes = dict(shape)
            for name in ("draft", "target"):
                needed.add((name, sizes["batch size"], sizes[f"{name} cache"], kind[0]))
        self.caches = {key: cache for key, cache in self.caches.items() if key in needed}
        self.rows = {key: rows for key, rows in self.rows.items() if ("draft", key[0], key[1] - 1, key[2]) in needed}


class CompileCaches:
    """The compile caches of a target, by draft; a copy of the model starts with none."""

    def __init__(self) -> None:
        self.by_draft: WeakKeyDictionary[PreTrainedModel, CompileCache] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[CompileCaches], tuple[()]]:
        return CompileCaches, ()


def compile_cache_of(target: PreTrainedModel, draft: PreTrainedModel) -> CompileCache:
    """Return the compile cache of a pair, made at the first call."""
    caches: CompileCaches = target.__dict__.setdefault("_pard_compile_caches", CompileCaches())
    return caches.by_draft.setdefault(draft, CompileCache())


class CompiledSteps:
    """The compiled steps of one call over the locked cache of its pair; a target that was moved gets other buffers.

    Of the config backend, mode and options count, and `fullgraph`, which compiles a model as one graph instead of one
    layer for all; shapes are fixed whatever it holds, but that layers serve caches of any size. A call that `waits`
    compiles every shape it meets, any other those that have run eagerly for long.
    """

    def __init__(self, kept: CompileCache, config: CompileConfig, target: PreTrainedModel, waits: bool = True):
        self.kept, self.config, self.waits, self.compile_seconds = kept, config, waits, 0.0
        self.device, self.eager_rounds = target.device, Counter[Hashable]()
        self.checked: set[Any] = set()  # The steps whose guards were checked in this call.
        # A model compiled as one graph is compiled for one size of caches, its layers for any.
        self.serves_any_size = not config.fullgraph and config.backend != CAPTURE
        self.placement = (target.dtype, str(target.device), autocast_dtype(target.device), self.serves_any_size)
        # What steps belong to besides their shape.
        backend = (str(config.backend), config.mode, str(config.options), config.fullgraph)
        self.kind: tuple[Hashable, ...] = (self.placement, *backend, torch.is_inference_mode_enabled())

    def cache(self, name: str, model: PreTrainedModel, batch_size: int, num_slots: int) -> SlotCache:
        """Return an empty static cache for one of the two models; `name` tells them apart."""
        key = (name, batch_size, num_slots, self.placement)
        if key not in self.kept.caches:
            self.kept.caches[key] = cache_for(model, num_slots, True, self.serves_any_size)
        self.kept.caches[key].clear()
        return self.kept.caches[key]

    def rows(self, rows: Any) -> Any:
        """Copy `Rows` to static buffers."""
        key = (*rows.tokens.shape, self.placement, rows.tokens.device)
        if key not in self.kept.rows:
            with torch.inference_mode(False):  # Later calls outside it write to them too.
                self.kept.rows[key] = replace(rows, **{name: tensor.clone() for name, tensor in vars(rows).items()})
            for tensor in vars(self.kept.rows[key]).values():
                torch._dynamo.mark_static_address(tensor)
            if self.serves_any_size:
                torch._dynamo.maybe_mark_dynamic(self.kept.rows[key].tokens, 1)
        static = self.kept.rows[key]
        for name, tensor in vars(rows).items():
            getattr(static, name).copy_(tensor)
        return static

    def tables(self, tables: Tables, device: torch.device) -> Tables:
        """Copy the tables of a call to static buffers on a device."""
        key = (tables.vocab_size, device, self.placement)
        if key not in self.kept.tables:
            self.kept.tables[key] = Tables.empty(tables.vocab_size, device)
            for tensor in vars(self.kept.tables[key]).values():
                torch._dynamo.mark_static_address(tensor)
        self.kept.tables[key].copy_(tables)
        return self.kept.tables[key]

    def compiles(self, shape: Any) -> bool:
        """Return whether rounds of a shape run compiled.

        Of eager rounds those of earlier calls count, so that equal calls change from eager to compiled between them,
        and back where compiled ones took no less time.
        """
        key = self.compiled_for(shape)
        is_worth_it = self.kept.eager_rounds[key] >= ROUNDS_BEFORE_COMPILING and key not in self.kept.no_faster
        return self.waits or is_worth_it

    def count(self, shape: Any, is_compiled: bool, seconds: float) -> None:
        """Count a round of a shape."""
        if not self.waits:
            key = self.compiled_for(shape)
            self.eager_rounds[key] += not is_compiled
            self.kept.seconds[key, is_compiled].append(seconds)

    def compare(self) -> None:
        """Note the shapes whose compiled rounds were measured and take no less time than eager ones."""
        for key in [key for key, is_compiled in self.kept.seconds if is_compiled]:
            eager, compiled = (self.kept.seconds[key, is_compiled] for is_compiled in (False, True))
            if len(compiled) == len(eager) == NUM_TIMED and median(compiled) >= median(eager):
                logger.info("Rounds of %s take no less time compiled; they run eagerly.", key)
                self.kept.no_faster.add(key)

    def compiled_for(self, shape: Any) -> Hashable:
        """Return what of a shape has to be compiled for."""
        return without_sizes(shape) if self.serves_any_size else shape, self.kind

    def is_ready(self, step: Step, shape: Any) -> bool:
        """Return whether a step runs for a shape without being compiled first."""
        if not self.compiles(shape):
            return True
        name = step.__name__, shape, self.kind
        return name in self.kept.steps or self.of_other_size(name) is not None

    def begin_round(self) -> None:
        """Let CUDA graphs reuse the results of earlier rounds."""
        torch.compiler.cudagraph_mark_step_begin()

    def run(self, step: Step, key: Hashable, *args: Any, repeats: str | None = None) -> Any:
        """Call a step with `args`, compiled; `key` holds every number among them that fixes a shape.

        What a step `repeats` can be compiled once: `"layers"` of the model that is its first argument, or `"depths"`
        of a tree. The `"moves"` of keys and values in each layer are not compiled then.
        """
        name = (step.__name__, key, self.kind)
        compiled = self.kept.steps.pop(name, None)
        if compiled is None:
            return self.compile_and_run(step, name, repeats, *args)
        self.kept.steps[name] = compiled
        if name in self.checked and isinstance(compiled, LayeredStep):
            return compiled.run_again(*args)
        self.checked.add(name)
        return compiled(*args)

    def compile_and_run(self, step: Step, name: tuple[str, Any, Any], repeats: str | None, *args: Any) -> Any:
        """Compile a step and call it; one that cannot be compiled runs eagerly from now on."""
        start, same = time.perf_counter(), self.of_other_size(name)
        if same is None:
            logger.warning("Compiling `%s` for %s: once for this shape, then kept in torch's cache.", *name[:2])
        makes = (*self.cuts(repeats, step, *args), compile_step) if same is None else (lambda *_: same, compile_step)
        try:
            for make in makes:
                compiled = self.kept.steps[name] = make(step, self.config)
                try:
                    return compiled(*args)
                except COMPILE_ERRORS as error:  # Raised before anything ran but layers, which write the same again.
                    reason = str(error).strip().partition("\n")[0]
            self.note_failure(step, reason)
            self.kept.steps[name] = step
            return step(*args)
        except BaseException:
            self.kept.steps.pop(name, None)
            raise
        finally:
            self.compile_seconds += time.perf_counter() - start

    def of_other_size(self, name: tuple[str, Any, Any]) -> Callable[..., Any] | None:
        """Return the same step of caches of another size, if it is compiled for any."""
        if not self.serves_any_size:
            return None
        step, shape, kind = name
        alike = [
            compiled
            for (other, its_shape, its_kind), compiled in self.kept.steps.items()
            if other == step and its_kind == kind and without_sizes(its_shape) == without_sizes(shape)
        ]
        return next((compiled for compiled in alike if alike.count(compiled) < MOST_SIZES), None)

    def note_failure(self, step: Step, reason: str) -> None:
        logger.warning("`%s` cannot be compiled (%s); it runs without torch.compile.", step.__name__, reason)
        self.kept.failure = reason

    def cuts(self, repeats: str | None, step: Step, *args: Any) -> tuple[Callable[..., Any], ...]:
        """Return the ways to compile a step in parts."""
        if self.config.backend == CAPTURE:
            return (lambda step, config: CapturedStep(step, self.device, partial(self.note_failure, step)),)
        if self.config.fullgraph or repeats is None:
            return ()
        if repeats == "depths":
            return (DepthwiseStep,)
        if repeats == "moves":
            return (UnmovedStep,)
        return (LayeredStep,) if self.can_cut(step, *args) else ()

    def can_cut(self, step: Step, model: CachedModel, *args: Any) -> bool:
        """Return whether one layer of a model may be compiled for all; tried once, eagerly."""
        key = step.__name__, self.kind
        if key not in self.kept.can_cut:
            cut = cut_of(model)
            self.kept.can_cut[key] = cut is not None and cut.check(step, *args)
        return self.kept.can_cut[key]


def without_sizes(shape: Any) -> tuple[tuple[str, Any], ...]:
    """Return a shape without the sizes of caches."""
    return tuple(part for part in shape if part[0] not in ("draft cache", "target cache"))


class LayeredStep:
    """A compiled step whose decoder layers share a graph, with one for what is before them and one for what is after.

    Compiling takes as long for two layers as for eighty. `CompileConfig(fullgraph=True)` compiles a step as a whole.
    """

    def __init__(self, step: Step, config: CompileConfig):
        self.step, self.code = step, own_code(run_layer)
        self.parts = [compile_step(before_layers, config), compiled_code(self.code, run_layer, config)]
        self.parts.append(compile_step(after_layers, config))

    def __call__(self, model: CachedModel, *args: Any) -> Any:
        return self.run(model, None, *args)

    def run_again(self, model: CachedModel, *args: Any) -> Any:
        """Call the step once more in one call of `generate()`, where layers are as they were."""
        return self.run(model, self.unguarded_layer(), *args)

    def run(self, model: CachedModel, next_layer: Step | None, *args: Any) -> Any:
        cut = cut_of(model)
        if cut is None:
            return self.step(model, *args)
        return cut.call(self.step, *self.parts, *args, next_layer_of=next_layer)

    def unguarded_layer(self) -> Step | None:
        """Return the compiled layer without the guards that are checked at every call, if one graph serves all.

        They look at every module and parameter of a layer, which takes longer than small kernels do. The first layer
        of every step keeps them, and so do all in the first step of each call.
        """
        entries = _debug_get_cache_entry_list(self.code)
        return FunctionType(entries[0].code, run_layer.__globals__) if len(entries) == 1 else None


class DepthwiseStep:
    """A step that grows a tree, of which one depth is compiled for all; the rest of it is small, and runs eagerly."""

    def __init__(self, step: Step, config: CompileConfig):
        self.step, self.grow = step, compile_step(grow_depth, config)

    def __call__(self, *args: Any) -> Any:
        return self.step(*args, grow=self.grow)


class UnmovedStep:
    """A compiled step that leaves out what moves in the cache, as two small kernels a layer compile longer than it."""

    def __init__(self, step: Step, config: CompileConfig):
        self.step, self.verify = step, compile_step(verify_step, config)

    def __call__(self, *args: Any) -> Any:
        return self.step(*args, verify=self.verify)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a device; `None` outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def compile_step(step: Any, config: CompileConfig) -> Callable[..., Any]:
    """Compile a function on its own.

    torch caches compiled code by code object and gives up after a few variants of one: every step gets a code object
    of its own, so that any number of shapes can coexist and a call checks the guards of one only.
    """
    return compiled_code(own_code(step), step, config)


def own_code(step: Any) -> CodeType:
    return step.__code__.replace()


def compiled_code(code: CodeType, step: Any, config: CompileConfig) -> Callable[..., Any]:
    """Compile a function of this code, and of the globals and defaults of `step`."""
    own = FunctionType(code, step.__globals__, step.__name__, step.__defaults__, step.__closure__)
    finalize(own, forget_code, code).atexit = False
    return torch.compile(
        own, fullgraph=True, dynamic=False, backend=config.backend, mode=config.mode, options=config.options
    )


def forget_code(code: CodeType) -> None:
    """Free what torch caches for a code object that cannot be called any more.

    Its entries keep the code alive in turn, and guards live as long as what they watch, a function of torch for one:
    without this, for ever.
    """
    guards = [entry.guard_manager for entry in _debug_get_cache_entry_list(code)]
    reset_code(code)
    for guard in guards:
        vars(guard).update(root=None, diff_guard_root=None)


def schedule_for(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    config: GenerationConfig,
    compiled: CompiledSteps | None,
    largest: Choice,
    has_sources: bool,
) -> Schedule:
    """Make the schedule of a call, with the costs that earlier calls of the pair measured."""
    costs = None
    if config.num_assistant_tokens_schedule == "adaptive":
        key = target.dtype, target.device, None if compiled is None else compiled.kind, has_sources
        costs = compile_cache_of(target, draft or target).costs.setdefault(key, RoundCosts())
    return Schedule(largest.num_drafts, largest.tree_size, costs, has_chains=not has_sources)


@contextmanager
def compiled_steps(
    target: PreTrainedModel, draft: PreTrainedModel | None, config: GenerationConfig
) -> Iterator[CompiledSteps | None]:
    """Yield the compiled steps of a call where it asks for them and they are possible; `None` for eager ones."""
    draft = draft or target  # Without a draft the target stands for both.
    kept = acquire_compile_cache(target, draft, config) if wants_compilation(target, config) else None
    if kept is None:
        yield None
        return
    waits = config.compile_config is not None or target.device.type == "cuda"
    steps = CompiledSteps(kept, config.compile_config or default_config(target), target, waits)
    try:
        yield steps
    finally:
        kept.eager_rounds.update(steps.eager_rounds)
        steps.compare()
        kept.evict()
        kept.lock.release()


def default_config(target: PreTrainedModel) -> CompileConfig:
    """Return how rounds are compiled where a call does not say: layer by layer, or the whole model.

    On CUDA the whole model, as calls of one layer after the other were not measured there. Neither do they pay in a
    small model, which compiles soon, and whose layers take no longer than calls of compiled code do.
    """
    is_whole = target.num_parameters() < MIN_PARAMETERS or target.device.type == "cuda"
    return CompileConfig(fullgraph=is_whole and not is_hybrid(target.config))


def wants_compilation(target: PreTrainedModel, config: GenerationConfig) -> bool:
    """Return whether a call asks for compiled rounds, by the options of transformers; on CUDA it need not ask.

    It does for a hybrid target, whose compiled layers were not tried there. On a CPU compiled rounds are
    faster too, but compiling takes longer than most calls do; see `ROUNDS_BEFORE_COMPILING`.
    """
    is_asked = config.cache_implementation == "static" or config.compile_config is not None
    need_not_ask = target.device.type == "cuda" and not is_hybrid(target.config)
    return not config.disable_compile and (is_asked or need_not_ask)


def acquire_compile_cache(
    target: PreTrainedModel, draft: PreTrainedModel, config: GenerationConfig
) -> CompileCache | None:
    """Lock and return the compile cache of a pair; `None`, with a log message, where that is impossible."""
    reason = not_compilable_reason(target, draft)
    if is_hybrid(target.config) and config.compile_config is not None and config.compile_config.backend == CAPTURE:
        reason = f"`{type(target).__name__}` keeps states, which are no static buffers"
    if reason is not None:
        warn_once(f"{reason}; rounds run without torch.compile.")
        return None
    kept = compile_cache_of(target, draft)
    if kept.lock.acquire(blocking=False):
        return kept
    logger.info("Another call uses the compiled rounds of this pair; this one runs without torch.compile.")
    return None


def not_compilable_reason(target: PreTrainedModel, draft: PreTrainedModel, of_rounds: bool = True) -> str | None:
    """Return why the rounds of a pair, or else plain `generate` of the target, cannot be compiled; `None` if they can.

    Layers of a hybrid may be compiled in rounds one by one.
    """
    for model in (target, draft):
        name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        is_offloaded = devices & {"cpu", "disk"} and len(devices) > 1 or "disk" in devices
        if not can_compile(model) and not (of_rounds and is_hybrid(model.config)):
            return f"`{name}` cannot be compiled as one graph"
        if is_offloaded or any(parameter.is_meta for parameter in model.parameters()):
            return f"Parts of `{name}` are offloaded"
        if len(devices) > 1:
            return f"`{name}` is spread over several devices"
        if quantizer is not None and not quantizer.is_compileable:
            return f"The quantization of `{name}` cannot be compiled"
    return "Target and draft are on different devices" if target.device != draft.device else None
