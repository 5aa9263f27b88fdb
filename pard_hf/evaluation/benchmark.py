"""Measure every route on the same prompts in one run, over prompt sets, batch sizes and K.

A cell is one prompt set at one batch size and one K. Every route runs on every batch of a cell once before anything is
timed; in each repeat the routes then take turns batch by batch, another one first each time, so that a machine that
slows down slows all of them. `Benchmark` goes through the cells, `Measurement` through the routes of one cell.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..generation.config import DEFAULT_DEPTH
from ..generation.stats import DecodingStats, now
from ..host import cache_of, check_num_assistant_tokens, end_token_ids, input_device, num_positions
from ..io import conditions_of, shown_command, shown_model, write_whole
from ..loading import Pair
from ..tokens import encode_prompt
from .metrics import RouteRecord, Texts, for_json, known, repeated_share
from .prompts import PromptBatch, choose_rows, encode_answer, lengthen, make_batches, regroup
from .routes import DEFAULT_TREE_SIZE, ROUTES, RoundStreamer, Route, RouteRunner

ROUND_STEPS = ("prefill", "draft", "verify", "loop", "num_rounds")
# A copied tensor is larger than any cache of the device; the median of the copies counts.
NUM_COPIED = {"cpu": 2**28, "cuda": 2**30}
NUM_COPIES = 9
# Writing 5 here resets the peak memory of the process, on Linux.
CLEAR_REFS, PROCESS_STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a benchmark: what is measured, and how often.

    Every batch size with every K is a cell; without any K, the draft's own. Paths that are proposed without a draft
    have at most `lookup_num_tokens` tokens, which is K too where there is no draft. Plain `generate` runs whatever
    `routes` are, as everything is compared with it. `limit` prompts of a set are drawn by `seed`; text of the set is
    put before prompts shorter than `context` tokens; `tree_size` is N, for the routes that draft a tree.
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
    lookup_num_tokens: int = DEFAULT_DEPTH

    def __post_init__(self) -> None:
        for name in self.routes:
            if name not in ROUTES:
                raise ValueError(f"Expected routes among {', '.join(ROUTES)}, got {name!r}. Name one of these.")
        values = {"batch-sizes": min(self.batch_sizes), "assistant-tree-size": self.tree_size, "limit": self.limit}
        values |= {"repeats": self.repeats, "max-new-tokens": self.max_new_tokens, "context": self.context}
        values["lookup"] = self.lookup_num_tokens
        for flag, value in values.items():
            if value is not None and value < 1:
                raise ValueError(f"Expected `--{flag}` of at least 1, got {value}. Raise it.")


@dataclass(frozen=True)
class EncodedSet:
    """The chosen prompts of a set as token ids, their indices in the set, and its reference answers."""

    name: str
    indices: list[int]
    ids: list[list[int]]
    answers: list[list[int]]
    num_left_out: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


class Benchmark:
    """Measure the cells of one pair; `advance` is called before each run with its share of all runs and its name.

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
        self.runner = RouteRunner(pair, tree_size=settings.tree_size, lookup_num_tokens=settings.lookup_num_tokens)
        default = settings.lookup_num_tokens if pair.draft is None else pair.draft.num_assistant_tokens
        self.counts = settings.num_assistant_tokens or (default,)
        configs = [model.config for model in pair.models]
        for num_assistant_tokens in self.counts:
            check_num_assistant_tokens(num_assistant_tokens, *configs)
        self.longest = min(map(num_positions, configs)) - settings.max_new_tokens
        if (settings.context or 1) > self.longest:
            raise ValueError(
                f"Expected prompts of at most {self.longest} tokens before {settings.max_new_tokens} new ones, the "
                f"positions of the pair, got {settings.context or 1}. Lower `--context` or `--max-new-tokens`."
            )

    def run(
        self,
        prompt_sets: dict[str, list[dict[str, Any]]],
        finished: Sequence[dict[str, Any]] = (),
        keep: Callable[[dict[str, Any]], None] = lambda cell: None,
    ) -> list[dict[str, Any]]:
        """Measure every cell that is not `finished`, call `keep` with each, and return all of them.

        Raises:
            ValueError: No prompt of a set fits, or a finished cell is of other prompts.
        """
        encoded = {name: self.encode(name, rows) for name, rows in prompt_sets.items()}
        cells = {(cell["prompts"], cell["batch_size"], cell["num_assistant_tokens"]): cell for cell in finished}
        for (name, *_), cell in cells.items():
            if name in encoded and cell["prompts_digest"] != encoded[name].digest:
                raise ValueError(
                    f"Expected the prompts of `{name}` that the unfinished run had, got others. Restore them, or "
                    "remove the unfinished run's file."
                )
        keys = [(name, size, count) for name in encoded for size in self.settings.batch_sizes for count in self.counts]
        for key in keys:
            name, batch_size, num_assistant_tokens = key
            if key in cells:
                self.advance(1 / len(keys), f"{name}: measured before")
                continue
            cells[key] = self.measure(encoded[name], batch_size, num_assistant_tokens, 1 / len(keys))
            keep(cells[key])
        return list(cells.values())

    def encode(self, name: str, rows: list[dict[str, Any]]) -> EncodedSet:
        """Choose and encode prompts of a set; those too long for the pair are left out, but not all of them."""
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
        answers = (encode_answer(tokenizer, rows[index], settings.max_new_tokens) for index in fitting)
        known_answers = [answer for answer in answers if answer is not None]
        num_left_out = len(encoded) - len(fitting)
        return EncodedSet(name, list(fitting), list(fitting.values()), known_answers, num_left_out)

    def measure(self, prompts: EncodedSet, batch_size: int, num_assistant_tokens: int, share: float) -> dict[str, Any]:
        """Measure one cell, `share` of the whole run, and return it as results hold it."""
        runner, repeats, target = self.runner, self.settings.repeats, self.pair.target
        runner.num_assistant_tokens = num_assistant_tokens
        routes = [route for name, route in ROUTES.items() if name == "ar" or name in self.settings.routes]
        served = [route for route in routes if runner.unsupported_reason(route, batch_size) is None]
        num_runs = len(served) * (1 + repeats) + repeats * sum(route.loop == "own" for route in served)
        text = f"{prompts.name} · batch {batch_size} · K {num_assistant_tokens}"

        def advance(route: str) -> None:
            self.advance(share / num_runs / len(measurement.batches), f"{text} · {route}")

        measurement = Measurement(runner, prompts.ids, batch_size, self.settings.max_new_tokens, advance)
        measurement.run(routes, repeats)
        ar = measurement.records["ar"]
        mean_prompt, mean_new = (sum(map(len, t)) / len(t) for t in (prompts.ids, ar.texts.values()))
        num_rows, mean_length = len(ar.texts) / ar.num_batches, mean_prompt + mean_new / 2
        target_bytes, num_bytes = (bytes_per_round(m, num_rows, mean_length) for m in ((target,), self.pair.models))
        for record in measurement.records.values():
            record.copy_seconds = (num_bytes if record.route.is_drafted else target_bytes) / self.bandwidth
            record.difference = self.difference(prompts, ar, record)
        cell = {
            "prompts": prompts.name,
            "prompts_digest": prompts.digest,
            "num_prompts": len(prompts.ids),
            "num_left_out": prompts.num_left_out,
            "batch_size": batch_size,
            "num_assistant_tokens": num_assistant_tokens,
            "mean_prompt_tokens": mean_prompt,
            "mean_new_tokens": mean_new,
            "repeated_4gram_share": repeated_share(ar.texts.values()),
            "repeated_4gram_share_of_references": repeated_share(prompts.answers) if prompts.answers else None,
            "bytes_per_round": num_bytes,
            "copy_bandwidth": self.bandwidth,
            "peak_memory_kind": measurement.gauge.kind,
            "routes": [record.to_json() for record in measurement.records.values()],
            "not_served": measurement.not_served,
            "regrouped": None if is_exact(self.pair.target.dtype) else measurement.regrouped(),
        }
        return for_json(cell)

    def difference(self, prompts: EncodedSet, ar: RouteRecord, record: RouteRecord) -> dict[str, Any] | None:
        """Describe where the first text that differs does, with the token of each text there; empty after its end."""
        if not record.differing:
            return None
        index = min(record.differing)
        texts = ar.texts[index], record.differing[index]
        position = first_difference(*texts)
        expected, got = (self.pair.tokenizer.decode(text[position : position + 1]) for text in texts)
        return {
            "prompts": prompts.name,
            "prompt_index": prompts.indices[index],
            "position": position,
            "expected": expected,
            "got": got,
            "logit_gap": record.logit_gaps[index],
        }

    @cached_property
    def bandwidth(self) -> float:
        return copy_bandwidth(self.pair.target.device)


class Measurement:
    """Measure routes on the token ids of some prompts; `advance` is called with a route's name before each batch.

    `run` fills `records`, and `not_served` with the reasons why a route has none.
    """

    def __init__(
        self,
        runner: RouteRunner,
        prompts: list[list[int]],
        batch_size: int,
        max_new_tokens: int,
        advance: Callable[[str], None] = lambda route: None,
    ):
        self.runner, self.prompts, self.batch_size, self.advance = runner, prompts, batch_size, advance
        self.max_new_tokens, self.device = max_new_tokens, runner.target.device
        self.batches = make_batches(prompts, batch_size, runner.pad_token_id, self.device)
        self.ends = end_token_ids(runner.target.generation_config)
        self.gauge = MemoryGauge(self.device)
        self.records: dict[str, RouteRecord] = {}
        self.not_served: dict[str, str] = {}

    def run(self, routes: Sequence[Route], repeats: int) -> None:
        """Warm every route up, then time them in turns; the first route is `ar`."""
        for route in routes:
            reason = self.runner.unsupported_reason(route, self.batch_size) or self.warm_up(route)
            if reason is not None and route.name == "ar":
                raise ValueError(f"Expected plain `generate` to run, but {reason}.")
            if reason is not None:
                self.not_served[route.name] = reason
        records = list(self.records.values())
        for repeat in range(repeats):
            self.runner.memory.clear()
            for record in records:
                record.seconds.append(0.0)
                record.first_seconds.append(0.0)
            for number, batch in enumerate(self.batches):
                first = (repeat + number) % len(records)
                for record in records[first:] + records[:first]:
                    self.time(record, batch)
            for record in records:
                if record.route.loop == "own":
                    self.time_rounds(record)
        for record in records:
            record.logit_gaps = self.logit_gaps(self.records["ar"].texts, record.differing)

    def warm_up(self, route: Route) -> str | None:
        """Run a route on every batch and record its texts; return the reason if it cannot run."""
        self.runner.memory.clear()
        record = RouteRecord(route, self.records, len(self.batches))
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
            if route.loop == "own" or route.name == "ar":
                raise
            # Which caches the assisted loop takes differs from version to version and from model to model.
            return f"transformers {transformers.__version__} refuses: {str(error).strip(' .`')}"
        if route.loop == "own" and route.is_compiled and (reason := self.runner.compile_failure(route)) is not None:
            return f"torch.compile failed: {reason}"  # The rounds ran, but eagerly: another route measures that.
        self.records[route.name] = record
        self.compare(record, record.texts)
        return None

    def warm_up_batch(self, record: RouteRecord, batch: PromptBatch) -> None:
        """Run a route on one batch; record its texts, steps and statistics."""
        loop, streamer = record.route.loop, RoundStreamer(self.runner.num_assistant_tokens, self.max_new_tokens)
        options = {"return_dict_in_generate": True, "streamer": streamer if loop == "stock" else None}
        output = self.runner.generate(record.route, batch.inputs, self.max_new_tokens, **options)
        texts = batch.new_texts(output.sequences, self.ends)
        record.texts |= texts
        record.num_steps += max(map(len, texts.values())) - 1
        if loop == "own":
            record.compile_seconds = (record.compile_seconds or 0.0) + (output.compile_seconds or 0.0)
        stats = output.stats if loop == "own" else streamer.stats
        if stats is not None:
            record.stats = stats + (record.stats or DecodingStats())

    def time(self, record: RouteRecord, batch: PromptBatch) -> None:
        """Time one run for the whole texts, and one for their first tokens."""
        self.advance(record.route.name)
        self.gauge.start()
        start = now(self.device)
        sequences = self.runner.generate(record.route, batch.inputs, self.max_new_tokens)
        end = now(self.device)
        self.runner.generate(record.route, batch.inputs, 1)
        record.seconds[-1] += end - start
        record.first_seconds[-1] += now(self.device) - end
        peak = self.gauge.read()
        if peak is not None:
            record.peak_memory = max(peak, record.peak_memory or 0)
        self.compare(record, batch.new_texts(sequences, self.ends))

    def time_rounds(self, record: RouteRecord) -> None:
        """Run once more and time the steps of all rounds, waiting for the device after every step."""
        self.runner.memory.clear()
        seconds, stats = Counter[str](), DecodingStats()
        options = {"return_dict_in_generate": True, "measure_rounds": True}
        for batch in self.batches:
            self.advance(record.route.name)
            output = self.runner.generate(record.route, batch.inputs, self.max_new_tokens, **options)
            stats += output.stats
            if output.round_times is not None:
                seconds.update({name: getattr(output.round_times, name) for name in ROUND_STEPS})
        record.round_seconds.append(seconds)
        record.stats = stats  # Where K adapts, the last run has adapted most.

    def compare(self, record: RouteRecord, texts: Texts) -> None:
        """Record the texts that are not those of plain `generate`."""
        for index, text in texts.items():
            if text != self.records["ar"].texts[index]:
                record.differing.setdefault(index, text)

    def logit_gaps(self, expected: Texts, differing: Texts) -> dict[int, float | None]:
        """Compute the [`logit_gap`] of every text that differs, by prompt."""
        return {
            index: logit_gap(self.runner.plain, self.prompts[index], expected[index], text)
            for index, text in sorted(differing.items())
        }

    def regrouped(self) -> dict[str, Any] | None:
        """Compare plain `generate` with itself on batches of another size; `None` where memory runs out.

        In 16 bit a block, a batch and a single row are rounded differently, and where two logits nearly tie another
        token can win: plain `generate` does not reproduce its own texts either.
        """
        again = Measurement(self.runner, self.prompts, self.batch_size, self.max_new_tokens)
        again.batches = regroup(self.prompts, self.batches, self.runner.pad_token_id)
        if again.warm_up(ROUTES["ar"]) is not None:
            return None
        size, texts = len(again.batches[0].indices), again.records["ar"].texts
        alone, batched = self.records["ar"].texts, texts
        if size == 1:  # The gap is that of the batch, as it is taken from a forward of one row.
            alone, batched = batched, alone
        gaps = self.logit_gaps(alone, {i: batched[i] for i in texts if batched[i] != alone[i]})
        return {"batch_size": size, "identical_share": 1 - len(gaps) / len(texts), "logit_gaps": known(gaps)}


def is_exact(dtype: torch.dtype) -> bool:
    """Return whether texts must be equal: in 16 bit a block and a single token are rounded differently."""
    return dtype in (torch.float32, torch.float64)


def first_difference(expected: list[int], got: list[int]) -> int:
    """Return the first position where two texts differ: the shorter one's length where the other begins with it."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(expected), len(got)))


def logit_gap(target: Any, prompt: list[int], expected: list[int], got: list[int]) -> float | None:
    """Compute how far the target prefers its best token to that in `got` where it first differs from `expected`.

    Takes one forward of the model, in its own dtype, over prompt and common prefix. A near tie that was rounded the
    other way has a gap of a few units in the last place of a logit; a wrong token has a large one. `None` where `got`
    ends there.
    """
    position = first_difference(expected, got)
    if position >= len(got):
        return None
    ids = torch.tensor([[*prompt, *expected[:position]]], device=input_device(target))
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    output = target.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **options)
    logits = output.logits[0][0].float()
    return float(logits.max() - logits[got[position]])


def differences(cells: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """List routes of ours whose texts are not plain `generate`'s, and where they first differ."""
    routes = (route for cell in cells for route in cell["routes"] if ROUTES[route["route"]].is_pard)
    return [(route["route"], route["difference"]) for route in routes if "difference" in route]


class MemoryGauge:
    """Read the peak memory since [`start`]: of the device, or of the whole process on a CPU.

    Only Linux can reset the peak of a process; `kind` tells since when it is.
    """

    def __init__(self, device: torch.device):
        self.device, self.kind = device, "ru_maxrss of the process, so far"
        self.start()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "max_memory_allocated, during the route"
            return
        try:
            CLEAR_REFS.write_text("5")
            self.kind = "VmHWM of the process, during the route"
        except OSError:
            pass

    def read(self) -> int | None:
        """Return the bytes; `None` where the system does not count them."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Not `ru_maxrss`: a process inherits its parent's, and no reset lowers that.
        if "VmHWM" in self.kind:
            return 1024 * int(PROCESS_STATUS.read_text().split("VmHWM:")[1].split()[0])
        try:
            import resource
        except ModuleNotFoundError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def bytes_per_round(models: Sequence[PreTrainedModel], num_rows: float, length: float) -> int:
    """Count bytes of weights, keys and values that a round reads for `num_rows` texts of mean `length`."""
    return round(sum(weight_bytes(model) + num_rows * cache_bytes(model, length) for model in models))


def weight_bytes(model: PreTrainedModel) -> int:
    """Count bytes of weights that a forward reads: every parameter once, but of an input embedding only single rows.

    An embedding tied to the LM head is read whole, as the head. All experts of a mixture count.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    return sum(p.nbytes for p in model.parameters() if is_tied or p is not embedding.weight)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, length: float) -> float:
    """Count bytes of keys and values that attention reads for `length` tokens, from a forward over one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    total = 0.0
    for layer in cache_of(model(input_ids=token, use_cache=True)).layers:
        if getattr(layer, "keys", None) is not None:
            window = getattr(layer, "sliding_window", None)
            total += (layer.keys.nbytes + layer.values.nbytes) * (length if window is None else min(length, window))
    return total


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes read and written a second while copying a tensor too big for any cache on the device."""
    source = torch.ones(NUM_COPIED.get(device.type, 2**28), dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    seconds = []
    for _ in range(NUM_COPIES + 1):
        start = now(device)
        copied.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() / median(seconds[1:])  # The first touches new memory.


def run_metadata(
    pair: Pair, settings: BenchmarkSettings, words: list[str], target: str | None = None, draft: str | None = None
) -> dict[str, Any]:
    """Describe a run: command, models, versions, device and settings; file names only, never folders."""
    names = ("repeats", "max_new_tokens", "limit", "seed", "context")
    metadata = {
        "command": shown_command(words),
        "target": shown_model(target),
        "draft": None if pair.draft is None else shown_model(draft),
        **conditions_of(pair.target),
        **{name: getattr(settings, name) for name in names},
        "assistant_tree_size": settings.tree_size,
        "prompt_lookup_num_tokens": settings.lookup_num_tokens,
        "routes": None if settings.routes == tuple(ROUTES) else list(settings.routes),
    }
    return {name: value for name, value in metadata.items() if value is not None}


def run_benchmark(
    benchmark: Benchmark,
    prompt_sets: dict[str, list[dict[str, Any]]],
    metadata: dict[str, Any],
    output: Path | None = None,
    resume: bool = False,
    show: Callable[[dict[str, Any]], None] = lambda cell: None,
) -> dict[str, Any]:
    """Run a benchmark, `show` each cell, and return the result (`metadata` and cells), which is written to `output`.

    Until the last cell is measured, the result so far is in a file next to `output`, rewritten after every cell;
    `resume` continues what an interrupted run left there.

    Raises:
        ValueError: An interrupted run is there and `resume` is not set, or it had other settings or other prompts.
    """
    partial = output and output.with_name(f"{output.stem}.partial.json")
    cells = resumed_cells(partial, metadata, resume) if partial and partial.exists() else []

    def keep(cell: dict[str, Any]) -> None:
        cells.append(cell)
        if partial:
            partial.parent.mkdir(parents=True, exist_ok=True)
            write_whole(partial, result_text({**metadata, "cells": cells}))
        show(cell)

    result = {**metadata, "cells": benchmark.run(prompt_sets, list(cells), keep)}
    if output and partial:
        write_whole(output, result_text(result))
        partial.unlink(missing_ok=True)
    return result


def resumed_cells(partial: Path, metadata: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """Read the cells that an interrupted run left, if its settings were the same."""
    if not resume:
        raise ValueError(f"Expected no unfinished run, got `{partial}`. Pass `--resume`, or remove the file.")
    found = json.loads(partial.read_text(encoding="utf-8"))
    for name in sorted({*found, *metadata} - {"command", "date", "cells"}):
        if found.get(name) != metadata.get(name):
            raise ValueError(
                f"Expected `{partial}` to be of a run with {name} {metadata.get(name)!r}, got {found.get(name)!r}. "
                "Use that setting with `--resume`, or remove the file."
            )
    return found["cells"]


def result_text(result: dict[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False, indent=1) + "\n"
