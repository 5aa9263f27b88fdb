"""The static cache whose rows have their own length: slot = logical position.

Every row writes at its own positions, and a query sees the slots up to its own position (and inside the window, for
sliding layers). Rejected entries are overwritten by the next round before anything can see them, so nothing is ever
cropped or realigned, and every shape is fixed. Padding goes to one spare slot that no query sees.

Only branches are an exception: several of their nodes share a position, so they stand in the slots behind the text one
after the other, and those on the path that is kept move to the slots of their positions (`keep_path`).

Knows nothing of drafts and tokens. The one invariant: when a query at position p runs, slots 0..p of its row hold the
entries of its own text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..host import looks_attention_up


@dataclass
class Slots:
    """Where the next forward writes and how far it reads: what a cache and its layers share.

    Layers know this and not their cache. Were they to point back at it, a finished call's keys and values would stay
    until the garbage collector comes by.

    Args:
        num_slots (`int`):
            Positions a row may use, without the spare slot.
        num_visible (`int`):
            Slots that attention reads.
        num_layers (`int`):
            Layers that share this.
        is_static (`bool`):
            Whether compiled code may rely on the buffers' addresses.
        is_contiguous (`bool`):
            Whether attention is given copies in the order that a growing cache has, for code that asks for it.
        flat_rows (`torch.LongTensor` of shape `(batch_size * query_length,)`, *optional*):
            Where each query of the next forward is written.
    """

    num_slots: int
    num_visible: int
    num_layers: int
    is_static: bool
    is_contiguous: bool = False
    flat_rows: torch.Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, stored as `[batch_size * num_slots, num_heads, head_dim]`.

    Token-major storage makes a write of ragged rows a single `index_copy_`; attention reads a transposed view.
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
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch_size, num_heads, query_length, head_dim]` where the cache said; return all visible slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.slots.flat_rows is not None, "`prepare` comes before a forward"
        rows = self.slots.flat_rows.to(self.device)
        self.keys = self.written(self.keys, rows, key_states)
        self.values = self.written(self.values, rows, value_states)
        return self.read(self.keys), self.read(self.values)

    def written(self, buffer: torch.Tensor, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Write states into a buffer, in place where their types agree.

        Under autocast keys and values may differ in type, and two calls on one cache may: the wider one is kept, as by
        `DynamicCache`, which concatenates.
        """
        dtype = torch.promote_types(buffer.dtype, states.dtype)
        buffer = buffer.to(dtype)
        return buffer.index_copy_(0, rows, states.transpose(1, 2).flatten(0, 1).to(dtype))

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """View stored `states` as `[batch_size, num_heads, num_visible, head_dim]`."""
        visible = self.by_row(states)[:, : self.slots.num_visible].transpose(1, 2)
        return visible.contiguous() if self.slots.is_contiguous else visible

    def by_row(self, states: torch.Tensor) -> torch.Tensor:
        """View stored `states` as `[batch_size, num_slots + 1, num_heads, head_dim]`."""
        return states.view(-1, self.slots.num_slots + 1, *states.shape[1:])

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

    def move_rows(self, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        """Copy entries from the places `theirs` to `ours`, all at once."""
        for states in (self.keys, self.values):
            states.index_copy_(0, ours, states.index_select(0, theirs))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.num_visible, 0

    def get_seq_length(self) -> int:
        # Rows differ in length, so positions and masks are handed to the model; nothing may derive them from here.
        return 0

    def get_max_length(self) -> int:
        return self.slots.num_slots


class SlotCache(Cache):
    """A cache for one model, shared by rows of different lengths.

    Args:
        config ([`PreTrainedConfig`]):
            Configuration of the model that attends over it.
        num_slots (`int`):
            Positions a row may use; one spare slot is added for padding.
        is_static (`bool`, *optional*, defaults to `False`):
            Whether compiled code may rely on the buffers' addresses.
        is_contiguous (`bool`, *optional*, defaults to `False`):
            Whether attention is given contiguous copies.
    """

    def __init__(self, config: PreTrainedConfig, num_slots: int, is_static: bool = False, is_contiguous: bool = False):
        self.windows = attention_windows(config)
        self.slots = Slots(num_slots, num_slots, len(self.windows), is_static, is_contiguous)
        super().__init__(layers=[SlotLayer(self.slots) for _ in self.windows])

    @classmethod
    def of(cls, model: PreTrainedModel, num_slots: int, is_static: bool = False) -> SlotCache:
        """Make an empty cache for a model, laid out as its attention needs it."""
        return cls(model.config, num_slots, is_static, is_contiguous=not looks_attention_up(model))

    @property
    def num_slots(self) -> int:
        return self.slots.num_slots

    def copy_rows(self, other: SlotCache, ours: list[int], theirs: list[int]) -> None:
        """Copy rows of another cache of the same model into these rows; the caches may differ in size."""
        index = torch.tensor(ours), torch.tensor(theirs)
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.copy_rows(source, *index)

    @property
    def has_memory(self) -> bool:
        """Whether anything was ever written."""
        return all(layer.is_initialized for layer in self.layers)

    def clear(self) -> None:
        """Forget every entry, in place."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()

    def prepare(
        self, positions: torch.Tensor, num_visible: int, on_path: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Say where the next forward writes, and return the attention mask it needs.

        Args:
            positions (`torch.LongTensor` of shape `(batch_size, query_length)`):
                Logical position of each query; negative for padding.
            num_visible (`int`):
                Slots read by attention; every one that is written must lie below it.
            on_path (`torch.BoolTensor` of shape `(batch_size, N + 1, N + 1)`, *optional*):
                The last N queries are nodes of a tree whose root is the query before them: which of root and nodes
                each of them may see. They see the text as the root does.

        Returns:
            Boolean mask `[batch_size, 1, query_length, num_visible]`, True = attend; for models that mix full and
            sliding layers a dict of two such masks under the names the host uses.
        """
        # A padding query attends to slot 0, not to nothing: an empty softmax is NaN.
        query = positions.clamp(min=0)[:, None, :, None]
        position = torch.arange(num_visible, device=positions.device)
        if on_path is None:
            slots, causal = positions, position <= query
        else:
            slots, position, causal = branching(positions, on_path, position)
        self.slots.flat_rows = self.rows_of(torch.where(slots < 0, self.num_slots, slots)).flatten()
        self.slots.num_visible = num_visible
        masks = {window: causal if window is None else causal & (position > query - window) for window in self.windows}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {"full_attention" if w is None else "sliding_attention": mask for w, mask in masks.items()}

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots `(batch_size, n)` of each row of the batch lie in a layer's storage."""
        return torch.arange(len(slots), device=slots.device).unsqueeze(1) * (self.num_slots + 1) + slots

    def keep_path(self, roots: torch.Tensor, nodes: torch.Tensor) -> None:
        """Move the nodes of a path to the slots of their positions: one gather a layer, nothing else moves.

        Args:
            roots (`torch.LongTensor` of shape `(batch_size,)`):
                Position of each tree's root.
            nodes (`torch.LongTensor` of shape `(batch_size, K)`):
                The node of each depth, counted from 1. What is void moves as well, to where nothing looks before it is
                written again.
        """
        roots = roots.unsqueeze(1)
        theirs = self.rows_of(roots + nodes).flatten()
        ours = self.rows_of(roots + torch.arange(1, nodes.shape[1] + 1, device=roots.device)).flatten()
        for layer in self.layers:
            layer.move_rows(theirs.to(layer.device), ours.to(layer.device))

    def load(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        """Take over the entries of an earlier call.

        Args:
            cache ([`DynamicCache`]):
                Cache of the same model over `past_length` columns.
            positions (`torch.LongTensor` of shape `(batch_size, past_length)`):
                Logical position of each column; negative for padding.
        """
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            # A sliding layer keeps only its last columns; no later query sees the others.
            kept = theirs.keys.shape[-2]
            if kept == 0:
                continue
            self.prepare(positions[:, positions.shape[1] - kept :], self.num_slots)
            ours.update(theirs.keys, theirs.values)

    def append_to(self, cache: DynamicCache, positions: torch.Tensor) -> None:
        """Append the entries at `positions`, `(batch_size, length)`, negative = zeros, to a cache of columns."""
        for index, layer in enumerate(self.layers):
            slots = positions.to(layer.device).clamp(min=0)[:, None, :, None]
            keep = (positions >= 0).to(layer.device)[:, None, :, None]
            self.slots.num_visible = self.num_slots
            states = (layer.read(layer.keys), layer.read(layer.values))
            gathered = (s.gather(2, slots.expand(-1, s.shape[1], -1, s.shape[3])) * keep for s in states)
            cache.update(*gathered, index)


def branching(
    positions: torch.Tensor, on_path: torch.Tensor, slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of text and nodes, the position in each slot, and who sees whom but for windows; see `SlotCache.prepare`.

    Returns:
        Slots `[B, q]`, positions `[B, 1, 1, num_visible]` and a mask `[B, 1, q, num_visible]`.
    """
    num_nodes = on_path.shape[1] - 1
    root = positions[:, -num_nodes - 1 : positions.shape[1] - num_nodes]
    nodes = torch.arange(1, num_nodes + 1, device=positions.device)
    slots = torch.cat([positions[:, :-num_nodes], root + nodes], dim=1)
    # Which node, if any, stands in each slot.
    node = slot - root
    is_node = (node >= 1) & (node <= num_nodes)
    node = node.clamp(min=1, max=num_nodes)
    depths = positions[:, -num_nodes:].gather(1, node - 1)
    position = torch.where(is_node, depths, slot)
    sees_text = slot <= torch.minimum(positions, root).clamp(min=0).unsqueeze(2)
    # Text sees of the tree what its root sees, which is no node.
    seen = torch.arange(1 - positions.shape[1] + num_nodes, num_nodes + 1, device=positions.device).clamp(min=0)
    sees_node = on_path[:, seen].gather(2, node.unsqueeze(1).expand(-1, len(seen), -1)) & is_node.unsqueeze(1)
    return slots, position[:, None, None], (sees_text | sees_node).unsqueeze(1)


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer (`None` = full attention), as the host's own cache sees it.

    Raises:
        ValueError: A layer attends in a way a slot cannot express (recurrent, chunked, compressed).
    """
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        # The host keeps chunks in sliding layers, but what a query sees depends on where its chunk begins.
        raise ValueError(f"Chunked attention in `{type(config).__name__}` has no window to mask by")
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        else:
            raise ValueError(
                f"A `{type(layer).__name__}` in `{type(config).__name__}` keeps more than keys and values"
            )
    return windows
