"""Verification rules, the noise of sampled tokens, and logits processors over many positions at once.

Verification is a pure function of logits and token ids: no model, no cache, no transfer between devices. Rows are
independent, so each batched result equals the stacked single-row results. Symbols follow
https://huggingface.co/papers/2211.17192: `p` is the target's distribution, `q` the draft's.

Every `verify_*` takes `draft_tokens` `[B, K]`, oldest first, and the target's processed logits `scores`
`[B, K + 1, V]`, of which row `i` continues the first `i` proposals. It returns `tokens` `[B, K + 1]` and `num_matched`
`[B]`: a row continues with `tokens[row, : num_matched[row] + 1]`, accepted draft tokens first, then the bonus token;
what follows is void.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process


def count_matched(draft_tokens: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
    """Count, per row, the leading draft tokens `[B, K]` that are the target's choices `[B, K + 1]` as well."""
    return (draft_tokens == target_tokens[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)


def verify_greedy(draft_tokens: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept the longest prefix that greedy decoding would have produced."""
    tokens = scores.argmax(dim=-1)
    return tokens, count_matched(draft_tokens, tokens)


def sample_with_noise(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw a token from each of `scores` `[..., V]` with unit exponential `noise` of the same shape.

    `argmax(p / e)`, `e` exponential, is a draw from `p`, and what `torch.multinomial` does for one draw.
    """
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)


def verify_sample_and_match(
    draft_tokens: torch.Tensor, scores: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the target's own token at every position and accept the draft while it equals the draw.

    The emitted token is always the target's draw, so the output is distributed as plain sampling for any proposal that
    does not depend on `noise` (see [`sample_with_noise`]), and needs no draft distribution; noise drawn in the order
    of plain `generate` gives its very tokens.
    """
    tokens = sample_with_noise(scores, noise)
    return tokens, count_matched(draft_tokens, tokens)


def verify_ratio_test(
    draft_tokens: torch.Tensor, draft_scores: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept x with probability min(1, p(x) / q(x)), else draw from norm(max(0, p - q)).

    Speculative sampling, https://huggingface.co/papers/2211.17192. Each proposal was drawn from its `draft_scores`
    `[B, K, V]`; that these are independent marginals does not matter, so the output is distributed as plain sampling.
    """
    p, q = scores.softmax(dim=-1), draft_scores.softmax(dim=-1)
    p_drafted = p[:, :-1].gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)
    q_drafted = q.gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)
    accepted = torch.rand_like(q_drafted) * q_drafted < p_drafted
    num_matched = accepted.long().cumprod(dim=-1).sum(dim=-1)

    # The residual of the last row is p itself: nothing was proposed there.
    residual = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], dim=1)
    # p = q leaves no residual; such a row rejects with probability 0 up to rounding, and then draws from p.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    at_stop = residual[torch.arange(len(residual), device=residual.device), num_matched]
    bonus = torch.multinomial(at_stop, 1)
    tokens = torch.cat([draft_tokens, bonus], dim=-1)
    return tokens.scatter(1, num_matched.unsqueeze(1), bonus), num_matched


def count_emitted(
    tokens: torch.Tensor, num_matched: torch.Tensor, remaining: torch.Tensor, eos_token_id: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each row's new tokens, as `verify_*` returns them, where plain `generate` would stop.

    `remaining` `[B]` counts the tokens a row may still emit, 0 for a finished row; after one of `eos_token_id`
    `[num_end_tokens]` a row ends. Returns `num_emitted` (bonus token included) and `is_finished`, `[B]` each.
    """
    num_emitted = torch.minimum(num_matched + 1, remaining)
    if eos_token_id is None:
        return num_emitted, num_emitted == remaining
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    # Not `isin`, which sorts many end tokens, and then a GPU waits for the host.
    is_end = (tokens.unsqueeze(2) == eos_token_id).any(dim=2) & (columns < num_emitted.unsqueeze(1))
    first_end = torch.where(is_end, columns, tokens.shape[1]).amin(dim=-1)
    num_emitted = torch.minimum(num_emitted, first_end + 1)
    return num_emitted, is_end.any(dim=-1) | (num_emitted == remaining)


class Noise:
    """Exponential noise for blocks of positions.

    For a single row (`is_ordered`) it is drawn one position after the other, and what a round does not use is kept for
    the next: the same seed gives the same text as plain `generate`, which draws once a token. Rows of a batch advance
    by different counts, so there only the distribution is kept.

    Noise is drawn ahead from a generator of its own. The device's generator only ever advances by the noise of tokens
    that were emitted, so it has the state that plain `generate` would leave, after an interrupt too.
    """

    def __init__(self, device: torch.device, is_ordered: bool):
        self.device, self.is_ordered = device, is_ordered
        self.source = default_generator(device)
        self.ahead: torch.Generator | None = None
        # Each position with the generator's state after it was drawn.
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(self, *shape: int) -> torch.Tensor:
        """Draw noise of `shape` `[B, num_positions, V]`."""
        if not self.is_ordered:  # Also once all rows but one have finished: rounds may be ahead of the host.
            return torch.empty(shape, device=self.device).exponential_()
        return torch.stack([self.at(position, shape[2]) for position in range(shape[1])], dim=1)

    def at(self, position: int, vocab_size: int) -> torch.Tensor:
        """Return noise `[1, V]` of a position, counted from the first that was not used yet."""
        if self.ahead is None:
            self.ahead = torch.Generator(self.source.device)
        if not self.kept:  # Others may have drawn since.
            self.ahead.set_state(self.source.get_state())
        while len(self.kept) <= position:
            noise = torch.empty(1, vocab_size, device=self.device).exponential_(generator=self.ahead)
            self.kept.append((noise, self.ahead.get_state()))
        return self.kept[position][0]

    def use(self, num_positions: int) -> None:
        """Drop the noise of positions that were emitted, and move the device's generator past it."""
        if num_positions and self.kept:
            self.source.set_state(self.kept[num_positions - 1][1])
            del self.kept[:num_positions]


def default_generator(device: torch.device) -> torch.Generator:
    """Return the default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


# Functions of a row of scores alone: K + 1 positions are K + 1 rows to them. Exact types, since a subclass may look at
# the prefix.
PREFIX_FREE = {
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
}
# Functions of the prefix and the scores, without a memory: calls for tokens that are rejected afterwards do no harm.
STATELESS = PREFIX_FREE | {
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
}


def is_prefix_free(processors: LogitsProcessorList) -> bool:
    """Return whether every processor is known to ignore the tokens before a position."""
    return PREFIX_FREE.issuperset(map(type, processors))


def is_stateless(processors: LogitsProcessorList) -> bool:
    """Return whether every processor is known to be a function of its two arguments."""
    return STATELESS.issuperset(map(type, processors))


def process_positions(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """Apply prefix-free `processors` to `logits` `[B, num_positions, V]` in one call each."""
    if not processors:
        return logits
    rows = logits.flatten(0, 1)
    no_prefix = torch.empty(len(rows), 0, dtype=torch.long, device=logits.device)
    return processors(no_prefix, rows).view_as(logits)
