"""Every route on the same prompts in one run, over prompt sets, batch sizes and K.

A cell is one set at one batch size and one K; within it routes are interleaved, so its ratios are fair. Knows neither
terminals nor files: what is finished is handed to the caller cell by cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..pair import Pair
from ..positions import check_num_assistant_tokens, num_positions
from ..sharing import without_head
from .agreement import first_difference, is_exact, logit_gap
from .batches import PromptBatch, make_batches, regroup
from .figures import route_result
from .measurement import Measurement
from .memory import cache_bytes, cache_layer_sizes, copy_bandwidth, weight_bytes
from .prompts import choose_rows, encode_answer, encode_prompt, lengthen, repeated_share
from .results import CellResult, Difference, Regrouped
from .routes import DEFAULT_TREE_SIZE, ROUTES, RouteRunner


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
