"""From one forward of the draft to K proposals.

Knows the draft's logits and hidden states; knows nothing of how a draft is loaded, and nothing of verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .correction_head import CorrectedPlaces, CorrectionHead
from .host import cache_argument, input_device, names_in_forwards
from .language_model_head import head_of
from .parts import needs_hidden_states
from .positions import check_num_assistant_tokens, croppable_cache, num_positions
from .trimmed_vocabulary import TrimmedVocabulary


class DraftingModel(PreTrainedModel):
    """What makes a causal LM propose; see [`PardDraftModel`].

    A checkpoint may bring a `correction_head` and a `trimmed_vocabulary` beside the base model's weights.
    """

    correction_head: CorrectionHead | None
    trimmed_vocabulary: TrimmedVocabulary | None
    # Whether the forward can be asked for its last rows of logits only.
    takes_num_logits: bool

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.takes_num_logits = "logits_to_keep" in names_in_forwards(cls.__mro__)

    @property
    def device(self) -> torch.device:
        """Where inputs go; offloaded weights lie on the meta device between two forwards."""
        return input_device(self)

    @property
    def mask_token_id(self) -> int:
        """The id fed at positions whose token is not known yet (`pard_token` on disk)."""
        return self.config.pard_token

    @property
    def num_assistant_tokens(self) -> int:
        """K, proposals a round, unless the call says otherwise."""
        return self.generation_config.num_assistant_tokens

    def readable(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond the draft's vocabulary, which a target with more padding rows may say, by mask tokens."""
        return torch.where(input_ids < self.config.get_text_config().vocab_size, input_ids, self.mask_token_id)

    def places(self, num_places: int, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the draft; logits `[B, num_places, V]` of the last places, and their hidden states where a head asks."""
        if not needs_hidden_states(self):
            if self.takes_num_logits:
                inputs["logits_to_keep"] = num_places
            return self(**inputs).logits[:, -num_places:], None
        hidden = self.base_model(**inputs).last_hidden_state[:, -num_places:]
        if self.trimmed_vocabulary is not None:
            return self.trimmed_vocabulary.logits(self, hidden), hidden
        return head_of(self)(hidden), hidden

    def chain(
        self, scores: torch.Tensor, hidden: torch.Tensor | None, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token a place, `[B, K]`, and return the logits they were chosen from as well.

        Args:
            scores (`torch.FloatTensor` of shape `(batch_size, K, vocab_size)`):
                As [`proposal_scores`] returns them.
            choose (`Callable`):
                From logits `(..., vocab_size)` to tokens `(...)`.
        """
        if self.correction_head is None or hidden is None:
            return choose(scores), scores
        return CorrectedPlaces(self.correction_head, hidden, scores).chain(choose)

    def proposal_scores(self, logits: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
        """Make draft logits comparable with a target's: no mask token, `vocab_size` columns.

        Args:
            logits (`torch.FloatTensor` of shape `(..., draft_vocab_size)`):
                Draft logits.
            vocab_size (`int`, *optional*):
                The target's vocabulary size; a vocabulary that differs by padding rows is cut or filled with -inf.
        """
        logits = logits.index_fill(-1, torch.tensor(self.mask_token_id, device=logits.device), -torch.inf)
        width = logits.shape[-1]
        if vocab_size is None or vocab_size == width:
            return logits
        if vocab_size < width:
            return logits[..., :vocab_size]
        return torch.nn.functional.pad(logits, (0, vocab_size - width), value=-torch.inf)

    @torch.no_grad()
    def draft(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_assistant_tokens: int | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Propose K tokens in one forward.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The text so far; left-padded where `attention_mask` says so.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for text, 0 for padding.
            num_assistant_tokens (`int`, *optional*):
                K; defaults to the draft's own.
            past_key_values ([`DynamicCache`], *optional*):
                Cache over the first columns of `input_ids`, extended in place. It is left with real tokens only:
                entries at masks were computed without knowing their neighbours.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, K, vocab_size)`: row `k` is about the token `k` places after the
            first new one; the mask token itself is never proposed. With a correction head each row is about what
            follows the best tokens of the rows before it.
        """
        num_drafts = self.num_assistant_tokens if num_assistant_tokens is None else num_assistant_tokens
        check_num_assistant_tokens(num_drafts, self.config)
        if input_ids.shape[1] == 0:
            raise ValueError("Expected at least one token to draft from, got none.")
        if past_key_values is None:
            past_key_values = croppable_cache(self.config)
        past_key_values.activate_past_recording()
        num_past, length = past_key_values.get_seq_length(), input_ids.shape[1]
        masks = input_ids.new_full((len(input_ids), num_drafts - 1), self.mask_token_id)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Only as far as the text goes: masks are attended like text, and an older mask may cover more or less.
        visible = torch.nn.functional.pad(
            attention_mask, (0, length + num_drafts - 1 - attention_mask.shape[1]), value=1
        )
        positions = (visible.cumsum(-1) - 1).clamp(min=0, max=num_positions(self.config) - 1)
        logits, hidden = self.places(
            num_drafts,
            input_ids=self.readable(torch.cat([input_ids[:, num_past:], masks], dim=1)),
            attention_mask=None if bool(visible.all()) else visible,
            position_ids=positions[:, num_past:],
            use_cache=True,
            **{cache_argument(self): past_key_values},
        )
        past_key_values.crop(-(num_drafts - 1))
        return self.chain(self.proposal_scores(logits), hidden, best)[1]


def best(scores: torch.Tensor) -> torch.Tensor:
    """The most likely token of each place."""
    return scores.argmax(dim=-1)


def num_until_end(proposals: torch.Tensor, eos_token_id: torch.Tensor | list[int] | int | None) -> int:
    """How many proposals `[1, K]` there are up to the first end token, which counts."""
    if eos_token_id is None:
        return proposals.shape[1]
    is_end = torch.isin(proposals[0], torch.as_tensor(eos_token_id, device=proposals.device))
    return int((is_end.cumsum(-1) - is_end.long() == 0).sum())
