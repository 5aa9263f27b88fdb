"""The texts of a batch, in buffers of fixed shape.

Knows tokens and lengths; knows nothing of models, caches or verification.
"""

from __future__ import annotations

import torch


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
