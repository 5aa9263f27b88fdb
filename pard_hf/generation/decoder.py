"""What to generate, in the words of `generate()`.

What a finished decoder hands back, in the shapes of plain `generate`.

The two forwards of a round, and how much of the text each has to read.

Knows which columns, slots and shapes a forward needs; knows nothing of lengths on the host and of verification.

The draft-verify loop over rows of different lengths.

A round is one draft forward and one target forward; both models keep a `SlotCache`, so rows accept different counts
freely and nothing is rolled back. Knows models, caches and tokens; knows nothing of `generate()`, which the mixin
translates into a `DecodingRequest`.

Two ways to advance, one output: rows on their own, decided on the device with one host synchronisation a round; or in
lockstep (`lockstep.py`), where processors, criteria and streamer see exactly the calls plain `generate` would make.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..draft.model import PardDraftModel
from .batch import PREFILL_CHUNK, Batch, Role, Rows, to_host
from .compilation import EagerSteps
from .kernels import grouped_attention
from .sampling import Noise, process_positions, verify_ratio_test
from .schedule import Choice, Schedule
from .stats import DecodingStats, NoClock, clock_of_call
from .steps import Proposals, accept_step, append_step, draft_step, score_step, target_step


@dataclass
class DecodingRequest:
    """One call of `generate()`, as our loop reads it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, num_columns)`):
            Prompt, left-padded; no columns when `inputs_embeds` is given.
        attention_mask (`torch.LongTensor` of shape `(batch_size, mask_length)`):
            1 for text, 0 for padding. Longer than the prompt where the prompt goes on after an earlier cache, `past`.
        num_assistant_tokens (`int`):
            K, draft tokens a round, at most.
        tree_size (`int`, *optional*, defaults to 0):
            N, nodes of a round's tree, at most; 0 for a chain.
        max_length (`int`):
            Columns of the longest output, prompt included.
        returns_cache (`bool`, *optional*, defaults to `False`):
            Whether the target's cache is asked for afterwards.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_assistant_tokens: int
    max_length: int
    pad_token_id: int | None
    eos_token_id: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    past: Cache | None = None
    do_sample: bool = False
    ratio_test: bool = False
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: Any = None
    output_scores: bool = False
    output_logits: bool = False
    returns_cache: bool = False
    tree_size: int = 0


def sequences_of(rows: Rows, request: DecodingRequest) -> torch.Tensor:
    """Prompt columns and what followed, `[B, num_columns + num_new]`; finished rows filled with `pad_token_id`."""
    counts = rows.lengths - rows.num_prompt_tokens
    columns = torch.arange(int(counts.max()), device=counts.device)
    index = rows.num_prompt_tokens.unsqueeze(1) + columns
    # A long row that ended early has columns of padding beyond its buffer.
    new = rows.tokens.gather(1, index.clamp(max=rows.tokens.shape[1] - 1))
    if request.pad_token_id is not None:
        new = torch.where(columns < counts.unsqueeze(1), new, request.pad_token_id)
    return torch.cat([request.input_ids, new], dim=1)


def on_path(values: torch.Tensor, nodes: torch.Tensor | None) -> torch.Tensor:
    """Of values `[B, N + 1, V]` at a tree's nodes, those at the root and on the accepted path, `[B, K + 1, V]`."""
    if nodes is None:
        return values
    rows = torch.nn.functional.pad(nodes, (1, 0)).unsqueeze(2)
    return values.gather(1, rows.expand(-1, -1, values.shape[2]))


class Recording:
    """The scores and raw logits of every round, for callers who ask for them."""

    def __init__(self) -> None:
        self.rounds: list[tuple[tuple[torch.Tensor, torch.Tensor], list[int]]] = []
        self.counts: list[list[int]] = []

    def add(self, scores: torch.Tensor, logits: torch.Tensor, row_ids: list[int]) -> None:
        """Keep a round's `[b, num_drafts + 1, V]` scores and logits of the rows `row_ids`."""
        self.rounds.append(((scores, logits), row_ids))

    def settle(self, counts: list[int]) -> None:
        """Say how many columns of each row counted, for the oldest round of which that was not known."""
        if len(self.counts) < len(self.rounds):
            self.counts.append(counts)

    def columns(self, which: int, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Scores (0) or raw logits (1) as plain `generate` gives them: one `[B, V]` a new column.

        Columns after a row's end are zeros.
        """
        filled = [0] * batch_size
        for (_, row_ids), counts in zip(self.rounds, self.counts, strict=True):
            for row, count in zip(row_ids, counts, strict=True):
                filled[row] += count
        first = self.rounds[0][0][which]
        merged = first.new_zeros(batch_size, max(filled), first.shape[-1])
        filled = [0] * batch_size
        for (tensors, row_ids), counts in zip(self.rounds, self.counts, strict=True):
            for source, (row, count) in enumerate(zip(row_ids, counts, strict=True)):
                merged[row, filled[row] : filled[row] + count] = tensors[which][source, :count]
                filled[row] += count
        return tuple(merged.unbind(1))


def extend_past(
    target: Role,
    rows: Rows,
    positions: torch.Tensor,
    sequences: torch.Tensor,
    num_columns: int,
    fewest_said: int,
    cache: Any,
) -> None:
    """Append to `cache` what plain `generate` would leave there: every column but the last new one.

    Args:
        positions (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            Logical positions of the prompt's columns, and of those before it; negative for padding.
        sequences (`torch.LongTensor`):
            As [`sequences_of`] gives them, of which the first `num_columns` are the prompt's.
        fewest_said (`int`):
            New tokens of the row that ended first, its last one included.
    """
    counts = rows.lengths - rows.num_prompt_tokens
    first, last = fewest_said - 1, int(counts.max()) - 1
    columns = torch.arange(last, device=counts.device)
    new = (rows.offset + rows.num_prompt_tokens).unsqueeze(1) + columns
    if first < last:  # Rows that ended early have not read their last token, nor the padding after it.
        ids = sequences[:, num_columns + first : num_columns + last]
        target.forward(new[:, first:], int(new.max()) + 1, 1, input_ids=ids)
    target.cache.append_to(cache, torch.cat([positions, new], dim=1)[:, cache.get_seq_length() :])


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


# New tokens that justify compiling for fewer rows: that takes longer than a short tail does.
WORTH_COMPILING = 1024
EAGER = EagerSteps()


class PardDecoder:
    """Generates for one request.

    Args:
        steps ([`EagerSteps`]):
            Where the parts of a round run.
        schedule ([`Schedule`]):
            Chooses K and the tree before each round, at most the request's.
    """

    loop = "own"

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PardDraftModel,
        request: DecodingRequest,
        steps: EagerSteps | None = None,
        schedule: Schedule | None = None,
    ):
        self.request = request
        self.steps = steps or EAGER
        self.schedule = schedule or Schedule(request.num_assistant_tokens, request.tree_size)
        ids, mask = request.input_ids.long(), request.attention_mask
        # As plain `generate`, which asks its criteria after the first token only.
        self.budget = max(request.max_length - ids.shape[1], 1)
        self.positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)
        text = mask[:, mask.shape[1] - ids.shape[1] :].sum(-1)
        # Host-side copies, refreshed by the one synchronisation a round; lists go by row of the present batch.
        self.host_lengths: list[int] = text.tolist()
        self.host_prompt = list(self.host_lengths)
        self.host_offset = int((mask.sum(-1) - text).max())
        self.active = [True] * len(ids)

        longest = max(self.host_lengths)
        rows = Rows.from_prompt(ids, mask, self.budget)
        sizes = self.sizes_for(longest, self.schedule.largest)
        self.batch = Batch(target, draft, rows, self.steps, sizes, request.returns_cache)
        vocab_size = target.config.get_text_config().vocab_size
        self.forwards = Forwards(self.batch, request, self.positions, vocab_size)
        num_cached = self.load_past()
        # How many of each row's last tokens a model has yet to read.
        self.target_width = int((text - num_cached).max()) if request.inputs_embeds is None else 0
        self.draft_width = longest
        self.is_first = True
        self.histogram = [0] * (request.num_assistant_tokens + 1)
        self.num_drafted = 0
        self.noise = Noise(ids.device, is_ordered=len(ids) == 1)
        self.recording = Recording() if request.output_scores or request.output_logits else None
        # Rounds whose outcome the host has not looked at yet.
        self.pending: deque[tuple[Callable[[], torch.Tensor], Choice]] = deque()
        self.num_ahead = int(self.may_run_ahead() and ids.device.type == "cuda")
        self.clock = clock_of_call.get() or NoClock()

    def load_past(self) -> torch.Tensor | int:
        """Take over the target's earlier cache; returns how many of each row's tokens it already holds."""
        past = self.request.past
        num_past = past.get_seq_length() if past is not None else 0
        if not num_past:
            return 0
        self.batch.target.cache.load(past, self.positions[:, :num_past])
        return (self.positions[:, :num_past] >= 0).sum(-1) - self.batch.rows.offset

    def may_run_ahead(self) -> bool:
        """Whether the device can begin a round before the host knows how the last one ended."""
        request = self.request
        return (
            self.steps.is_fixed
            and not self.schedule.is_adaptive
            and request.streamer is None
            and not (request.output_scores or request.output_logits)
            and not (request.do_sample and len(request.input_ids) == 1)  # Noise is drawn in the order it is used.
        )

    @property
    def stats(self) -> DecodingStats:
        return DecodingStats(tuple(self.histogram), self.num_drafted, self.loop)

    def remaining(self, row: int) -> int:
        """Tokens the row may still emit, as far as the host knows."""
        return self.budget - (self.host_lengths[row] - self.host_prompt[row])

    def run(self) -> None:
        """Generate until every row has finished."""
        self.clock.start(self.batch.rows.tokens.device)
        while any(self.active):
            self.compact()
            if any(self.active):
                choice = self.schedule.choose(self.work, self.is_ready)
                self.batch.make_room(self.sizes_for(self.longest(), choice))
                self.round(choice)
        while self.pending:  # Every row had ended before these began.
            self.settle(*self.pending.popleft())
        self.batch.reunite()

    def is_ready(self, choice: Choice) -> bool:
        """Whether a round of the present batch is compiled for a choice, or need not be."""
        return self.steps.is_ready(target_step, self.batch.shape(choice))

    def sizes_for(self, longest: int, choice: Choice) -> tuple[int, int]:
        """Slots that a round needs in the draft's and the target's cache."""
        room = longest + max(choice.num_drafts, choice.num_proposals) + 1
        return room, room + self.host_offset

    def round(self, choice: Choice) -> None:
        """Draft, verify, advance."""
        most = max(self.remaining(row) for row in range(len(self.batch)) if self.active[row])
        if not self.steps_now.is_fixed:
            # The bonus token needs no proposal, so at most `most - 1` can be accepted.
            choice = choice.at_most(most - 1 if self.target_width else 0)
        num_drafts = choice.num_drafts
        # A round whose draft has much to catch up on says nothing about the next.
        most_to_read = self.schedule.largest.num_drafts + 1
        is_typical = not self.is_first and (num_drafts == 0 or self.draft_width <= most_to_read)
        start, compile_seconds, work = time.perf_counter(), self.steps.compile_seconds, self.work
        self.steps.begin_round()
        proposals = self.forwards.nothing()
        with grouped_attention():
            if num_drafts:
                proposals = self.forwards.propose(self.steps_now, self.draft_width, self.longest(), choice)
            self.clock.mark("draft")
            longest = self.longest() + self.host_offset
            logits = self.forwards.verify(self.steps_now, self.target_width, longest, proposals, choice)
        self.clock.mark("verify")
        accepted = self.advance(proposals, logits)
        is_typical &= compile_seconds == self.steps.compile_seconds
        self.schedule.record(work, choice, time.perf_counter() - start if is_typical else None, accepted)
        self.clock.end_round(is_prefill=self.is_first)
        self.is_first = False

    @property
    def steps_now(self) -> EagerSteps:
        """Where this round's parts run: the first reads prompts of any length, as it stands."""
        return EAGER if self.is_first else self.steps

    def longest(self) -> int:
        """An upper bound of the tokens known of any row."""
        return max(self.host_lengths) + sum(choice.num_drafts + 1 for _, choice in self.pending)

    def advance(self, proposals: Proposals, logits: torch.Tensor) -> list[int]:
        """Verify, append and finish rows; returns what unfinished rows accepted, where it is known already."""
        scores = process_positions(self.request.logits_processor, logits)
        outcome, nodes = self.accept(proposals, scores)
        self.pending.append((to_host(outcome), proposals.choice))
        if self.recording is not None:  # Copies of what compiled parts return: the next round writes there.
            kept = (scores.clone(), logits.clone()) if self.steps.is_fixed else (scores, logits)
            self.recording.add(on_path(kept[0], nodes), on_path(kept[1], nodes), self.batch.row_ids)
        accepted: list[int] = []
        while len(self.pending) > (0 if self.is_first else self.num_ahead):
            accepted = self.settle(*self.pending.popleft())
        return accepted

    def accept(self, proposals: Proposals, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Verify by the rule of the request and append; returns as [`accept_step`] does."""
        ends = self.request.eos_token_id
        if self.request.ratio_test and proposals.scores is not None:
            verified = verify_ratio_test(proposals.tokens, proposals.scores, scores)
            return append_step(self.batch.rows, *verified, ends), None
        depths = proposals.num_depths + 1
        noise = self.noise.draw(len(scores), depths, scores.shape[-1]) if self.request.do_sample else None
        shape = self.batch.shape(proposals.choice)
        key = (*shape, ("end tokens", 0 if ends is None else len(ends)), ("samples", noise is not None))
        arguments = (self.batch.target, self.batch.rows, proposals, scores, ends, noise)
        return self.steps_now.run(accept_step, key, *arguments)

    def settle(self, arrived: Callable[[], torch.Tensor], choice: Choice) -> list[int]:
        """Learn how a round ended: the round's only synchronisation."""
        emitted, finished, *columns = arrived().T.tolist()
        if self.request.streamer is None:
            self.noise.use(emitted[0])
        if self.recording is not None:
            self.recording.settle(emitted)
        if self.request.streamer is not None:
            for column in range(emitted[0]):
                self.noise.use(1)  # A streamer that raises leaves the generator where the text ends.
                self.stream(torch.tensor(columns[column][:1]), is_accepted=column < emitted[0] - 1)
        self.account(emitted, emitted, choice)
        self.active = [not done for done in finished]
        return [count - 1 for count, done in zip(emitted, finished, strict=True) if count and not done]

    def stream(self, tokens: torch.Tensor, is_accepted: bool) -> None:
        """Hand a column to the streamer; one with `put_accepted` is told which tokens the draft proposed."""
        streamer = self.request.streamer
        put = getattr(streamer, "put_accepted", streamer.put) if is_accepted else streamer.put
        put(tokens)

    def account(self, grown: list[int], emitted: list[int], choice: Choice) -> None:
        """Update host-side lengths and statistics after a round."""
        for row, count in enumerate(emitted):
            if count and self.target_width:  # A prefill of embeddings without a draft is no round.
                self.histogram[count - 1] += 1
                self.num_drafted += choice.tree_size or min(choice.num_drafts, self.remaining(row) - 1)
            self.host_lengths[row] += grown[row]
        self.target_width = 1
        # What the draft has not read: accepted proposals too, for their entries were computed from masks.
        self.draft_width = max(grown) if choice.num_drafts else self.draft_width + max(grown)

    def compact(self) -> None:
        """Let finished rows leave, so that the last ones do not pay for everyone."""
        if self.smaller_size() is None:
            return
        while self.pending:  # Rounds begun meanwhile are of the whole batch.
            self.settle(*self.pending.popleft())
        if (size := self.smaller_size()) is None:
            return
        kept = sorted(sorted(range(len(self.batch)), key=lambda row: not self.active[row])[:size])
        self.batch.keep(kept)
        self.host_lengths, self.host_prompt = ([r[row] for row in kept] for r in (self.host_lengths, self.host_prompt))
        self.active = [self.active[row] for row in kept]
        # Nobody has more to read than the longest of those who stay.
        self.draft_width = min(self.draft_width, max(self.host_lengths))

    def smaller_size(self) -> int | None:
        """The power of two that holds the rows still going; `None` where a smaller batch does not pay.

        Where its rounds would have to be compiled first, it pays only with much left to say.
        """
        if not any(self.active):
            return None
        size = 1 << (sum(self.active) - 1).bit_length()
        most = max(self.remaining(row) for row in range(len(self.batch)) if self.active[row])
        shape = (("batch size", size), *self.batch.shape(self.schedule.largest)[1:])
        pays = most >= WORTH_COMPILING or self.steps.is_ready(target_step, shape)
        return size if size < len(self.batch) and pays else None

    @property
    def work(self) -> tuple[int, int]:
        """What the cost of a round depends on besides K: rows, and the tokens they may attend to."""
        return len(self.batch), self.batch.target.cache.num_slots

    def sequences(self) -> torch.Tensor:
        """Prompt columns and what followed, `[B, num_columns + num_new]`."""
        return sequences_of(self.batch.rows, self.request)

    def outputs(self, which: int) -> tuple[torch.Tensor, ...]:
        """Scores (0) or raw logits (1), one `[B, V]` a new column."""
        assert self.recording is not None
        return self.recording.columns(which, len(self.batch.rows))

    def extend_past(self, cache: Any) -> None:
        """Append to `cache` what plain `generate` would leave there."""
        target, rows, num_columns = self.batch.target, self.batch.rows, self.request.input_ids.shape[1]
        extend_past(target, rows, self.positions, self.sequences(), num_columns, self.fewest_said(), cache)

    def fewest_said(self) -> int:
        """New tokens of the row that ended first."""
        return int((self.batch.rows.lengths - self.batch.rows.num_prompt_tokens).min())
