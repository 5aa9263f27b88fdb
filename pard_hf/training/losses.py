"""What a kept row costs: cross-entropy, distillation, and how much the row counts.

Pure functions of tensors; knows no model, no trainer and no text. Symbols follow `cod.py`: a row (a, d) predicts token
a + d + 1 from real tokens up to a. `p` is the target's distribution given every gold token before the predicted one,
`q` the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

# Head outputs that may exist at once, rows x vocabulary: 2**25 float32 values are 128 MiB.
CHUNK_SIZE = 2**25

Head = Callable[[torch.Tensor], torch.Tensor]
# From hidden states of some rows, and which rows they are, to what is added to their logits.
Correction = Callable[[torch.Tensor, slice], torch.Tensor]


class Losses(NamedTuple):
    """Sums over rows, each row times its weight; divide by the number of rows for a mean."""

    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def confidence_weights(gold_logprobs: torch.Tensor, anchors: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """The chance that a block gets as far as a row: every gold token between its anchor and its prediction is said.

    Confidence-adaptive token weights of PARD-2, https://huggingface.co/papers/2605.08632: the product of the target's
    probabilities of the d gold tokens after the anchor.

    Args:
        gold_logprobs (`torch.FloatTensor` of shape `(..., length)`):
            Entry `i` is log p of the i-th token; what stands where no text is before the token is ignored.
        anchors, depths (`torch.LongTensor` of shape `(..., num_rows)`):
            As `keep_rows` returns them; padding rows have anchor -1.

    Returns:
        `torch.FloatTensor` of shape `(..., num_rows)`, in [0, 1]; 1 at depth 0.
    """
    total = gold_logprobs.double().cumsum(dim=-1)  # Differences of long sums: a float32 would lose the small ones.
    start = anchors.clamp(min=0)
    end = (anchors + depths).clamp(min=0, max=total.shape[-1] - 1)
    return (total.gather(-1, end) - total.gather(-1, start)).exp().to(gold_logprobs.dtype)


def divergence(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Forward Kullback-Leibler divergence KL(p || q) of each row, `(num_rows,)`, times the squared temperature.

    The factor keeps gradients of one size at any temperature, https://huggingface.co/papers/1503.02531.

    Args:
        logits, target_logits (`torch.FloatTensor` of shape `(num_rows, vocab_size)`):
            The draft's and the target's; vocabularies that differ by padding rows are compared where both have ids.
    """
    width = min(logits.shape[-1], target_logits.shape[-1])
    q = (logits[..., :width].float() / temperature).log_softmax(dim=-1)
    p = (target_logits[..., :width].float() / temperature).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows whose head outputs hold at most `CHUNK_SIZE` values each."""
    size = max(CHUNK_SIZE // vocab_size, 1)
    return (slice(start, start + size) for start in range(0, num_rows, size))


@torch.no_grad()
def gold_logprobs(head: Head, hidden: torch.Tensor, following: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probability of the token that follows each place, a chunk at a time.

    Args:
        head (`Callable`):
            From hidden states `(n, hidden_size)` to logits `(n, vocab_size)`.
        hidden (`torch.FloatTensor` of shape `(num_places, hidden_size)`) and
        following (`torch.LongTensor` of shape `(num_places,)`):
            Last hidden states, and the ids that follow them.
    """
    values = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for rows in chunks(len(hidden), vocab_size):
        logits = head(hidden[rows]).float()
        said = following[rows].unsqueeze(-1).to(logits.device)
        values[rows] = (logits.gather(-1, said).squeeze(-1) - logits.logsumexp(dim=-1)).to(values.device)
    return values


def own_casts(device_type: str) -> AbstractContextManager[Any]:
    """Let each chunk cast the weights for itself under autocast.

    Autocast keeps one cast of a weight for all its uses, and the gradients of all uses are then added in its 16 bit:
    what the 256th chunk adds is mostly rounded off. Gradients of casts of one's own are added in the weight's float32.
    """
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
    target_places: torch.Tensor | None = None,
    temperature: float = 1.0,
    correction: Correction | None = None,
) -> Losses:
    """Losses of all rows, a chunk at a time.

    Logits of all rows x vocabulary never exist at once, neither the draft's nor the target's; the backward pass
    computes those of each chunk again.

    Args:
        head (`Callable`):
            From hidden states `(n, hidden_size)` to logits `(n, vocab_size)`.
        hidden (`torch.FloatTensor` of shape `(num_rows, hidden_size)`) and
        labels (`torch.LongTensor` of shape `(num_rows,)`):
            Rows that have a label.
        vocab_size (`int`):
            Columns of the larger head's output, which decide how many rows a chunk has.
        weights (`torch.FloatTensor` of shape `(num_rows,)`, *optional*):
            What each row counts; 1 by default.
        target_head, target_hidden (`torch.FloatTensor` of shape `(num_places, target_hidden_size)`) and
        target_places (`torch.LongTensor` of shape `(num_rows,)`), all *optional*:
            The target's head and last hidden states, and which of them speaks of each row: depths of one text share
            them. Without them the divergence is 0.
        correction (`Callable`, *optional*):
            Added to the draft's logits, chunk by chunk.
    """
    if weights is None:
        weights = torch.ones(len(labels), device=hidden.device)

    def losses_of(rows: slice, part: torch.Tensor) -> Losses:
        with own_casts(part.device.type):
            logits = head(part).float()
            if correction is not None:
                logits = logits + correction(part, rows).float()
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")
        kl = torch.zeros_like(cross_entropy)
        if target_head is not None and target_hidden is not None and target_places is not None:
            with torch.no_grad():
                target_logits = target_head(target_hidden[target_places[rows]])
            kl = divergence(logits, target_logits.to(logits.device), temperature)
        return Losses((weights[rows] * cross_entropy).sum(), (weights[rows] * kl).sum())

    # The sum of nothing keeps the graph: a batch without a label still has a gradient, zero.
    sums = Losses(hidden[:0].sum().float(), hidden[:0].sum().float())
    for rows in chunks(len(labels), vocab_size):
        part = checkpoint(losses_of, rows, hidden[rows], use_reentrant=False)
        sums = Losses(*(total + new for total, new in zip(sums, part, strict=True)))
    return sums
