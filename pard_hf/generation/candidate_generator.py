"""Proposals for the assisted loop of transformers (the stock loop), where our own loop does not apply."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from ..draft.model import PardDraftModel, num_until_end
from ..host import croppable_cache, input_device
from .sampling import Noise, sample_with_noise
from .stats import DecodingStats


class StockSampling(LogitsProcessor):
    """Draw, inside the stock loop, the tokens that plain `generate` would draw under the same seed.

    The loop asks for the scores at every position of a block, accepted or not, and draws noise for all of them. Here a
    position keeps its noise however often it is scored, and the loop, set to greedy, has one token to choose.
    So the call's processors must be stateless.
    """

    def __init__(self, processors: LogitsProcessorList, noise: Noise, num_prompt_tokens: int, keeps_scores: bool):
        self.original, self.noise, self.keeps_scores = processors, noise, keeps_scores
        self.num_prompt_tokens = self.length = num_prompt_tokens
        self.latest: dict[int, torch.Tensor] = {}

    def processors(self) -> LogitsProcessorList:
        """Return the processors for the stock loop, in place of the call's own."""
        return LogitsProcessorList([self])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave one token of `scores` `[1, V]` at the position after `input_ids`: the one that is drawn."""
        position = input_ids.shape[1]
        scores = self.original(input_ids, scores)
        if self.keeps_scores:
            self.latest[position] = scores.clone()
        token = sample_with_noise(scores, self.noise.at(position - self.length, scores.shape[-1]))
        return torch.full_like(scores, -torch.inf).scatter(-1, token.unsqueeze(-1), 0.0)

    def advance(self, length: int) -> None:
        """Use up the noise of a text that has grown to `length` columns."""
        self.noise.use(length - self.length)
        self.length = length

    def streamer(self, streamer: Any) -> Any:
        """Wrap the caller's streamer for the stock loop."""
        return SampledStream(self, streamer)

    def scores(self, length: int) -> tuple[torch.Tensor, ...]:
        """Return the scores `[1, V]` of every new token: the last ones of each position, which follow its own text."""
        return tuple(self.latest[position] for position in range(self.num_prompt_tokens, length))


class SampledStream:
    """A caller's streamer inside the stock loop; one that raises leaves the generator where the text ends."""

    def __init__(self, sampling: StockSampling, streamer: Any):
        self.sampling, self.streamer = sampling, streamer
        self.end = streamer.end

    def put(self, tokens: torch.Tensor) -> None:
        """Stream a block of tokens `[1, n]`."""
        self.sampling.advance(self.sampling.length + tokens.numel())
        self.streamer.put(tokens)


class PardCandidateGenerator(CandidateGenerator):
    """Propose K tokens from one draft forward under the `CandidateGenerator` contract of transformers (batch size 1).

    No candidate logits are returned: without them the stock loop draws the target's tokens and keeps those that match,
    which is lossless for any proposal.

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
        sampling ([`StockSampling`], *optional*):
            Of a sampled call; advanced as the text grows.
        eos_token_id (`torch.LongTensor` or `list[int]`, *optional*):
            End tokens of the call: nothing is proposed after one.
    """

    requires_model_outputs = False

    def __init__(
        self,
        draft: PardDraftModel,
        num_assistant_tokens: int,
        max_length: int,
        vocab_size: int,
        attention_mask: torch.Tensor | None = None,
        sampling: StockSampling | None = None,
        eos_token_id: torch.Tensor | list[int] | None = None,
    ):
        self.draft, self.sampling = draft, sampling
        self.num_assistant_tokens, self.max_length, self.vocab_size = num_assistant_tokens, max_length, vocab_size
        self.attention_mask, self.eos_token_id = attention_mask, eos_token_id
        self.cache = croppable_cache(draft.config)
        self.stats = DecodingStats(loop="stock")
        self.num_drafted = 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: object) -> tuple[torch.LongTensor, None]:
        """Return `input_ids` of shape `(1, length)` with up to K proposals appended, and no logits."""
        length = input_ids.shape[1]
        if self.sampling is not None:
            self.sampling.advance(length)
        self.num_drafted = min(self.num_assistant_tokens, self.max_length - length - 1)
        if self.num_drafted < 1 or length == 0:
            self.num_drafted = 0
            return input_ids, None
        ids, mask = input_ids.to(input_device(self.draft)), self.attention_mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask.to(ids.device), (0, length - mask.shape[1]), value=1)
        proposals = self.draft.draft(ids, mask, self.num_drafted, self.cache)[..., : self.vocab_size].argmax(dim=-1)
        # In older versions of transformers (5.17) the loop checks for an end at the last token of a block only.
        proposals = proposals[:, : num_until_end(proposals, self.eos_token_id)]
        self.num_drafted = proposals.shape[1]
        return torch.cat([ids, proposals], dim=1), None  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record the round; K stays as it is."""
        self.stats = self.stats.record(num_matches, self.num_drafted)


class CopyCandidateGenerator(PromptLookupCandidateGenerator):
    """Propose by the prompt lookup of transformers, not beyond `max_length`, and count what is accepted."""

    def __init__(self, *args: Any, sampling: StockSampling | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampling, self.stats, self.num_drafted = sampling, DecodingStats(loop="stock"), 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: object) -> tuple[torch.LongTensor, None]:
        """Return `input_ids` of shape `(1, length)` with proposals appended, and no logits."""
        length = input_ids.shape[1]
        if self.sampling is not None:
            self.sampling.advance(length)
        candidates = super().get_candidates(input_ids)[0][:, : max(self.max_length - 1, length)]
        self.num_drafted = candidates.shape[1] - length
        return candidates, None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record the round."""
        self.stats = self.stats.record(num_matches, self.num_drafted)
