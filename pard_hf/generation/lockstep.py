"""Rows that advance together, so that code which looks at the prefix sees what plain `generate` would show it.

Processors, stopping criteria and streamers may keep state, look at other rows or count their calls. Here each is
called once a column with all rows, in order, on emitted tokens only: the body of plain `generate`'s loop, with logits
that were computed ahead. A round ends at the first column where an unfinished row leaves its proposals.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .batch import to_host
from .decoder import DecodingRequest, PardDecoder
from .sampling import is_prefix_free
from .steps import Proposals, keep_step
from .tree import chain_as_tree, child_with

# Criteria decided on the device, row by row; any other is called as plain `generate` calls it.
KNOWN_CRITERIA = {EosTokenCriteria, MaxLengthCriteria}


class LockstepDecoder(PardDecoder):
    """A `PardDecoder` whose rows all grow by the same number of tokens a round."""

    loop = "lockstep"

    def __init__(self, target: Any, draft: Any, request: DecodingRequest, *args: Any):
        super().__init__(target, draft, request, *args)
        self.columns = request.input_ids
        self.unfinished = torch.ones(len(self.batch), dtype=torch.long, device=self.columns.device)
        # Tokens of each row up to its end: what a finished row's proposals left in the cache is no text of its own.
        self.num_said = torch.zeros(len(self.batch), dtype=torch.long)  # On the host, which alone asks.
        # As in plain `generate`: only where an end token exists do finished rows turn into padding.
        self.pads_finished = any(hasattr(criteria, "eos_token_id") for criteria in request.stopping_criteria)
        self.scores: tuple[torch.Tensor, ...] | None = () if request.output_scores else None

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token a row from raw `logits` `[B, V]` as plain `generate` does; returns tokens and scores."""
        scores = self.request.logits_processor(self.columns, logits)
        if self.request.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.pads_finished and self.request.pad_token_id is not None:
            tokens = torch.where(self.unfinished == 1, tokens, self.request.pad_token_id)
        return tokens, scores

    def emit(self, tokens: torch.Tensor, scores: torch.Tensor, is_proposed: torch.Tensor) -> torch.Tensor:
        """Append a column, ask the criteria which rows end here and show it to the streamer.

        Returns:
            `[2, B]` on the host, all it looks at of a column: whether each token was proposed, which rows go on.
        """
        self.columns = torch.cat([self.columns, tokens.unsqueeze(1)], dim=1)
        if self.scores is not None:
            self.scores += (scores,)
        self.unfinished = self.unfinished & ~self.request.stopping_criteria(self.columns, self.scores)
        said = to_host(torch.stack([tokens, is_proposed.long(), self.unfinished]))()
        if self.request.streamer is not None:
            self.stream(said[0], is_accepted=bool(said[1].all()))
        return said[1:].bool()

    def compact(self) -> None:
        """Nobody leaves: processors and criteria are shown every row to the end."""

    def may_run_ahead(self) -> bool:
        return False

    def advance(self, proposals: Proposals, logits: torch.Tensor) -> list[int]:
        tree = chain_as_tree(proposals.tokens) if proposals.tree is None else proposals.tree
        nodes, processed, raw, path = torch.zeros_like(self.unfinished), [], [], []
        going, emitted = torch.tensor(self.active), torch.zeros(len(self.batch), dtype=torch.long)
        while True:
            # A copy: processors may write in place, and the raw logits are an output of their own.
            raw.append(logits[torch.arange(len(nodes), device=nodes.device), nodes])
            tokens, scores = self.choose(raw[-1].clone())
            processed.append(scores)
            emitted += going
            nodes, is_proposed = child_with(tree, nodes, tokens)
            was_proposed, going = self.emit(tokens, scores, is_proposed)
            goes_on = going | (not self.pads_finished)
            if not going.any() or (goes_on & ~was_proposed).any():
                break
            path.append(nodes)
        num_grown = len(processed)
        self.num_said += emitted
        if proposals.tree is not None and path:
            keep_step(self.batch.target, self.batch.rows, torch.stack(path, dim=1))
        self.batch.rows.append(self.columns[:, -num_grown:], num_grown)
        if self.recording is not None:
            self.recording.add(torch.stack(processed, dim=1), torch.stack(raw, dim=1), self.batch.row_ids)
            self.recording.settle([num_grown] * len(self.batch))
        self.account([num_grown] * len(self.batch), emitted.tolist(), proposals.choice)
        self.active = going.tolist()
        # The slowest row decides what a round of this batch is worth.
        return [num_grown - 1] if any(self.active) else []

    def sequences(self) -> torch.Tensor:
        return self.columns

    def fewest_said(self) -> int:
        return int(self.num_said.min())


def decoder_for(request: DecodingRequest) -> type[PardDecoder]:
    """Rows on their own where nothing looks at the prefix or waits for a whole column, else in lockstep."""
    is_ragged = (
        {type(criterion) for criterion in request.stopping_criteria} <= KNOWN_CRITERIA
        and is_prefix_free(request.logits_processor)
        and (request.streamer is None or len(request.input_ids) == 1)
    )
    if request.ratio_test and not is_ragged:
        raise ValueError(
            "Expected rows that may advance on their own with `verification='ratio_test'`, got a batch with a "
            "streamer, or a processor or criterion that looks at the prefix (repetition penalty, stop string). "
            "Use the default, `verification='sample_and_match'`."
        )
    return PardDecoder if is_ragged else LockstepDecoder
