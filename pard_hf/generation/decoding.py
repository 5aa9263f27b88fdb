"""The draft-verify loop over rows of different lengths.

A round is one draft forward and one target forward; both models keep a `SlotCache`, so rows accept different counts
freely and nothing is rolled back. Knows models, caches and tokens; knows nothing of `generate()`, which the mixin
translates into a `DecodingRequest`.

Two ways to advance, one output: rows on their own, decided on the device with one host synchronisation a round; or in
lockstep (`lockstep.py`), where processors, criteria and streamer see exactly the calls plain `generate` would make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..draft_model import PardDraftModel
from .noise import Noise
from .processors import process_positions
from .role import Role
from .stats import DecodingStats
from .verification import count_emitted, verify_greedy, verify_ratio_test, verify_sample_and_match


@dataclass
class DecodingRequest:
    """What to generate, in the words of `generate()`.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, num_columns)`):
            Prompt, left-padded; no columns when `inputs_embeds` is given.
        attention_mask (`torch.LongTensor` of shape `(batch_size, mask_length)`):
            1 for text, 0 for padding. Longer than the prompt where the prompt goes on after `past_key_values`.
        num_assistant_tokens (`int`):
            K, draft tokens a round.
        max_length (`int`):
            Columns of the longest output, prompt included.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_assistant_tokens: int
    max_length: int
    pad_token_id: int | None
    eos_token_id: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    past_key_values: Cache | None = None
    do_sample: bool = False
    ratio_test: bool = False
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: Any = None
    output_scores: bool = False
    output_logits: bool = False


class PardDecoder:
    """Generates for one request.

    Rows are kept as texts without padding: `tokens[row, i]` is the i-th known token, `lengths[row]` their number, and
    its logical position in the target is `offset[row] + i` (the offset counts what came before as embeddings or as an
    earlier cache).
    """

    def __init__(self, target: PreTrainedModel, draft: PardDraftModel, request: DecodingRequest):
        self.request, self.draft_model = request, draft
        self.num_drafts = request.num_assistant_tokens
        ids, mask = request.input_ids.long(), request.attention_mask
        self.batch_size, num_columns = ids.shape
        # As plain `generate`, which asks its criteria after the first token only.
        self.budget = max(request.max_length - num_columns, 1)
        text = mask[:, mask.shape[1] - num_columns :]
        self.positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)
        self.offset = mask[:, : mask.shape[1] - num_columns].sum(-1)
        self.lengths = text.sum(-1)
        self.num_prompt_tokens = self.lengths.clone()
        self.is_finished = torch.zeros_like(self.lengths, dtype=torch.bool)

        # A row may finish at `max_length` while its last verify still writes every proposal.
        room = self.budget + self.num_drafts + 1
        longest, longest_offset = int(self.lengths.max()), int(self.offset.max())
        self.tokens = ids.new_zeros(self.batch_size, longest + room + 1)
        index = torch.where(text == 0, longest + room, text.cumsum(-1) - 1)
        self.tokens.scatter_(1, index, ids)

        self.target = Role(target, longest + longest_offset + room)
        self.draft = Role(draft, longest + room)
        num_cached = self.load_past()
        # Host-side copies, refreshed by the one synchronisation a round.
        self.host_lengths: list[int] = self.lengths.tolist()
        self.host_prompt = list(self.host_lengths)
        self.host_offset = longest_offset
        self.active = [True] * self.batch_size
        self.target_width = int((self.lengths - num_cached).max()) if request.inputs_embeds is None else 0
        self.draft_width = longest
        self.histogram = [0] * (self.num_drafts + 1)
        self.num_drafted = 0
        self.noise = Noise(self.tokens.device)
        self.recorded: list[tuple[tuple[torch.Tensor, torch.Tensor], list[int]]] = []

    def load_past(self) -> torch.Tensor | int:
        """Take over the target's earlier cache; returns how many of each row's tokens it already holds."""
        past = self.request.past_key_values
        num_past = past.get_seq_length() if past is not None else 0
        if not num_past:
            return 0
        self.target.cache.load(past, self.positions[:, :num_past])
        return (self.positions[:, :num_past] >= 0).sum(-1) - self.offset

    @property
    def stats(self) -> DecodingStats:
        return DecodingStats(tuple(self.histogram), self.num_drafted)

    def last_tokens(self, width: int, num_more: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `width` tokens of each row, and their indices with those of `num_more` tokens to come."""
        index = self.lengths.unsqueeze(1) - width + torch.arange(width + num_more, device=self.lengths.device)
        return self.tokens.gather(1, index[:, :width].clamp(min=0)), index

    def propose(self, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft forward: proposals `[B, num_drafts]` and the logits `[B, num_drafts, V]` they come from."""
        model = self.draft_model
        ids, index = self.last_tokens(self.draft_width, num_drafts - 1)
        masks = ids.new_full((self.batch_size, num_drafts - 1), model.mask_token_id)
        logits = self.draft.forward(
            index,
            max(self.host_lengths) + num_drafts - 1,
            num_drafts,
            input_ids=model.readable(torch.cat([ids, masks], dim=1)),
        )
        vocab_size = self.target.model.config.get_text_config().vocab_size
        scores = model.proposal_scores(logits, vocab_size).to(self.tokens.device)
        if not self.request.ratio_test:
            return scores.argmax(dim=-1), scores
        scores = process_positions(self.request.logits_processor, scores.float())
        drawn = torch.multinomial(scores.softmax(dim=-1).flatten(0, 1), 1)
        return drawn.view(self.batch_size, num_drafts), scores

    def target_logits(self, draft_tokens: torch.Tensor) -> torch.Tensor:
        """One target forward over what its cache lacks and the proposals; logits `[B, num_drafts + 1, V]`, float32."""
        num_drafts, embeds = draft_tokens.shape[1], self.request.inputs_embeds
        if embeds is not None and self.target_width == 0:  # Nothing but embeddings is known yet.
            positions, inputs = self.positions, {"inputs_embeds": embeds}
        else:
            ids, index = self.last_tokens(self.target_width, num_drafts)
            positions = torch.where(index < 0, -1, index + self.offset.unsqueeze(1))
            inputs = {"input_ids": torch.cat([ids, draft_tokens], dim=1)}
        num_visible = self.host_offset + max(self.host_lengths) + num_drafts
        logits = self.target.forward(positions, num_visible, num_drafts + 1, **inputs)
        return logits.to(self.tokens.device, torch.float32)

    def verify(self, draft_tokens: torch.Tensor, draft_scores: torch.Tensor | None, scores: torch.Tensor):
        if not self.request.do_sample:
            return verify_greedy(draft_tokens, scores)
        if self.request.ratio_test and draft_scores is not None:
            return verify_ratio_test(draft_tokens, draft_scores, scores)
        return verify_sample_and_match(draft_tokens, scores, self.noise.draw(scores.shape))

    def remaining(self, row: int) -> int:
        """Tokens the row may still emit."""
        return self.budget - (self.host_lengths[row] - self.host_prompt[row])

    def run(self) -> None:
        """Generate until every row has finished."""
        while any(self.active):
            most = max(self.remaining(row) for row in range(self.batch_size) if self.active[row])
            # The bonus token needs no proposal, so at most `most - 1` can be accepted.
            num_drafts = min(self.num_drafts, most - 1) if self.target_width else 0
            draft_tokens = self.tokens.new_empty(self.batch_size, 0)
            draft_scores = None
            if num_drafts:
                draft_tokens, draft_scores = self.propose(num_drafts)
            logits = self.target_logits(draft_tokens)
            grown, emitted = self.advance(draft_tokens, draft_scores, logits)
            self.account(grown, emitted, num_drafts)
        self.noise.rewind()

    def advance(
        self, draft_tokens: torch.Tensor, draft_scores: torch.Tensor | None, logits: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """Verify, append and finish rows, with the round's only synchronisation.

        Returns, a row each: by how many tokens it grew, and how many of them a round of its own emitted (fewer only in
        lockstep, where finished rows grow by padding).
        """
        scores = process_positions(self.request.logits_processor, logits)
        tokens, num_matched = self.verify(draft_tokens, draft_scores, scores)
        emitted_before = self.lengths - self.num_prompt_tokens
        remaining = torch.where(self.is_finished, 0, self.budget - emitted_before)
        num_emitted, ended = count_emitted(tokens, num_matched, remaining, self.request.eos_token_id)
        self.append(tokens, num_emitted)
        self.is_finished = self.is_finished | ended
        emitted, finished = torch.stack([num_emitted, self.is_finished.long()]).tolist()
        self.active = [not done for done in finished]
        self.noise.use(emitted[0])
        self.record(scores, logits, emitted)
        if self.request.streamer is not None:
            for column, token in enumerate(tokens[0, : emitted[0]].cpu()):
                self.stream(token.unsqueeze(0), is_accepted=column < emitted[0] - 1)
        return emitted, emitted

    def stream(self, tokens: torch.Tensor, is_accepted: bool) -> None:
        """Hand a column to the streamer; one with `put_accepted` is told which tokens the draft proposed."""
        streamer = self.request.streamer
        put = getattr(streamer, "put_accepted", streamer.put) if is_accepted else streamer.put
        put(tokens)

    def append(self, tokens: torch.Tensor, num_emitted: torch.Tensor | int) -> None:
        """Write the round's tokens behind each row; what is not emitted is overwritten by the next round."""
        index = self.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, index, tokens)
        self.lengths = self.lengths + num_emitted

    def account(self, grown: list[int], emitted: list[int], num_drafts: int) -> None:
        """Update host-side lengths and statistics after a round."""
        for row, count in enumerate(emitted):
            if count and self.target_width:  # A prefill of embeddings without a draft is no round.
                self.histogram[count - 1] += 1
                self.num_drafted += min(num_drafts, self.remaining(row) - 1)
            self.host_lengths[row] += grown[row]
        self.target_width = 1
        # What the draft has not read: accepted proposals too, for their entries were computed from masks.
        self.draft_width = max(grown)

    def record(self, scores: torch.Tensor, logits: torch.Tensor, grown: list[int]) -> None:
        """Keep a round's scores and raw logits where the caller asked for them."""
        if self.request.output_scores or self.request.output_logits:
            self.recorded.append(((scores, logits), grown))

    def outputs(self, which: int) -> tuple[torch.Tensor, ...]:
        """Scores (0) or raw logits (1) as plain `generate` gives them: one `[B, V]` a new column.

        Columns after a row's end are zeros.
        """
        counts = [0] * self.batch_size
        num_columns = max(length - prompt for length, prompt in zip(self.host_lengths, self.host_prompt, strict=True))
        first = self.recorded[0][0][which]
        merged = first.new_zeros(self.batch_size, num_columns, first.shape[-1])
        for tensors, grown in self.recorded:
            for row, count in enumerate(grown):
                merged[row, counts[row] : counts[row] + count] = tensors[which][row, :count]
                counts[row] += count
        return tuple(merged.unbind(1))

    def sequences(self) -> torch.Tensor:
        """Prompt columns and what followed, `[B, num_columns + num_new]`; finished rows filled with `pad_token_id`."""
        counts = self.lengths - self.num_prompt_tokens
        columns = torch.arange(int(counts.max()), device=counts.device)
        new = self.tokens.gather(1, self.num_prompt_tokens.unsqueeze(1) + columns)
        if self.request.pad_token_id is not None:
            new = torch.where(columns < counts.unsqueeze(1), new, self.request.pad_token_id)
        return torch.cat([self.request.input_ids, new], dim=1)

    def extend_past(self, cache: Any) -> None:
        """Append to `cache` what plain `generate` would leave there: every column but the last new one."""
        counts = self.lengths - self.num_prompt_tokens
        first, last = int(counts.min()) - 1, int(counts.max()) - 1
        columns = torch.arange(last, device=counts.device)
        new = (self.offset + self.num_prompt_tokens).unsqueeze(1) + columns
        if first < last:  # Rows that ended early have not read their last token, nor the padding after it.
            start = self.request.input_ids.shape[1]
            ids = self.sequences()[:, start + first : start + last]
            self.target.forward(new[:, first:], int(new.max()) + 1, 1, input_ids=ids)
        self.target.cache.append_to(cache, torch.cat([self.positions, new], dim=1)[:, cache.get_seq_length() :])
