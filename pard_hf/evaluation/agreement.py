"""How far a text agrees with plain `generate`'s, and how near the choice was where it leaves it.

In 16 bit a block, a batch and a single row are rounded differently, and where the best logits nearly tie another one
can win: there plain `generate` leaves its own texts, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..host import input_device
from .batches import pad_token_id

# What stands beside gaps.
GAP = "gap: how far the plain model prefers its best token where texts part, the largest"


@dataclass(frozen=True)
class Agreement:
    """How many texts are identical, and the logit gaps of the others; agreements on several texts add up."""

    num_identical: int
    num_texts: int = 1
    logit_gaps: tuple[float, ...] = ()

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_identical + other.num_identical,
            self.num_texts + other.num_texts,
            self.logit_gaps + other.logit_gaps,
        )

    def __str__(self) -> str:
        gap = f", gap {max(self.logit_gaps):.2g}" if self.logit_gaps else ""
        return f"{self.num_identical}/{self.num_texts}{gap}"


def agreement(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> Agreement:
    """Compare one text with plain `generate`'s."""
    gap = None if got == expected else logit_gap(target, prompt, expected, got)
    return Agreement(int(got == expected), logit_gaps=() if gap is None else (gap,))


def is_exact(dtype: torch.dtype) -> bool:
    """Whether texts must be equal: in 16 bit a block and a single token are rounded differently."""
    return dtype in (torch.float32, torch.float64)


def first_difference(expected: list[int], got: list[int]) -> int:
    """The first position where two texts part: the length of the shorter one where the other begins with it."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(expected), len(got)))


def logit_gap(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> float | None:
    """How far the target prefers its best token to the one another text has where it first parts from `expected`.

    Takes one forward of the plain model, in its own dtype, over prompt and common prefix. A near tie that was rounded
    the other way has a gap of a few units in the last place of a logit; a wrong token has a large one.

    Args:
        target ([`PreTrainedModel`]):
            The model whose texts they are.
        prompt (`list[int]`), expected (`list[int]`) and got (`list[int]`):
            Token ids: of the prompt, of the new tokens of plain `generate`, and of those of another way.

    Returns:
        `float`, or `None` where `got` has ended and says nothing there.
    """
    position = first_difference(expected, got)
    if position >= len(got):
        return None
    ids = torch.tensor([[*prompt, *expected[:position]]], device=input_device(target))
    output = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad_token_id(target),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = output.logits[0][0].float()
    return float(logits.max() - logits[got[position]])
