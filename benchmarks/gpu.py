"""Check that texts are exact on a device, then measure rounds there against what its memory allows: `make gpu`.

    python benchmarks/gpu.py --shapes llama-8b --output gpu.json

Needs neither a network nor a checkpoint. Exactness comes first, in float32 on the bundled pair. Then the pair is
enlarged on the spot (`scaling.py`), so that it accepts what the small one does at a real pair's cost. The result is
written after every check and measurement; what `--seconds` leaves no time for is listed as skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import pairwise
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from first_call import CACHE_FOLDER, Clock, milliseconds
from pard_hf.evaluation.benchmark import MemoryGauge, cache_bytes, copy_bandwidth, is_exact, weight_bytes
from pard_hf.evaluation.metrics import for_json, repeated_share
from pard_hf.evaluation.prompts import DEMO_PROMPTS, make_batches
from pard_hf.evaluation.routes import NUM_COMPILED, ROUTES, RouteRunner, compile_anywhere
from pard_hf.generation.capture import CAPTURE
from pard_hf.generation.stats import now
from pard_hf.host import without_head
from pard_hf.loading import Pair, default_device, load_pair
from pard_hf.tokens import encode_prompt
from scaling import Shape, enlarge_pair
from script import finish, parser_of, run_metadata, write

# Shapes of target and draft; the tiny ones have room for the first layers of the bundled pair.
TINY = Shape("llama", 192, 448, 2, 6, 6, 32, 2100, True)
PAIRS: dict[str, tuple[str | Shape, str | Shape]] = {"cpu": ("cpu-1.2b", "cpu-0.15b"), "tiny": (TINY, TINY)}
PAIRS |= {"llama-8b": ("llama-3.1-8b", "llama-3.2-1b"), "qwen-7b": ("qwen2.5-7b", "qwen2.5-0.5b")}
EAGER, WHOLE, LAYERS, CAPTURED = "eager", "whole model", "layers", "captured"
# What has arrived, the prompt first, when kernels begin to be counted and when they no longer are.
FIRST_COUNTED, LAST_COUNTED = 3, 7
# A token that was waited for so many times longer than the median one came before full speed.
WAITED = 5
# Of the time that exactness may take.
CHECK_SHARE = 0.3
# Columns of the table: what they show of an entry.
COLUMNS = {"tokens/s": "tokens_per_second", "x AR+": "speedup_over_ar_plus", "τ": "acceptance_length"}
COLUMNS |= {"ms/round": "milliseconds_a_round", "of bound": "bandwidth_share", "kernels": "kernels_a_round"}
COLUMNS |= {"first s": "first_token_seconds", "full s": "full_speed_seconds", "spent s": "spent_seconds"}


class Case(NamedTuple):
    """A route at a batch size: eager, compiled in one of two ways, or captured from eager calls."""

    name: str
    way: str = EAGER
    batch_size: int = 1
    do_sample: bool = False


CHECKS = [Case(name, EAGER, size) for name in ("tier2", "tree_head", "every_source", "lookup") for size in (1, 5)]
CHECKS += [Case("tier1"), *(Case(name, EAGER, 1, True) for name in ("tier2", "tree_head", "every_source"))]
CHECKS += [Case("tier2", WHOLE), Case("tier2", WHOLE, 1, True), Case("every_source", LAYERS, 5)]
CHECKS += [Case("tier2", CAPTURED, 1, True), Case("every_source", CAPTURED, 5)]
# Plain `generate` first, which others are compared with; the rest by its worth, as time may end.
OF_ONE = [Case("ar"), Case("ar_plus", WHOLE), Case("tier2_compiled", WHOLE), Case("tree_head_compiled", WHOLE)]
OF_ONE += [Case("tier2"), Case("tier2_compiled", CAPTURED), Case("tree_head_compiled", CAPTURED)]
OF_ONE += [Case("tier2_compiled", LAYERS), Case("tier1"), Case("tree_head")]
OF_MANY = [Case("ar"), Case("ar_plus", WHOLE), Case("tier2_compiled", WHOLE), Case("tree_head_compiled", LAYERS)]


class Rounds(Clock):
    """Note when rounds end; count the kernels of some, on a CPU the calls of operators."""

    def __init__(self, device: torch.device, counts: bool = False):
        super().__init__()
        kinds = DeviceType, ProfilerActivity
        self.kind, activity = (kind.CUDA if device.type == "cuda" else kind.CPU for kind in kinds)
        self.device, self.counts, self.profile = device, counts, profile(activities=[activity])

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.counts and len(self.arrivals) in (FIRST_COUNTED, LAST_COUNTED):
            now(self.device)
            (self.profile.start if len(self.arrivals) == FIRST_COUNTED else self.profile.stop)()

    def num_kernels(self) -> float:
        """Count those of a round."""
        kernels = [event for event in self.profile.events() or () if event.device_type == self.kind]
        return len(kernels) / (LAST_COUNTED - FIRST_COUNTED)

    def put_accepted(self, value: torch.Tensor, source: str | None = None) -> None:
        """Do nothing: a round ends with its bonus token."""

    def full_speed_seconds(self) -> float:
        """Return when the last token came that was waited for."""
        waits = [(later - earlier, later) for earlier, later in pairwise(self.arrivals[1:])]
        longest = WAITED * median(wait for wait, _ in waits)
        return max((later for wait, later in waits if wait > longest), default=self.arrivals[1])


class Calls:
    """Calls of one pair with the options of the command line, and some for all calls."""

    def __init__(self, pair: Pair, args: argparse.Namespace, **options: Any):
        self.pair, self.args, self.device, self.options = pair, args, pair.target.device, options
        self.runner = RouteRunner(pair, args.num_assistant_tokens, args.tree_size)
        self.prompts = [encode_prompt(pair.tokenizer, prompt) for prompt in DEMO_PROMPTS]

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        prompts = [self.prompts[index % len(self.prompts)] for index in range(size)]
        return make_batches(prompts, size, self.runner.pad_token_id, self.device)[0].inputs

    def __call__(self, case: Case, **options: Any) -> Any:
        """Generate, sampling by the same seed; raise where a step that was to be compiled could not be."""
        route, runner = ROUTES[case.name], self.runner
        options = {**runner.arguments(route), **self.compiling(case.way), **self.options, **options}
        options |= {"max_new_tokens": self.args.max_new_tokens, "pad_token_id": runner.pad_token_id}
        options |= {"do_sample": case.do_sample, "return_dict_in_generate": True}
        model = runner.target if route.loop == "own" else runner.plain
        torch.manual_seed(0)
        with torch._dynamo.config.patch(recompile_limit=NUM_COMPILED):
            output = model.generate(**self.batch(case.batch_size), **options)
        if case.way != EAGER and (failure := runner.compile_failure(route)) is not None:
            raise RuntimeError(failure)
        return output

    def compiling(self, way: str) -> dict[str, Any]:
        """Return the arguments that compile, and that wait for it."""
        if way == EAGER:
            return {}
        config = compile_anywhere()
        config.fullgraph, config.backend = way == WHOLE, CAPTURE if way == CAPTURED else self.args.backend
        config.mode = config.mode if config.backend == "inductor" else "default"
        return {"disable_compile": False, "cache_implementation": "static", "compile_config": config}

    def check(self, case: Case) -> dict[str, Any]:
        """Compare with plain `generate`."""
        expected = self(Case("ar", EAGER, case.batch_size, case.do_sample)).sequences
        return {"identical_share": float(torch.equal(self(case).sequences, expected))}


class Measurement:
    """Measure cases of a pair; `found` holds what later ones are compared with, `texts` those of each batch size."""

    def __init__(self, calls: Calls):
        self.calls, self.device = calls, calls.device
        self.bandwidth = copy_bandwidth(self.device)
        self.models = {"draft": without_head(calls.pair.draft), "verify": calls.pair.target}
        self.found: dict[Case, dict[str, Any]] = {}
        self.texts: dict[int, list[list[int]]] = {}

    def measure(self, case: Case) -> dict[str, Any]:
        """Call a case for the first time, then in turns with plain `generate`, then to look into its rounds."""
        first, gauge = Rounds(self.device), MemoryGauge(self.device)
        output = self.calls(case, streamer=first)
        texts = output.sequences.tolist()
        pairs = zip(texts, self.texts.setdefault(case.batch_size, texts), strict=True)
        found = {"first_token_seconds": first.arrivals[1], "full_speed_seconds": first.full_speed_seconds()}
        found |= {
            "peak_memory": gauge.read(),
            "repeated_4gram_share": repeated_share(t[-self.calls.args.max_new_tokens :] for t in texts),
        }
        found["identical_share"] = mean(one == other for one, other in pairs)
        if ROUTES[case.name].loop == "own":
            found |= {"compile_seconds": output.compile_seconds, "acceptance_length": output.stats.acceptance_length}
        found |= self.speed(case)
        self.found[case] = found | self.rounds(case, found["seconds"])
        return self.found[case]

    def speed(self, case: Case) -> dict[str, Any]:
        """Time calls that take turns with those of compiled plain `generate`, or of eager where that is missing."""
        compiled, args = Case("ar_plus", WHOLE, case.batch_size), self.calls.args
        reference = compiled if compiled in self.found else Case("ar", EAGER, case.batch_size)
        turns = [(self.timed(case), self.timed(reference)) for _ in range(args.repeats)]
        seconds, ratio = median(ours for ours, _ in turns), median(theirs / ours for ours, theirs in turns)
        rate = case.batch_size * args.max_new_tokens / seconds
        return {"seconds": seconds, "tokens_per_second": rate, f"speedup_over_{reference.name}": ratio}

    def timed(self, case: Case) -> float:
        start = now(self.device)
        self.calls(case)
        return now(self.device) - start

    def rounds(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return what a round takes and has to read, the kernels that it runs, and its steps where they are ours."""
        counted, times = Rounds(self.device, counts=True), None
        self.calls(case, streamer=counted)
        if ROUTES[case.name].loop == "own":
            times = self.calls(case, measure_rounds=True).round_times
        num_rounds = len(counted.arrivals) - 2 if times is None else times.num_rounds
        usual, num_bytes = (seconds - counted.arrivals[1]) / num_rounds, self.bytes_of(case)
        least = sum(num_bytes.values()) / self.bandwidth
        found = {"milliseconds_a_round": 1000 * usual, "bound_milliseconds": 1000 * least}
        found |= {"bandwidth_share": least / usual, "kernels_a_round": counted.num_kernels()}
        if times is None:
            return found
        steps = milliseconds(times)
        shares = {step: 1000 * read / self.bandwidth / steps[step] for step, read in num_bytes.items()}
        return {**found, "step_milliseconds": steps, "step_bytes": num_bytes, "step_bandwidth_shares": shares}

    def bytes_of(self, case: Case) -> dict[str, float]:
        """Count the bytes of weights, keys and values that draft and verify must read in a round."""
        mask = self.calls.batch(case.batch_size)["attention_mask"]
        num_cached = float(mask.sum()) + case.batch_size * self.calls.args.max_new_tokens / 2
        models = self.models if ROUTES[case.name].is_drafted else {"verify": self.models["verify"]}
        return {step: weight_bytes(model) + cache_bytes(model, num_cached) for step, model in models.items()}


class Run:
    """A result that is written and shown entry by entry, and when it has to end."""

    def __init__(self, args: argparse.Namespace, metadata: dict[str, Any]):
        self.args, self.start, self.is_right = args, time.perf_counter(), True
        self.result: dict[str, Any] = {**metadata, "exactness": []}

    def go_through(self, cases: list[Case], call: Any, entries: list[Any], is_exact: bool, share: float = 1.0) -> None:
        """Call cases while that is likely to end in time; one that fails does not stop the others."""
        longest: dict[str, float] = {}
        for case in cases:
            begin, entry = time.perf_counter(), case._asdict()
            if begin - self.start + longest.get(case.way, 0.0) > share * self.args.seconds:
                entry |= {"skipped": "no time left"}
            else:
                try:
                    entry |= call(case)
                except Exception as error:  # Of any kind: the device may be one that was never tried.
                    entry |= {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
                longest[case.way] = entry["spent_seconds"] = time.perf_counter() - begin
                self.is_right &= entry.get("identical_share", 0) == 1 or not (is_exact or "failed" in entry)
            entries.append(for_json(entry))
            write(self.result, self.args.output)
            show(entry)


def show(entry: dict[str, Any]) -> None:
    """Print a line of the table."""
    name = f"{entry['name']}, {entry['way']}, batch {entry['batch_size']}{', sampled' * entry['do_sample']}"
    cells = [f"{entry[column]:.3g}" if column in entry else "" for column in COLUMNS.values()]
    note = entry.get("failed") or entry.get("skipped") or f"identical {entry['identical_share']:.0%}"
    print(f"{name:42}", *(f"{cell:>8}" for cell in cells), note, flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", choices=PAIRS, default="llama-8b")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", help="default: bfloat16, and float32 on a CPU")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    for flag, default in (("num-assistant-tokens", 8), ("tree-size", 64), ("max-new-tokens", 96), ("repeats", 2)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=300.0, help="in which the run is to end")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    small = load_pair(dtype="float32", device=args.device)
    for model in small.models if args.shapes == "tiny" else ():
        model.config.num_hidden_layers = TINY.num_hidden_layers
        model.model.layers = model.model.layers[: TINY.num_hidden_layers]
    run = Run(args, {**run_metadata(small.target), "dtype": str(dtype), "shapes": args.shapes})
    print(f"{'':42}", *(f"{title:>8}" for title in COLUMNS))
    with TemporaryDirectory() as folder:
        os.environ[CACHE_FOLDER] = folder  # Nothing was compiled before.
        run.go_through(CHECKS, Calls(small, args).check, run.result["exactness"], True, CHECK_SHARE)
        measurement = Measurement(
            Calls(enlarge_pair(small, *PAIRS[args.shapes], dtype=dtype), args, eos_token_id=None)
        )  # Equal lengths.
        run.result |= {"copy_bandwidth": measurement.bandwidth, "cases": []}
        for size in args.batch_sizes:
            cases = [case._replace(batch_size=size) for case in (OF_ONE if size == 1 else OF_MANY)]
            run.go_through(cases, measurement.measure, run.result["cases"], is_exact(dtype))
    skipped = sum("skipped" in entry for entry in run.result["exactness"] + run.result["cases"])
    finish(run.result, args.output, {"exact": run.is_right, "skipped": skipped})
    sys.exit(not run.is_right)


if __name__ == "__main__":
    main()
