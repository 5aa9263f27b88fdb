"""A static cache whose batch rows have their own length: slot = logical position.

Every row writes at its own positions, and a query sees the slots up to its own position (and inside the window, for
sliding layers). Rejected entries are overwritten by the next round before anything can see them, so nothing is ever
cropped or realigned, and every shape is fixed. Padding goes to one spare slot that no query sees.

Nodes of a tree are the exception: several share a position, so they take the slots after the text one after the
other, and those on the accepted path move to the slots of their positions ([`SlotCache.keep_path`]).

The one invariant: when a query at position p runs, slots 0..p of its row hold the entries of its own text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..host import EMPTY_LAYERS, PLAIN_LAYERS, cache_layers, input_device, uses_attention_interface


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer, `None` for full attention, as the cache of transformers has it.

    Raises:
        ValueError: A layer attends in a way a slot cannot express (recurrent, chunked, compressed).
    """
    name = type(config).__name__
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        # transformers keeps chunks in sliding layers, but what a query sees depends on where its chunk begins.
        raise ValueError(f"Chunked attention in `{name}` has no window to mask by")
    windows: list[int | None] = []
    for layer in cache_layers(config):
        if type(layer) not in PLAIN_LAYERS:
            raise ValueError(f"A `{type(layer).__name__}` in `{name}` keeps more than keys and values")
        windows.append(layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None)
    return windows


@dataclass
class Slots:
    """State that a cache shares with its layers, which hold no reference to it: a cycle would outlive the call."""

    num_slots: int  # Positions a row may use, without the spare slot.
    num_visible: int | None  # Slots that attention reads; `None` for all, by the shapes of the buffers.
    num_layers: int
    is_static: bool  # Whether compiled code may rely on the buffers' addresses.
    is_contiguous: bool = False  # Whether attention is given copies laid out as a growing cache, for code that asks.
    serves_any_size: bool = False  # Whether compiled code is to serve caches of other sizes as well.
    flat_rows: torch.Tensor | None = None  # Where each query of the next forward is written, `[B * query_length]`.


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, stored as `[batch_size * (num_slots + 1), num_heads, head_dim]`.

    Token-major storage makes a write of rows of different lengths a single `index_copy_`; attention reads a transposed
    view.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states of shape `[batch_size, num_heads, any length, head_dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self.allocate(key_states), self.allocate(value_states)
        self.is_initialized = True

    def allocate(self, states: torch.Tensor) -> torch.Tensor:
        batch_size, num_heads, _, head_dim = states.shape
        shape = (batch_size * (self.slots.num_slots + 1), num_heads, head_dim)
        try:
            # Zeros, not empty memory: a masked slot has weight 0, and 0 times a stray NaN would be NaN. Ordinary
            # tensors: one made in inference mode could not be written to by a later call outside it.
            with torch.inference_mode(False):
                buffer = torch.zeros(shape, dtype=states.dtype, device=states.device)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            size = 2 * self.slots.num_layers * shape[0] * num_heads * head_dim * states.element_size()
            raise torch.OutOfMemoryError(
                f"Expected {size / 2**30:.2f} GiB for a cache of {batch_size} x {self.slots.num_slots} tokens on "
                f"{states.device}, but memory ran out. Lower the batch size, `max_new_tokens` or the prompt's length."
            ) from error
        if self.slots.is_static:
            torch._dynamo.mark_static_address(buffer)
        if self.slots.serves_any_size:
            torch._dynamo.maybe_mark_dynamic(buffer, 0)
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch_size, num_heads, query_length, head_dim]` in the prepared slots; return all visible ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.slots.flat_rows is not None, "`prepare` comes before a forward"
        index = self.slots.flat_rows.to(self.device)
        self.keys, keys = self.write(self.keys, index, key_states)
        self.values, values = self.write(self.values, index, value_states)
        return keys, values

    def write(
        self, buffer: torch.Tensor, index: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states into a buffer, in place where their types agree; return it and a view of its visible slots.

        Under autocast keys and values may differ in type, and two calls on one cache may: the wider one is kept, as by
        `DynamicCache`, which concatenates.
        """
        dtype = torch.promote_types(buffer.dtype, states.dtype)
        buffer = buffer.to(dtype).index_copy_(0, index, states.transpose(1, 2).flatten(0, 1).to(dtype))
        end = -1 if self.slots.num_visible is None else self.slots.num_visible  # The spare slot is the last.
        visible = buffer.view(len(states), -1, *buffer.shape[1:])[:, :end].transpose(1, 2)
        return buffer, visible.contiguous() if self.slots.is_contiguous else visible

    def by_row(self, buffer: torch.Tensor) -> torch.Tensor:
        """View a buffer as `[batch_size, num_slots + 1, num_heads, head_dim]`."""
        return buffer.view(-1, self.slots.num_slots + 1, *buffer.shape[1:])

    def copy_rows(self, other: SlotLayer, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Copy the slots both have from rows of another layer; without memory yet, allocate as many rows as `ours`."""
        if not other.is_initialized:
            return
        length = min(self.slots.num_slots, other.slots.num_slots)
        if not self.is_initialized:
            self.lazy_initialization(*(other.by_row(s)[ours * 0].transpose(1, 2) for s in (other.keys, other.values)))
        for mine, source in ((self.keys, other.keys), (self.values, other.values)):
            rows = other.by_row(source)[:, :length].index_select(0, theirs.to(self.device))
            self.by_row(mine)[:, :length].index_copy_(0, ours.to(self.device), rows)

    def clear(self) -> None:
        """Zero every entry, in place."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.num_slots if self.slots.num_visible is None else self.slots.num_visible, 0

    def get_seq_length(self) -> int:
        # Rows differ in length, so positions and masks are handed to the model; nothing may derive them from here.
        return 0

    def get_max_length(self) -> int:
        return self.slots.num_slots


class SlotCache(Cache):
    """A cache for one model, shared by rows of different lengths, of `num_slots` positions each; see [`Slots`]."""

    # Every slot's number, `[num_slots]`, where compiled code reads the size from it.
    numbers: torch.Tensor | None = None

    def __init__(self, config: PreTrainedConfig, num_slots: int, is_static: bool = False, is_contiguous: bool = False):
        self.windows, self.num_slots = attention_windows(config), num_slots
        self.slots = Slots(num_slots, num_slots, len(self.windows), is_static, is_contiguous=is_contiguous)
        super().__init__(layers=[SlotLayer(self.slots) for _ in self.windows])

    @classmethod
    def of(
        cls, model: PreTrainedModel, num_slots: int, is_static: bool = False, serves_any_size: bool = False
    ) -> SlotCache:
        """Make an empty cache for a model, laid out as its attention needs it."""
        cache = cls(model.config, num_slots, is_static, is_contiguous=not uses_attention_interface(model))
        if serves_any_size:
            cache.slots.serves_any_size = True
            with torch.inference_mode(False):
                cache.numbers = torch.arange(num_slots, device=input_device(model))
            torch._dynamo.maybe_mark_dynamic(cache.numbers, 0)
        return cache

    @property
    def has_memory(self) -> bool:
        """Return whether anything was ever written."""
        return all(layer.is_initialized for layer in self.layers)

    def clear(self) -> None:
        """Zero every entry, in place."""
        for layer in self.layers:
            if not isinstance(layer, EMPTY_LAYERS):
                layer.clear()

    def prepare(
        self, positions: torch.Tensor, num_visible: int | None, on_path: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Set the slots that the next forward writes, and return its attention mask.

        Args:
            positions (`torch.LongTensor` of shape `(batch_size, query_length)`):
                Logical position of each query; negative for padding.
            num_visible (`int`, *optional*):
                Slots read by attention, all by default; every one that is written must lie below it.
            on_path (`torch.BoolTensor` of shape `(batch_size, N + 1, N + 1)`, *optional*):
                The last N queries are nodes of a tree whose root is the query before them: which of root and nodes
                each of them may see. They see the text as the root does.

        Returns:
            Boolean mask `[batch_size, 1, query_length, num_visible]`, True = attend; for models that mix full and
            sliding layers a dict of two such masks under the names of transformers.
        """
        # A padding query attends to slot 0, not to nothing: an empty softmax is NaN.
        query = positions.clamp(min=0)[:, None, :, None]
        position = self.first_slots(num_visible, positions.device)
        if on_path is None:
            slots, causal = positions, position <= query
        else:
            slots, position, causal = tree_slots(positions, on_path, position)
        self.slots.flat_rows = self.storage_index(torch.where(slots < 0, self.size, slots))
        self.slots.num_visible = num_visible
        masks = {window: causal if window is None else causal & (position > query - window) for window in self.windows}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {"full_attention" if w is None else "sliding_attention": mask for w, mask in masks.items()}

    def storage_index(self, slots: torch.Tensor) -> torch.Tensor:
        """Compute the indices in a layer's storage, `[B * n]`, of slots `[B, n]` of each row."""
        return (torch.arange(len(slots), device=slots.device).unsqueeze(1) * (self.size + 1) + slots).flatten()

    @property
    def size(self) -> int:
        """Return the number of slots, where compiled code serves several from the shape of a buffer."""
        return self.num_slots if self.numbers is None else self.numbers.shape[0]

    def first_slots(self, count: int | None, device: torch.device) -> torch.Tensor:
        """Return the numbers of the first slots, or of all."""
        if count is None and self.numbers is not None:
            return self.numbers
        return torch.arange(self.num_slots if count is None else count, device=device)

    def keep_path(self, roots: torch.Tensor, nodes: torch.Tensor) -> None:
        """Move the nodes of a path to the slots of their positions: one gather a layer, nothing else moves.

        `roots` `[B]` are positions, `nodes` `[B, K]` of each depth are counted from 1. What is void moves as well, to
        slots that are written again before anything sees them.
        """
        roots = roots.unsqueeze(1)
        sources = self.storage_index(roots + nodes)
        targets = self.storage_index(roots + torch.arange(1, nodes.shape[1] + 1, device=roots.device))
        for layer in self.layers:
            source, target = sources.to(layer.device), targets.to(layer.device)
            for buffer in (layer.keys, layer.values):
                buffer.index_copy_(0, target, buffer.index_select(0, source))

    def copy_rows(self, other: SlotCache, ours: list[int], theirs: list[int]) -> None:
        """Copy rows of another cache of the same model into these rows; the caches may differ in size."""
        index = torch.tensor(ours), torch.tensor(theirs)
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.copy_rows(source, *index)

    def load(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        """Take over an earlier call's entries, whose columns have `positions` `[B, length]`, negative for padding."""
        for layer, source in zip(self.layers, cache.layers, strict=True):
            if not isinstance(layer, SlotLayer):
                continue
            # A sliding layer keeps only its last columns; no later query sees the others.
            kept = source.keys.shape[-2]
            if kept:
                self.prepare(positions[:, positions.shape[1] - kept :], self.num_slots)
                layer.update(source.keys, source.values)

    def append_to(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        """Append the entries at `positions` `[B, length]`, zeros where negative, to a cache of columns."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, SlotLayer):
                continue
            columns = positions.to(layer.device)[:, None, :, None]
            states = (layer.by_row(buffer).transpose(1, 2) for buffer in (layer.keys, layer.values))
            gathered = (s.gather(2, columns.clamp(min=0).expand(-1, s.shape[1], -1, s.shape[3])) for s in states)
            cache.update(*(entries * (columns >= 0) for entries in gathered), index)


def tree_slots(
    positions: torch.Tensor, on_path: torch.Tensor, slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place a tree after the text; arguments as in [`SlotCache.prepare`], and `slot` counts the visible slots.

    Returns:
        Slots `[B, q]` of the queries, positions `[B, 1, 1, num_visible]` in the slots, and the mask
        `[B, 1, q, num_visible]`, windows aside.
    """
    num_nodes, num_text = on_path.shape[1] - 1, positions.shape[1] - on_path.shape[1] + 1
    root = positions[:, num_text - 1 : num_text]
    slots = torch.cat([positions[:, :num_text], root + torch.arange(1, num_nodes + 1, device=positions.device)], dim=1)
    # The node, if any, that each slot holds.
    node = slot - root
    is_node = (node >= 1) & (node <= num_nodes)
    node = node.clamp(min=1, max=num_nodes)
    position = torch.where(is_node, positions[:, num_text:].gather(1, node - 1), slot)
    sees_text = slot <= torch.minimum(positions, root).clamp(min=0).unsqueeze(2)
    # Text sees of the tree what its root sees, which is no node.
    seer = torch.arange(1 - num_text, num_nodes + 1, device=positions.device).clamp(min=0)
    sees_node = on_path[:, seer].gather(2, node.unsqueeze(1).expand(-1, len(seer), -1)) & is_node.unsqueeze(1)
    return slots, position[:, None, None], (sees_text | sees_node).unsqueeze(1)
