"""What each proposal source gives, alone and together: tokens a round, tokens/s, accepted tokens by source.

    python benchmarks/sources.py --target smollm2 --prompts humaneval.jsonl gsm8k_test.jsonl \
        --copy-from heldout_code_functions.jsonl --output sources.json

Routes with a draft run on the bundled pair, or where `--draft` names one. A way is a route at one tree size. Each
first runs untimed on the longest prompt, compiled ones on the shortest too, so that their shapes are there. After
that prompts are read in the order of the file, each by all ways before the next one, greedily, and every pass is
timed. A way begins each text with nothing, but for `lookup_kept`, whose memory is empty at the start of each pass
over a set. Texts of all passes are compared with plain `generate`'s. The result so far is written after every batch.

With `--tau-only` nothing is timed, and `--jobs` measures ways beside one another, those of the first routes first.
"""

from __future__ import annotations

import ast
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from pard_hf.evaluation.metrics import bounds, for_json, ratios, repeated_share
from pard_hf.evaluation.prompts import PromptBatch, choose_rows, load_prompts, make_batches
from pard_hf.evaluation.routes import ROUTES, RoundStreamer, Route, RouteRunner
from pard_hf.generation.stats import DecodingStats, now
from pard_hf.host import end_token_ids, num_positions
from pard_hf.loading import Pair
from pard_hf.tokens import encode_prompt
from script import add_pair, finish, load_pair_of, parser_of, run_metadata, write

DEFAULT_ROUTES = (
    *("ar", "pld", "copy", "successors", "lookup", "lookup_kept"),
    *("tier2", "head", "tree", "tree_head", "every_source"),
)
REQUEST = "Add a docstring to this function:\n```python\n{}\n```\n"
# Prompts that a job takes at a time; a memory that is kept needs all of a set.
NUM_AT_A_TIME = 4
# Of `--seconds`, what compiling may take before the ways that have not been warmed up are given up.
WARM_UP_SHARE = 0.6


@dataclass
class Way:
    """A route at one tree size, and what it did on one set.

    `stats` and `texts` are those of the first pass, `changed` the prompts whose text was another one later. Each pass
    has an entry in `seconds` and `num_tokens`.
    """

    route: Route
    tree_size: int
    runner: Any = None
    stats: DecodingStats | None = None
    texts: dict[int, list[int]] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.route.name} {self.tree_size}" if self.route.uses_tree else self.route.name

    def afresh(self) -> Way:
        return Way(self.route, self.tree_size, self.runner)

    def begin_pass(self) -> None:
        self.seconds.append(0.0)
        self.num_tokens.append(0)
        self.runner.memory.clear()

    def run(self, batch: PromptBatch, max_new_tokens: int) -> None:
        streamer = RoundStreamer(self.runner.num_assistant_tokens, max_new_tokens)
        options = {"return_dict_in_generate": True, "streamer": streamer if self.route.loop == "stock" else None}
        start = now(self.runner.target.device)
        output = self.runner.generate(self.route, batch.inputs, max_new_tokens, **options)
        self.seconds[-1] += now(self.runner.target.device) - start
        if len(self.seconds) == 1:
            self.count(streamer.stats if self.route.loop == "stock" else getattr(output, "stats", None))
        texts = batch.new_texts(output.sequences, end_token_ids(self.runner.target.generation_config))
        self.num_tokens[-1] += sum(map(len, texts.values()))
        self.changed |= {index for index, text in texts.items() if text != self.texts.setdefault(index, text)}

    def count(self, stats: DecodingStats | None) -> None:
        if stats is not None:
            self.stats = stats if self.stats is None else self.stats + stats

    def add(self, other: Way) -> None:
        """Add what the same way did on further prompts."""
        self.count(other.stats)
        self.texts |= other.texts

    @property
    def rates(self) -> list[float]:
        """Return tokens a second in each pass, prefill included."""
        return ratios(self.num_tokens, self.seconds)

    def to_json(self, plain: Way, is_timed: bool) -> dict[str, Any]:
        speedups = ratios(self.rates, plain.rates) if is_timed else []
        same = [text == plain.texts[index] and index not in self.changed for index, text in self.texts.items()]
        return {
            "acceptance_length": 1.0 if self.stats is None else self.stats.acceptance_length,
            "accepted_by_source": self.stats and self.stats.accepted_by_source,
            "accepted_shares": (self.stats and self.stats.accepted_shares) or None,
            "identical_share": sum(same) / len(same),
            "tokens_per_second": median(self.rates) if is_timed else None,
            "speedup": median(speedups) if speedups else None,
            "speedup_range": bounds(speedups),
        }


@dataclass
class PromptSet:
    """A set of prompts as token ids, and what ways did on it, plain `generate` first."""

    name: str
    encoded: list[list[int]]
    num_left_out: int
    ways: list[Way]

    def to_json(self, is_timed: bool) -> dict[str, Any]:
        """Describe ways that have read the same prompts as plain `generate`."""
        plain = self.ways[0]
        prompts = [self.encoded[index] for index in plain.texts]
        whole = [way for way in self.ways if way.texts.keys() == plain.texts.keys()]
        return {
            "num_prompts": len(prompts),
            "num_left_out": self.num_left_out,
            **({"num_passes": len(plain.seconds)} if is_timed else {}),
            "mean_prompt_tokens": round(sum(map(len, prompts)) / len(prompts), 1),
            "mean_new_tokens": round(sum(map(len, plain.texts.values())) / len(prompts), 1),
            "repeated_4gram_share": round(repeated_share(plain.texts.values()), 4),
            "routes": {way.name: for_json(way.to_json(plain, is_timed)) for way in whole},
        }


def main() -> None:
    args = parse()
    args.end = time.time() + args.seconds
    share_threads(args)
    pair = load_pair_of(args)
    ways, not_served = make_ways(args, pair)
    names = ("limit", "longest_prompt", "max_new_tokens", "batch_size", "prompt_lookup_num_tokens")
    result = {
        **run_metadata(pair.target),
        **{name: getattr(args, name) for name in names},
        "num_assistant_tokens": args.num_assistant_tokens or getattr(pair.draft, "num_assistant_tokens", None),
        "repeats": None if args.tau_only else args.repeats,
        "not_served": not_served,
        "sets": {},
    }
    result = {name: value for name, value in result.items() if value is not None}
    sets = encode_sets(args, pair, ways)
    for found in measure_in_jobs(args, sets) if args.jobs else measure_in_turn(args, ways, sets, not_served):
        result["sets"][found.name] = found.to_json(is_timed=not args.tau_only)
        write(result, args.output)
    lengths = {
        name: {way: route["acceptance_length"] for way, route in found["routes"].items()}
        for name, found in result["sets"].items()
    }
    finish(result, args.output, lengths)


def parse() -> Any:
    parser = parser_of(__doc__)
    add_pair(parser)
    parser.add_argument("--prompts", nargs="+", default=["demo"], help="prompt sets")
    parser.add_argument("--copy-from", nargs="*", default=[], help="files of functions that are to get a docstring")
    parser.add_argument(
        "--routes",
        nargs="+",
        default=DEFAULT_ROUTES,
        metavar="ROUTE[:N,...]",
        help="as of `pard bench`, with tree sizes of their own; `_compiled` may end any that runs in our loop",
    )
    parser.add_argument("--tree-sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--num-assistant-tokens", type=int, help="default: the draft's")
    parser.add_argument("--prompt-lookup-num-tokens", type=int, default=10, help="of stock prompt lookup as well")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each set, drawn with seed 0")
    parser.add_argument("--longest-prompt", type=int, help="leave out prompts of more tokens")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    parser.add_argument("--tau-only", action="store_true", help="one pass, and no times in the JSON")
    parser.add_argument("--jobs", type=int, default=0, help="with --tau-only: processes that share the ways")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no prompt later; sets have equal shares of the time"
    )
    args = parser.parse_args()
    if args.jobs and not args.tau_only:
        parser.error("Expected `--tau-only` with `--jobs`: processes beside one another disturb each other's times.")
    return args


def make_ways(args: Any, pair: Pair) -> tuple[list[Way], dict[str, str]]:
    """Make the ways to generate, plain `generate` first, and list why others cannot run.

    Each has a runner of its own, and with it a memory of its own.
    """
    num_lookup, ways, not_served = args.prompt_lookup_num_tokens, [], {}
    for word in dict.fromkeys(("ar", *args.routes)):
        name, _, sizes = word.partition(":")
        route = route_of(name)
        num_drafts = args.num_assistant_tokens or getattr(pair.draft, "num_assistant_tokens", num_lookup)
        tree_sizes = [int(size) for size in sizes.split(",")] if sizes else args.tree_sizes
        for tree_size in tree_sizes if route.uses_tree else [1]:
            runner = RouteRunner(pair, num_drafts if route.is_drafted else num_lookup, tree_size, num_lookup)
            if (reason := runner.unsupported_reason(route, args.batch_size)) is not None:
                not_served[name] = reason
                break
            ways.append(Way(route, tree_size, runner))
    return ways, not_served


def route_of(name: str) -> Route:
    """Return a route of `pard bench`, or one that it lacks: any of our loop, compiled."""
    if (route := ROUTES.get(name)) is not None:
        return route
    route = ROUTES.get(name.removesuffix("_compiled"))
    if route is None or route.loop != "own":
        raise ValueError(f"Expected a route among {', '.join(ROUTES)}, got {name!r}.")
    return replace(route, name=name, title=f"{route.title}, compiled", is_compiled=True)


def read_sets(args: Any) -> dict[str, list[str]]:
    """Read the prompts of every set, in the order of the file."""
    sets = {}
    for source in args.prompts:
        name, rows = load_prompts(source)
        sets[name] = [rows[index]["prompt"] for index in choose_rows(rows, args.limit, 0)]
    for source in args.copy_from:
        name, rows = load_prompts(source)
        requests = [REQUEST.format(code) for row in rows if (code := without_docstring(row)) is not None]
        sets[f"copy: {name}"] = [requests[index] for index in choose_rows(requests, args.limit, 0)]
    return sets


def without_docstring(row: dict[str, Any]) -> str | None:
    """Return the function of a JSONL row, `prompt` and `reference`, without its docstring; `None` if it has none."""
    code = textwrap.dedent(row["prompt"] + row.get("reference", ""))
    try:
        function: Any = ast.parse(code).body[-1]
    except (SyntaxError, IndexError):
        return None
    if not isinstance(function, ast.FunctionDef) or ast.get_docstring(function) is None or len(function.body) < 2:
        return None
    docstring, lines = function.body[0], code.splitlines()
    del lines[docstring.lineno - 1 : docstring.end_lineno]
    return "\n".join(line for line in lines if line.strip())


def encode_sets(args: Any, pair: Pair, ways: list[Way]) -> list[PromptSet]:
    """Encode the prompts of every set; leave out those that are too long."""
    longest = min(num_positions(model.config) for model in pair.models) - args.max_new_tokens
    longest, sets = min(longest, args.longest_prompt or longest), []
    for name, prompts in read_sets(args).items():
        encoded = [ids for ids in (encode_prompt(pair.tokenizer, prompt) for prompt in prompts) if len(ids) <= longest]
        if not encoded:
            raise ValueError(
                f"Expected prompts of at most {longest} tokens in `{name}`, got none. Choose another set."
            )
        sets.append(PromptSet(name, encoded, len(prompts) - len(encoded), [way.afresh() for way in ways]))
    return sets


def measure_in_turn(
    args: Any, ways: list[Way], sets: list[PromptSet], not_served: dict[str, str]
) -> Iterator[PromptSet]:
    """Measure set after set, and yield one whenever it has more to tell; add to `not_served` what cannot run."""
    if not args.tau_only:
        not_served |= warm_up(args, ways, [ids for found in sets for ids in found.encoded])
    for index, found in enumerate(sets):
        found.ways = [way for way in found.ways if way.name not in not_served]
        end = time.time() + (args.end - time.time()) / (len(sets) - index)
        for _ in measure(found, args.batch_size, args.max_new_tokens, 1 if args.tau_only else args.repeats, end):
            yield found


def warm_up(args: Any, ways: list[Way], encoded: list[list[int]]) -> dict[str, str]:
    """Run every way on the longest prompts, and compiled ones on the shortest too: rounds meet most and fewest tokens.

    Returns why ways cannot be measured.
    """
    encoded = sorted(encoded, key=len, reverse=True)
    chosen = [*encoded[: args.batch_size], *encoded[-args.batch_size :]]
    batches = batches_in_order(chosen, args.batch_size, ways[0].runner)
    end, not_served = time.time() + WARM_UP_SHARE * (args.end - time.time()), {}
    for way in [way.afresh() for way in ways]:
        is_late = way.route.name != "ar" and time.time() > end
        needed = batches if way.route.is_compiled else batches[:1]
        reason = "no time was left to warm up" if is_late else try_out(way, needed, args.max_new_tokens)
        if reason is not None:
            not_served[way.name] = reason
        print(f"warm-up: {way.name}, {reason or f'{sum(way.seconds):.1f} s'}", file=sys.stderr, flush=True)
    return not_served


def try_out(way: Way, batches: list[PromptBatch], max_new_tokens: int) -> str | None:
    """Run a way; return why it is not the one that its name promises."""
    way.begin_pass()
    try:
        for batch in batches:
            way.run(batch, max_new_tokens)
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"torch.compile failed: {str(error).strip().splitlines()[0]}"
    if way.route.loop == "own" and way.route.is_compiled and (reason := way.runner.compile_failure(way.route)):
        return f"torch.compile failed: {reason}"  # The rounds ran, but eagerly.
    return None


def measure(
    found: PromptSet, batch_size: int, max_new_tokens: int, num_passes: int, end: float = float("inf")
) -> Iterator[None]:
    """Measure every way on one set; in each batch another one is first."""
    batches = batches_in_order(found.encoded, batch_size, found.ways[0].runner)
    for number in range(num_passes):
        for way in found.ways:
            way.begin_pass()
        for index, batch in enumerate(batches):
            if number + index and time.time() > end:
                return
            print(f"{found.name}: pass {number + 1}, batch {index + 1} of {len(batches)}", file=sys.stderr, flush=True)
            first = (number + index) % len(found.ways)
            for way in found.ways[first:] + found.ways[:first]:
                way.run(batch, max_new_tokens)
            yield


# The arguments and the ways of a process of `--jobs`.
job: dict[str, Any] = {}


def measure_in_jobs(args: Any, sets: list[PromptSet]) -> Iterator[PromptSet]:
    """Share the ways among processes, and yield a set whenever it has more to tell."""
    parts: dict[Future[Way | None], tuple[PromptSet, Way]] = {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), begin_job, (args,)) as pool:
        for ways in zip(*(found.ways for found in sets), strict=True):
            for found, way in zip(sets, ways, strict=True):
                size = len(found.encoded) if way.route.keeps_memory else NUM_AT_A_TIME * args.batch_size
                for first in range(0, len(found.encoded), size):
                    parts[pool.submit(run_part, way.name, first, found.encoded[first : first + size])] = found, way
        for number, future in enumerate(as_completed(parts), start=1):
            found, way = parts[future]
            if future.exception() is None and (part := future.result()) is not None:
                way.add(part)
            print(f"{found.name}: {way.name}, part {number} of {len(parts)}", file=sys.stderr, flush=True)
            if len(found.ways[0].texts) == len(found.encoded):
                yield found
        for future in parts:  # What failed is told when all others are done.
            future.result()


def share_threads(args: Any) -> None:
    """Leave each process of `--jobs` its share of the cores: more threads than cores wait for one another."""
    if args.jobs:
        torch.set_num_threads(max(torch.get_num_threads() // args.jobs, 1))


def begin_job(args: Any) -> None:
    share_threads(args)
    ways, _ = make_ways(args, load_pair_of(args))
    job.update(args=args, ways={way.name: way for way in ways})


def run_part(name: str, first: int, encoded: list[list[int]]) -> Way | None:
    """Run a way on the prompts of a set from the `first` one on; `None` where there is no time left."""
    args, way = job["args"], job["ways"][name].afresh()
    if time.time() > args.end:
        return None
    way.begin_pass()
    for batch in batches_in_order(encoded, args.batch_size, way.runner):
        indices = tuple(first + index for index in batch.indices)
        way.run(PromptBatch(indices, batch.inputs), args.max_new_tokens)
    return replace(way, runner=None)


def batches_in_order(encoded: list[list[int]], batch_size: int, runner: RouteRunner) -> list[PromptBatch]:
    """Batch prompts in their order; `make_batches` would take long ones first."""
    batches = []
    for start in range(0, len(encoded), batch_size):
        [batch] = make_batches(
            encoded[start : start + batch_size], batch_size, runner.pad_token_id, runner.target.device
        )
        batches.append(PromptBatch(tuple(start + index for index in batch.indices), batch.inputs))
    return batches


if __name__ == "__main__":
    main()
