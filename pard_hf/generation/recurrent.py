"""States of recurrent and convolution layers beside the slots of attention layers, for targets that are hybrids.

A slot is overwritten; a state is not: every token that enters it stays. So a layer keeps the state of the text that is
sure, and of each forward the inputs of the tokens that may yet be rejected. After verification each row's state
advances over the row's own tokens ([`HybridCache.commit`]): a round is one target forward, whatever was accepted.

The families' code is used as it is. Convolutions pass their inputs to the cache. Recurrences pass it the last state
only, so the functions that compute them ([`KERNELS`]) are wrapped in the modules of a family when a cache is first
made for one of its models: inside [`recording`] they start from our state, compute the few tokens of a round by
[`recurrences`], and keep what may enter; elsewhere they are what they were. Tokens that are not to enter a state,
padding and rejected ones, are turned off in the inputs: a decay of 1 and an update of 0. To the layers a cache never
has a state, so that they always take their path for several tokens.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..host import EMPTY_LAYERS, PLAIN_LAYERS, cache_layers, cached_columns
from .cache import SlotCache, SlotLayer, Slots
from .recurrences import Advance, delta_rule, state_space

STATE_LAYERS = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
# Most tokens that a recurrence computes without chunks, with weights for each pair.
FEW_TOKENS = 32


class Kernel(NamedTuple):
    """What a function of the families computes: which arguments have a token in dimension 1, and how to skip one."""

    inputs: tuple[str, ...]
    # Those of them that turn a token off where they are 0.
    switches: tuple[str, ...]
    initial_state: str
    asks_for_state: str
    # What computes it over few tokens from a state, with the state after any first ones.
    over_few: Callable[[dict[str, Any], torch.Tensor | None], tuple[torch.Tensor, Advance]]
    # What makes the switches of the arguments, given how many of the tokens are the prompt's.
    prepare: Callable[[dict[str, Any], int], dict[str, Any]] | None = None


def step_sizes(arguments: dict[str, Any], num_prompt: int) -> dict[str, Any]:
    """Compute the step sizes of a state space model as its kernels do inside.

    Plain `generate` limits those of a prompt only: the families' functions for one token take no limit.
    """
    steps, bias = arguments["dt"], arguments.get("dt_bias")
    if bias is not None:
        steps = steps + bias.to(steps.dtype)
    if arguments.get("dt_softplus"):
        steps = torch.nn.functional.softplus(steps)
    limits = arguments.get("dt_limit", (0.0, float("inf")))
    steps = torch.cat([steps[:, :num_prompt].clamp(*limits), steps[:, num_prompt:]], dim=1)
    return arguments | {"dt": steps, "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}


DELTA_RULE = Kernel(
    inputs=("query", "key", "value", "g", "beta"),
    switches=("g", "beta"),
    initial_state="initial_state",
    asks_for_state="output_final_state",
    over_few=delta_rule,
)
# By the name in the families' modules.
KERNELS = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": Kernel(
        inputs=("hidden_states", "dt", "B", "C"),
        switches=("dt",),
        initial_state="initial_states",
        asks_for_state="return_final_states",
        over_few=state_space,
        prepare=step_sizes,
    ),
}
# The `layer` at work while this thread is inside `recording`.
state = threading.local()


class Block(NamedTuple):
    """The queries of a forward: `positions` `[B, q]`, negative for padding, of which the last `num_open` may go.

    The first `num_prompt` are those of the prompt.
    """

    positions: torch.Tensor
    num_open: int
    num_prompt: int

    @property
    def num_sure(self) -> int:
        return self.positions.shape[1] - self.num_open

    def num_padding(self, device: torch.device) -> torch.Tensor:
        """Count the padding, all on the left, of each row."""
        return (self.positions < 0).sum(1).to(device)


class StateLayer(LinearAttentionCacheLayerMixin):
    """The states of one layer: of a convolution its last inputs `[B, C, kernel]`, of a recurrence `[B, ...]`.

    Between forward and [`commit`] it holds the inputs of the last forward's open tokens too.
    """

    is_compileable = False

    def __init__(self, slots: Slots):
        super().__init__()
        self.conv: torch.Tensor | None = None
        self.recurrent: torch.Tensor | None = None
        # Of the last forward: inputs of the convolution behind its state, and where the state ends in each row.
        self.window: tuple[torch.Tensor, torch.Tensor] | None = None
        # Of the last forward: the state of the recurrence as a function of which open tokens enter.
        self.advance: Advance | None = None
        self.block: Block | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """States are allocated when first computed."""

    def update_conv_state(
        self, inputs: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Put each row's state right before its text: `[B, C, kernel + q]` of inputs `[B, C, q]`."""
        if conv_kernel_size is None or self.block is None:
            raise NotImplementedError("Expected the inputs of a convolution with the size of its kernel")
        if self.conv is None:
            self.conv = inputs.new_zeros(*inputs.shape[:2], conv_kernel_size)
        joined = torch.cat([self.conv.to(inputs.dtype), inputs], dim=-1)
        num_padding = self.block.num_padding(inputs.device).unsqueeze(1)
        column = torch.arange(joined.shape[-1], device=inputs.device)
        is_before_text = column < num_padding + conv_kernel_size
        joined = select_columns(joined, torch.where(is_before_text, (column - num_padding).clamp(min=0), column))
        num_sure = self.block.num_sure
        starts = (num_padding - num_sure).clamp(min=0)
        self.window = joined[..., num_sure:].clone(), starts
        return joined

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Check that the state was computed by a function we know: it was kept there."""
        if self.advance is None:
            raise NotImplementedError("Expected a recurrence that can be computed again")
        return recurrent_states

    def run(
        self, kernel: Kernel, function: Callable[..., Any], arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a recurrence from our state, and keep what the tokens that may go would add to it."""
        assert self.block is not None
        num_sure, outputs = self.block.num_sure, []
        is_text = (self.block.positions >= 0).to(arguments[kernel.inputs[0]].device)
        if kernel.prepare is not None:
            arguments = kernel.prepare(arguments, self.block.num_prompt)
        arguments = turned_off(kernel, arguments, is_text)
        if num_sure:
            sure_tokens = sliced(kernel, arguments, 0, num_sure)
            output, self.recurrent = computed_whole(kernel, function, sure_tokens, self.recurrent)
            outputs.append(output)
        output, self.advance = computed(kernel, function, sliced(kernel, arguments, num_sure, None), self.recurrent)
        return torch.cat([*outputs, output], dim=1), self.recurrent

    def commit(self, enters: torch.Tensor) -> None:
        """Advance the states over those open tokens that `enters` `[B, num_open]` names, first ones of each row."""
        if self.window is not None and self.conv is not None:
            inputs, starts = self.window
            columns = starts + enters.to(inputs.device).sum(1, keepdim=True)
            self.conv = select_columns(inputs, columns + torch.arange(self.conv.shape[-1], device=inputs.device))
        if self.advance is not None:
            self.recurrent = self.advance(enters)
        self.window = self.advance = None

    def clear(self) -> None:
        """Begin anew, without a state."""
        self.conv = self.recurrent = self.window = self.advance = self.block = None

    def copy_states(self, other: StateLayer, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Copy the states of rows of another layer; without any yet, make as many rows as `ours`."""
        for name in ("conv", "recurrent"):
            source, mine = getattr(other, name), getattr(self, name)
            if source is None:
                continue
            if mine is None:
                mine = torch.zeros_like(source[(ours * 0).to(source.device)])
            rows = source.index_select(0, theirs.to(source.device))
            setattr(self, name, mine.index_copy(0, ours.to(mine.device), rows))

    def copy_rows(self, other: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        self.copy_states(other, ours, theirs)

    def take_over(self, layer: Any) -> None:
        """Copy the states of a layer of transformers."""
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        # One that recorded its past has more columns.
        self.conv = None if conv is None else conv[..., -layer.conv_kernel_size[0] :].clone()
        self.recurrent = None if recurrent is None else recurrent.clone()

    def copy_to(self, layer: Any) -> None:
        """Give an empty layer of transformers these states."""
        if self.conv is not None:
            layer.update_conv_state(self.conv, conv_kernel_size=self.conv.shape[-1])
        if self.recurrent is not None:
            layer.update_recurrent_state(self.recurrent)


class StateAndSlotLayer(StateLayer, SlotLayer):
    """States, keys and values of a layer that mixes by attention and by a recurrence at once."""

    def __init__(self, slots: Slots):
        StateLayer.__init__(self, slots)
        SlotLayer.__init__(self, slots)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        SlotLayer.lazy_initialization(self, *args, **kwargs)

    def clear(self) -> None:
        StateLayer.clear(self)
        SlotLayer.clear(self)

    def copy_rows(self, other: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        StateLayer.copy_states(self, other, ours, theirs)
        SlotLayer.copy_rows(self, other, ours, theirs)


class HybridCache(SlotCache):
    """A `SlotCache` of which some layers keep a state."""

    def __init__(self, config: PreTrainedConfig, num_slots: int, is_static: bool = False, is_contiguous: bool = False):
        kinds = cache_layers(config)
        self.windows = [
            getattr(kind, "sliding_window", None)
            for kind in kinds
            if isinstance(kind, (*PLAIN_LAYERS, STATE_LAYERS[1]))
        ] or [None]
        self.num_slots = num_slots
        # Whether the next forward begins with tokens of the prompt.
        self.reads_prompt = True
        # Whether every token is the prompt's, as in a plain forward.
        self.is_all_prompt = False
        # Whether the next forward is the first after an earlier call's cache.
        self.is_taken_over = False
        self.slots = Slots(num_slots, num_slots, len(kinds), is_static, is_contiguous)
        Cache.__init__(self, layers=[layer_like(kind, self.slots) for kind in kinds])

    @property
    def state_layers(self) -> list[StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Hide the state: `update_conv_state` puts it before the inputs, of one token too."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Hide the state, and remember which layer asked: its recurrence starts from it in [`StateLayer.run`]."""
        asked_by(self.layers[layer_idx])

    def clear(self) -> None:
        """Zero every entry, in place, and forget every state."""
        super().clear()
        self.reads_prompt, self.is_taken_over = True, False

    def begin(self, positions: torch.Tensor, num_open: int) -> None:
        """Tell the layers what the next forward reads; its last `num_open` queries may be rejected or read again."""
        num_sure = positions.shape[1] - num_open
        if self.is_taken_over and num_sure == 0:  # To plain `generate`, one new token is no prompt.
            self.reads_prompt = False
        self.is_taken_over = False
        num_prompt = num_sure + 1 if self.reads_prompt else 0
        if self.is_all_prompt:
            num_prompt = positions.shape[1]
        for layer in self.state_layers:
            layer.block, layer.window, layer.advance = Block(positions, num_open, num_prompt), None, None

    def prepare(self, positions: torch.Tensor, num_visible: int | None, on_path: torch.Tensor | None = None) -> Any:
        """Set the slots to write and return the mask of attention; see [`SlotCache.prepare`].

        Layers with a state are given none: [`StateLayer`] knows padding by its position.
        """
        mask: Any = super().prepare(positions, num_visible, on_path)
        return {**mask, "linear_attention": None, "conv": None} if isinstance(mask, dict) else mask

    def commit(self, ends: torch.Tensor) -> None:
        """Advance every state over the last forward's text before the positions `ends` `[B]`."""
        for layer in self.state_layers:
            if layer.block is not None:
                positions = layer.block.positions[:, layer.block.num_sure :]
                layer.commit((positions >= 0) & (positions < ends.unsqueeze(1)))
                layer.block = None

    def keep_path(self, roots: torch.Tensor, nodes: torch.Tensor) -> None:
        """Keep everything where it is: the one path there is, a chain, stands at its positions."""

    def copy_rows(self, other: Any, ours: list[int], theirs: list[int]) -> None:
        index = torch.tensor(ours), torch.tensor(theirs)
        self.reads_prompt = other.reads_prompt
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not isinstance(layer, EMPTY_LAYERS):
                layer.copy_rows(source, *index)

    def load(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        super().load(cache, positions)
        self.is_taken_over = True
        for layer, theirs in zip(self.layers, cache.layers, strict=True):
            if isinstance(layer, StateLayer):
                layer.take_over(theirs)

    def append_to(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        """Give a cache of columns the entries at `positions` `[B, length]`, and the states after the last."""
        self.commit(positions[:, -1] + 1)
        super().append_to(cache, positions)
        for layer, theirs in zip(self.layers, cache.layers, strict=True):
            if isinstance(layer, StateLayer):
                layer.copy_to(theirs)


def layer_like(kind: Any, slots: Slots) -> Any:
    """Make the layer of ours for one of transformers' cache."""
    if type(kind) is LinearAttentionAndFullAttentionLayer:
        return StateAndSlotLayer(slots)
    if type(kind) is LinearAttentionLayer:
        return StateLayer(slots)
    return type(kind)() if type(kind) in EMPTY_LAYERS else SlotLayer(slots)


def select_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Select columns `[B, n]` of each row from states `[B, C, length]`."""
    return states.gather(2, columns.unsqueeze(1).expand(-1, states.shape[1], -1))


def sliced(kernel: Kernel, arguments: dict[str, Any], start: int, stop: int | None) -> dict[str, Any]:
    """Select tokens from the inputs of a kernel."""
    return arguments | {name: arguments[name][:, start:stop] for name in kernel.inputs}


def turned_off(kernel: Kernel, arguments: dict[str, Any], enters: torch.Tensor) -> dict[str, Any]:
    """Turn off in a kernel's inputs the tokens that do not enter, by `enters` `[B, n]`."""
    switches = {name: arguments[name] for name in kernel.switches}
    stays = {name: ~enters.view(*enters.shape, *[1] * (values.dim() - 2)) for name, values in switches.items()}
    return arguments | {name: values.masked_fill(stays[name], 0) for name, values in switches.items()}


def computed(
    kernel: Kernel, function: Callable[..., Any], arguments: dict[str, Any], initial: torch.Tensor | None
) -> tuple[torch.Tensor, Advance]:
    """Compute a recurrence: outputs of its tokens, and the state after any first ones.

    More than `FEW_TOKENS` go through the family's own function, which runs again for a state in between.
    """
    if is_few(kernel, arguments):
        return kernel.over_few(arguments, initial)
    output, _ = by_family(kernel, function, arguments, initial)

    def advance(enters: torch.Tensor) -> torch.Tensor:
        entered = turned_off(kernel, arguments, enters.to(output.device))
        return by_family(kernel, function, entered, initial)[1]

    return output, advance


def computed_whole(
    kernel: Kernel, function: Callable[..., Any], arguments: dict[str, Any], initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a recurrence: outputs of its tokens, and the state after all of them."""
    if not is_few(kernel, arguments):
        return by_family(kernel, function, arguments, initial)
    output, advance = kernel.over_few(arguments, initial)
    return output, advance(torch.ones(output.shape[:2], dtype=torch.bool, device=output.device))


def is_few(kernel: Kernel, arguments: dict[str, Any]) -> bool:
    return arguments[kernel.inputs[0]].shape[1] <= FEW_TOKENS


def by_family(
    kernel: Kernel, function: Callable[..., Any], arguments: dict[str, Any], initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a family's own function: outputs, and the state after the last token."""
    output, final = function(**arguments, **{kernel.initial_state: initial, kernel.asks_for_state: True})
    return output, final


def recording_version(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a kernel: inside [`recording`] it computes from the state of the layer that asked for it."""
    kernel, signature = KERNELS[name], inspect.signature(function)

    @functools.wraps(function)
    def recording_kernel(*args: Any, **kwargs: Any) -> Any:
        layer = getattr(state, "layer", None)
        if layer is None:
            return function(*args, **kwargs)
        state.layer = None
        bound = signature.bind(*args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        for name in (kernel.initial_state, kernel.asks_for_state):
            arguments.pop(name, None)
        return layer.run(kernel, function, arguments)

    recording_kernel.records = True  # type: ignore[attr-defined]
    return recording_kernel


def install(model: PreTrainedModel) -> None:
    """Wrap the kernels in the modules of a model's code, once."""
    for owner in {type(module) for module in model.modules()}:
        names = inspect.unwrap(owner.forward).__globals__
        for name in KERNELS.keys() & names.keys():
            if not hasattr(names[name], "records"):
                names[name] = recording_version(name, names[name])


@contextmanager
def recording() -> Iterator[None]:
    """Let kernels that this thread runs inside keep their inputs, for the layers that ask for a state."""
    state.layer = None
    try:
        yield
    finally:
        state.layer = None


def asked_by(layer: StateLayer) -> None:
    """Remember which layer computes its recurrence next, in this thread."""
    state.layer = layer


def is_hybrid(config: PreTrainedConfig) -> bool:
    """Return whether a layer keeps a state, by the cache that transformers makes for a config."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache_layers(config))


def cache_for(
    model: PreTrainedModel, num_slots: int, is_static: bool = False, serves_any_size: bool = False
) -> SlotCache:
    """Make an empty cache for a model, with states where its layers keep them; see [`SlotCache.of`]."""
    if not is_hybrid(model.config):
        return SlotCache.of(model, num_slots, is_static, serves_any_size)
    install(model)
    return HybridCache.of(model, num_slots, is_static, serves_any_size)


def can_take_over(config: PreTrainedConfig, past: Cache, mask: torch.Tensor) -> bool:
    """Return whether the states of a caller's cache are those of the text under a 2-D mask `[B, length]`.

    The text must go on without padding, which plain `generate` lets into states; and keys must tell its length.
    """
    kinds = cache_layers(config)
    if [type(layer) for layer in past.layers] != [type(kind) for kind in kinds]:
        return False
    num_past = cached_columns(past)
    has_states = any(
        any(layer.has_previous_state.values()) for layer in past.layers if isinstance(layer, STATE_LAYERS)
    )
    return has_states == (num_past > 0) and (num_past == 0 or bool(mask[:, num_past:].all()))


def unsupported_states(config: PreTrainedConfig) -> str | None:
    """Return why the states of a config's layers cannot be kept, `None` where they can."""
    if not hasattr(Cache, "get_conv_state"):
        return "This version of transformers has no interface for the states of a cache; 5.23 has"
    for layer in cache_layers(config):
        if type(layer) not in (*PLAIN_LAYERS, *STATE_LAYERS, *EMPTY_LAYERS):
            return f"A `{type(layer).__name__}` keeps more than keys, values and one state"
        if isinstance(layer, STATE_LAYERS) and layer.number_of_states != 1:
            return f"A layer keeps {layer.number_of_states} states"
    return None
