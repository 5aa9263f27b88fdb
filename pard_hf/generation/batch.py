"""The one way from the device to the host while a call is decoded.

Every look at a value makes the host wait for the device, so rounds make one, here; a test fails at any other.

One of the two models with the cache it decodes over.

The texts of a batch, in buffers of fixed shape.

Knows tokens and lengths; knows nothing of models, caches or verification.

The rows of a call with both models' caches: growing, losing rows that have finished, coming together again.

Knows sizes and rows; knows nothing of proposals and verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..host import cache_argument, forward_parameters, input_device, num_positions
from .cache import SlotCache
from .schedule import Choice

if TYPE_CHECKING:
    from .compilation import EagerSteps


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; what is returned waits until it is there, and hands it over."""
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


class Role:
    """One of the two models with its cache: token ids and positions in, logits out."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        self.model = model
        self.cache = cache
        self.device = input_device(model)
        self.cache_name = cache_argument(model)
        self.takes_num_logits = "logits_to_keep" in forward_parameters(model)
        self.last_position = num_positions(model.config) - 1
        self.is_eager_attention = model.config._attn_implementation == "eager"

    def forward(
        self,
        positions: torch.Tensor,
        num_visible: int,
        num_logits: int,
        on_path: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Run `input_ids` or `inputs_embeds` at `positions` `[B, q]`; returns the last `num_logits` rows of logits.

        With `on_path` the last columns are nodes of a tree; see [`SlotCache.prepare`].
        """
        arguments = self.arguments(positions, num_visible, on_path, inputs)
        if self.takes_num_logits:
            arguments["logits_to_keep"] = num_logits
        logits = self.model(**arguments).logits
        self.cache.slots.flat_rows = None  # Compiled code would keep it as a result.
        return logits[:, -num_logits:]

    def places(
        self, positions: torch.Tensor, num_visible: int, num_places: int, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of a draft: logits of the last `num_places` rows, and their hidden states where a head asks for them."""
        model: Any = self.model
        found = model.position_logits(
            num_places, **self.arguments(positions, num_visible, None, {"input_ids": input_ids})
        )
        self.cache.slots.flat_rows = None
        return found

    def arguments(
        self, positions: torch.Tensor, num_visible: int, on_path: torch.Tensor | None, inputs: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What a forward over the cache takes."""
        positions = positions.to(self.device)
        mask = self.cache.prepare(positions, num_visible, on_path)
        if self.is_eager_attention:
            mask = as_additive(mask, self.model.dtype)
        return {
            **{name: tensor.to(self.device) for name, tensor in inputs.items()},
            "attention_mask": mask,
            # Slots past the end of a row are written but never accepted; a learned position table ends before them.
            "position_ids": positions.clamp(min=0, max=self.last_position),
            self.cache_name: self.cache,
            "use_cache": True,
        }


def as_additive(mask: Any, dtype: torch.dtype) -> Any:
    """Turn a boolean mask, or a dict of them, into the additive form eager attention takes."""
    if isinstance(mask, dict):
        return {name: as_additive(part, dtype) for name, part in mask.items()}
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Rows:
    """Texts without padding, each of its own length.

    `tokens[row, i]` is the i-th known token, `lengths[row]` their number, and the logical position of that token in
    the target is `offset[row] + i` (the offset counts what came before as embeddings or as an earlier cache). Every
    change during a round is in place: compiled rounds read and write the same buffers again and again.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, width)`):
            With room for what is to come.
        lengths (`torch.LongTensor` of shape `(batch_size,)`), offset, num_prompt_tokens and
        budget (`torch.LongTensor` of shape `(batch_size,)`):
            Known tokens, tokens before them, those of the prompt, and how many a row may emit.
        is_finished (`torch.BoolTensor` of shape `(batch_size,)`).
    """

    NAMES = ("tokens", "lengths", "offset", "num_prompt_tokens", "budget", "is_finished")

    def __init__(self, **tensors: torch.Tensor):
        self.tokens, self.lengths, self.offset, self.num_prompt_tokens, self.budget, self.is_finished = (
            tensors[name] for name in self.NAMES
        )

    @classmethod
    def from_prompt(cls, ids: torch.Tensor, mask: torch.Tensor, budget: int) -> Rows:
        """Take the padding out of `ids` `[B, columns]`; `mask` may begin with columns that came before."""
        text = mask[:, mask.shape[1] - ids.shape[1] :]
        lengths = text.sum(-1)
        # One column more than any text has takes the padding.
        tokens = ids.new_zeros(len(ids), ids.shape[1] + 1)
        index = torch.where(text == 0, ids.shape[1], text.cumsum(-1) - 1)
        tokens.scatter_(1, index, ids)
        return cls(
            tokens=tokens,
            lengths=lengths,
            offset=mask[:, : mask.shape[1] - ids.shape[1]].sum(-1),
            num_prompt_tokens=lengths.clone(),
            budget=torch.full_like(lengths, budget),
            is_finished=torch.zeros_like(lengths, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def last(self, width: int, num_more: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `width` tokens of each row, and their indices with those of `num_more` tokens to come.

        An index is negative where a row is shorter than `width`.
        """
        index = self.lengths.unsqueeze(1) - width + torch.arange(width + num_more, device=self.lengths.device)
        return self.tokens.gather(1, index[:, :width].clamp(min=0)), index

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Logical positions in the target of token indices; negative stays negative."""
        return torch.where(index < 0, -1, index + self.offset.unsqueeze(1))

    def remaining(self) -> torch.Tensor:
        """Tokens each row may still emit, `[B]`; 0 for a finished row."""
        return torch.where(self.is_finished, 0, self.budget - (self.lengths - self.num_prompt_tokens))

    def append(self, tokens: torch.Tensor, num_emitted: torch.Tensor | int) -> None:
        """Write a round's tokens behind each row; what is not emitted is overwritten by the next round."""
        index = self.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, index, tokens)
        self.lengths.add_(num_emitted)

    def grow(self, width: int) -> Rows:
        """The same rows with room for `width` tokens."""
        tensors = self.tensors()
        tensors["tokens"] = torch.nn.functional.pad(self.tokens, (0, width - self.tokens.shape[1]))
        return Rows(**tensors)

    def select(self, kept: list[int]) -> Rows:
        """A copy of some rows."""
        index = torch.tensor(kept, device=self.lengths.device)
        return Rows(**{name: tensor.index_select(0, index) for name, tensor in self.tensors().items()})

    def update(self, kept: list[int], rows: Rows) -> Rows:
        """These rows with those `kept` replaced by what became of them."""
        merged = self.grow(rows.tokens.shape[1])
        index = torch.tensor(kept, device=self.lengths.device)
        return Rows(**{name: t.index_copy(0, index, getattr(rows, name)) for name, t in merged.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}


# Cache sizes are these doubled again and again: attention never reads more than twice the text, and a long run crosses
# few of them.
SMALLEST_CACHE = 256
# Longer prompts are read in parts: the mask of a part grows with its length times the text.
PREFILL_CHUNK = 4096


def cache_size(num_tokens: int) -> int:
    """The smallest cache that holds `num_tokens`."""
    return max(SMALLEST_CACHE, 1 << (num_tokens - 1).bit_length())


class Batch:
    """Rows and what the two models remember of them.

    Args:
        rows ([`Rows`]):
            As the call gives them.
        sizes (`tuple[int, int]`):
            Tokens the draft's and the target's cache must hold at first.
        keeps_cache (`bool`):
            Whether the target's entries of rows that leave are wanted in the end.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        rows: Rows,
        steps: EagerSteps,
        sizes: tuple[int, int],
        keeps_cache: bool,
    ):
        self.steps, self.keeps_cache = steps, keeps_cache
        draft_size, target_size = map(cache_size, sizes)
        self.rows = steps.rows(rows.grow(draft_size + 1))
        self.draft = Role(draft, steps.cache("draft", draft, len(rows), draft_size))
        self.target = Role(target, steps.cache("target", target, len(rows), target_size))
        # Which row of the call each row of the batch is.
        self.row_ids = list(range(len(rows)))
        # The batches that finished rows have left.
        self.left: list[tuple[Rows, SlotCache | None, list[int], list[int]]] = []

    def __len__(self) -> int:
        return len(self.row_ids)

    def shape(self, choice: Choice) -> tuple[tuple[str, int], ...]:
        """The numbers that compiled parts are made for."""
        return (
            ("batch size", len(self)),
            ("K", choice.num_drafts),
            ("tree size", choice.tree_size),
            ("draft cache", self.draft.cache.num_slots),
            ("target cache", self.target.cache.num_slots),
        )

    def make_room(self, sizes: tuple[int, int]) -> None:
        """Move to larger caches where the draft's and the target's would not hold so many tokens."""
        draft_size, target_size = map(cache_size, sizes)
        draft_size = max(draft_size, self.draft.cache.num_slots)
        target_size = max(target_size, self.target.cache.num_slots)
        if (draft_size, target_size) != (self.draft.cache.num_slots, self.target.cache.num_slots):
            self.move(list(range(len(self))), draft_size, target_size)

    def keep(self, kept: list[int]) -> None:
        """Go on without the other rows."""
        self.left.append((self.rows, self.target.cache if self.keeps_cache else None, kept, self.row_ids))
        self.move(kept, self.draft.cache.num_slots, self.target.cache.num_slots)
        self.row_ids = [self.row_ids[row] for row in kept]

    def move(self, kept: list[int], draft_size: int, target_size: int) -> None:
        """Copy some rows into buffers of the given sizes."""
        self.rows = self.steps.rows(self.rows.select(kept).grow(draft_size + 1))
        for role, name, size in ((self.draft, "draft", draft_size), (self.target, "target", target_size)):
            if len(kept) == len(self) and size == role.cache.num_slots:
                continue  # A compiled cache of this size is this very cache.
            cache = self.steps.cache(name, role.model, len(kept), size)
            cache.copy_rows(role.cache, list(range(len(kept))), kept)
            role.cache = cache

    def reunite(self) -> None:
        """Put the rows that left back to the others; the target's cache only where it is kept."""
        while self.left:
            rows, cache, kept, self.row_ids = self.left.pop()
            self.rows = rows.update(kept, self.rows)
            if cache is not None:
                whole = self.copy_of(cache, self.target.cache.num_slots)
                whole.copy_rows(self.target.cache, kept, list(range(len(kept))))
                self.target.cache = whole
        if self.keeps_cache:  # Rows that ended early go on as padding, maybe further than any text.
            prompts, lengths = self.rows.num_prompt_tokens, self.rows.lengths
            last = int(to_host((self.rows.offset + prompts).max() + (lengths - prompts).max())())
            if last > self.target.cache.num_slots:
                self.target.cache = self.copy_of(self.target.cache, cache_size(last))

    def copy_of(self, cache: SlotCache, num_slots: int) -> SlotCache:
        """A larger cache of the target with the same entries."""
        copy, everyone = SlotCache.of(self.target.model, num_slots), list(range(len(self)))
        copy.copy_rows(cache, everyone, everyone)
        return copy

    def read(self, role: Role, width: int, longest: int) -> None:
        """Let a model read each row's last `width` tokens, part by part, without a look at its logits.

        Args:
            longest (`int`):
                Positions of the longest text in that model.
        """
        ids, index = self.rows.last(width, 0)
        positions = self.rows.positions(index) if role is self.target else index
        for start in range(0, width, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, width)
            num_visible = max(longest - width + end, 1)  # Nothing but padding still looks at one slot.
            role.forward(positions[:, start:end], num_visible, 1, input_ids=ids[:, start:end])
