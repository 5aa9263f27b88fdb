"""The two forwards of a round, and how much of the text each has to read.

Knows which columns, slots and shapes a forward needs; knows nothing of lengths on the host and of verification.
"""

from __future__ import annotations

from typing import Any

import torch

from .batch import PREFILL_CHUNK, Batch
from .compilation import EagerSteps
from .processors import process_positions
from .request import DecodingRequest
from .schedule import Choice
from .steps import Proposals, draft_step, score_step, target_step


class Forwards:
    """Runs the draft and the target of one call.

    Args:
        batch ([`Batch`]):
            Rows and caches of both models.
        request ([`DecodingRequest`]):
            The call.
        positions (`torch.LongTensor` of shape `(batch_size, mask_length)`):
            Logical positions of the prompt's columns; negative for padding.
        vocab_size (`int`):
            The target's.
    """

    def __init__(self, batch: Batch, request: DecodingRequest, positions: torch.Tensor, vocab_size: int):
        self.batch, self.request, self.positions, self.vocab_size = batch, request, positions, vocab_size

    def nothing(self) -> Proposals:
        """No proposals: a round of plain decoding."""
        return Proposals(self.batch.rows.tokens.new_empty(len(self.batch), 0), 0)

    def propose(self, steps: EagerSteps, width: int, longest: int, choice: Choice) -> Proposals:
        """Proposals of a round.

        Args:
            width (`int`):
                How many of each row's last tokens the draft has yet to read.
            longest (`int`):
                Tokens of the longest text.
        """
        num_drafts, draft = choice.num_drafts, self.batch.draft
        num_visible = longest + num_drafts - 1
        is_first_read = steps.is_fixed and not draft.cache.has_memory
        if is_first_read or width > (num_drafts + 1 if steps.is_fixed else PREFILL_CHUNK):
            self.batch.read(draft, width, longest)
            width = 1
        if steps.is_fixed:
            # Entries written twice are the same twice, so one width serves every count that was accepted.
            num_visible, width = draft.cache.num_slots, num_drafts + 1
        arguments = (draft, self.batch.rows, width, num_drafts, num_visible, self.vocab_size)
        if self.request.ratio_test:
            return self.draw(*steps.run(score_step, self.batch.shape(choice), *arguments))
        return steps.run(draft_step, self.batch.shape(choice), *arguments, choice.tree_size)

    def draw(self, scores: torch.Tensor, hidden: torch.Tensor | None) -> Proposals:
        """Draw a chain from the draft's distributions, as the ratio test wants it."""
        processors, model = self.request.logits_processor, self.batch.draft.model

        def choose(logits: torch.Tensor) -> torch.Tensor:
            places = logits if logits.dim() == 3 else logits.unsqueeze(1)
            law = process_positions(processors, places.float()).softmax(dim=-1)
            return torch.multinomial(law.flatten(0, 1), 1).view(logits.shape[:-1])

        device = self.batch.rows.tokens.device
        tokens, scores = (values.to(device) for values in model.chain(scores, hidden, choose))
        return Proposals(tokens, tokens.shape[1], process_positions(processors, scores.float()))

    def verify(
        self, steps: EagerSteps, width: int, longest: int, proposals: Proposals, choice: Choice
    ) -> torch.Tensor:
        """One target forward over what its cache lacks and the proposals; logits `[B, num_proposals + 1, V]`, float32.

        Args:
            width (`int`):
                How many of each row's last tokens the target has yet to read.
            longest (`int`):
                Positions of the longest text in the target.
        """
        target, rows = self.batch.target, self.batch.rows
        num_visible = longest + proposals.tokens.shape[1]
        if self.request.inputs_embeds is not None and width == 0:  # Nothing but embeddings is known yet.
            logits = target.forward(self.positions, num_visible, 1, inputs_embeds=self.request.inputs_embeds)
            return logits.to(rows.tokens.device, torch.float32)
        if width > PREFILL_CHUNK:
            self.batch.read(target, width, longest)
            width = 1
        if steps.is_fixed:
            num_visible = target.cache.num_slots
        arguments: tuple[Any, ...] = (target, rows, proposals, width, num_visible)
        return steps.run(target_step, self.batch.shape(choice), *arguments)
