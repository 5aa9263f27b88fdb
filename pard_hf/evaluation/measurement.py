"""Running routes side by side on the same batches, and noting what each did.

Knows clocks and outputs; derives nothing from them (`figures.py` does). Every route runs on every batch once before
anything is timed, and in each repeat the routes take turns batch by batch, another one going first each time: a
machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from ..generation.clock import measure_rounds
from ..generation.stats import DecodingStats
from .batches import PromptBatch, end_token_ids
from .memory import MemoryGauge, now
from .routes import COMPILED, ROUTES, RoundStreamer, Route, RouteRunner


@dataclass
class Parts:
    """Seconds of a repeat's rounds by part, all batches together; the first rounds are `prefill`."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    loop: float = 0.0
    num_rounds: int = 0

    def add(self, clock: object) -> None:
        for name in ("prefill", "draft", "verify", "loop", "num_rounds"):
            setattr(self, name, getattr(self, name) + getattr(clock, name))


@dataclass
class RouteRecord:
    """What a route did on all batches of a cell.

    Args:
        texts (`dict[int, list[int]]`):
            New tokens of every prompt, as the warm-up said them.
        differing (`dict[int, list[int]]`):
            What was said for prompts that got other tokens than plain `generate`'s, in whichever run.
        seconds (`list[float]`), first_seconds (`list[float]`) and parts (`list[Parts]`):
            One a repeat, summed over batches: wall time, that of a run for a single token, and where rounds spent it.
        num_steps (`int`):
            Forwards for one token a row that plain `generate` takes for these texts.
    """

    route: Route
    texts: dict[int, list[int]] = field(default_factory=dict)
    differing: dict[int, list[int]] = field(default_factory=dict)
    stats: DecodingStats | None = None
    warm_up_seconds: float = 0.0
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    peak_memory: int | None = None
    num_steps: int = 0

    @property
    def num_new_tokens(self) -> int:
        return sum(map(len, self.texts.values()))

    def compare(self, texts: dict[int, list[int]], expected: dict[int, list[int]]) -> None:
        """Note where `texts` leave `expected`."""
        for index, text in texts.items():
            if text != expected[index]:
                self.differing.setdefault(index, text)

    def note_memory(self, peak: int | None) -> None:
        if peak is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)


class Measurement:
    """Measures routes on the batches of one cell.

    Args:
        runner ([`RouteRunner`]):
            Of the pair, at the cell's K.
        batches (`list[PromptBatch]`):
            The prompts, longest first.
        max_new_tokens (`int`):
            Of every text.
        advance (`Callable[[str], None]`):
            Called with a route's name before each of its runs on a batch.
    """

    def __init__(
        self,
        runner: RouteRunner,
        batches: list[PromptBatch],
        max_new_tokens: int,
        advance: Callable[[str], None] = lambda name: None,
    ):
        self.runner, self.batches, self.max_new_tokens, self.advance = runner, batches, max_new_tokens, advance
        self.device = runner.target.device
        self.ends = end_token_ids(runner.target)
        self.gauge = MemoryGauge(self.device)
        self.records: dict[str, RouteRecord] = {}
        self.not_served: dict[str, str] = {}

    def run(self, names: list[str], batch_size: int, repeats: int) -> None:
        """Fill `records`, and `not_served` with why a route has none. `names` begin with `ar`."""
        for name in names:
            reason = self.runner.why_not_served(ROUTES[name], batch_size) or self.warm_up(ROUTES[name])
            if reason is not None and name == "ar":
                raise ValueError(f"Expected plain `generate` to run, but {reason}.")
            if reason is not None:
                self.not_served[name] = reason
        for repeat in range(repeats):
            for record in self.records.values():
                record.seconds.append(0.0)
                record.first_seconds.append(0.0)
            for number, batch in enumerate(self.batches):
                records = list(self.records.values())
                first = (repeat + number) % len(records)
                for record in records[first:] + records[:first]:
                    self.time(record, batch)
            self.measure_parts()

    def plain_texts(self, batches: list[PromptBatch]) -> dict[int, list[int]] | None:
        """What plain `generate` says for prompts in other batches; `None` where memory runs out."""
        texts: dict[int, list[int]] = {}
        try:
            for batch in batches:
                self.advance("ar")
                sequences = self.runner.generate(ROUTES["ar"], batch.inputs, self.max_new_tokens)
                texts |= batch.new_texts(sequences, self.ends)
        except torch.OutOfMemoryError:
            return None
        return texts

    def warm_up(self, route: Route) -> str | None:
        """Run a route on every batch and keep what it says; returns why it cannot, if so."""
        record = RouteRecord(route)
        try:
            for batch in self.batches:
                self.advance(route.name)
                start = now(self.device)
                self.warm_up_batch(record, batch)
                record.warm_up_seconds += now(self.device) - start
                self.runner.generate(route, batch.inputs, 1)
        except torch.OutOfMemoryError:
            return "memory ran out; lower the batch size, `--context` or `--max-new-tokens`"
        except torch._dynamo.exc.TorchDynamoException as error:
            return f"torch.compile failed: {str(error).strip().splitlines()[0]}"
        except ValueError as error:
            if route.in_our_loop or route.name == "ar":
                raise
            # Which caches its assisted loop takes differs from version to version and from model to model.
            return f"transformers {transformers.__version__} refuses: {str(error).strip(' .`')}"
        if route.name in COMPILED and (reason := self.runner.compile_failure(route)) is not None:
            return f"torch.compile failed: {reason}"  # Our rounds ran, but as they stand: another route's figure.
        if route.name != "ar":
            record.compare(record.texts, self.records["ar"].texts)
        self.records[route.name] = record
        return None

    def warm_up_batch(self, record: RouteRecord, batch: PromptBatch) -> None:
        route = record.route
        if route.in_our_loop:
            output = self.runner.generate(route, batch.inputs, self.max_new_tokens, return_dict_in_generate=True)
            sequences, stats = output.sequences, output.stats
            record.compile_seconds = (record.compile_seconds or 0.0) + (output.compile_seconds or 0.0)
        elif not route.takes_batches:
            streamer = RoundStreamer(self.runner.num_drafts, self.max_new_tokens)
            sequences = self.runner.generate(route, batch.inputs, self.max_new_tokens, streamer=streamer)
            stats = streamer.stats
        else:
            sequences, stats = self.runner.generate(route, batch.inputs, self.max_new_tokens), None
        texts = batch.new_texts(sequences, self.ends)
        record.texts |= texts
        record.num_steps += max(map(len, texts.values())) - 1
        if stats is not None:
            record.stats = stats if record.stats is None else record.stats + stats

    def time(self, record: RouteRecord, batch: PromptBatch) -> None:
        """One timed run for the whole texts, and one for their first tokens."""
        self.advance(record.route.name)
        self.gauge.start()
        for max_new_tokens, totals in ((self.max_new_tokens, record.seconds), (1, record.first_seconds)):
            start = now(self.device)
            sequences = self.runner.generate(record.route, batch.inputs, max_new_tokens)
            totals[-1] += now(self.device) - start
            if max_new_tokens == self.max_new_tokens:
                record.compare(batch.new_texts(sequences, self.ends), self.records["ar"].texts)
        record.note_memory(self.gauge.read())

    def measure_parts(self) -> None:
        """Run our routes once more under a clock, apart from the timed runs: it waits for the device at every mark."""
        for record in self.records.values():
            if not record.route.in_our_loop:
                continue
            parts, stats = Parts(), DecodingStats()
            for batch in self.batches:
                self.advance(record.route.name)
                with measure_rounds() as clock:
                    output = self.runner.generate(
                        record.route, batch.inputs, self.max_new_tokens, return_dict_in_generate=True
                    )
                parts.add(clock)
                stats += output.stats
            record.parts.append(parts)
            record.stats = stats  # Where K adapts, the last run has adapted most.
