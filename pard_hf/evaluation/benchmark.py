"""How far a text agrees with plain `generate`'s, and how near the choice was where it leaves it.

In 16 bit a block, a batch and a single row are rounded differently, and where the best logits nearly tie another one
can win: there plain `generate` leaves its own texts, too.

The cells of a run that is not finished yet, in a file: one JSON object a line, the settings first.

Running routes side by side on the same batches, and noting what each did.

Knows clocks and outputs; derives nothing from them (`figures.py` does). Every route runs on every batch once before
anything is timed, and in each repeat the routes take turns batch by batch, another one going first each time: a
machine that slows down slows all of them.

Every route on the same prompts in one run, over prompt sets, batch sizes and K.

A cell is one set at one batch size and one K; within it routes are interleaved, so its ratios are fair. Knows neither
terminals nor files: what is finished is handed to the caller cell by cell.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from ..generation.stats import DecodingStats, measure_rounds
from ..host import (
    check_num_assistant_tokens,
    end_token_ids,
    input_device,
    num_positions,
    pad_token_id,
    without_head,
)
from ..io import conditions_of, shown_command, shown_model, write_whole
from ..loading import Pair
from .memory import MemoryGauge, cache_bytes, cache_layer_sizes, copy_bandwidth, now, weight_bytes
from .metrics import CellResult, Difference, Parts, Regrouped, RouteRecord, route_result
from .prompts import choose_rows, encode_answer, encode_prompt, lengthen, repeated_share
from .routes import (
    COMPILED,
    DEFAULT_TREE_SIZE,
    ROUTES,
    PromptBatch,
    RoundStreamer,
    Route,
    RouteRunner,
    make_batches,
    regroup,
)

# What stands beside gaps.
GAP = "gap: how far the plain model prefers its best token where texts part, the largest"


@dataclass(frozen=True)
class Agreement:
    """How many texts are identical, and the logit gaps of the others; agreements on several texts add up."""

    num_identical: int
    num_texts: int = 1
    logit_gaps: tuple[float, ...] = ()

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_identical + other.num_identical,
            self.num_texts + other.num_texts,
            self.logit_gaps + other.logit_gaps,
        )

    def __str__(self) -> str:
        gap = f", gap {max(self.logit_gaps):.2g}" if self.logit_gaps else ""
        return f"{self.num_identical}/{self.num_texts}{gap}"


def agreement(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> Agreement:
    """Compare one text with plain `generate`'s."""
    gap = None if got == expected else logit_gap(target, prompt, expected, got)
    return Agreement(int(got == expected), logit_gaps=() if gap is None else (gap,))


def is_exact(dtype: torch.dtype) -> bool:
    """Whether texts must be equal: in 16 bit a block and a single token are rounded differently."""
    return dtype in (torch.float32, torch.float64)


def first_difference(expected: list[int], got: list[int]) -> int:
    """The first position where two texts part: the length of the shorter one where the other begins with it."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(expected), len(got)))


def logit_gap(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> float | None:
    """How far the target prefers its best token to the one another text has where it first parts from `expected`.

    Takes one forward of the plain model, in its own dtype, over prompt and common prefix. A near tie that was rounded
    the other way has a gap of a few units in the last place of a logit; a wrong token has a large one.

    Args:
        target ([`PreTrainedModel`]):
            The model whose texts they are.
        prompt (`list[int]`), expected (`list[int]`) and got (`list[int]`):
            Token ids: of the prompt, of the new tokens of plain `generate`, and of those of another way.

    Returns:
        `float`, or `None` where `got` has ended and says nothing there.
    """
    position = first_difference(expected, got)
    if position >= len(got):
        return None
    ids = torch.tensor([[*prompt, *expected[:position]]], device=input_device(target))
    output = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad_token_id(target.generation_config),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = output.logits[0][0].float()
    return float(logits.max() - logits[got[position]])


class PartialFile:
    """Keeps what is finished, so that an interrupted run can go on.

    Args:
        path (`Path`):
            The result's own path; the file lies beside it.
        settings (`dict[str, Any]`):
            What must be the same for cells to belong together.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path.with_name(f"{path.name}.partial.jsonl")
        self.settings = json.loads(json.dumps(settings))

    def begin(self, resume: bool) -> list[CellResult]:
        """Read back what is finished; nothing is written before the first cell.

        Raises:
            ValueError: There is a file and `resume` is not set, or its settings are others.
        """
        if self.path.exists() and not resume:
            raise ValueError(
                f"Expected no unfinished run, got `{self.path}`. Pass `--resume` to go on with it, or remove the file."
            )
        rows = read_whole_lines(self.path) if self.path.exists() else []
        if not rows:
            return []
        self.check(rows[0])
        # Its last line may have been cut off: what is added now begins a line of its own.
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return [CellResult.from_dict(row) for row in rows[1:]]

    def check(self, header: dict[str, Any]) -> None:
        settings = header.get("settings", {})
        for name in sorted({*settings, *self.settings}):
            if settings.get(name) != self.settings.get(name):
                raise ValueError(
                    f"Expected `{self.path}` to be of a run with {name} {self.settings.get(name)!r}, got "
                    f"{settings.get(name)!r}. Go back to that for `--resume`, or remove the file to begin anew."
                )

    def append(self, cell: CellResult) -> None:
        """Add a finished cell, on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [cell.to_dict()] if self.path.exists() else [{"settings": self.settings}, cell.to_dict()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON lines in `{path}`, got: {error}. Remove the file to begin anew.") from None


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
        self.ends = end_token_ids(runner.target.generation_config)
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


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, and how often.

    Args:
        routes (`tuple[str, ...]`):
            Names in `ROUTES`; plain `generate` runs in any case, for everything is compared with it.
        batch_sizes (`tuple[int, ...]`) and num_assistant_tokens (`tuple[int, ...]`):
            Every combination is a cell; no K at all stands for the draft's own.
        limit (`int`, *optional*):
            Prompts of a set at most, chosen by `seed`.
        tree_size (`int`, *optional*, defaults to 64):
            N, nodes of a round's tree in the routes that draft one.
        context (`int`, *optional*):
            Tokens that every prompt is made to have at least, by text of the set put before it.
    """

    routes: tuple[str, ...] = tuple(ROUTES)
    batch_sizes: tuple[int, ...] = (1,)
    num_assistant_tokens: tuple[int, ...] = ()
    repeats: int = 3
    max_new_tokens: int = 128
    limit: int | None = 16
    seed: int = 0
    context: int | None = None
    tree_size: int = DEFAULT_TREE_SIZE

    def __post_init__(self) -> None:
        for name in self.routes:
            if name not in ROUTES:
                raise ValueError(f"Expected routes among {', '.join(ROUTES)}, got {name!r}. Name one of these.")
        smallest = {
            "--batch-sizes": min(self.batch_sizes),
            "--repeats": self.repeats,
            "--max-new-tokens": self.max_new_tokens,
            "--assistant-tree-size": self.tree_size,
            "--limit": 1 if self.limit is None else self.limit,
            "--context": 1 if self.context is None else self.context,
        }
        for flag, value in smallest.items():
            if value < 1:
                raise ValueError(f"Expected `{flag}` of at least 1, got {value}. Raise it.")


@dataclass(frozen=True)
class EncodedSet:
    """A prompt set as token ids; `indices` are the prompts' places in the set."""

    name: str
    digest: str
    indices: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    num_left_out: int

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.prompts)) / len(self.prompts)


class Benchmark:
    """Measures the cells of one pair.

    Args:
        pair ([`Pair`]):
            Target, draft and tokenizer.
        settings ([`BenchmarkSettings`]):
            What is measured.
        advance (`Callable[[float, str], None]`, *optional*):
            Called before each run with the share of all runs that it is, and what it is.

    Raises:
        ValueError: A K or the context does not fit the models.
    """

    def __init__(
        self,
        pair: Pair,
        settings: BenchmarkSettings,
        advance: Callable[[float, str], None] = lambda share, text: None,
    ):
        self.pair, self.settings, self.advance = pair, settings, advance
        self.device = pair.target.device
        self.headless = without_head(pair.draft)
        self.counts = settings.num_assistant_tokens or (pair.draft.num_assistant_tokens,)
        for num_drafts in self.counts:
            check_num_assistant_tokens(num_drafts, pair.target.config, pair.draft.config)
        self.longest = min(num_positions(m.config) for m in (pair.target, pair.draft)) - settings.max_new_tokens
        if (settings.context or 1) > self.longest:
            raise ValueError(
                f"Expected prompts of at most {self.longest} tokens before {settings.max_new_tokens} new ones, the "
                f"positions of the pair, got {settings.context or 1}. Lower `--context` or `--max-new-tokens`."
            )

    def encode(self, name: str, rows: list[dict[str, Any]]) -> EncodedSet:
        """Choose prompts of a set and encode them; those too long for the pair are left out.

        Raises:
            ValueError: All of them are.
        """
        settings, tokenizer = self.settings, self.pair.tokenizer
        chosen = choose_rows(rows, settings.limit, settings.seed)
        encoded = {index: encode_prompt(tokenizer, rows[index]["prompt"]) for index in chosen}
        if settings.context is not None:
            texts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
            for index, ids in encoded.items():
                others = [*texts[index + 1 :], *texts[:index]] or texts
                encoded[index] = lengthen(ids, others, settings.context, tokenizer.bos_token_id)
        fitting = {index: ids for index, ids in encoded.items() if len(ids) <= self.longest}
        if not fitting:
            raise ValueError(
                f"Expected prompts of at most {self.longest} tokens in `{name}`, got none. Lower `--max-new-tokens`."
            )
        answers = [encode_answer(tokenizer, rows[index], settings.max_new_tokens) for index in fitting]
        return EncodedSet(
            name=name,
            digest=hashlib.sha256(json.dumps(list(fitting.values())).encode()).hexdigest()[:16],
            indices=list(fitting),
            prompts=list(fitting.values()),
            answers=[answer for answer in answers if answer is not None],
            num_left_out=len(encoded) - len(fitting),
        )

    @cached_property
    def bandwidth(self) -> float:
        return copy_bandwidth(self.device)

    def keys(self, encoded: list[EncodedSet]) -> list[tuple[EncodedSet, int, int]]:
        """The cells in the order they are measured."""
        return [
            (prompts, batch_size, num_drafts)
            for prompts in encoded
            for batch_size in self.settings.batch_sizes
            for num_drafts in self.counts
        ]

    def run(
        self,
        prompt_sets: dict[str, list[dict[str, Any]]],
        finished: list[CellResult] | None = None,
        keep: Callable[[CellResult], None] = lambda cell: None,
    ) -> list[CellResult]:
        """Measure every cell that is not `finished`, and `keep` each as soon as it is.

        Raises:
            ValueError: A set has no prompt that fits, or a finished cell is of other prompts.
        """
        encoded = [self.encode(name, rows) for name, rows in prompt_sets.items()]
        cells = {cell.key: cell for cell in finished or []}
        for prompts in encoded:
            for cell in cells.values():
                if cell.prompts == prompts.name and cell.prompts_digest != prompts.digest:
                    raise ValueError(
                        f"Expected the prompts of `{prompts.name}` that the unfinished run had, got others. Bring "
                        "them back, or remove the unfinished run's file to begin anew."
                    )
        keys = self.keys(encoded)
        for prompts, batch_size, num_drafts in keys:
            key = prompts.name, batch_size, num_drafts
            if key in cells:
                self.advance(1 / len(keys), f"{prompts.name}: measured before")
                continue
            cells[key] = self.measure(prompts, batch_size, num_drafts, 1 / len(keys))
            keep(cells[key])
        return list(cells.values())

    def measure(self, prompts: EncodedSet, batch_size: int, num_drafts: int, share: float) -> CellResult:
        """Measure one cell, `share` of the whole run."""
        runner = RouteRunner(self.pair, num_drafts, self.settings.tree_size, self.headless)
        batches = make_batches(prompts.prompts, batch_size, runner.pad_token_id, self.device)
        names = ["ar", *(name for name in ROUTES if name in self.settings.routes and name != "ar")]
        served = [name for name in names if runner.why_not_served(ROUTES[name], batch_size) is None]
        num_looped = sum(ROUTES[name].in_our_loop for name in served)
        repeats = self.settings.repeats
        others = list[PromptBatch]()
        if not is_exact(self.pair.target.dtype):
            others = regroup(prompts.prompts, batches, runner.pad_token_id)
        num_runs = len(batches) * (len(served) * (1 + repeats) + num_looped * repeats) + len(others)
        cell_name = f"{prompts.name} · batch {batch_size} · K {num_drafts}"
        measurement = Measurement(
            runner,
            batches,
            self.settings.max_new_tokens,
            lambda name: self.advance(share / num_runs, f"{cell_name} · {name}"),
        )
        measurement.run(names, batch_size, repeats)
        cell = self.collect(prompts, batches, measurement, batch_size)
        if others and (texts := measurement.plain_texts(others)) is not None:
            other_size = len(others[0].indices)
            alone, batched = measurement.records["ar"].texts, texts
            if other_size == 1:  # The gap is that of the batch, for it is taken from a forward of one row.
                alone, batched = batched, alone
            gaps = self.logit_gaps(prompts, alone, {i: batched[i] for i in texts if batched[i] != alone[i]})
            cell.regrouped = Regrouped(other_size, 1 - len(gaps) / len(texts), known(gaps))
        return cell

    def collect(
        self, prompts: EncodedSet, batches: list[PromptBatch], measurement: Measurement, batch_size: int
    ) -> CellResult:
        """The figures of a measured cell."""
        ar = measurement.records["ar"]
        mean_new = ar.num_new_tokens / len(ar.texts)
        num_bytes = self.bytes_per_round(len(ar.texts) / len(batches), prompts.mean_length + mean_new / 2)
        cell = CellResult(
            prompts=prompts.name,
            prompts_digest=prompts.digest,
            num_prompts=len(prompts.prompts),
            num_left_out=prompts.num_left_out,
            batch_size=batch_size,
            num_assistant_tokens=measurement.runner.num_drafts,
            mean_prompt_tokens=prompts.mean_length,
            mean_new_tokens=mean_new,
            repeated_4gram_share=repeated_share(ar.texts.values()),
            repeated_4gram_share_of_references=repeated_share(prompts.answers) if prompts.answers else None,
            bytes_per_round=num_bytes,
            copy_bandwidth=self.bandwidth,
            peak_memory_kind=measurement.gauge.kind,
            not_served=measurement.not_served,
        )
        for record in measurement.records.values():
            result = route_result(record, measurement.records, len(batches), num_bytes / self.bandwidth)
            if gaps := self.logit_gaps(prompts, ar.texts, record.differing):
                index = min(gaps)
                result.difference = self.difference(
                    prompts.name, prompts.indices[index], ar.texts[index], record.differing[index], gaps[index]
                )
                result.logit_gaps = known(gaps)
            cell.routes.append(result)
        return cell

    def logit_gaps(
        self, prompts: EncodedSet, expected: dict[int, list[int]], differing: dict[int, list[int]]
    ) -> dict[int, float | None]:
        """The gap at the first difference of every text that differs, by prompt."""
        return {
            index: logit_gap(self.pair.target, prompts.prompts[index], expected[index], text)
            for index, text in sorted(differing.items())
        }

    def bytes_per_round(self, num_rows: float, length: float) -> int:
        """Bytes of weights, keys and values that both models read in a round of `num_rows` texts of mean `length`."""
        models = (self.pair.target, self.pair.draft)
        keys_and_values = sum(cache_bytes(cache_layer_sizes(model), length) for model in models)
        return round(sum(map(weight_bytes, models)) + num_rows * keys_and_values)

    def difference(
        self, name: str, prompt_index: int, expected: list[int], got: list[int], gap: float | None
    ) -> Difference:
        """Where two texts part, with the token each has there; nothing where it has ended."""
        position = first_difference(expected, got)
        first, second = (self.pair.tokenizer.decode(text[position : position + 1]) for text in (expected, got))
        return Difference(name, prompt_index, position, first, second, gap)


def differences(cells: list[CellResult]) -> list[tuple[str, Difference]]:
    """Routes that should say what plain `generate` says, and where they do not."""
    return [
        (route.route, route.difference)
        for cell in cells
        for route in cell.routes
        if route.difference is not None and ROUTES[route.route].is_pard
    ]


def known(gaps: dict[int, float | None]) -> list[float]:
    return [gap for gap in gaps.values() if gap is not None]


def run_metadata(
    pair: Pair, settings: BenchmarkSettings, words: list[str], target: str | None = None, draft: str | None = None
) -> dict[str, Any]:
    """Describe a run: command, models, versions, device and settings; file names only, never folders."""
    metadata = {
        "command": shown_command(words),
        "target": shown_model(target),
        "draft": shown_model(draft),
        **conditions_of(pair.target),
        "repeats": settings.repeats,
        "max_new_tokens": settings.max_new_tokens,
        "limit": settings.limit,
        "seed": settings.seed,
        "context": settings.context,
        "assistant_tree_size": settings.tree_size,
        "routes": None if settings.routes == tuple(ROUTES) else list(settings.routes),
    }
    return {name: value for name, value in metadata.items() if value is not None}
