"""Losses of training rows: cross-entropy, distillation and confidence weights.

Symbols follow `cod.py`: row (a, d) predicts token a + d + 1 from the real tokens up to a. `p` is the target's
distribution given every gold token before the predicted one, `q` the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

# Logits that exist at once, rows x vocabulary: 2**25 float32 values are 128 MiB.
CHUNK_SIZE = 2**25

# An LM head: hidden states `[n, hidden_size]` to logits `[n, vocab_size]`.
Head = Callable[[torch.Tensor], torch.Tensor]
# A correction head: hidden states of some labeled rows, and which rows they are, to what is added to their logits.
Correction = Callable[[torch.Tensor, slice], torch.Tensor]


class Losses(NamedTuple):
    """Weighted sums over rows; divide by the number of rows for a mean."""

    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def confidence_weights(gold_logprobs: torch.Tensor, anchors: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Compute the probability that a block gets as far as each row, `[..., num_rows]`; it is 1 at depth 0.

    Confidence-adaptive token weights of PARD-2, https://huggingface.co/papers/2605.08632: the product of the target's
    probabilities of the d gold tokens after the anchor. Entry i of `gold_logprobs` `[..., length]` is log p of token
    i; that of a text's first token is ignored.
    """
    total = gold_logprobs.double().cumsum(dim=-1)  # Differences of long sums: a float32 would lose the small ones.
    start = anchors.clamp(min=0)
    end = (anchors + depths).clamp(min=0, max=total.shape[-1] - 1)
    return (total.gather(-1, end) - total.gather(-1, start)).exp().to(gold_logprobs.dtype)


def divergence(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence KL(p || q) of each row, `[num_rows]`, times the squared temperature.

    The factor keeps gradients of one size at any temperature, https://huggingface.co/papers/1503.02531. Vocabularies
    that differ by padding are compared where both have ids.
    """
    width = min(logits.shape[-1], target_logits.shape[-1])
    q = (logits[..., :width].float() / temperature).log_softmax(dim=-1)
    p = (target_logits[..., :width].float() / temperature).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Yield slices of rows whose logits have at most `CHUNK_SIZE` values each."""
    size = max(CHUNK_SIZE // vocab_size, 1)
    return (slice(start, start + size) for start in range(0, num_rows, size))


@torch.no_grad()
def gold_logprobs(head: Head, hidden: torch.Tensor, following: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Compute log p of the ids `following` `[n]` the positions of `hidden` `[n, hidden_size]`, a chunk at a time."""
    values = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for rows in chunks(len(hidden), vocab_size):
        logits = head(hidden[rows]).float()
        gold = following[rows].unsqueeze(-1).to(logits.device)
        values[rows] = (logits.gather(-1, gold).squeeze(-1) - logits.logsumexp(dim=-1)).to(values.device)
    return values


def without_cast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Make each chunk cast the weights for itself under autocast: gradients are then summed in float32, not 16 bit."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)


def row_losses(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    weights: torch.Tensor | None = None,
    target_head: Head | None = None,
    target_hidden: torch.Tensor | None = None,
    target_index: torch.Tensor | None = None,
    temperature: float = 1.0,
    correction: Correction | None = None,
) -> Losses:
    """Sum the losses of labeled rows, a chunk at a time; the backward pass computes the logits of each chunk again.

    `hidden` is `[num_rows, hidden_size]`, `labels` and `weights` (1 by default) `[num_rows]`; `vocab_size` is that of
    the larger LM head. `target_index` `[num_rows]` is which of `target_hidden` `[num_positions, target_hidden_size]`
    predicts each row's token, since depths of one text share them; without a target the divergence is 0.
    """
    if weights is None:
        weights = torch.ones(len(labels), device=hidden.device)

    def losses_of(rows: slice, chunk: torch.Tensor) -> Losses:
        with without_cast_cache(chunk.device.type):
            logits = head(chunk).float()
            if correction is not None:
                logits = logits + correction(chunk, rows).float()
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")
        kl = torch.zeros_like(cross_entropy)
        if target_head is not None and target_hidden is not None and target_index is not None:
            with torch.no_grad():
                target_logits = target_head(target_hidden[target_index[rows]])
            kl = divergence(logits, target_logits.to(logits.device), temperature)
        return Losses((weights[rows] * cross_entropy).sum(), (weights[rows] * kl).sum())

    # The empty sum keeps the graph: a batch without labels has a gradient of zero.
    sums = Losses(hidden[:0].sum().float(), hidden[:0].sum().float())
    for rows in chunks(len(labels), vocab_size):
        new = checkpoint(losses_of, rows, hidden[rows], use_reentrant=False)
        sums = Losses(*(total + value for total, value in zip(sums, new, strict=True)))
    return sums
