"""The decoding loop: draft, verify, accept, synchronize, over rows of different lengths.

A round is one draft forward and one target forward. Both models keep a `SlotCache`, so rows accept different counts
and nothing is rolled back; what was rejected is overwritten by the next round. Verification runs on the device; the
host reads its outcome once a round. `lockstep.py` is the same loop for code that reads the prefix token by token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..draft.model import PardDraftModel
from ..host import cached_columns, is_callers, pad_token_id
from .batch import PREFILL_CHUNK, Batch, CachedModel, Rows, to_host
from .compilation import CompiledSteps
from .kernels import grouped_attention
from .layers import Step
from .recurrent import HybridCache
from .sampling import Noise, process_positions, verify_ratio_test
from .schedule import Choice, Schedule
from .sources import COMPONENTS, Sources, accepted_by_source
from .stats import DecodingStats, RoundTimes
from .steps import Proposals, accept_step, append_step, draft_step, lookup_step, score_step, target_step

# New tokens that justify compiling for fewer rows: that takes longer than a short tail does.
WORTH_COMPILING = 1024


class PardDecoder:
    """Decode one call of `generate()`, whose arguments it takes as transformers prepared them.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, num_columns)`) and inputs_embeds (`torch.FloatTensor`):
            Prompt, left-padded; no columns of ids when there are embeddings.
        attention_mask (`torch.LongTensor` of shape `(batch_size, mask_length)`):
            1 for text, 0 for padding; longer than the prompt where it continues an earlier cache, `past`.
        compiled ([`CompiledSteps`], *optional*):
            Runs the steps of rounds that are to be compiled, never the first; without it all run eagerly.
    """

    loop = "own"

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PardDraftModel | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        compiled: CompiledSteps | None,
        schedule: Schedule,
        generation_config: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        past: Cache | None = None,
        sources: Sources | None = None,
    ):
        config = generation_config
        self.input_ids, self.streamer, self.inputs_embeds = input_ids, streamer, inputs_embeds
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.do_sample, self.pad_token_id = bool(config.do_sample), pad_token_id(config)
        self.eos_token_id = end_tokens(stopping_criteria, input_ids.device)
        self.compiled, self.schedule, self.sources = compiled, schedule, sources
        self.num_draft_positions = config.num_assistant_tokens if draft is not None else 0
        self.vocab_size = target.config.get_text_config().vocab_size

        # As plain `generate`, which asks its criteria after the first token only.
        budget = max(max_length(stopping_criteria) - input_ids.shape[1], 1)
        # Logical positions of the mask's columns; negative for padding.
        self.positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, -1)
        rows = Rows.from_prompt(input_ids.long(), attention_mask, budget)
        returns_dict = config.return_dict_in_generate
        self.returns_cache = bool(returns_dict or is_callers(past))
        self.batch = Batch(target, draft, rows, budget, self.schedule.largest, compiled, self.returns_cache)
        self.load_past(past)

        # Whether this round reads the prompt, whether its shapes are those of compiled steps, and which these are.
        self.is_first, self.is_fixed, self.shape = True, False, self.batch.shape(self.schedule.largest)
        self.noise = Noise(input_ids.device, is_ordered=len(input_ids) == 1)
        self.histogram = [0] * (self.schedule.largest.num_drafts + 1)
        self.num_drafted = self.num_compiled = 0
        self.accepted_by_component = [0] * len(COMPONENTS)
        self.scores = Recording(len(input_ids)) if returns_dict and config.output_scores else None
        self.logits = Recording(len(input_ids)) if returns_dict and config.output_logits else None
        self.times = RoundTimes(input_ids.device) if config.measure_rounds else None
        # Outcomes of rounds that the host has not read yet.
        self.pending: deque[tuple[Callable[[], torch.Tensor], Choice]] = deque()
        self.num_ahead = int(self.can_overlap() and input_ids.device.type == "cuda")

    def load_past(self, past: Cache | None) -> None:
        """Take over the target's earlier cache."""
        num_past = cached_columns(past)
        if num_past:
            self.batch.target.cache.load(past, self.positions[:, :num_past])
            num_cached = (self.positions[:, :num_past] >= 0).sum(-1) - self.batch.rows.offset
            self.batch.target.num_unread = int((self.batch.rows.lengths - num_cached).max())

    def can_overlap(self) -> bool:
        """Return whether the device may start a round before the host has the outcome of the previous one."""
        return (
            self.compiled is not None
            and not self.schedule.is_adaptive
            and self.streamer is None
            and self.scores is None
            and self.logits is None
            and not (self.do_sample and len(self.input_ids) == 1)  # Noise is drawn in the order it is used.
        )

    @property
    def stats(self) -> DecodingStats:
        by_source = None if self.sources is None else accepted_by_source(self.accepted_by_component)
        counts = tuple(self.histogram), self.num_drafted, self.loop
        return DecodingStats(*counts, accepted_by_source=by_source, num_compiled=self.num_compiled)

    def run(self) -> None:
        """Generate until every row has finished."""
        if self.inputs_embeds is not None:
            self.read_embeddings(self.inputs_embeds)
        run_round = self.observed_round if self.schedule.is_adaptive else self.round
        while self.batch.has_unfinished:
            choice, was_first, start = self.choose(), self.is_first, time.perf_counter()
            run_round(choice)
            if self.compiled is not None and not was_first:
                self.compiled.count(self.shape, self.is_fixed, time.perf_counter() - start)
            self.drop_finished_rows()
        self.synchronize()  # Rounds that began when every row had ended.
        self.batch.restore_finished_rows()

    def round(self, choice: Choice) -> list[int]:
        """Draft, verify, accept, synchronize; return what unfinished rows accepted, where that is known."""
        longest = self.longest()
        self.batch.make_room(longest, choice)
        self.is_fixed = self.compiles(choice)
        if self.compiled is not None:
            self.compiled.begin_round()
        with grouped_attention():
            proposals = self.propose(choice, longest)
            self.show(proposals)
            self.mark("draft")
            logits = self.score(proposals, choice, longest + self.batch.offset)
        self.mark("verify")
        if choice.tree_size:  # A small vocabulary may not have as many prefixes.
            choice = choice._replace(tree_size=proposals.tokens.shape[1])
        self.accept(proposals, logits, choice)
        accepted = self.synchronize(0 if self.is_first else self.num_ahead)
        self.mark("loop")
        self.is_first = False
        return accepted

    def read_embeddings(self, inputs_embeds: torch.Tensor) -> None:
        """Prefill the target with embeddings, which the draft cannot read, and accept the first token."""
        longest = inputs_embeds.shape[1]
        logits = self.batch.target.forward(self.positions, longest, 1, inputs_embeds=inputs_embeds)
        logits = logits.to(self.input_ids.device, torch.float32)
        self.accept(self.no_proposals(), logits, Choice(0))
        self.synchronize()
        self.histogram[0] = 0  # Nothing was drafted: this was no round.
        self.mark("loop")
        self.is_first = False

    def choose(self) -> Choice:
        """Choose K and the tree of the next round."""
        choice = self.schedule.choose(self.batch.cost_key, self.is_ready)
        self.shape = self.batch.shape(choice)
        if self.compiles(choice):
            return choice
        return choice.at_most(self.batch.most_remaining() - 1)  # The bonus token needs no proposal.

    def compiles(self, choice: Choice) -> bool:
        """Return whether a round runs compiled: never the first, which reads prompts of any length."""
        return self.compiled is not None and not self.is_first and self.compiled.compiles(self.batch.shape(choice))

    def observed_round(self, choice: Choice) -> None:
        """Run a round and record in the schedule its time, where typical, and what it accepted."""
        most_unread, draft = self.schedule.largest.num_drafts + 1, self.batch.draft
        # A draft with much to catch up on makes a slow round.
        is_typical = not self.is_first and (not choice.num_drafts or not draft or draft.num_unread <= most_unread)
        start, compile_seconds, cost_key = time.perf_counter(), self.compile_seconds, self.batch.cost_key
        accepted = self.round(choice)
        is_typical &= compile_seconds == self.compile_seconds
        self.schedule.record(cost_key, choice, time.perf_counter() - start if is_typical else None, accepted)

    def no_proposals(self) -> Proposals:
        return Proposals(self.batch.rows.tokens.new_empty(len(self.batch), 0))

    def propose(self, choice: Choice, longest: int) -> Proposals:
        """Propose K tokens, or a tree of them; `longest` counts the tokens of the longest text."""
        if choice.num_drafts == 0:
            return self.no_proposals()
        draft, num_drafts = self.batch.draft, min(choice.num_drafts, self.num_draft_positions)
        if draft is None:
            return self.look_up(choice)
        # Other sources go deeper than the draft, and a round that the host has not read may have accepted as much.
        most_unread = choice.num_drafts + 1 if self.is_fixed else PREFILL_CHUNK
        if draft.num_unread > most_unread or (self.is_fixed and not draft.cache.has_memory):
            self.batch.read(draft, longest)
        if self.is_fixed:  # An entry written twice is the same twice, so one width serves every accepted count.
            return self.draft(draft, choice, most_unread, num_drafts, None)
        return self.draft(draft, choice, draft.num_unread, num_drafts, longest + num_drafts - 1)

    def draft(
        self, draft: CachedModel, choice: Choice, width: int, num_drafts: int, num_visible: int | None
    ) -> Proposals:
        """Run the draft over each row's last `width` tokens and choose the best proposals."""
        arguments = draft, self.batch.rows, width, num_drafts, num_visible, self.vocab_size
        if self.sources is None:
            return self.run_step(draft_step, choice, *arguments, choice.tree_size, repeats="layers")
        outputs = self.run_step(score_step, choice, *arguments, repeats="layers")
        model: Any = draft.model
        return self.look_up(choice, model.correction_head, *outputs)

    def look_up(self, choice: Choice, *of_draft: Any) -> Proposals:
        """Choose the best proposals of all sources; `of_draft` are its head, logits and hidden states."""
        arguments = self.batch.rows, self.sources, choice.num_drafts, choice.tree_size, *of_draft
        return self.run_step(lookup_step, choice, *arguments, key=self.source_key, repeats="depths")

    @property
    def source_key(self) -> tuple[Any, ...]:
        """Return what of the sources fixes the shapes of compiled steps."""
        sources = self.sources
        if sources is None:
            return ()
        return (
            ("references", sources.references.shape[1]),
            ("copies", sources.longest_match),
            ("successors", sources.learns_successors),
        )

    def score(self, proposals: Proposals, choice: Choice, longest: int) -> torch.Tensor:
        """Run the target over what its cache lacks and the proposals: float32 logits `[B, num_proposals + 1, V]`.

        `longest` counts the positions of the longest text in the target.
        """
        target = self.batch.target
        if target.num_unread > PREFILL_CHUNK:
            self.batch.read(target, longest)
        num_visible = None if self.is_fixed else longest + proposals.tokens.shape[1]
        arguments = (target, self.batch.rows, proposals, target.num_unread, num_visible)
        return self.run_step(target_step, choice, *arguments, repeats="layers")

    def accept(self, proposals: Proposals, logits: torch.Tensor, choice: Choice) -> None:
        """Verify the proposals, append what was accepted and begin to copy the outcome to the host."""
        scores = process_positions(self.logits_processor, logits)
        outcome, nodes = self.verify(proposals, scores, choice)
        self.batch.commit()
        arrived = to_host(outcome)
        self.pending.append((arrived, choice))
        if self.scores is not None or self.logits is not None:
            self.record(on_path(scores, nodes), on_path(logits, nodes), arrived()[:, 0].tolist())

    def verify(
        self, proposals: Proposals, scores: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Verify greedily or by sample-and-match; see [`accept_step`]."""
        noise, ends = None, self.eos_token_id
        if self.do_sample:
            noise = self.noise.draw(len(scores), choice.num_drafts + 1, scores.shape[-1])
        arguments = (
            self.batch.target,
            self.batch.rows,
            proposals,
            choice.num_drafts,
            scores,
            ends,
            noise,
            self.sources,
        )
        key = (("end tokens", 0 if ends is None else len(ends)), ("samples", self.do_sample), *self.source_key)
        return self.run_step(accept_step, choice, *arguments, key=key, repeats="moves")

    def synchronize(self, num_ahead: int = 0) -> list[int]:
        """Read the outcome of all rounds but the last `num_ahead`: the one wait for the device in a round.

        Returns how many proposals each unfinished row accepted in the last round read.
        """
        accepted: list[int] = []
        while len(self.pending) > num_ahead:
            arrived, choice = self.pending.popleft()
            emitted, finished, *columns = arrived().T.tolist()
            columns, components = columns[: choice.num_drafts + 1], columns[choice.num_drafts + 1 :]
            self.stream(emitted[0], columns, components)
            self.count_components(emitted, components)
            self.account(emitted, emitted, choice)
            self.batch.unfinished = [not done for done in finished]
            accepted = [count - 1 for count, done in zip(emitted, finished, strict=True) if count and not done]
        return accepted

    def record(self, scores: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:
        """Keep what the call asks for of a round's `[b, K + 1, V]`: of each row the first `counts[row]` positions."""
        for recording, values in ((self.scores, scores), (self.logits, logits)):
            if recording is not None:
                recording.add(values, self.batch.row_ids, counts)

    def count_components(self, emitted: list[int], components: list[list[int]]) -> None:
        """Count accepted tokens by the component that gave them; column `i` holds that of each row's token `i`."""
        for depth, column in enumerate(components, start=1):
            for count, component in zip(emitted, column, strict=True):
                self.accepted_by_component[component] += depth < count

    def stream(self, num_emitted: int, columns: list[list[int]], components: list[list[int]]) -> None:
        """Stream the first row's tokens, and use up the noise of each with it."""
        if self.streamer is None:
            self.noise.use(num_emitted)
            return
        for number, column in enumerate(columns[:num_emitted], start=1):
            self.noise.use(1)  # A streamer that raises leaves the generator where the text ends.
            component = components[number - 1][0] if number <= len(components) else None
            self.put(torch.tensor(column[:1]), number < num_emitted, component)

    def put(self, tokens: torch.Tensor, is_accepted: bool, component: int | None = None) -> None:
        """Pass a column to the streamer; `put_accepted`, if it has that, gets accepted proposals and their source."""
        put = getattr(self.streamer, "put_accepted", None)
        if put is None or not is_accepted:
            self.streamer.put(tokens)
        elif component is None:
            put(tokens)
        else:
            put(tokens, source=COMPONENTS[component])

    def show(self, proposals: Proposals) -> None:
        """Pass the proposals of a round to the streamer's `put_proposals`, if it has that."""
        put = getattr(self.streamer, "put_proposals", None)
        if put is not None:
            put(proposals)

    def account(self, grown: list[int], emitted: list[int], choice: Choice) -> None:
        """Update the host's lengths and the statistics after a round."""
        batch = self.batch
        is_compiled = self.is_fixed and not (self.compiled and self.compiled.kept.failure)
        for row, count in enumerate(emitted):
            if count:
                self.histogram[count - 1] += 1
                self.num_drafted += choice.at_most(batch.remaining(row) - 1).num_proposals
                self.num_compiled += is_compiled
            batch.lengths[row] += grown[row]
        batch.target.num_unread = 1
        # The draft has not read accepted proposals either: their entries were computed from masks.
        if batch.draft is not None:
            batch.draft.num_unread = max(grown) + (0 if choice.num_drafts else batch.draft.num_unread)

    def drop_finished_rows(self) -> None:
        """Shrink the batch when rows have finished."""
        if self.smaller_batch_size() is None:
            return
        self.synchronize()  # Rounds under way are of the whole batch.
        if (size := self.smaller_batch_size()) is not None:
            unfinished = self.batch.unfinished
            self.batch.keep(sorted(sorted(range(len(unfinished)), key=lambda row: not unfinished[row])[:size]))

    def smaller_batch_size(self) -> int | None:
        """Return the power of two that holds the unfinished rows; `None` where a smaller batch does not pay.

        Where its steps would have to be compiled first, it pays only with many tokens to come.
        """
        num_unfinished = sum(self.batch.unfinished)
        size = 1 << max(num_unfinished - 1, 0).bit_length()
        if num_unfinished == 0 or size >= len(self.batch):
            return None
        pays = self.is_ready(self.schedule.largest, size) or self.batch.most_remaining() >= WORTH_COMPILING
        return size if pays else None

    def longest(self) -> int:
        """Return an upper bound of the tokens known of any row."""
        return max(self.batch.lengths) + sum(choice.num_drafts + 1 for _, choice in self.pending)

    def run_step(
        self, step: Step, choice: Choice, *arguments: Any, key: tuple[Any, ...] = (), repeats: str | None = None
    ) -> Any:
        """Call a step, compiled or eagerly; `key` holds what fixes its shapes besides batch, caches and choice.

        For `repeats` see [`CompiledSteps.run`].
        """
        if self.compiled is None or not self.is_fixed:
            return step(*arguments)
        return self.compiled.run(step, (*self.batch.shape(choice), *key), *arguments, repeats=repeats)

    def is_ready(self, choice: Choice, batch_size: int | None = None) -> bool:
        """Return whether a round runs for a choice without being compiled first, in this batch or a smaller one."""
        return self.compiled is None or self.compiled.is_ready(target_step, self.batch.shape(choice, batch_size))

    @property
    def compile_seconds(self) -> float:
        return 0.0 if self.compiled is None else self.compiled.compile_seconds

    def mark(self, step: str) -> None:
        """Record the time since the last mark, if the call asks for it; the whole first round is `prefill`."""
        if self.times is not None:
            self.times.mark("prefill" if self.is_first else step)
            self.times.num_rounds += step == "loop" and not self.is_first

    def sequences(self) -> torch.Tensor:
        """Return prompt and new tokens, `[B, num_columns + num_new]`; finished rows filled with `pad_token_id`."""
        rows, counts = self.batch.rows, self.batch.rows.num_new()
        columns = torch.arange(int(counts.max()), device=counts.device)
        index = rows.num_prompt_tokens.unsqueeze(1) + columns
        # A long row that ended early has columns of padding beyond its buffer.
        new = rows.tokens.gather(1, index.clamp(max=rows.tokens.shape[1] - 1))
        if self.pad_token_id is not None:
            new = torch.where(columns < counts.unsqueeze(1), new, self.pad_token_id)
        return torch.cat([self.input_ids, new], dim=1)

    def fewest_new_tokens(self) -> int:
        """Count the new tokens of the row that ended first, its last one included."""
        return int(self.batch.rows.num_new().min())

    def extend(self, cache: Any) -> None:
        """Append to `cache` what plain `generate` would leave there: every column but the last new one."""
        rows, target = self.batch.rows, self.batch.target
        first, last = self.fewest_new_tokens() - 1, int(rows.num_new().max()) - 1
        columns = torch.arange(last, device=rows.lengths.device)
        new = (rows.offset + rows.num_prompt_tokens).unsqueeze(1) + columns
        if first < last:  # Rows that ended early have not read their last token, nor the padding after it.
            num_columns = self.input_ids.shape[1]
            ids = self.sequences()[:, num_columns + first : num_columns + last]
            reread = new
            if isinstance(target.cache, HybridCache):  # A slot may be written twice, a state may not.
                reread = new.where(new >= (rows.offset + rows.lengths - 1).unsqueeze(1), -1)
            target.forward(reread[:, first:], int(new.max()) + 1, 1, input_ids=ids)
        positions = torch.cat([self.positions, new], dim=1)
        target.cache.append_to(cache, positions[:, cached_columns(cache) :])


class RatioTestDecoder(PardDecoder):
    """Speculative sampling: draw a chain from the draft's distributions and accept it by the ratio test."""

    def draft(
        self, draft: CachedModel, choice: Choice, width: int, num_drafts: int, num_visible: int | None
    ) -> Proposals:
        arguments = (draft, self.batch.rows, width, num_drafts, num_visible, self.vocab_size)
        outputs = self.run_step(score_step, choice, *arguments, repeats="layers")
        model: Any = draft.model
        tokens, scores = (values.to(self.input_ids.device) for values in model.chain(*outputs, self.draw))
        return Proposals(tokens, process_positions(self.logits_processor, scores.float()))

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw a token for each row of logits `(..., V)` from its distribution after the call's processors."""
        positions = logits if logits.dim() == 3 else logits.unsqueeze(1)
        probs = process_positions(self.logits_processor, positions.float()).softmax(dim=-1)
        return torch.multinomial(probs.flatten(0, 1), 1).view(logits.shape[:-1])

    def verify(
        self, proposals: Proposals, scores: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if proposals.scores is None:  # No room was left for proposals.
            return super().verify(proposals, scores, choice)
        verified = verify_ratio_test(proposals.tokens, proposals.scores, scores)
        return append_step(self.batch.rows, *verified, self.eos_token_id), None


class Recording:
    """Scores or raw logits of every emitted token, for callers who ask for them."""

    def __init__(self, batch_size: int):
        self.rows: list[list[torch.Tensor]] = [[] for _ in range(batch_size)]

    def add(self, values: torch.Tensor, row_ids: list[int], counts: list[int]) -> None:
        """Keep the first `counts[i]` of values `[b, K + 1, V]`, which belong to the rows `row_ids` of the call."""
        for row_id, row, count in zip(row_ids, values, counts, strict=True):
            self.rows[row_id].append(row[:count].clone())  # The next round writes to a compiled step's results.

    def columns(self) -> tuple[torch.Tensor, ...]:
        """Return one `[B, V]` a new column, as plain `generate` returns them; zeros after a row's end."""
        return pad_sequence([torch.cat(row) for row in self.rows], batch_first=True).unbind(1)


def on_path(values: torch.Tensor, nodes: torch.Tensor | None) -> torch.Tensor:
    """Select from values `[B, N + 1, V]` at a tree's nodes those at the root and on the path, `[B, K + 1, V]`."""
    if nodes is None:
        return values
    rows = torch.nn.functional.pad(nodes, (1, 0)).unsqueeze(2)
    return values.gather(1, rows.expand(-1, -1, values.shape[2]))


def max_length(criteria: StoppingCriteriaList) -> int:
    """Return the columns of the longest output, prompt included."""
    return min(criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria))


def end_tokens(criteria: StoppingCriteriaList, device: torch.device) -> torch.Tensor | None:
    """Return the end tokens that criteria name, on a device; `None` without any."""
    ends = [criterion.eos_token_id.to(device) for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    return torch.cat(ends) if ends else None
