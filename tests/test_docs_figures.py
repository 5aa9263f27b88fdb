"""Figures of README and docs: every quoted row is made again from its JSON, every drawing from its script."""

import importlib.util
import json
import re
from dataclasses import fields

import pytest
import torch
from documents import DOCUMENTS, RESULTS, ROOT, prose_of

from pard_hf.generation.sources import Tables
from pard_hf.hub.model_card import PUBLISHED
from pard_hf.training.settings import TrainingSettings

DOCS = ROOT / "docs"
SETS = ("heldout_code_functions", "gsm8k_test")
SOURCE_SETS = ("humaneval", "gsm8k_test", "mt_bench", "copy: heldout_code_functions")
# Decimals that are no measurements: versions, papers, sizes. Defaults of flags are asked of the parser.
NAMES = re.compile(
    r"Qwen\d\.5(-\d\.\d)?|Llama \d\.\d|transformers 5\.\d+|0\.16 to 0\.33|vLLM 0\.16\.0|Version 0\.16"
    r"|arXiv \d{4}\.\d{5}|\d\.\d+ B\b|\]\([^)]*\)"
)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cells(name):
    """The cells of a result of `pard bench`, by set and batch size, as routes by name."""
    return {
        (cell["prompts"], cell["batch_size"]): {route["route"]: route for route in cell["routes"]}
        for cell in result(name)["cells"]
    }


def row(*entries):
    return "| " + " | ".join(entry if isinstance(entry, str) else f"{entry:.2f}" for entry in entries) + " |"


def rows_of_positions():
    for name, found in result("bundled_pair")["sets"].items():
        acceptance = found["acceptance"]
        yield row(f"`{name}`", *acceptance["position_acceptance"], acceptance["acceptance_length"])


def rows_of_verify_ratios():
    ways = (
        ("bundled, our loop", "bundled_routes", "tier2"),
        ("bundled, our loop, compiled", "bundled_routes", "tier2_compiled"),
        ("bundled, enlarged to 1.2 B and 0.15 B", "scaled_pair", "tier2"),
    )
    for title, file, way in ways:
        for name in SETS:
            routes = cells(file)[name, 1]
            found, compiled = routes[way], routes.get("ar_plus")
            figures = (found[key] for key in ("acceptance_length", "verify_ratio", "ideal_speedup", "speedup"))
            yield row(title, f"`{name}`", *figures, found["speedup"] / compiled["speedup"] if compiled else "")


def rows_of_schedules():
    for name in SETS:
        routes = cells("bundled_routes")[name, 1]
        order = ("ar_plus", "tier2", "adaptive", "tier2_compiled", "adaptive_compiled")
        yield row(f"`{name}`", *(routes[route]["speedup"] for route in order))


def rows_of_routes():
    """The bundled pair, one text at a time."""
    for name in SETS:
        routes = cells("bundled_routes")[name, 1]
        ours = [route for key, route in routes.items() if key.startswith(("tier", "adaptive"))]
        assert {route["identical_share"] for route in ours} == {1.0}
        order = ("ar_plus", "pld", "ad", "tier1", "tier2", "tier2_compiled")
        speedups = (routes[route]["speedup"] for route in order)
        length, plain = routes["tier2"]["acceptance_length"], f"{routes['ar']['tokens_per_second']:.0f}"
        yield row(f"`{name}`", length, plain, *speedups, "100%")


def rows_of_batches():
    """The bundled pair in batches."""
    for name in SETS:
        found = [cells("bundled_batches")[name, size]["adaptive"] for size in (1, 2, 4, 8, 16)]
        yield row(f"`{name}`", *(e for r in found for e in (f"{r['tokens_per_second']:.0f}", r["speedup"])))


def rows_of_headline():
    """The README's table."""
    for name in SOURCE_SETS:
        routes = result("sources_smollm2_timed")["sets"][name]["routes"]
        ways = ("ar_plus", "ad", "pld", "lookup_compiled 8", "tree_head_compiled 8")
        yield row(f"`{name}`", *(routes[way]["speedup"] for way in ways))


def test_the_headline_was_measured_as_described():
    found, text = result("sources_smollm2_timed"), " ".join(text_of("README.md").split())
    numbers = {(part["num_prompts"], part["num_passes"]) for part in found["sets"].values()}

    assert (found["device"], found["dtype"], numbers) == ("CPU, 2 threads, AVX2", "float32", {(found["limit"], 2)})
    assert (
        f"{found['limit']} prompts a set, at most {found['max_new_tokens']} new tokens, median of two passes" in text
    )


def test_the_gpu_of_the_readme_is_as_measured():
    """In the first set compiled plain `generate` compiled once more."""
    sets = [result("sources_h100")["sets"][name] for name in SOURCE_SETS]
    ways = ("ar", "ar_plus", "tree_head_compiled 32")
    plain, compiled, ours = ([part["routes"][way]["tokens_per_second"] for part in sets] for way in ways)
    over = [
        part["routes"]["tree_head_compiled 32"]["speedup"] / part["routes"]["ar_plus"]["speedup"] for part in sets[1:]
    ]
    same = [round(sum(part["num_prompts"] * part["routes"][way]["identical_share"] for part in sets)) for way in ways]
    total = sum(part["num_prompts"] for part in sets)

    text = " ".join(text_of("README.md").split())
    assert f"gave {min(ours):.0f} to {max(ours):.0f} tokens a second, eager plain {min(plain):.0f} to" in text
    assert (
        f"to {max(plain):.0f} and compiled plain at most {max(compiled):.0f}: {min(over):.2f} to {max(over):.2f}"
        in text
    )
    assert (
        f"of eager plain's {total} texts the draft's rounds give {same[2]}, compiled plain gives {same[1]} (" in text
    )


def rows_of_trees():
    for name in SETS:
        lengths = result("trees")["sets"][name]["acceptance_lengths"]
        for way, title in (("", "draft alone"), (" + head", "with the head")):
            ways = ["chain" + way, *(f"tree {size}{way}" for size in (8, 16, 32, 64))]
            yield row(f"`{name}`", title, *(lengths[key] for key in ways))


def rows_of_heads():
    for run in result("adaptation_correction_head")["runs"]:
        lengths = run["points"][-1]["acceptance_length"]
        ways = (" chain", " head", " tree 64", " head, tree 64")
        yield row(run["run"], *(lengths[f"bundled{way}_{name}"] for name in SETS for way in ways))


def rows_of_tree_routes():
    for name in SETS:
        for size in (8, 64):
            routes = cells(f"trees/bundled_tree_{size}")[name, 1]
            order = ("tier2", "head", "tree", "tree_head", "adaptive")
            yield row(f"`{name}`", f"{size}", *(routes[route]["speedup"] for route in order))


def rows_of_compiled_trees():
    for name in SETS:
        routes = cells("trees/bundled_tree_8")[name, 1]
        yield row(f"`{name}`", *(routes[route]["speedup"] for route in ("tier2_compiled", "tree_head_compiled")))


def rows_of_tree_batches():
    for name in SETS:
        for route, title in (("tier2", "chain of 8"), ("adaptive", "adaptive, up to 64 nodes")):
            speedups = (cells("trees/bundled_tree_batches")[name, size][route]["speedup"] for size in (1, 2, 4, 8, 16))
            yield row(f"`{name}`", title, *speedups)


def rows_of_lookup():
    for name, found in result("sources_smollm2")["sets"].items():
        routes = [found["routes"][route] for route in ("pld", "lookup 16", "lookup_kept 16")]
        assert {route["identical_share"] for route in routes} == {1.0}
        figures = (route[key] for key in ("acceptance_length", "speedup") for route in routes)
        yield row(f"`{name}`", found["repeated_4gram_share"], *figures)


def rows_of_timed_sources():
    ways = dict(by_way("sources_smollm2_timed"))
    assert {route["identical_share"] for routes in ways.values() for route in routes} == {1.0}
    for way in sorted(set(ways) - {"ar"}):
        yield row(f"`{way}`", *(route["speedup"] for route in ways[way]))


def rows_of_sources():
    """The bundled pair: chains, and trees by their number of nodes."""
    for name, found in result("sources_bundled")["sets"].items():
        routes = found["routes"]
        assert {route["identical_share"] for route in routes.values()} == {1.0}
        for way in dict.fromkeys(key.split()[0] for key in routes if key != "ar"):
            keys = (way, *(f"{way} {size}" for size in (8, 16, 32, 64)))
            yield row(
                f"`{name}`", f"`{way}`", *(routes[key]["acceptance_length"] if key in routes else "" for key in keys)
            )


def by_way(*names):
    """Every way of results of `sources.py` that was measured on all sets, with what it gave on each."""
    found = [result(name)["sets"] for name in names]
    routes = [{way: route for sets in found for way, route in sets[key]["routes"].items()} for key in SOURCE_SETS]
    ways = [way for way in routes[0] if all(way in others for others in routes)]
    for way in sorted(ways, key=lambda way: (way.split()[0], *map(int, way.split()[1:]))):
        yield way, [others[way] for others in routes]


def rows_of_lengths_by_source():
    found = result("sources_smollm2_tau")["sets"]
    yield row("repeated 4-grams", *(found[name]["repeated_4gram_share"] for name in SOURCE_SETS))
    for way, routes in by_way("sources_smollm2_tau"):
        assert {route["identical_share"] for route in routes} == {1.0}
        if way != "ar":
            yield row(f"`{way}`", *(route["acceptance_length"] for route in routes))


def rows_of_cold_lengths():
    for way, routes in by_way("sources_smollm2_cold", "sources_smollm2_each"):
        assert {route["identical_share"] for route in routes} == {1.0}
        if way != "ar":
            yield row(f"`{way}`", *(route["acceptance_length"] for route in routes))


def rows_of_more_prompts():
    for name, found in result("sources_smollm2_more")["sets"].items():
        routes = [found["routes"][way] for way in ("head", "every_source 32")]
        assert {route["identical_share"] for route in routes} == {1.0}
        lengths = (route["acceptance_length"] for route in routes)
        yield row(f"`{name}`", str(found["num_prompts"]), found["repeated_4gram_share"], *lengths)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_every_source_exceeds_the_draft_alone(size):
    found = dict(by_way(*(f"sources_smollm2_{name}" for name in ("cold", "each", "tau"))))
    for alone, together in zip(found[f"tree_head {size}"], found[f"every_source {size}"], strict=True):
        assert together["acceptance_length"] > alone["acceptance_length"]


def rows_of_copied_shares():
    for way, routes in by_way("sources_smollm2_tau"):
        if way.startswith("lookup"):
            yield row(f"`{way}`", *(f"{100 * route['accepted_shares']['copy']:.0f}%" for route in routes))


def rows_of_h100():
    """Plain `generate` in tokens a second, all others over it; and the texts that are its own."""
    found = [result("sources_h100")["sets"][name] for name in SOURCE_SETS]
    numbers = [part["num_prompts"] for part in found]
    ways = dict(by_way("sources_h100"))
    yield row("`ar`, tokens a second", *(f"{route['tokens_per_second']:.0f}" for route in ways.pop("ar")), "")
    for way, routes in ways.items():
        same = sum(number * route["identical_share"] for number, route in zip(numbers, routes, strict=True))
        yield row(f"`{way}`", *(route["speedup"] for route in routes), f"{same:.0f} of {sum(numbers)}")


def rows_of_engines():
    for file in sorted(RESULTS.glob("engines_*.json")):
        for name, found in result(file.stem)["sets"].items():
            shares = (found["same_as_vllm_without_draft"], found["same_as_ours"])
            counts = (found["num_prompts"], found["vllm"]["num_rounds"], found["ours"]["num_rounds"])
            number, theirs, own = (str(count) for count in counts)
            percent = (f"{100 * share:.0f}%" for share in shares)
            yield row(file.stem.split("_")[1], f"`{name}`", number, *percent, theirs, own)


def rows_of_training_rows():
    starts = {(found["num_rows"], found["way"]): found for found in result("training_rows")["starts"]}
    for num_rows in sorted({key[0] for key in starts}):
        ways = [starts[num_rows, way] for way in ("one process", "all cores", "second start")]
        seconds = (f"{way['seconds']:.2f}" if way["seconds"] < 1 else f"{way['seconds']:.0f}" for way in ways)
        memory = (f"{way['memory_bytes'] / 1e6:.0f}" for way in ways[:2])
        yield row(f"{num_rows:,}", f"{ways[0]['num_tokens'] / 1e6:.0f}", *seconds, *memory)


def rows_of_objectives():
    lengths = {run["run"]: run["points"][-1]["acceptance_length"] for run in result("adaptation_objectives")["runs"]}
    runs = (*(f"{objective}, seed 0" for objective in ("ce", "kd", "cat", "tv", "lk")), "ce, seed 1")
    for name in SETS:
        yield row(f"`{name}`", *(lengths[run][f"bundled_{name}"] for run in runs))


def rows_published():
    targets = (("Llama 3.1 8B", "A100"), ("Llama 3.3 70B", "H20"), ("Qwen3 8B", "A100"))
    figures = [figure for part in PUBLISHED.values() for figure in part if "V1 engine" in figure["engine"]]
    for target in targets:
        speedups = {f["prompts"]: f["speedup"] for f in figures if (f["target"], f["hardware"]) == target}
        yield row(*target, *(speedups[prompts] for prompts in ("HumanEval", "GSM8K", "MT-Bench")))


TABLES = {
    rows_of_headline: "README.md",
    rows_of_routes: "benchmarks/README.md",
    rows_of_batches: "benchmarks/README.md",
    rows_of_positions: "docs/choosing-k.md",
    rows_of_verify_ratios: "docs/choosing-k.md",
    rows_of_schedules: "docs/choosing-k.md",
    rows_of_trees: "docs/trees.md",
    rows_of_heads: "docs/trees.md",
    rows_of_tree_routes: "docs/trees.md",
    rows_of_compiled_trees: "docs/trees.md",
    rows_of_tree_batches: "docs/trees.md",
    rows_of_lookup: "docs/sources.md",
    rows_of_timed_sources: "docs/sources.md",
    rows_of_sources: "docs/sources.md",
    rows_of_lengths_by_source: "docs/sources.md",
    rows_of_cold_lengths: "docs/sources.md",
    rows_of_more_prompts: "docs/sources.md",
    rows_of_copied_shares: "docs/sources.md",
    rows_of_h100: "docs/sources.md",
    rows_of_engines: "docs/serving.md",
    rows_of_training_rows: "benchmarks/README.md",
    rows_of_objectives: "benchmarks/README.md",
    rows_published: "docs/limits.md",
}


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: rows.__name__)
def test_rows_are_those_of_the_results(rows):
    lines = text_of(TABLES[rows]).splitlines()
    expected = list(rows())

    first = lines.index(expected[0]) if expected[0] in lines else len(lines)
    assert lines[first : first + len(expected)] == expected
    assert lines[first - 1].startswith("|---"), "a table holds these rows and no others"
    assert not lines[first + len(expected)].startswith("|")


def decimals_in(value):
    """Every number in a JSON value, as a document would round it."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from decimals_in(part)
    elif isinstance(value, float):
        yield from (f"{value:.{digits}f}" for digits in (1, 2, 3))


def defaults_of_training():
    return {str(setting.default) for setting in fields(TrainingSettings) if isinstance(setting.default, float)}


@pytest.mark.parametrize("document", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_decimals_come_from_files_that_are_linked(document):
    text = " ".join(prose_of(document.read_text(encoding="utf-8")).split())
    linked = re.findall(r"results/([\w/]+)\.json", text)
    known = {figure for name in linked for figure in decimals_in(result(name))}
    known |= {figure["speedup"] for figures in PUBLISHED.values() for figure in figures}
    known |= defaults_of_training()

    for number in re.findall(r"\d+\.\d+", NAMES.sub("", re.sub(r"`[^`]*`", "", text))):
        assert number in known, number


def test_compilation_in_between_is_as_quoted():
    seconds = cells("bundled_routes")[SETS[0], 1]["adaptive_compiled"]["seconds"]
    longest, shortest = max(seconds), min(seconds)

    text = " ".join(text_of("docs/choosing-k.md").split())
    assert f"took {longest:.1f} seconds instead of {shortest:.1f}" in text


def test_long_context_is_as_quoted():
    found = result("long_context")

    assert found["lengths"] == [512, 8192]
    text = " ".join(text_of("docs/limits.md").split())
    assert f"after 8,192 tokens took {found['round_ratio']:.2f} times as long as one after 512" in text
    assert f"{found['round_ratio_without_attention']:.2f} times without attention" in text


def test_first_calls_are_as_quoted():
    found, text = result("first_call"), " ".join(text_of("docs/usage.md").split())
    layers, whole = (found["ways"][way] for way in ("layers", "whole"))
    seconds = {n: (layers[n]["compile_seconds"], whole[n]["compile_seconds"]) for n in ("first", "further")}
    first, further = (seconds[name] for name in ("first", "further"))
    assert f"took {first[0]:.1f} seconds to compile layer by layer and {first[1]:.1f} as whole models" in text
    assert f"the next size of caches {further[0]:.1f} and {further[1]:.1f}" in text
    steady = result("streamed_rounds")["steady"]
    assert f"layer by layer then took {steady['layers_over_whole']:.2f} times as long as those of whole models" in text
    assert f"eager ones {steady['eager_over_layers']:.2f} times as long" in text
    assert steady["identical"]


def test_rounds_of_hybrids_are_as_quoted():
    found, text = result("hybrids")["families"], " ".join(text_of("docs/limits.md").split())
    titles = {"lfm2": "LFM2", "qwen3_next": "Qwen3-Next", "bamba": "Bamba", "mamba2": "Mamba-2"}
    for family, title in titles.items():
        assert f"{found[family]['round_over_dense']:.1f} ({title})" in text
    compiled = [f"{found[family]['compiled_over_dense']:.1f}" for family in titles]
    assert f"a compiled one {', '.join(compiled[:3])} and {compiled[3]}" in text
    times = [part["milliseconds"] for part in found.values()]
    gains = sorted(ways["hybrid_rounds"] / ways["hybrid_compiled"] for ways in times)
    assert f"Eager rounds of a hybrid took {gains[0]:.1f} to {gains[-1]:.1f} times as long" in text
    steps = sorted(part["step_over_dense"] for part in found.values())
    assert f"a plain step took {steps[0]:.1f} to {steps[-1]:.1f} times as long" in text
    for name in ("state_bytes", "kept_bytes"):
        sizes = sorted(part[name] for part in found.values())
        assert f"{sizes[0]:,} to {sizes[-1]:,}" in text
    assert all(part["compile_failure"] == {"hybrid": None, "dense": None} for part in found.values())
    assert all(part["is_identical"] == {"hybrid": True, "dense": True} for part in found.values())


def test_batches_of_others_are_as_published():
    speedups = {f["prompts"]: f["speedup"] for f in PUBLISHED["amd/PARD-Llama-3.2-1B"] if "V0" in f["engine"]}

    assert (speedups["HumanEval"], speedups["HumanEval, batch 16"]) == ("3.63", "1.33")
    assert "3.63 at batch 1 and 1.33 at batch 16" in " ".join(text_of("docs/choosing-k.md").split())


def test_figures_of_the_remeasured_result_are_not_quoted():
    """`bundled_batches.json` is linked from the docs, and stands in one table only, that of the benchmarks."""
    section = text_of("docs/choosing-k.md").split("## Batches")[1]

    assert "bundled_batches.json" in section
    assert set(re.findall(r"\d+\.\d+", NAMES.sub("", section))) == {"3.63", "1.33"}


def test_sources_were_measured_as_described():
    text = " ".join(text_of("docs/sources.md").split())

    alone, timed = result("sources_smollm2_tau"), result("sources_h100")
    for key in ("dtype", "limit", "max_new_tokens", "prompt_lookup_num_tokens"):
        assert result("sources_smollm2_cold")[key] == result("sources_smollm2_each")[key] == alone[key]
    assert (alone["dtype"], timed["dtype"]) == ("float32", "bfloat16")
    assert f"{alone['limit']} prompts a set in chat form, at most {alone['max_new_tokens']} new tokens" in text
    length, number = timed["longest_prompt"], timed["max_new_tokens"]
    assert f"bfloat16 on one {timed['device']}, prompts of at most {length} tokens, at most {number} new ones" in text
    assert {part["num_prompts"] for part in timed["sets"].values()} == {4, 5, 6}
    assert "4 to 6 prompts a set" in text
    assert {part["num_passes"] for part in timed["sets"].values()} == {1}


def test_bytes_of_a_memory_are_as_quoted():
    rows = re.findall(r"^\| ([\d,]+) \(.*\) \| ([\d,]+) \|$", text_of("docs/sources.md"), flags=re.MULTILINE)
    sizes = {int(v.replace(",", "")): int(size.replace(",", "")) for v, size in rows}

    assert sizes.keys() == {49_152, 151_936}
    for vocab_size, size in sizes.items():
        tables = Tables.empty(vocab_size, torch.device("cpu"))
        assert size == sum(tensor.nbytes for tensor in vars(tables).values())
        assert f"64 bytes a token, and {size - 64 * vocab_size:,} bytes" in text_of("docs/sources.md")


def identical_shares(value):
    if isinstance(value, dict):
        yield from ([value["identical_share"]] if "identical_share" in value else ())
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from identical_shares(part)


def test_every_committed_result_is_identical_in_float32():
    """What limits.md says of them."""
    names = (path.relative_to(RESULTS).with_suffix("").as_posix() for path in RESULTS.rglob("*.json"))
    names = [name for name in names if result(name).get("dtype", "float32") == "float32"]
    found = {name: set(identical_shares(result(name))) for name in names}

    assert found["bundled_routes"] == {1.0}
    assert all(shares <= {1.0} for shares in found.values())
    assert "every committed result shows it" in " ".join(text_of("docs/limits.md").split())


def labels_and_coordinates(path):
    svg = path.read_text(encoding="utf-8")
    paths = " ".join(re.findall(r' d="([^"]*)"', svg))
    return re.findall(r"<text[^>]*>([^<]*)<", svg), [float(number) for number in re.findall(r"-?\d+\.?\d*", paths)]


def test_drawings_are_what_the_script_draws(tmp_path):
    """Labels and lines, not bytes, which differ between versions of matplotlib."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    script.draw_all(tmp_path)

    for name in script.FIGURES:
        (labels, lines), (drawn_labels, drawn_lines) = (
            labels_and_coordinates(folder / f"{name}.svg") for folder in (DOCS / "figures", tmp_path)
        )
        assert labels == drawn_labels, f"{name}: run `python docs/figures.py`"
        assert lines == pytest.approx(drawn_lines, abs=0.5), f"{name}: run `python docs/figures.py`"


def test_drawings_hold_text_and_no_pictures():
    """Text can be read and searched; a raster would hide figures from both."""
    for path in (DOCS / "figures").iterdir():
        content = path.read_text(encoding="utf-8")
        assert "<text" in content, path.name
        assert "<image" not in content, path.name


def test_every_drawing_is_shown():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    shown = set(re.findall(r"!\[[^]]+\]\((?:docs/)?figures/(\w+\.svg)\)", text))

    # `benchmarks/README.md` shows `speedup.svg`.
    assert shown | {"speedup.svg"} == {path.name for path in (DOCS / "figures").iterdir()}
