"""The texts of a call with both models' caches: grow, drop finished rows, restore them.

Texts lie in buffers of fixed shape, which compiled steps read and write again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..host import cache_argument, forward_parameters, input_device, num_positions
from .cache import SlotCache
from .kernels import StreamedLinear, can_stream
from .recurrent import HybridCache, cache_for, recording
from .schedule import Choice

if TYPE_CHECKING:
    from .compilation import CompiledSteps
    from .layers import CutModel

# Cache sizes are this one doubled again and again: attention never reads more than twice the text, and a long run
# crosses few of them.
SMALLEST_CACHE = 256
# Longer prompts are read in chunks: the mask of a chunk grows with its length times the text.
PREFILL_CHUNK = 4096


def cache_size(num_tokens: int) -> int:
    """Return the smallest cache size that holds `num_tokens`."""
    return max(SMALLEST_CACHE, 1 << (num_tokens - 1).bit_length())


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; the returned function waits for the copy and returns it.

    Reading a value waits for the device, so decoding copies values to the host only by this function, once a round.
    """
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


class CachedModel:
    """A model with its KV cache, which may lack up to `num_unread` of each row's last tokens."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, num_unread: int = 0):
        self.model, self.cache, self.num_unread = model, cache, num_unread
        self.cut: CutModel | None = None  # See [`cut_of`].
        # False where stand-ins take the place of the layers (`CutModel.around`), and where a forward goes on behind
        # the layers: their states must not be prepared a second time.
        self.has_layers = self.begins = True
        self.is_streamed = can_stream(model)
        self.device, self.cache_name = input_device(model), cache_argument(model)
        self.takes_num_logits = "logits_to_keep" in forward_parameters(model)
        self.takes_positions = "position_ids" in forward_parameters(model)
        self.last_position = num_positions(model.config) - 1
        self.is_eager_attention = model.config._attn_implementation == "eager"

    def forward(
        self,
        positions: torch.Tensor,
        num_visible: int | None,
        num_logits: int,
        on_path: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Run `input_ids` or `inputs_embeds` at `positions` `[B, q]`; return logits of the last `num_logits`.

        With `on_path` the last columns are nodes of a tree; see [`SlotCache.prepare`].
        """
        arguments = self.prepare(positions, num_visible, on_path, inputs)
        if isinstance(self.cache, HybridCache) and self.begins:
            self.cache.begin(positions.to(self.device), num_logits)
        if self.takes_num_logits:
            arguments["logits_to_keep"] = num_logits
        logits = self.call(self.model, arguments).logits
        self.cache.slots.flat_rows = None  # Compiled code would keep it as a result.
        return logits[:, -num_logits:]

    def draft(
        self, positions: torch.Tensor, num_visible: int | None, num_drafts: int, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a draft; return logits of the last `num_drafts` positions, and hidden states for a correction head."""
        model: Any = self.model
        arguments = self.prepare(positions, num_visible, None, {"input_ids": input_ids})
        outputs = self.call(model.position_logits, {"num_positions": num_drafts, **arguments})
        self.cache.slots.flat_rows = None
        return outputs

    def call(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a forward, its linear layers streamed where that is faster."""
        if isinstance(self.cache, HybridCache) and self.has_layers:
            forward = recording()(forward)
        if not self.is_streamed:
            return forward(**arguments)
        with StreamedLinear():
            return forward(**arguments)

    def prepare(
        self,
        positions: torch.Tensor,
        num_visible: int | None,
        on_path: torch.Tensor | None,
        inputs: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Set the slots to write and return the arguments of a forward over the cache."""
        positions = positions.to(self.device)
        mask: Any = self.cache.prepare(positions, num_visible, None if on_path is None else on_path.to(self.device))
        if self.is_eager_attention:
            mask = additive(mask, self.model.dtype)
        arguments = {
            **{name: tensor.to(self.device) for name, tensor in inputs.items()},
            "attention_mask": mask,
            self.cache_name: self.cache,
            "use_cache": True,
        }
        if self.takes_positions:
            # Slots past the end of a row are written but never accepted; a learned position table ends before them.
            arguments["position_ids"] = positions.clamp(min=0, max=self.last_position)
        return arguments


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """Convert a boolean mask, or a dict of them, to the additive form of eager attention."""
    if isinstance(mask, dict):
        return {name: None if one is None else additive(one, dtype) for name, one in mask.items()}
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@dataclass(eq=False)
class Rows:
    """Texts without padding, each of its own length; changed in place during a round.

    `tokens[row, i]`, i < `lengths[row]`, is a known token, of which the first `num_prompt_tokens` are the prompt's;
    the rest is room for more, `budget` new tokens at most. Its position in the draft is i and in the target
    `offset + i`: the offset counts what came before as embeddings or in an earlier cache. Shapes `[B, width]`, `[B]`.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    offset: torch.Tensor
    num_prompt_tokens: torch.Tensor
    budget: torch.Tensor
    is_finished: torch.Tensor

    @classmethod
    def from_prompt(cls, ids: torch.Tensor, mask: torch.Tensor, budget: int) -> Rows:
        """Remove the padding from `ids` `[B, columns]`; `mask` may begin with columns of an earlier cache."""
        before, text = mask.tensor_split([mask.shape[1] - ids.shape[1]], dim=1)
        lengths = text.sum(-1)
        # One column more than any text has takes the padding.
        tokens = ids.new_zeros(len(ids), ids.shape[1] + 1)
        tokens.scatter_(1, torch.where(text == 0, ids.shape[1], text.cumsum(-1) - 1), ids)
        is_finished = torch.zeros_like(lengths, dtype=torch.bool)
        return cls(tokens, lengths, before.sum(-1), lengths.clone(), torch.full_like(lengths, budget), is_finished)

    def last(self, width: int, num_more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last `width` tokens of each row, and their indices with those of `num_more` tokens to come.

        An index is negative where a row is shorter than `width`.
        """
        index = self.lengths.unsqueeze(1) - width + torch.arange(width + num_more, device=self.lengths.device)
        return self.tokens.gather(1, index[:, :width].clamp(min=0)), index

    def known_last(self, width: int) -> torch.Tensor:
        """Return the last `width` tokens of each row, -1 where a row is shorter."""
        ids, index = self.last(width)
        return torch.where(index < 0, -1, ids)

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Convert token indices to logical positions in the target; negative stays negative."""
        return torch.where(index < 0, -1, index + self.offset.unsqueeze(1))

    def num_new(self) -> torch.Tensor:
        """Count the tokens each row has emitted, `[B]`."""
        return self.lengths - self.num_prompt_tokens

    def remaining(self) -> torch.Tensor:
        """Count the tokens each row may still emit, `[B]`; 0 for a finished row."""
        return torch.where(self.is_finished, 0, self.budget - self.num_new())

    def append(self, tokens: torch.Tensor, num_emitted: torch.Tensor | int) -> None:
        """Append a round's tokens to each row; what is not emitted is overwritten by the next round."""
        index = self.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, index, tokens)
        self.lengths.add_(num_emitted)

    def grow(self, width: int) -> Rows:
        """Copy the rows with room for `width` tokens."""
        return replace(self, tokens=torch.nn.functional.pad(self.tokens, (0, width - self.tokens.shape[1])))

    def select(self, kept: list[int]) -> Rows:
        """Copy some rows."""
        index = torch.tensor(kept, device=self.lengths.device)
        return Rows(*(tensor.index_select(0, index) for tensor in vars(self).values()))

    def update(self, kept: list[int], rows: Rows) -> Rows:
        """Replace the rows `kept` by their later state."""
        index = torch.tensor(kept, device=self.lengths.device)
        pairs = zip(vars(self.grow(rows.tokens.shape[1])).values(), vars(rows).values(), strict=True)
        return Rows(*(tensor.index_copy(0, index, new) for tensor, new in pairs))


class Batch:
    """The rows still decoded, both models' caches, and the host's copy of lengths.

    Buffers are those of `compiled` steps where there are any. With `keeps_cache` the target's entries of dropped rows
    are kept for the end.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        rows: Rows,
        budget: int,
        largest: Choice,
        compiled: CompiledSteps | None,
        keeps_cache: bool,
    ):
        self.budget, self.compiled, self.keeps_cache = budget, compiled, keeps_cache
        # Host copies, refreshed by the one synchronization a round; an entry for each row still in the batch.
        self.lengths: list[int] = rows.lengths.tolist()
        self.prompt_lengths = list(self.lengths)
        self.offset = int(rows.offset.max())
        self.unfinished = [True] * len(self.lengths)
        # Which row of the call each one is.
        self.row_ids = list(range(len(self.lengths)))
        # What the batch was before each drop: rows, the target's cache, which rows stayed, and `row_ids`.
        self.dropped: list[tuple[Rows, SlotCache | None, list[int], list[int]]] = []
        draft_size, target_size = self.sizes_for(max(self.lengths), largest)
        self.rows = self.buffers(rows, draft_size)
        self.draft = None
        if draft is not None:
            self.draft = CachedModel(draft, self.new_cache("draft", draft, draft_size), max(self.lengths))
        self.target = CachedModel(target, self.new_cache("target", target, target_size), max(self.lengths))

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def has_unfinished(self) -> bool:
        return any(self.unfinished)

    @property
    def cost_key(self) -> tuple[int, int]:
        """Return what the time of a round depends on besides K: batch size and cache size."""
        return len(self.row_ids), self.target.cache.num_slots

    def remaining(self, row: int) -> int:
        """Count the tokens a row may still emit, by the host's copy of lengths."""
        return self.budget - (self.lengths[row] - self.prompt_lengths[row])

    def most_remaining(self) -> int:
        """Return the largest number of tokens that an unfinished row may still emit."""
        return max(self.remaining(row) for row, goes_on in enumerate(self.unfinished) if goes_on)

    @property
    def draft_size(self) -> int:
        """Return the slots of the draft's cache, and the tokens that a row's buffer has room for."""
        return self.rows.tokens.shape[1] - 1

    def shape(self, choice: Choice, batch_size: int | None = None) -> tuple[tuple[str, int], ...]:
        """Return the numbers that fix the shapes of compiled steps."""
        return (
            ("batch size", batch_size or len(self)),
            ("K", choice.num_drafts),
            ("tree size", choice.tree_size),
            ("draft cache", self.draft_size),
            ("target cache", self.target.cache.num_slots),
        )

    def sizes_for(self, longest: int, choice: Choice) -> tuple[int, int]:
        """Count the slots that a round needs in the draft's and the target's cache."""
        num_tokens = longest + max(choice.num_drafts, choice.tree_size) + 1
        return cache_size(num_tokens), cache_size(num_tokens + self.offset)

    def new_cache(self, name: str, model: PreTrainedModel, num_slots: int) -> SlotCache:
        if self.compiled is None:
            return cache_for(model, num_slots)
        return self.compiled.cache(name, model, len(self), num_slots)

    def buffers(self, rows: Rows, draft_size: int) -> Rows:
        rows = rows.grow(draft_size + 1)
        return rows if self.compiled is None else self.compiled.rows(rows)

    def make_room(self, longest: int, choice: Choice) -> None:
        """Move to larger caches where the current ones would not hold a round."""
        current = self.draft_size, self.target.cache.num_slots
        sizes = tuple(map(max, self.sizes_for(longest, choice), current))
        if sizes != current:
            self.move(list(range(len(self))), *sizes)

    def keep(self, kept: list[int]) -> None:
        """Drop all other rows."""
        self.dropped.append((self.rows, self.target.cache if self.keeps_cache else None, kept, self.row_ids))
        self.row_ids, self.lengths, self.prompt_lengths = (
            [values[row] for row in kept] for values in (self.row_ids, self.lengths, self.prompt_lengths)
        )
        self.unfinished = [self.unfinished[row] for row in kept]
        self.move(kept, self.draft_size, self.target.cache.num_slots)
        if self.draft is not None:
            self.draft.num_unread = min(self.draft.num_unread, max(self.lengths))

    def move(self, kept: list[int], draft_size: int, target_size: int) -> None:
        """Copy some rows into buffers of the given sizes."""
        is_smaller = len(kept) < len(self.rows.lengths)
        self.rows = self.buffers(self.rows.select(kept), draft_size)
        for name, model, size in (("draft", self.draft, draft_size), ("target", self.target, target_size)):
            if model is None:
                continue
            if is_smaller or size != model.cache.num_slots:  # Else a compiled cache would be this very one.
                cache = self.new_cache(name, model.model, size)
                cache.copy_rows(model.cache, list(range(len(kept))), kept)
                model.cache = cache

    def restore_finished_rows(self) -> None:
        """Merge dropped rows back in their original order; the target's cache only where it is kept."""
        while self.dropped:
            rows, cache, kept, self.row_ids = self.dropped.pop()
            self.rows = rows.update(kept, self.rows)
            if cache is not None:
                whole = self.copy_of(cache, self.target.cache.num_slots)
                whole.copy_rows(self.target.cache, kept, list(range(len(kept))))
                self.target.cache = whole
        if self.keeps_cache:  # Rows that ended early continue as padding, maybe beyond any text.
            ends = (self.rows.offset + self.rows.num_prompt_tokens).max() + self.rows.num_new().max()
            last = int(to_host(ends)())
            if last > self.target.cache.num_slots:
                self.target.cache = self.copy_of(self.target.cache, cache_size(last))

    def copy_of(self, cache: SlotCache, num_slots: int) -> SlotCache:
        """Copy a cache of the target to a larger one."""
        copy, every_row = cache_for(self.target.model, num_slots), list(range(len(self)))
        copy.copy_rows(cache, every_row, every_row)
        return copy

    def read(self, model: CachedModel, longest: int) -> None:
        """Prefill in chunks what a model has not read yet; `longest` are positions of the longest text in it."""
        width = model.num_unread
        ids, index = self.rows.last(width)
        positions = self.rows.positions(index) if model is self.target else index
        for start in range(0, width, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, width)
            num_visible = max(longest - width + end, 1)  # A chunk of padding alone still attends to one slot.
            model.forward(positions[:, start:end], num_visible, 1, input_ids=ids[:, start:end])
            if model is self.target:
                self.commit(reads_prompt=True)
        model.num_unread = 1  # The last token is read again for its logits.

    def commit(self, reads_prompt: bool = False) -> None:
        """Advance the target's states, if it keeps some, over all known tokens but the last, which is read again."""
        cache = self.target.cache
        if isinstance(cache, HybridCache):
            ends = self.rows.positions(self.rows.lengths.unsqueeze(1) - 1).squeeze(1)
            cache.commit(ends.to(self.target.device))
            cache.reads_prompt = reads_prompt
