"""Losses of training rows: cross-entropy, distillation and confidence weights.

Symbols follow `cod.py`: row (a, d) predicts token a + d + 1 from the real tokens up to a. `p` is the target's
distribution given every gold token before the predicted one, `q` the draft's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

# Logits that exist at once, rows x vocabulary: 2**25 float32 values are 128 MiB. A GPU needs larger products.
CHUNK_SIZE, CUDA_CHUNK_SIZE = 2**25, 2**27

# An LM head: hidden states `[n, hidden_size]` to logits `[n, vocab_size]`.
Head = Callable[[torch.Tensor], torch.Tensor]
# A correction head: hidden states of some labeled rows, and which rows they are, to what is added to their logits.
Correction = Callable[[torch.Tensor, slice], torch.Tensor]
# From a slice of rows and their hidden states to the sum of their losses.
ChunkLoss = Callable[[slice, torch.Tensor], torch.Tensor]
# The least probability of all tokens that a teacher did not store: rounded ones may add up to more than 1.
LEAST_REST = 1e-6


class TopLogprobs(NamedTuple):
    """The log-probabilities of a teacher's k most probable tokens in each row, `[num_rows, k]`, and their ids."""

    ids: torch.Tensor
    logprobs: torch.Tensor


# How a teacher says what follows: by logits `[num_rows, vocab_size]`, or by what is stored of them.
Teaching = torch.Tensor | TopLogprobs
# How far a draft is from its teacher in each row, `[num_rows]`: from its logits, the teaching and a temperature.
Divergence = Callable[[torch.Tensor, Teaching, float], torch.Tensor]


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


def divergence(logits: torch.Tensor, target_logits: Teaching, temperature: float = 1.0) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence KL(p || q) of each row, `[num_rows]`, times the squared temperature.

    The factor keeps gradients of one size at any temperature, https://huggingface.co/papers/1503.02531.
    """
    q, p = logprobs_of(logits, target_logits, temperature)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def total_variation(logits: torch.Tensor, target_logits: Teaching, temperature: float = 1.0) -> torch.Tensor:
    """Compute the total variation distance of p and q in each row, `[num_rows]`: one minus the acceptance."""
    q, p = logprobs_of(logits, target_logits, temperature)
    return (p.exp() - q.exp()).abs().sum(dim=-1) / 2


def negative_log_acceptance(logits: torch.Tensor, target_logits: Teaching, temperature: float = 1.0) -> torch.Tensor:
    """Compute -log of the acceptance of each row, `[num_rows]`.

    The acceptance, the probability that speculative sampling keeps a draw from q, is the sum of min(p, q) over the
    vocabulary. Gradients do not vanish where it is small, as those of the total variation do
    (https://huggingface.co/papers/2602.23881).
    """
    q, p = logprobs_of(logits, target_logits, temperature)
    return -torch.minimum(p, q).logsumexp(dim=-1)


def logprobs_of(
    logits: torch.Tensor, target_logits: Teaching, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q and log p; vocabularies that differ by padding are compared where both have ids.

    Of a teacher that stored its most probable tokens all others count as one. That is never farther than the whole
    distributions are.
    """
    if isinstance(target_logits, TopLogprobs):
        stored = logits.float().log_softmax(dim=-1).gather(-1, target_logits.ids)
        return with_rest(stored), with_rest(target_logits.logprobs)
    width = min(logits.shape[-1], target_logits.shape[-1])
    q, p = ((one[..., :width].float() / temperature).log_softmax(dim=-1) for one in (logits, target_logits))
    return q, p


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all other tokens to those of some, `[..., k]`."""
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([logprobs, rest.log()], dim=-1)


def stored_gold_logprobs(top: TopLogprobs, ids: torch.Tensor) -> torch.Tensor:
    """Look up log p of the tokens `ids` `[...]`: of one that is not stored, that of all others; 0 without a teacher.

    Ids of `top` are negative where a token has no teacher.
    """
    is_gold = top.ids == ids.unsqueeze(-1)
    stored = (top.logprobs * is_gold).sum(dim=-1)
    found = torch.where(is_gold.any(dim=-1), stored, with_rest(top.logprobs)[..., -1])
    return torch.where(top.ids[..., 0] < 0, 0.0, found)


# What each objective with a teacher adds to the cross-entropy.
DIVERGENCES = {"kd": divergence, "cat": divergence, "tv": total_variation, "lk": negative_log_acceptance}


def chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows whose logits have at most `CHUNK_SIZE` values each, or `CUDA_CHUNK_SIZE`."""
    size = max((CUDA_CHUNK_SIZE if device.type == "cuda" else CHUNK_SIZE) // vocab_size, 1)
    return (slice(start, start + size) for start in range(0, num_rows, size))


@torch.no_grad()
def gold_logprobs(head: Head, hidden: torch.Tensor, following: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Compute log p of the ids `following` `[n]` the positions of `hidden` `[n, hidden_size]`, a chunk at a time."""
    values = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for rows in chunks(len(hidden), vocab_size, hidden.device):
        logits = head(hidden[rows]).float()
        gold = following[rows].unsqueeze(-1).to(logits.device)
        values[rows] = (logits.gather(-1, gold).squeeze(-1) - logits.logsumexp(dim=-1)).to(values.device)
    return values


def without_cast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Make each chunk cast the weights for itself under autocast: gradients are then summed in float32, not 16 bit."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)


def logits_loss(
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    labels: torch.Tensor,
    row_weights: torch.Tensor,
    target_logits: Teaching | None,
    loss_weights: tuple[float, float],
    temperature: float,
    divergence_of: Divergence,
) -> torch.Tensor:
    """Sum the weighted loss of rows: `loss_weights` of the cross-entropy and of the divergence, in float32."""
    logits = logits.float() if correction is None else logits.float() + correction.float()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * loss_weights[0]
    if target_logits is not None:
        loss = loss + divergence_of(logits, target_logits, temperature) * loss_weights[1]
    return (row_weights * loss).sum()


@cache
def logits_loss_on(device_type: str) -> Callable[..., torch.Tensor]:
    """Return `logits_loss`, compiled on a GPU: a dozen passes over the logits become one each way.

    A CPU waits longer for the compiler than it saves.
    """
    return torch.compile(logits_loss, dynamic=True) if device_type == "cuda" else logits_loss


class SumOverChunks(torch.autograd.Function):
    """Sum `loss_of(rows, chunk)` over chunks of hidden states, each with its gradient while its logits exist.

    The gradient of a sum does not depend on what follows, so that nothing is computed a second time in the backward
    pass, as checkpointing would; `parameters` are those that `loss_of` uses beside the chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, loss_of: ChunkLoss, vocab_size: int, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        ctx.gradients = [torch.zeros_like(one) if one.requires_grad else None for one in (hidden, *parameters)]
        trained = [index for index, one in enumerate(ctx.gradients) if one is not None]
        for rows in chunks(len(hidden), vocab_size, hidden.device):
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_(hidden.requires_grad)
                loss = loss_of(rows, chunk)
            total += loss.detach()
            inputs = [(chunk, *parameters)[index] for index in trained]
            if not inputs:
                continue
            for index, gradient in zip(trained, torch.autograd.grad(loss, inputs), strict=True):
                kept = ctx.gradients[index][rows] if index == 0 else ctx.gradients[index]
                kept += gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        return None, None, *(one if one is None else one * outputs[0] for one in ctx.gradients)


def row_loss(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    parameters: Iterable[torch.Tensor],
    row_weights: torch.Tensor | None = None,
    target_head: Head | None = None,
    target_hidden: torch.Tensor | None = None,
    target_index: torch.Tensor | None = None,
    loss_weights: tuple[float, float] = (1.0, 1.0),
    temperature: float = 1.0,
    correction: Correction | None = None,
    divergence_of: Divergence = divergence,
    top: TopLogprobs | None = None,
) -> torch.Tensor:
    """Sum the weighted losses of labeled rows, a chunk at a time, each with its gradient.

    `hidden` is `[num_rows, hidden_size]`, `labels` and `row_weights` (1 by default) `[num_rows]`; `vocab_size` is that
    of the larger LM head, `parameters` are those of both heads. `target_index` `[num_rows]` is which of
    `target_hidden` `[num_positions, target_hidden_size]` predicts each row's token, since depths of one text share
    them; `top` is what is stored of a teacher in each row. Without either there is no divergence.
    """
    weights = torch.ones(len(labels), device=hidden.device) if row_weights is None else row_weights
    of_logits = logits_loss_on(hidden.device.type)

    def loss_of(rows: slice, chunk: torch.Tensor) -> torch.Tensor:
        with without_cast_cache(chunk.device.type):
            logits = head(chunk)
            corrected = None if correction is None else correction(chunk, rows)
        target_logits: Teaching | None = None if top is None else TopLogprobs(top.ids[rows], top.logprobs[rows])
        if target_head is not None and target_hidden is not None and target_index is not None:
            with torch.no_grad():
                target_logits = target_head(target_hidden[target_index[rows]]).to(logits.device)
        settings = (loss_weights, temperature, divergence_of)
        return of_logits(logits, corrected, labels[rows], weights[rows], target_logits, *settings)

    trained = [one for one in parameters if one.requires_grad]
    return SumOverChunks.apply(loss_of, vocab_size, hidden, *trained)
