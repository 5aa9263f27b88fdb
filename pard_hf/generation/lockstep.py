"""Decode rows that advance together, for code that reads the prefix token by token.

Processors, stopping criteria and streamers may keep state, read other rows or count their calls. Here each is
called once a column with all rows, in order, on emitted tokens only: the body of plain `generate`'s loop, with logits
that were computed ahead. A round ends at the first column where an unfinished row leaves its proposals.
"""

from __future__ import annotations

from typing import Any

import torch

from .batch import to_host
from .decoder import PardDecoder
from .recurrent import HybridCache
from .schedule import Choice
from .sources import components_of
from .steps import Proposals, keep_step, remember_step
from .tree import Tree, chain_as_tree, child_with


class LockstepDecoder(PardDecoder):
    """A `PardDecoder` whose rows all grow by the same number of tokens a round."""

    loop = "lockstep"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.columns = self.input_ids
        self.unfinished = torch.ones(len(self.batch), dtype=torch.long, device=self.columns.device)
        # Tokens of each row up to its end, on the host: the padding after it is not their text.
        self.num_new = torch.zeros(len(self.batch), dtype=torch.long)
        # As in plain `generate`: finished rows become padding only where an end token exists.
        self.pads_finished = any(hasattr(criterion, "eos_token_id") for criterion in self.stopping_criteria)
        # Whether the padding of finished rows must have been read as well: into a state that is returned.
        self.reads_padding = self.returns_cache and isinstance(self.batch.target.cache, HybridCache)
        # Scores so far, as plain `generate` shows them to its criteria.
        self.scores_so_far: tuple[torch.Tensor, ...] | None = None if self.scores is None else ()
        self.accepted: list[int] = []

    def can_overlap(self) -> bool:
        return False

    def accept(self, proposals: Proposals, logits: torch.Tensor, choice: Choice) -> None:
        """Emit column by column until a row leaves its proposals, then append what was emitted."""
        tree = chain_as_tree(proposals.tokens) if proposals.tree is None else proposals.tree
        nodes, processed, raw, path = torch.zeros_like(self.unfinished), [], [], []
        are_proposed, components = [], []
        going, emitted = torch.tensor(self.batch.unfinished), torch.zeros_like(self.num_new)
        while True:
            # A copy: processors may write in place, and the raw logits are an output of their own.
            raw.append(logits[torch.arange(len(nodes), device=nodes.device), nodes])
            tokens, scores = self.choose_tokens(raw[-1].clone())
            processed.append(scores)
            emitted += going
            nodes, is_proposed = child_with(tree, nodes, tokens)
            are_proposed.append(is_proposed)
            was_proposed, going, component = self.emit(tokens, scores, is_proposed, component_at(tree, nodes))
            components.append(component)
            goes_on = going | (not self.pads_finished or self.reads_padding)
            if not going.any() or (goes_on & ~was_proposed).any():
                break
            path.append(nodes)
        if self.sources is not None:
            self.count_components(emitted.tolist(), components)
            num_matched = torch.stack(are_proposed, dim=1).long().cumprod(dim=1).sum(dim=1)
            nodes_BK = torch.stack(path, dim=1) if path else logits.new_empty(len(logits), 0, dtype=torch.long)
            remember_step(self.sources, self.batch.rows, proposals.tree, logits, nodes_BK, num_matched)
        if proposals.tree is not None and path:
            last = self.batch.rows.lengths - 1
            keep_step(self.batch.target, self.batch.rows, last, torch.stack(path, dim=1))
        self.append(processed, raw, emitted, choice)
        self.batch.unfinished = going.tolist()
        self.batch.rows.is_finished.copy_(self.unfinished == 0)

    def append(
        self, processed: list[torch.Tensor], raw: list[torch.Tensor], emitted: torch.Tensor, choice: Choice
    ) -> None:
        """Append the columns of a round, of each row the first `emitted` as its own text."""
        grown = [len(raw)] * len(self.batch)
        self.num_new += emitted
        self.batch.rows.append(self.columns[:, -len(raw) :], len(raw))
        self.batch.commit()
        if self.scores is not None or self.logits is not None:
            self.record(torch.stack(processed, dim=1), torch.stack(raw, dim=1), grown)
        self.account(grown, emitted.tolist(), choice)
        self.accepted = [len(raw) - 1]  # The slowest row decides what a round of this batch is worth.

    def choose_tokens(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token a row from raw `logits` `[B, V]` as plain `generate` does; return tokens and scores."""
        scores = self.logits_processor(self.columns, logits)
        if self.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.pads_finished and self.pad_token_id is not None:
            tokens = torch.where(self.unfinished == 1, tokens, self.pad_token_id)
        return tokens, scores

    def emit(
        self, tokens: torch.Tensor, scores: torch.Tensor, is_proposed: torch.Tensor, component: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Append a column, ask the criteria which rows end here and show it to the streamer.

        Returns:
            On the host, of each row: whether the token was proposed, whether the row continues, and the component.
        """
        self.columns = torch.cat([self.columns, tokens.unsqueeze(1)], dim=1)
        if self.scores_so_far is not None:
            self.scores_so_far += (scores,)
        self.unfinished = self.unfinished & ~self.stopping_criteria(self.columns, self.scores_so_far)
        outcome = to_host(torch.stack([tokens, is_proposed.long(), self.unfinished, component]))()
        if self.streamer is not None:
            source = None if self.sources is None else int(outcome[3][0])
            self.put(outcome[0], bool(outcome[1].all()), source)
        return outcome[1].bool(), outcome[2].bool(), outcome[3].tolist()

    def synchronize(self, num_ahead: int = 0) -> list[int]:
        """Return what the round accepted: every column was read when it was emitted."""
        return self.accepted if self.batch.has_unfinished else []

    def drop_finished_rows(self) -> None:
        """Keep every row: processors and criteria are shown all of them to the end."""

    def sequences(self) -> torch.Tensor:
        return self.columns

    def fewest_new_tokens(self) -> int:
        return int(self.num_new.min())


def component_at(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
    """Return the component that gave the node `[B]` of each row; 0 where only a draft proposed."""
    return torch.zeros_like(nodes) if tree.shares is None else components_of(tree, nodes.unsqueeze(1)).squeeze(1)
