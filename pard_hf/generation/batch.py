"""The rows of a call with both models' caches: growing, losing rows that have finished, coming together again.

Knows sizes and rows; knows nothing of proposals and verification.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from .cache import SlotCache
from .compilation import EagerSteps
from .role import Role
from .rows import Rows
from .schedule import Choice
from .transfer import to_host

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
