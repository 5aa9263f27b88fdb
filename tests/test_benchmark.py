"""The benchmark: routes run side by side, what is counted, what an interrupted run keeps."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from families import add_head, make_draft, make_forgetful, make_model, make_self_draft
from transformers import CompileConfig, LlamaForCausalLM
from transformers.cache_utils import StaticLayer

from benchmarks.sources import (
    PromptSet,
    Way,
    batches_in_order,
    make_ways,
    measure_in_jobs,
    measure_in_turn,
    route_of,
    without_docstring,
)
from benchmarks.sources import measure as measure_set
from pard_hf import with_pard
from pard_hf.cli import main
from pard_hf.evaluation.benchmark import (
    Benchmark,
    BenchmarkSettings,
    Measurement,
    cache_bytes,
    copy_bandwidth,
    first_difference,
    logit_gap,
    run_benchmark,
    weight_bytes,
)
from pard_hf.evaluation.metrics import RouteRecord
from pard_hf.evaluation.prompts import choose_rows, encode_answer, lengthen, load_prompts, make_batches, regroup
from pard_hf.evaluation.routes import ROUTES, RoundStreamer, RouteRunner
from pard_hf.generation.stats import DecodingStats
from pard_hf.io import shown_command, shown_model
from pard_hf.loading import Pair

ROWS = [{"prompt": "abcab"}, {"prompt": "What?", "reference": "xyxyxyxy"}, {"prompt": "xyz" * 5}]
EAGER = ("ar", "ad", "pld", "tier1", "tier2", "adaptive")


@pytest.fixture
def pair(bundled_like_tokenizer):
    target = make_model("llama")
    draft = make_self_draft(target)
    return Pair(with_pard(target), draft, bundled_like_tokenizer)


def run(pair, rows=ROWS, **settings):
    settings = {"routes": EAGER, "repeats": 1, "max_new_tokens": 10, "num_assistant_tokens": (4,), **settings}
    return Benchmark(pair, BenchmarkSettings(**settings)).run({"set": rows})


def routes_of(cell):
    return {route["route"]: route for route in cell["routes"]}


def key_of(cell):
    return cell["prompts"], cell["batch_size"], cell["num_assistant_tokens"]


def test_every_route_runs_and_agrees(pair):
    [cell] = run(pair, repeats=2)

    assert list(routes_of(cell)) == list(EAGER)
    assert all(route["identical_share"] == 1 and "difference" not in route for route in cell["routes"])
    assert all(route["num_new_tokens"] == 30 and len(route["seconds"]) == 2 for route in cell["routes"])
    assert routes_of(cell)["ar"]["speedup"] == 1
    assert not cell["not_served"]


def test_rounds_of_the_stock_loop_are_counted_as_ours_are(pair):
    """The target's own weights draft: token by token every proposal is accepted, 10 tokens in 2 rounds of 5."""
    routes = routes_of(run(pair)[0])

    assert routes["ad"]["acceptance_length"] == 5
    assert routes["ad"]["histogram"] == [0, 0, 0, 0, 6]
    assert sum(routes["tier2"]["histogram"]) > 6
    assert routes["tier1"]["histogram"] == routes["tier2"]["histogram"][: len(routes["tier1"]["histogram"])]
    assert routes["tier1"]["acceptance_rate"] == pytest.approx(routes["tier2"]["acceptance_rate"])
    assert "acceptance_rate" not in routes["pld"]


def test_chains_are_drafted_without_the_head_by_every_loop(pair):
    """Equal proposals are accepted equally; a head that spoils them shows in its own route alone."""
    add_head(pair.draft, 3.0)

    [cell] = run(pair, routes=("tier1", "tier2", "head"))

    tier1, tier2, head = (routes_of(cell)[name]["acceptance_length"] for name in ("tier1", "tier2", "head"))
    assert tier1 == tier2 != head


def test_round_streamer_counts_the_forwards_of_the_target(pair):
    runner = RouteRunner(pair, 3)
    [batch] = make_batches([[5, 6, 7, 5, 6]], 1, runner.pad_token_id, "cpu")
    calls = []
    pair.target.register_forward_hook(lambda *_: calls.append(1))

    for name in ("pld", "ad", "tier1"):
        calls.clear()
        streamer = RoundStreamer(3, 12)
        output = runner.generate(ROUTES[name], batch.inputs, 12, streamer=streamer)

        assert streamer.stats.num_rounds == len(calls), name
        assert streamer.stats.num_tokens == output.shape[1] - batch.num_columns == 12


def test_one_copy_of_the_weights_serves_all(pair):
    runner = RouteRunner(pair, 3)
    token_by_token, parallel = (runner.arguments(ROUTES[name])["assistant_model"] for name in ("ad", "tier1"))

    for twin in (token_by_token, parallel):
        assert twin.lm_head.weight is pair.draft.lm_head.weight
        assert twin.generation_config.num_assistant_tokens == 3
    assert runner.plain.lm_head.weight is pair.target.lm_head.weight
    assert type(runner.plain) is LlamaForCausalLM
    assert type(token_by_token) is LlamaForCausalLM
    assert pair.draft.generation_config.num_assistant_tokens == 5
    run(pair)
    assert with_pard(pair.target) is pair.target
    assert "PardGenerationMixin" in [base.__name__ for base in type(pair.target).__mro__]


def test_stock_routes_are_left_out_of_batches_with_a_reason(pair):
    [cell] = run(pair, batch_sizes=(2,))

    assert list(routes_of(cell)) == ["ar", "tier2", "adaptive"]
    assert set(cell["not_served"]) == {"ad", "pld", "tier1"}
    assert "one text at a time" in cell["not_served"]["pld"]
    assert all(route["identical_share"] == 1 for route in cell["routes"])


def test_routes_that_cannot_run_have_a_reason(bundled_like_tokenizer):
    """A target with padding rows, and a K that the adaptive schedule cannot choose."""
    target = with_pard(make_model("llama", vocab_size=2004))
    pair = Pair(target, make_draft(make_model("llama", vocab_size=2000), 4), bundled_like_tokenizer)

    [cell] = run(pair, num_assistant_tokens=(3,))

    assert "2004 and 2000" in cell["not_served"]["ad"]
    assert "not 3" in cell["not_served"]["adaptive"]
    assert routes_of(cell)["tier2"]["identical_share"] == 1


def test_sources_are_measured_with_a_draft_and_without(pair, bundled_like_tokenizer):
    """A target that has no draft is asked nothing else: the routes that need one say so."""
    names = ("pld", "tier2", "copy", "successors", "lookup", "lookup_kept", "lookup_adaptive")
    drafted = ("every_source", "every_source_adaptive")
    alone = Pair(pair.target, None, bundled_like_tokenizer)

    [cell] = run(pair, routes=(*names, *drafted), tree_size=8)
    [left] = run(alone, ROWS[:1], routes=(*names, *drafted), tree_size=8, num_assistant_tokens=(), lookup_num_tokens=6)

    routes = routes_of(cell)
    assert list(routes) == ["ar", *names, *drafted]
    assert list(routes_of(left)) == ["ar", *(name for name in names if name != "tier2")]
    assert left["not_served"] == dict.fromkeys(("tier2", *drafted), "it needs a draft")
    assert left["num_assistant_tokens"] == 6
    assert all(route["identical_share"] == 1 for found in (cell, left) for route in found["routes"])
    proposed = {"copy": {"copy"}, "successors": {"successors"}, "lookup": {"copy", "successors"}}
    for name, sources in {**proposed, "every_source": {"copy", "successors", "draft"}}.items():
        counts = {source: count for source, count in routes[name]["accepted_by_source"].items() if count}
        assert set(counts) <= sources
        accepted = sum(n * rounds for n, rounds in enumerate(routes[name]["histogram"]))
        assert sum(counts.values()) == accepted
        assert routes[name]["draft_seconds"] > 0
    assert "accepted_by_source" not in routes["tier2"]


def test_a_kept_memory_begins_empty_in_every_repeat(pair):
    """Each text is met after another that is the same; a memory from the repeat before would know it already."""
    runner = RouteRunner(Pair(pair.target, None, pair.tokenizer), tree_size=8)
    measurement = Measurement(runner, [[5, 6, 7, 5, 6]] * 2, 1, 30)

    measurement.run([ROUTES[name] for name in ("ar", "lookup", "lookup_kept")], repeats=2)

    cold, kept = (measurement.records[name] for name in ("lookup", "lookup_kept"))
    assert kept.stats.acceptance_length > cold.stats.acceptance_length
    once = kept.stats
    runner.memory.clear()
    for _ in range(2):
        [batch, _] = measurement.batches
        runner.generate(ROUTES["lookup_kept"], batch.inputs, 30)
    measurement.time_rounds(kept)
    assert kept.stats == once
    assert "emptied before each repeat" in kept.speed()["assistant_memory"]
    assert "assistant_memory" not in cold.to_json()


def test_the_copy_set_has_functions_without_their_docstrings():
    prompt = '@cached\ndef half(x: int) -> float:\n    """Return half.\n\n    Of x.\n    """\n'

    code = without_docstring({"prompt": prompt, "reference": "\n    return x / 2\n"})

    assert code == "@cached\ndef half(x: int) -> float:\n    return x / 2"
    for row in ({"prompt": "half of x"}, {"prompt": prompt}, {"prompt": "def f():\n    return 1\n    return 2\n"}):
        assert without_docstring(row) is None


def test_the_benchmark_of_sources_keeps_the_order_of_the_prompts_and_one_memory_a_set(pair):
    args = Namespace(routes=["lookup", "lookup_kept:8,4", "tree_head"], tree_sizes=[8], num_assistant_tokens=4)
    vars(args).update(batch_size=1, prompt_lookup_num_tokens=6)
    ways, not_served = make_ways(args, pair)
    encoded = [[5, 6], [5, 6, 7] * 3, [5, 6]]
    sets = [PromptSet("set", encoded, 0, [way.afresh() for way in ways]) for _ in range(2)]

    first, again = ([found.to_json(True) for _ in measure_set(found, 1, 20, 2)] for found in sets)

    assert [found["num_prompts"] for found in first] == [1, 2, 3, 3, 3, 3]
    assert [found["num_passes"] for found in first] == [1, 1, 1, 2, 2, 2]
    routes = first[-1]["routes"]
    assert list(routes) == ["ar", "lookup 8", "lookup_kept 8", "lookup_kept 4"]
    assert not_served == {"tree_head": "the draft has no correction head"}
    batches = batches_in_order([[5], [6] * 3, [7]], 1, ways[0].runner)
    assert [batch.num_columns for batch in batches] == [1, 3, 1]
    assert routes["lookup_kept 8"]["acceptance_length"] > routes["lookup 8"]["acceptance_length"] > 1
    assert all(route["identical_share"] == 1 for route in routes.values())
    for way, route in again[-1]["routes"].items():
        assert route["acceptance_length"] == routes[way]["acceptance_length"]


def test_texts_of_all_passes_count_for_identity():
    plain = Way(ROUTES["ar"], 1, texts={0: [5], 1: [6], 2: [7], 3: [8]}, num_tokens=[4], seconds=[2.0])
    way = Way(ROUTES["copy"], 8, texts={**plain.texts, 1: [9]}, changed={2}, num_tokens=[4, 2], seconds=[1.0, 1.0])

    found = way.to_json(replace(plain, num_tokens=[4, 2], seconds=[2.0, 3.0]), is_timed=True)

    assert found["identical_share"] == 0.5
    assert (found["tokens_per_second"], found["speedup"], found["speedup_range"]) == (3.0, 2.5, [2.0, 3.0])
    assert way.to_json(plain, is_timed=False)["tokens_per_second"] is None


def test_no_prompt_begins_after_the_end(pair):
    args = Namespace(routes=["copy"], tree_sizes=[4], num_assistant_tokens=None)
    vars(args).update(batch_size=1, prompt_lookup_num_tokens=6)
    ways, _ = make_ways(args, pair)
    found = PromptSet("set", [[5, 6], [7]], 0, ways)

    assert len(list(measure_set(found, 1, 4, 1, end=0.0))) == 1  # One in any case.
    assert found.to_json(is_timed=True)["num_prompts"] == 1


def test_ways_that_cannot_be_compiled_or_come_too_late_are_left_out(pair):
    def no_compiler(graph, inputs):
        raise RuntimeError("there is no C++ compiler here")

    args = Namespace(routes=["ar_plus", "lookup", "lookup_compiled", "tier2"], tree_sizes=[4], num_assistant_tokens=4)
    vars(args).update(batch_size=1, prompt_lookup_num_tokens=6, max_new_tokens=4, end=float("inf"))
    vars(args).update(tau_only=False, repeats=1)
    ways, not_served = make_ways(args, pair)
    for way in ways:
        compile_by(way.runner, no_compiler)
    in_time, late = (PromptSet("set", [[5, 6], [7] * 3], 0, [way.afresh() for way in ways]) for _ in range(2))

    assert len(list(measure_in_turn(args, ways, [in_time], not_served))) == 2

    assert set(not_served) == {"ar_plus", "lookup_compiled 4"}
    assert all("torch.compile failed" in reason for reason in not_served.values())
    assert [way.name for way in in_time.ways] == ["ar", "lookup 4", "tier2"]
    args.end = 0.0
    assert list(measure_in_turn(args, ways, [late], not_served)) == [late]
    assert not_served["lookup 4"] == "no time was left to warm up"


def test_any_route_of_our_loop_has_a_compiled_one():
    assert route_of("lookup_compiled") is ROUTES["lookup_compiled"]
    kept = route_of("lookup_kept_compiled")
    assert (kept.is_compiled, kept.keeps_memory, kept.name) == (True, True, "lookup_kept_compiled")
    for name in ("nothing", "pld_compiled"):
        with pytest.raises(ValueError, match=f"Expected a route among ar, .* got '{name}'"):
            route_of(name)


def test_jobs_find_what_one_process_finds(pair, tmp_path):
    """Parts of a set come from several calls; a memory that is kept has the whole set."""
    for name in ("target", "draft"):
        getattr(pair, name).save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    args = Namespace(target=str(tmp_path / "target"), draft=str(tmp_path / "draft"), dtype="float32")
    vars(args).update(routes=["lookup", "lookup_kept"], tree_sizes=[4])
    vars(args).update(num_assistant_tokens=None, prompt_lookup_num_tokens=6)
    vars(args).update(batch_size=1, max_new_tokens=8, tau_only=True, jobs=1, end=float("inf"))
    ways, _ = make_ways(args, pair)
    encoded = [[5, 6, 7] * 2, [7], [8, 9], [5, 6], [9, 8, 7], [5, 5]]
    apart, alone = (PromptSet("set", encoded, 0, [way.afresh() for way in ways]) for _ in range(2))

    *_, last = measure_in_jobs(args, [apart])

    *_, _ = measure_set(alone, 1, 8, 1)
    assert last is apart
    assert apart.to_json(is_timed=False) == alone.to_json(is_timed=False)
    assert list(apart.to_json(is_timed=False)["routes"]) == ["ar", "lookup 4", "lookup_kept 4"]


def test_plain_generate_always_runs_and_every_combination_is_a_cell(pair):
    cells = run(pair, routes=("tier2",), batch_sizes=(1, 2), num_assistant_tokens=(2, 4), limit=2)

    assert [key_of(cell) for cell in cells] == [("set", 1, 2), ("set", 1, 4), ("set", 2, 2), ("set", 2, 4)]
    assert list(routes_of(cells[0])) == ["ar", "tier2"]
    assert cells[0]["num_prompts"] == 2


def test_repetition_is_that_of_outputs_and_of_references(pair):
    [cell] = run(pair, routes=("ar",), max_new_tokens=8)

    assert cell["repeated_4gram_share_of_references"] == pytest.approx(3 / 5)  # xyxy yxyx xyxy yxyx xyxy
    assert 0 <= cell["repeated_4gram_share"] < 1
    assert "repeated_4gram_share_of_references" not in run(pair, [{"prompt": "abc"}], routes=("ar",))[0]


def test_long_prompts_are_left_out_and_counted(pair):
    [cell] = run(pair, [{"prompt": "a" * 200}, {"prompt": "ab"}], routes=("ar",))

    assert (cell["num_prompts"], cell["num_left_out"]) == (1, 1)
    with pytest.raises(ValueError, match="118 tokens in `set`, got none"):
        run(pair, [{"prompt": "a" * 200}])


def test_context_makes_prompts_longer(pair):
    [cell] = run(pair, routes=("ar",), context=40)

    assert cell["mean_prompt_tokens"] == 40
    with pytest.raises(ValueError, match="at most 118 tokens"):
        run(pair, context=119)


def test_lengthen_keeps_the_start_token_and_the_prompt():
    assert lengthen([1, 8, 9], [[3], [4, 5]], 8, start=1) == [1, 3, 4, 5, 3, 4, 8, 9]
    assert lengthen([8, 9], [[3]], 4, start=1) == [3, 3, 8, 9]
    assert lengthen([8, 9], [[3]], 2, start=1) == [8, 9]
    with pytest.raises(ValueError, match="Expected text"):
        lengthen([8, 9], [[]], 4, start=1)


def test_batches_are_sorted_padded_and_cut_at_the_end_token():
    first, second = make_batches([[5], [6, 7, 8], [9, 9]], 2, 0, "cpu")

    assert first.indices == (1, 2)
    assert first.inputs["input_ids"].tolist() == [[6, 7, 8], [0, 9, 9]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert second.indices == (0,)
    texts = first.new_texts(torch.tensor([[6, 7, 8, 4, 2, 0], [0, 9, 9, 4, 4, 4]]), [2])
    assert texts == {1: [4, 2], 2: [4, 4, 4]}


def test_regrouped_rows_are_alone_once_and_together_once():
    rows = [[5], [6, 7, 8], [9, 9], [4], [3, 3]]

    for size, together in ((1, range(5)), (2, (1, 2, 4, 0)), (8, range(5))):
        found = regroup(rows, make_batches(rows, size, 0, "cpu"), 0)
        assert {index for batch in found for index in batch.indices} == set(together)
        assert {len(batch.indices) for batch in found} == {4 if size == 1 else 1}
        for batch in found:
            for index, ids, mask in zip(batch.indices, *(t.tolist() for t in batch.inputs.values()), strict=True):
                assert ids[-sum(mask) :] == rows[index]
    assert [batch.indices for batch in regroup([[5]], make_batches([[5]], 1, 0, "cpu"), 0)] == [(0, 0, 0, 0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routes": ("tier3",)}, "Expected routes among ar, ar_plus"),
        ({"batch_sizes": (0,)}, "`--batch-sizes` of at least 1, got 0"),
        ({"repeats": 0}, "`--repeats`"),
        ({"limit": 0}, "`--limit`"),
        ({"lookup_num_tokens": 0}, "`--lookup`"),
        ({"num_assistant_tokens": (0,)}, "`num_assistant_tokens` to be an integer of at least 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        run(pair, **settings)


def record(records, name, seconds, first_seconds, **values):
    """One text of 11 tokens."""
    texts = {0: list(range(11))}
    values = {"seconds": seconds, "first_seconds": first_seconds, "texts": texts, "num_steps": 10, **values}
    records[name] = RouteRecord(ROUTES[name], records, **values)
    return records[name]


def test_metrics_follow_their_formulas():
    """Plain steps of 0.1 s; rounds of 0.05 draft, 0.1 verify and 0.01 loop."""
    records = {}
    record(records, "ar", [1.5, 1.5, 3.0], [0.5, 0.5, 2.0])
    rounds = [Counter(prefill=0.3, draft=0.25, verify=0.5, loop=0.05, num_rounds=5)] * 3
    stats = DecodingStats((1, 4), num_drafted=10)
    ours = record(records, "tier2", [1.0, 0.75, 1.0], [0.25] * 3, stats=stats, round_seconds=rounds, copy_seconds=0.07)

    result = ours.to_json()

    assert result["speedup"] == pytest.approx(2.0)  # of 1.5, 2 and 3: repeat by repeat, then the median
    assert result["speedup_range"] == pytest.approx([1.5, 3.0])
    assert result["tokens_per_second"] == pytest.approx(11.0)
    assert result["decode_tokens_per_second"] == pytest.approx(10 / 0.75, rel=1e-5)
    assert result["decode_speedup"] == pytest.approx(4 / 3, rel=1e-5)
    assert result["time_to_first_token"] == pytest.approx(0.25)
    assert result["acceptance_length"] == pytest.approx(1.8)
    assert result["acceptance_rate"] == pytest.approx(0.4)
    assert result["draft_seconds"] == pytest.approx(0.05)
    assert result["draft_share"] + result["verify_share"] + result["loop_share"] == pytest.approx(1)
    assert result["verify_ratio"] == pytest.approx(1.0)
    assert result["ideal_speedup"] == pytest.approx(1.8 / 1.5)
    assert result["ideal_share"] == pytest.approx(2.0 / 1.2, rel=1e-5)
    assert result["seconds_per_round"] == pytest.approx(0.7 / 5)
    assert result["bandwidth_share"] == pytest.approx(0.5)
    assert result["baseline"] == "ar"


def test_compiled_rounds_are_compared_with_compiled_steps():
    records = {}
    record(records, "ar", [2.0], [1.0])
    record(records, "ar_plus", [1.0], [0.5], warm_up_seconds=9.0)
    rounds = [Counter(draft=0.25, verify=0.25, num_rounds=5)]
    ours = record(records, "tier2_compiled", [0.5], [0.25], stats=DecodingStats((0, 5)), round_seconds=rounds)

    result = ours.to_json()

    assert (result["baseline"], result["speedup"], result["speedup_over_ar_plus"]) == ("ar_plus", 4, 2)
    assert result["speedup_over_ar_plus_range"] == [2, 2]
    assert result["ideal_speedup"] == pytest.approx(2 / (1 + 0.05 / 0.05))
    assert result["ideal_share"] == pytest.approx(2.0)
    plain = records["ar_plus"].to_json()
    assert plain["compile_seconds"] == pytest.approx(8.0)
    assert plain["plain_step_seconds"] == pytest.approx(0.05)
    del records["ar_plus"]
    assert ours.to_json()["baseline"] == "ar"


def test_texts_of_one_token_have_no_steps_and_no_rounds(pair):
    [cell] = run(pair, routes=("tier2",), max_new_tokens=1)

    assert routes_of(cell)["tier2"]["acceptance_length"] == 1
    assert "plain_step_seconds" not in routes_of(cell)["ar"]
    assert "ideal_speedup" not in routes_of(cell)["tier2"]


def test_weights_are_counted_once_and_embeddings_not():
    tied, untied = (make_model("llama", tie_word_embeddings=tie) for tie in (True, False))

    assert weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    assert weight_bytes(untied) == 4 * (sum(p.numel() for p in untied.parameters()) - 100 * 32)
    assert weight_bytes(untied) == weight_bytes(tied)


def test_cache_bytes_grow_with_the_text_up_to_the_window():
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 in float32
    assert cache_bytes(make_model("llama"), 100.5) == 2 * per_token * 100.5
    assert cache_bytes(make_model("mistral"), 100) == 2 * per_token * 9
    assert copy_bandwidth(torch.device("cpu")) > 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_memory_gauge_forgets_what_came_before():
    # A process of its own: what earlier tests leave is freed at any time, and its parent's peak is large.
    script = """
import torch
from pard_hf.evaluation.benchmark import MemoryGauge
gauge = MemoryGauge(torch.device("cpu"))
before = gauge.read()
torch.ones(2**28, dtype=torch.uint8)
peak = gauge.read()
gauge.start()
print(before, peak, gauge.read(), gauge.kind, sep=";")
"""
    parent = torch.ones(2**30, dtype=torch.uint8)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, peak, after, kind = answer.stdout.strip().split(";")

    assert parent.nbytes > int(peak)
    assert int(peak) - int(before) > 2**27
    assert int(after) < int(peak) - 2**27
    assert kind == "VmHWM of the process, during the route"


def test_prompt_sets_come_by_name_and_file(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "answer": "<<1+1=2>>2"}\n\n{"prompt": "b"}\n')

    name, rows = load_prompts(str(file))

    assert name == "mine"
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert len(load_prompts("demo")[1]) == 6
    for source in ("nothing", str(tmp_path / "absent.jsonl")):
        with pytest.raises(ValueError, match="one of demo, or a Hub data set"):
            load_prompts(source)
    file.write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        load_prompts(str(file))


def test_prompt_sets_come_from_the_datasets_library(tmp_path):
    """A folder stands for the Hub, which `datasets` reads alike."""
    pytest.importorskip("datasets")
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')

    name, rows = load_prompts(f"hub:{folder}:test:question")

    assert name == "questions:test"
    assert rows[1] == {"question": "c", "answer": "d", "prompt": "c"}
    with pytest.raises(ValueError, match="text field 'prompt'.*'answer', 'question'"):
        load_prompts(f"hub:{folder}")


def test_seed_chooses_prompts_and_answers_are_cut(bundled_like_tokenizer):
    rows = [{"prompt": str(number)} for number in range(50)]

    assert choose_rows(rows, 5, seed=1) == choose_rows(rows, 5, seed=1) != choose_rows(rows, 5, seed=2)
    assert choose_rows(rows, 80, seed=1) == list(range(50))
    assert len(encode_answer(bundled_like_tokenizer, {"prompt": "x", "solution": "abc<<1>>def"}, 5)) == 5
    assert encode_answer(bundled_like_tokenizer, {"prompt": "x"}, 5) is None


def test_commands_are_shown_without_folders(tmp_path):
    (tmp_path / "model").mkdir()
    words = ["bench", "--target", str(tmp_path / "model"), "--draft", "org/draft", "--prompts", "a/b.jsonl"]
    words += ["--prompts", f"c/d.jsonl,hub:{tmp_path}/model:test,hub:org/set", "--output=x/y.json", "--limit", "3"]

    shown = shown_command(words)

    assert shown == (
        "pard bench --target model --draft org/draft --prompts b.jsonl --prompts d.jsonl,hub:model:test,hub:org/set "
        "--output=y.json --limit 3"
    )
    assert shown_model(None) == "bundled"


def test_interrupted_run_keeps_its_cells_and_continues(pair, tmp_path):
    output, partial = tmp_path / "result.json", tmp_path / "result.partial.json"

    def measure(rows=ROWS, resume=False, seed=0, show=lambda cell: None):
        settings = BenchmarkSettings(("tier2",), num_assistant_tokens=(2, 4), repeats=1, max_new_tokens=4)
        return run_benchmark(Benchmark(pair, settings), {"set": rows}, {"seed": seed}, output, resume, show)

    def stop(cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(show=stop)

    kept = json.loads(partial.read_text())
    assert [key_of(cell) for cell in kept["cells"]] == [("set", 1, 2)]
    with pytest.raises(ValueError, match="Pass `--resume`"):
        measure()
    with pytest.raises(ValueError, match="seed 1, got 0"):
        measure(resume=True, seed=1)
    with pytest.raises(ValueError, match="Expected the prompts of `set`"):
        measure(ROWS[:1], resume=True)
    shown = []
    result = measure(resume=True, show=shown.append)
    assert [key_of(cell) for cell in result["cells"]] == [("set", 1, 2), ("set", 1, 4)]
    assert result["cells"] == [*kept["cells"], *shown]
    assert json.loads(output.read_text()) == result
    assert not partial.exists()


def compiling_runner(pair, backend):
    """A runner whose compiled routes go through another backend than inductor, which takes half a minute."""
    return compile_by(RouteRunner(pair, 4), backend)


def compile_by(runner, backend):
    arguments = runner.arguments

    def with_backend(route):
        found = arguments(route)
        if route.is_compiled:
            if route.loop == "own":  # Layer by layer, which is sooner done than whole models.
                found["compile_config"] = CompileConfig()
            found["compile_config"].backend, found["compile_config"].mode = backend, "default"
        return found

    runner.arguments = with_backend
    return runner


def measure(runner, prompts, *names):
    measurement = Measurement(runner, prompts, 1, 10)
    measurement.run([ROUTES[name] for name in names], repeats=1)
    return measurement


def test_compiled_routes_give_the_same_texts(pair):
    runner = compiling_runner(pair, "aot_eager")

    names = ["ar", "ar_plus", "tier2", "tier2_compiled", "lookup_compiled", "every_source_compiled"]
    records = measure(runner, [[5, 6, 7, 5, 6], [5, 6, 7]], *names).records

    assert list(records) == names
    assert not any(record.differing for record in records.values())
    assert records["tier2_compiled"].compile_seconds > 0
    assert records["tier2"].compile_seconds == 0
    assert hasattr(runner.plain, "_compiled_call")  # transformers has compiled.
    assert records["ar_plus"].warm_up_seconds > records["ar_plus"].seconds[0]


def test_a_compiler_that_fails_leaves_the_route_out(pair):
    def no_compiler(graph, inputs):
        raise RuntimeError("there is no C++ compiler here")

    runner = compiling_runner(pair, no_compiler)

    measurement = measure(runner, [[5, 6, 7]], "ar", "ar_plus", "tier2_compiled", "tier2")

    assert list(measurement.records) == ["ar", "tier2"]
    assert set(measurement.not_served) == {"ar_plus", "tier2_compiled"}
    assert "torch.compile failed" in measurement.not_served["ar_plus"]
    assert not measurement.records["tier2"].differing


def test_the_stock_loop_verifies_compiled_where_transformers_can(pair):
    """Versions before 5.24 take no static cache there, and the reason is their own message."""
    runner = compiling_runner(pair, "eager")

    measurement = measure(runner, [[5, 6, 7, 5, 6], [5, 6]], "ar", "tier1", "tier1_compiled")

    if "tier1_compiled" in measurement.not_served:
        assert f"transformers {transformers.__version__} refuses: " in measurement.not_served["tier1_compiled"]
        assert not getattr(StaticLayer, "is_croppable", False)
        return
    tier1, compiled = measurement.records["tier1"], measurement.records["tier1_compiled"]
    assert not compiled.differing
    assert compiled.stats == tier1.stats
    assert hasattr(runner.plain, "_compiled_call")


def test_routes_that_transformers_refuses_have_its_message(bundled_like_tokenizer):
    """Static caches cannot be cropped after a full window."""
    target = make_model("mistral")
    pair = Pair(with_pard(target), make_self_draft(target), bundled_like_tokenizer)
    runner = compiling_runner(pair, "eager")

    measurement = measure(runner, [[5, 6, 7] * 8], "ar", "tier1_compiled", "tier2")

    assert list(measurement.records) == ["ar", "tier2"]
    assert "refuses: " in measurement.not_served["tier1_compiled"]


def test_a_gap_is_what_the_plain_model_prefers_its_token_by(pair):
    prompt, [cell] = [5, 6, 7], run(pair, routes=("ar",))
    ids = torch.tensor([prompt])
    plain = pair.target.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    other = [*plain[:4], (plain[4] + 1) % 97, 5]
    with torch.no_grad():
        logits = pair.target(torch.tensor([[*prompt, *plain[:4]]])).logits[0, -1]

    assert first_difference(plain, other) == 4
    assert logit_gap(pair.target, prompt, plain, other) == pytest.approx(
        float(logits[plain[4]] - logits[other[4]]), abs=1e-5
    )
    assert logit_gap(pair.target, prompt, plain, plain[:3]) is None
    assert "regrouped" not in cell  # In float32 texts must be equal.
    assert not any("logit_gaps" in route for route in cell["routes"])


@pytest.mark.parametrize(("batch_size", "other"), [(1, 4), (2, 1)])
def test_16_bit_shows_plain_generate_against_itself(pair, batch_size, other):
    """A target whose texts differ in a batch and alone, whatever drafts."""
    forward = pair.target.forward

    def in_batches_otherwise(*args, **kwargs):
        output = forward(*args, **kwargs)
        if len(output.logits) > 1:
            output.logits = output.logits.roll(1, dims=-1)
        return output

    pair.target.to(torch.bfloat16).forward = in_batches_otherwise
    pair.draft.to(torch.bfloat16)

    [cell] = run(pair, routes=("ar",), batch_sizes=(batch_size,))

    assert cell["regrouped"]["batch_size"] == other
    assert cell["regrouped"]["identical_share"] == 0
    assert len(cell["regrouped"]["logit_gaps"]) == (3 if other == 4 else 2)  # The third prompt is a batch of its own.
    assert min(cell["regrouped"]["logit_gaps"]) > 0


@pytest.fixture
def folders(tmp_path, bundled_like_tokenizer):
    def save(target):
        make_draft(make_model("llama"), 4).save_pretrained(tmp_path / "draft")
        target.save_pretrained(tmp_path / "target")
        for name in ("target", "draft"):
            bundled_like_tokenizer.save_pretrained(tmp_path / name)
        prompts = tmp_path / "few.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        pair = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float32"]
        return ["bench", *pair, "--prompts", str(prompts), "--repeats", "1", "--max-new-tokens", "6"]

    return save


def test_other_texts_than_plain_ones_end_with_3(folders, capsys):
    command = folders(make_forgetful())

    command += ["--json"]
    assert main([*command, "--routes", "tier2"]) == 3

    captured = capsys.readouterr()
    tier2 = json.loads(captured.out.splitlines()[-1])["cells"][0]["routes"][1]
    assert tier2["identical_share"] < 1
    assert {"prompts", "prompt_index", "position", "expected", "got", "logit_gap"} == set(tier2["difference"])
    assert len(tier2["logit_gaps"]) == round(3 * (1 - tier2["identical_share"]))
    where = "prompt {prompt_index}, new token {position}".format(**tier2["difference"])
    assert f"set few, {where}" in captured.err
    assert f"its logit {tier2['difference']['logit_gap']:.2g} below the best" in captured.err

    assert main([*command, "--routes", "tier2", "--dtype", "bfloat16"]) == 0  # told, and left to the reader

    captured = capsys.readouterr()
    cell = json.loads(captured.out.splitlines()[-1])["cells"][0]
    assert cell["routes"][1]["identical_share"] < 1
    assert max(cell["routes"][1]["logit_gaps"]) > 0
    assert f"gap {max(cell['routes'][1]['logit_gaps']):.2g}" in captured.err
    assert set(cell["regrouped"]) == {"batch_size", "identical_share", "logit_gaps"}
    assert "plain generate against itself: one row against a batch of 4: identical" in captured.err


def test_command_continues_where_it_was_interrupted(folders, tmp_path, capsys):
    command = [*folders(make_model("llama")), "--routes", "tier2", "--output", str(tmp_path / "out"), "--json"]
    assert main([*command, "--num-assistant-tokens", "2"]) == 0
    result, file = json.loads(capsys.readouterr().out), tmp_path / "out" / "bench.json"
    assert json.loads(file.read_text()) == result
    partial = file.rename(file.with_name("bench.partial.json"))  # As if stopped after its first cell.

    assert main([*command, "--num-assistant-tokens", "2,4"]) == 2
    assert "Pass `--resume`" in capsys.readouterr().err
    assert main([*command, "--num-assistant-tokens", "2,4", "--resume", "--seed", "5"]) == 2
    assert "seed 5, got 0" in capsys.readouterr().err
    assert main([*command, "--num-assistant-tokens", "2,4", "--resume"]) == 0

    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert resumed["cells"][0] == result["cells"][0]
    assert [cell["num_assistant_tokens"] for cell in resumed["cells"]] == [2, 4]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nothing"], "one of demo"),
        (["--routes", "tier9"], "Expected routes among"),
        (["--resume"], "`--output` with `--resume`"),
        (["--prompts", "demo,demo"], "`demo` twice"),
        (["--context", "4000"], "Lower `--context`"),
    ],
)
def test_bad_input_is_a_sentence(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2

    assert message in capsys.readouterr().err


def test_bundled_pair_from_the_command_line(tmp_path, capsys):
    """The whole way, as a person would start it."""
    command = ["bench", "--limit", "1", "--max-new-tokens", "8", "--repeats", "1", "--dtype", "float32"]
    command += ["--routes", "ad,pld", "--routes", "tier1", "--routes", "tier2", "--output", str(tmp_path / "out.json")]

    assert main(command) == 0

    captured = capsys.readouterr()
    result = json.loads((tmp_path / "out.json").read_text())
    assert not re.search(r"[{}]", captured.out)  # The table alone; the JSON is in the file.
    assert [route["route"] for route in result["cells"][0]["routes"]] == ["ar", "ad", "pld", "tier1", "tier2"]
    assert all(route["identical_share"] == 1 for route in result["cells"][0]["routes"])
    assert result["cells"][0]["routes"][-1]["verify_ratio"] > 0
    assert result["command"].startswith("pard bench --limit 1")
    assert result["command"].endswith("--output out.json")
    assert str(tmp_path) not in captured.out
    assert "PARD tier 2" in captured.out
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
