"""Proposals for the stock assisted loop, where our own loop does not apply."""

from __future__ import annotations

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from ..draft_model import PardDraftModel
from ..positions import croppable_cache
from .stats import DecodingStats


class PardCandidateGenerator(CandidateGenerator):
    """Proposes K tokens from one draft forward under the host's `CandidateGenerator` contract (batch size 1).

    No candidate logits are returned: without them the host draws the target's tokens and keeps those that match, which
    is lossless for any proposal.

    Args:
        draft ([`PardDraftModel`]):
            The draft model.
        num_assistant_tokens (`int`):
            K, proposals a round; fewer near `max_length`.
        max_length (`int`):
            Tokens of the longest output, prompt included.
        vocab_size (`int`):
            The target's vocabulary size: no id at or above it is proposed.
        attention_mask (`torch.LongTensor` of shape `(1, sequence_length)`, *optional*):
            0 for the prompt's left padding.
    """

    requires_model_outputs = False

    def __init__(
        self,
        draft: PardDraftModel,
        num_assistant_tokens: int,
        max_length: int,
        vocab_size: int,
        attention_mask: torch.Tensor | None = None,
    ):
        self.draft = draft
        self.num_assistant_tokens = num_assistant_tokens
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.attention_mask = attention_mask
        self.cache = croppable_cache(draft.config)
        self.stats = DecodingStats()
        self.num_drafted = 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: object) -> tuple[torch.LongTensor, None]:
        """Return `input_ids` of shape `(1, length)` with up to K proposals appended, and no logits."""
        length = input_ids.shape[1]
        self.num_drafted = min(self.num_assistant_tokens, self.max_length - length - 1)
        if self.num_drafted < 1 or length == 0:
            self.num_drafted = 0
            return input_ids, None
        ids = input_ids.to(self.draft.device)
        mask = self.attention_mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask.to(ids.device), (0, length - mask.shape[1]), value=1)
        proposals = self.draft.draft(ids, mask, self.num_drafted, self.cache)[..., : self.vocab_size].argmax(dim=-1)
        return torch.cat([ids, proposals], dim=1), None  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record the round; K stays as it is."""
        self.stats = self.stats.record(num_matches, self.num_drafted)
