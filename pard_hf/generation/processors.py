"""Which logits processors look at the prefix, and applying the others to many positions at once."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

# Row-wise functions of the scores alone: K + 1 positions are just K + 1 rows to them. Exact types, since a subclass
# may look at the prefix.
PREFIX_FREE = tuple(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)


# Functions of the prefix and the scores, without a memory: it does not matter how often they are called, and for which
# tokens that are refused afterwards.
STATELESS = PREFIX_FREE + tuple(
    getattr(logits_process, name)
    for name in (
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
    )
)


def is_stateless(processors: LogitsProcessorList) -> bool:
    """Say whether every processor is known to be a function of its two arguments."""
    return all(type(processor) in STATELESS for processor in processors)


def is_prefix_free(processors: LogitsProcessorList) -> bool:
    """Say whether every processor ignores the tokens before a position."""
    return all(type(processor) in PREFIX_FREE for processor in processors)


def process_positions(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """Apply prefix-free `processors` to `logits` of shape `(batch_size, num_positions, vocab_size)` in one go."""
    if not processors:
        return logits
    rows = logits.flatten(0, 1)
    no_prefix = torch.empty(len(rows), 0, dtype=torch.long, device=logits.device)
    return processors(no_prefix, rows).view_as(logits)
