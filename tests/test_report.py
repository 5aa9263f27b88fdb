"""What a person sees of a result: tables, figures, sentences."""

import io

import pytest
from rich.console import Console

from pard_hf.evaluation.benchmark import differences
from pard_hf.evaluation.metrics import BenchmarkResult, CellResult, Difference, Regrouped, RouteResult, for_json
from pard_hf.evaluation.plots import write_plots
from pard_hf.evaluation.report import difference_sentence, progress_bar, show_cell


def make_route(name, speedup=1.0, **values):
    return RouteResult(
        route=name,
        tokens_per_second=100.0 * speedup,
        tokens_per_second_range=[90.0 * speedup, 110.0 * speedup],
        time_to_first_token=0.05,
        speedup=speedup,
        speedup_range=[0.9 * speedup, 1.1 * speedup],
        num_new_tokens=40,
        identical_share=1.0,
        seconds=[0.4 / speedup],
        **values,
    )


def make_cell(prompts="code", batch_size=1, num_assistant_tokens=4):
    tier2 = make_route(
        "tier2",
        2.5,
        speedup_over_ar_plus=1.7,
        speedup_over_ar_plus_range=[1.6, 1.8],
        acceptance_length=3.25,
        acceptance_rate=0.5625,
        position_acceptance=[0.9, 0.6],
        draft_seconds=0.001,
        verify_seconds=0.0035,
        loop_seconds=0.0005,
        draft_share=0.2,
        verify_share=0.7,
        loop_share=0.1,
        baseline="ar",
        verify_ratio=1.75,
        ideal_speedup=2.75,
        ideal_share=0.91,
    )
    return CellResult(
        prompts=prompts,
        prompts_digest="0",
        num_prompts=3,
        num_left_out=2,
        batch_size=batch_size,
        num_assistant_tokens=num_assistant_tokens,
        mean_prompt_tokens=20.0,
        mean_new_tokens=13.0,
        repeated_4gram_share=0.125,
        repeated_4gram_share_of_references=0.25,
        bytes_per_round=19_000_000,
        copy_bandwidth=18.1e9,
        peak_memory_kind="none",
        routes=[make_route("ar", plain_step_seconds=0.002), make_route("ad", 0.8, position_acceptance=[0.9]), tier2],
        not_served={"pld": "the stock assisted loop takes one text at a time, not 2"},
    )


def make_result(*cells):
    return BenchmarkResult({"command": "pard bench", "device": "CPU", "dtype": "float32"}, list(cells))


def test_tables_show_what_was_measured_and_what_was_not():
    out = io.StringIO()

    show_cell(Console(file=out, width=160), make_cell())

    lines = out.getvalue().splitlines()
    row = next(line for line in lines if "PARD tier 2" in line)
    assert (
        row.split()
        == "PARD tier 2 250.0 [225.0–275.0] – 50.0 2.50 [2.25–2.75] 1.70 [1.60–1.80] 3.25 0.56 100% – –".split()
    )
    round_row = [line for line in lines if "PARD tier 2" in line][1]
    assert "1.00 (20%)" in round_row
    assert "3.50 (70%)" in round_row
    assert "2.75 × AR" in round_row
    text = out.getvalue()
    assert "repeated 4-grams 12.5% (references 25.0%)" in text
    assert "2 too long, left out" in text
    assert "a step of AR 2.00 ms · 19 MB a round · copies at 18.1 GB/s" in text
    assert "PLD: not served: the stock assisted loop takes one text at a time, not 2" in text


def test_16_bit_texts_stand_beside_plain_generate_against_itself():
    out, cell = io.StringIO(), make_cell(batch_size=2)
    cell.routes[0] = make_route("ar")
    cell.routes.append(make_route("ar_plus", 1.5))
    for route, share, gaps in ((cell.route("tier2"), 0.5, [0.125, 0.0625]), (cell.route("ar_plus"), 0.75, [0.25])):
        route.identical_share, route.logit_gaps = share, gaps
    cell.regrouped = Regrouped(1, 0.5, [0.03125, 0.0625])

    show_cell(Console(file=out, width=240), cell)

    text = out.getvalue()
    assert "50% gap 0.12" in next(line for line in text.splitlines() if "PARD tier 2" in line)
    assert (
        "one row against a batch of 2: identical 50% gap 0.062 · eager against compiled: identical 75% gap 0.25"
        in text
    )


def test_tables_are_not_read_as_markup():
    out = io.StringIO()

    show_cell(Console(file=out, width=160), make_cell(prompts="[red]code"))

    assert "[red]code" in out.getvalue()


def test_progress_bar_takes_shares():
    out = io.StringIO()

    with progress_bar(Console(file=out, width=120, force_terminal=True)) as advance:
        advance(0.25, "code · ar")
        advance(0.5, "code · tier2")

    assert "75%" in out.getvalue()
    assert "code · tier2" in out.getvalue()


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ([{}], ["position_acceptance", "speedup"]),
        ([{}, {"batch_size": 2}], ["batch_size", "position_acceptance", "speedup"]),
        (
            [{}, {"num_assistant_tokens": 8}, {"prompts": "math"}],
            ["num_assistant_tokens", "position_acceptance", "speedup"],
        ),
    ],
)
def test_figures_are_drawn_for_what_was_swept(tmp_path, cells, names):
    pytest.importorskip("matplotlib")

    files = write_plots(make_result(*(make_cell(**cell) for cell in cells)), tmp_path / "out.json")

    assert sorted(file.name for file in files) == [f"out_{name}.svg" for name in names]
    assert all(file.read_text().startswith("<?xml") for file in files)


def test_first_difference_is_a_sentence():
    cell = make_cell()
    cell.route("tier2").difference = Difference("code", 7, 3, " x", " y")
    cell.route("ad").difference = Difference("code", 1, 0, "a", "b")  # Not ours to answer for.

    [(route, difference)] = differences([cell])

    assert difference_sentence(route, difference) == (
        "Expected the tokens of plain `generate` from PARD tier 2, got others: set code, prompt 7, new token 3: "
        "' x' expected, ' y' said."
    )


def test_json_leaves_out_what_nobody_measured():
    values = for_json({"a": None, "b": [1, {"c": None, "d": 0.123456789}], "e": {}})

    assert values == {"b": [1, {"d": 0.123457}], "e": {}}
