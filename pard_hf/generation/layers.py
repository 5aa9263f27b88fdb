"""Cut a step at the decoder layers of its model, so that one compiled layer serves them all.

Decoder layers are alike: the same code over other weights and another part of the cache. What comes before them and
what comes after are graphs of their own, made of the same step over a model whose layers are stand-ins: these note
what each layer is given, and give what the last layer computed. What a graph does not need, its compiler drops.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .batch import CachedModel, to_host
from .cache import SlotCache, SlotLayer
from .kernels import StreamedLinear
from .recurrent import asked_by, recording

logger = logging.getLogger(__name__)
Step = Callable[..., Any]


@dataclass
class Visit:
    """One pass through the stand-ins: what each was given, and the states that the last layer computed, if known."""

    calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    flat_rows: torch.Tensor | None = None
    result: torch.Tensor | None = None


class StandIn(torch.nn.Module):
    """Stand for a decoder layer; models ask layers for plain attributes too, such as the kind of their attention."""

    def __init__(self, layer: torch.nn.Module, cache: SlotCache, visit: Visit):
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | str)}
        self.__dict__.update(plain)
        self.slots, self.visit = cache.slots, visit

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.visit.calls.append((hidden_states, args, kwargs))
        self.visit.flat_rows = self.slots.flat_rows
        return hidden_states if self.visit.result is None else self.visit.result


class OneLayerCache(Cache):
    """Hold one layer of a cache. The layer's number goes unread, as compiled code would serve that number only."""

    def __init__(self, layer: Any):
        super().__init__(layers=[layer])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer: SlotLayer = self.layers[0]
        return layer.update(key_states, value_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Hide the state, as [`HybridCache`] does."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        asked_by(self.layers[0])

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layers[0].update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layers[0].update_recurrent_state(recurrent_states, *args, **kwargs)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class CutModel:
    """A model and its cache, cut at the decoder layers: `around` is the model with stand-ins for them."""

    def __init__(self, whole: CachedModel, name: str, layers: torch.nn.ModuleList):
        self.whole, self.cache, self.visit = whole, whole.cache, Visit()
        self.layers = [(layer, OneLayerCache(part)) for layer, part in zip(layers, self.cache.layers, strict=True)]
        stand_ins = torch.nn.ModuleList(StandIn(layer, self.cache, self.visit) for layer in layers)
        self.around = copy.copy(whole)
        self.around.model, self.around.has_layers = with_module(whole.model, name, stand_ins), False

    def call(
        self, step: Step, before: Step, layer_of: Step, after: Step, *args: Any, next_layer_of: Step | None = None
    ) -> Any:
        """Call a step in three parts, functions as [`before_layers`], [`run_layer`] and [`after_layers`].

        Layers after the first may be run by another function, `next_layer_of`.
        """
        calls, flat_rows = before(step, self.around, self.visit, *args)
        hidden, slots = calls[0][0], self.cache.slots
        if slots.serves_any_size:
            mark_masks(calls)
        slots.flat_rows = flat_rows
        try:
            with recording():
                for (layer, cache), (_, given, named) in zip(self.layers, calls, strict=True):
                    given = tuple(cache if value is self.cache else value for value in given)
                    named = {name: cache if value is self.cache else value for name, value in named.items()}
                    hidden = layer_of(layer, hidden, given, named, self.whole.is_streamed)
                    layer_of = next_layer_of or layer_of
        finally:
            slots.flat_rows = None
        return after(step, self.around, self.visit, hidden, *args)

    def check(self, step: Step, *args: Any) -> bool:
        """Return whether a step in three parts, run eagerly, returns what it returns whole.

        Between its layers a model may do what no stand-in sees: scale the states, or hand on more than these.
        """
        try:
            parts = self.call(step, before_layers, run_layer, after_layers, *args)
        except Exception as error:  # Of any kind, as it comes from the code of the model.
            logger.info("`%s` cannot be cut at the layers of `%s`: %s", step.__name__, type(self.whole.model), error)
            return False
        return is_same(parts, step(self.whole, *args), torch.finfo(self.whole.model.dtype).eps ** 0.5)


def is_same(one: Any, other: Any, tolerance: float) -> bool:
    """Return whether two results are equal up to rounding: tensors, `None` or tuples of these."""
    if isinstance(one, tuple):
        return all(is_same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if one is None:
        return other is None
    is_float = one.is_floating_point()
    is_equal = torch.isclose(one, other, tolerance, tolerance, equal_nan=True) if is_float else one == other
    return bool(to_host(is_equal.all())())


def mark_masks(calls: list[Any]) -> None:
    """Let masks `[B, 1, q, num_slots]` that layers are given have any number of slots."""
    for _, given, named in calls:
        for value in (*given, *named.values()):
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                torch._dynamo.maybe_mark_dynamic(value, 3)


def before_layers(step: Step, model: CachedModel, visit: Visit, *args: Any) -> tuple[list[Any], torch.Tensor | None]:
    """Return what a step gives each layer, `(hidden_states, args, kwargs)`, and where the cache is written."""
    visit.calls, visit.result, model.begins = [], None, True
    step(model, *args)
    calls, flat_rows = visit.calls, visit.flat_rows
    visit.calls, visit.flat_rows = [], None
    return calls, flat_rows


def run_layer(
    layer: Any, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], is_streamed: bool = False
) -> torch.Tensor:
    """Run a decoder layer over hidden states `[B, q, hidden_size]`; for `is_streamed` see [`StreamedLinear`]."""
    if not is_streamed:
        return layer(hidden_states, *args, **kwargs)
    with StreamedLinear():
        return layer(hidden_states, *args, **kwargs)


def after_layers(step: Step, model: CachedModel, visit: Visit, hidden_states: torch.Tensor, *args: Any) -> Any:
    """Return what a step returns when its last layer has computed `hidden_states` `[B, q, hidden_size]`."""
    visit.result, model.begins = hidden_states, False
    result = step(model, *args)
    visit.calls, visit.flat_rows, visit.result = [], None, None
    return result


def cut_of(whole: CachedModel) -> CutModel | None:
    """Return a model cut at its decoder layers, kept as long as its cache is the same one.

    `None` unless it has exactly one list of layers, one for each of its cache.
    """
    if whole.cut is None or whole.cut.cache is not whole.cache:
        whole.cut = cut(whole)
    return whole.cut


def cut(whole: CachedModel) -> CutModel | None:
    lists = [(name, module) for name, module in whole.model.named_modules() if is_layer_list(module)]
    if len(lists) != 1 or len(lists[0][1]) != len(whole.cache.layers):
        return None
    return CutModel(whole, *lists[0])


def is_layer_list(module: torch.nn.Module) -> bool:
    """Return whether a module is a list of decoder layers."""
    is_list = isinstance(module, torch.nn.ModuleList)
    return is_list and all(isinstance(layer, GradientCheckpointingLayer) for layer in module.children())


def with_module(model: Any, name: str, module: torch.nn.Module) -> Any:
    """Copy a model, over the same tensors and submodules, with one of these replaced."""
    first, _, rest = name.partition(".")
    twin: Any = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model._modules)
    twin._modules[first] = with_module(model._modules[first], rest, module) if rest else module
    return twin
