"""What each proposal source gives, alone and together: tokens a round, tokens/s, accepted tokens by source.

    python benchmarks/sources.py --target smollm2 --prompts humaneval.jsonl gsm8k_test.jsonl \
        --copy-from heldout_code_functions.jsonl --output sources.json

Routes with a draft run on the bundled pair, or where `--draft` names one. Prompts are read in the order of the file,
each by all routes before the next one, greedily. Every route begins each text with nothing, but for `lookup_kept`,
whose memory is empty at the start of each pass over a set. The first pass warms up; each later one is timed. Texts of
all passes are compared with plain `generate`'s. The result so far is written after every set.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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


@dataclass
class Way:
    """A route at one tree size, and what it did in each pass over a set."""

    route: Route
    runner: RouteRunner
    stats: DecodingStats | None = None
    texts: dict[int, list[int]] = field(default_factory=dict)
    differing: set[int] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.route.name} {self.runner.tree_size}" if self.route.uses_tree else self.route.name

    def begin_pass(self) -> None:
        self.stats, self.texts = None, {}
        self.seconds.append(0.0)
        self.runner.memory.clear()

    def run(self, batch: PromptBatch, max_new_tokens: int, expected: dict[int, list[int]] | None) -> None:
        """Generate for a batch; compare texts with the `expected` ones."""
        streamer = RoundStreamer(self.runner.num_assistant_tokens, max_new_tokens)
        options = {"return_dict_in_generate": True, "streamer": streamer if self.route.loop == "stock" else None}
        start = now(self.runner.target.device)
        output = self.runner.generate(self.route, batch.inputs, max_new_tokens, **options)
        self.seconds[-1] += now(self.runner.target.device) - start
        stats = streamer.stats if self.route.loop == "stock" else getattr(output, "stats", None)
        if stats is not None:
            self.stats = stats if self.stats is None else self.stats + stats
        texts = batch.new_texts(output.sequences, end_token_ids(self.runner.target.generation_config))
        self.texts |= texts
        self.differing |= {index for index, text in texts.items() if text != (expected or texts)[index]}

    @property
    def rates(self) -> list[float]:
        """Return tokens a second in each timed pass, prefill included."""
        return [sum(map(len, self.texts.values())) / seconds for seconds in self.seconds[1:]]

    def to_json(self, plain: Way) -> dict[str, Any]:
        speedups = ratios(self.rates, plain.rates)
        return {
            "acceptance_length": 1.0 if self.stats is None else self.stats.acceptance_length,
            "accepted_by_source": self.stats and self.stats.accepted_by_source,
            "accepted_shares": (self.stats and self.stats.accepted_shares) or None,
            "identical_share": 1 - len(self.differing) / len(self.texts),
            "tokens_per_second": median(self.rates) if self.rates else None,
            "speedup": median(speedups) if speedups else None,
            "speedup_range": bounds(speedups),
        }


def main() -> None:
    args = parse()
    pair = load_pair_of(args)
    ways, not_served = make_ways(args, pair)
    names = ("limit", "max_new_tokens", "batch_size", "prompt_lookup_num_tokens")
    result = {
        **run_metadata(pair.target),
        **{name: getattr(args, name) for name in names},
        "num_assistant_tokens": args.num_assistant_tokens or getattr(pair.draft, "num_assistant_tokens", None),
        "repeats": None if args.tau_only else args.repeats,
        "not_served": not_served,
        "sets": {},
    }
    result = {name: value for name, value in result.items() if value is not None}
    for name, prompts in read_sets(args).items():
        result["sets"][name] = measure(args, pair, ways, name, prompts)
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
    parser.add_argument("--routes", nargs="+", default=DEFAULT_ROUTES, choices=ROUTES, metavar="ROUTE")
    parser.add_argument("--tree-sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--num-assistant-tokens", type=int, help="default: the draft's")
    parser.add_argument("--prompt-lookup-num-tokens", type=int, default=10, help="of stock prompt lookup as well")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each set, drawn with seed 0")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    parser.add_argument("--tau-only", action="store_true", help="one pass, and no times in the JSON")
    return parser.parse_args()


def make_ways(args: Any, pair: Pair) -> tuple[list[Way], dict[str, str]]:
    """Make the ways to generate, plain `generate` first, and list why others cannot run.

    Each has a runner of its own, and with it a memory of its own.
    """
    num_lookup, ways, not_served = args.prompt_lookup_num_tokens, [], {}
    for name in dict.fromkeys(("ar", *args.routes)):
        route = ROUTES[name]
        num_drafts = args.num_assistant_tokens or getattr(pair.draft, "num_assistant_tokens", num_lookup)
        for tree_size in args.tree_sizes if route.uses_tree else [1]:
            runner = RouteRunner(pair, num_drafts if route.is_drafted else num_lookup, tree_size, num_lookup)
            if (reason := runner.unsupported_reason(route, args.batch_size)) is not None:
                not_served[name] = reason
                break
            ways.append(Way(route, runner))
    return ways, not_served


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


def measure(args: Any, pair: Pair, ways: list[Way], name: str, prompts: list[str]) -> dict[str, Any]:
    """Measure every way on one set; in each batch another one is first."""
    longest = min(num_positions(model.config) for model in pair.models) - args.max_new_tokens
    encoded = [ids for ids in (encode_prompt(pair.tokenizer, prompt) for prompt in prompts) if len(ids) <= longest]
    if not encoded:
        raise ValueError(f"Expected prompts of at most {longest} tokens in `{name}`, got none. Choose another set.")
    batches = batches_in_order(encoded, args.batch_size, ways[0].runner)
    for way in ways:
        way.seconds, way.differing = [], set()
    plain, expected = ways[0], None
    for number in range(1 if args.tau_only else 1 + args.repeats):
        for way in ways:
            way.begin_pass()
        for index, batch in enumerate(batches):
            print(f"{name}: pass {number + 1}, batch {index + 1} of {len(batches)}", file=sys.stderr, flush=True)
            first = 0 if number == 0 else (number + index) % len(ways)  # The first pass asks what is expected.
            for way in ways[first:] + ways[:first]:
                way.run(batch, args.max_new_tokens, expected or (None if way is plain else plain.texts))
        expected = expected or dict(plain.texts)
    return {
        "num_prompts": len(encoded),
        "num_left_out": len(prompts) - len(encoded),
        "mean_prompt_tokens": round(sum(map(len, encoded)) / len(encoded), 1),
        "mean_new_tokens": round(sum(map(len, plain.texts.values())) / len(encoded), 1),
        "repeated_4gram_share": round(repeated_share(plain.texts.values()), 4),
        "routes": {way.name: for_json(way.to_json(plain)) for way in ways},
    }


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
