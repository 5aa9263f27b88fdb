"""Tables, plots and sentences made of a result."""

import io
import json
import re

import pytest
from rich.console import Console

from benchmarks.plots import main, write_plots
from pard_hf.evaluation.benchmark import differences
from pard_hf.evaluation.metrics import for_json
from pard_hf.evaluation.report import difference_sentence, progress_bar, show_cell


def make_route(name, speedup=1.0, **values):
    return {
        "route": name,
        "tokens_per_second": 100.0 * speedup,
        "tokens_per_second_range": [90.0 * speedup, 110.0 * speedup],
        "time_to_first_token": 0.05,
        "speedup": speedup,
        "speedup_range": [0.9 * speedup, 1.1 * speedup],
        "num_new_tokens": 40,
        "identical_share": 1.0,
        "seconds": [0.4 / speedup],
        **values,
    }


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
    return {
        "prompts": prompts,
        "prompts_digest": "0",
        "num_prompts": 3,
        "num_left_out": 2,
        "batch_size": batch_size,
        "num_assistant_tokens": num_assistant_tokens,
        "mean_prompt_tokens": 20.0,
        "mean_new_tokens": 13.0,
        "repeated_4gram_share": 0.125,
        "repeated_4gram_share_of_references": 0.25,
        "bytes_per_round": 19_000_000,
        "copy_bandwidth": 18.1e9,
        "peak_memory_kind": "none",
        "routes": [
            make_route("ar", plain_step_seconds=0.002),
            make_route("ad", 0.8, position_acceptance=[0.9]),
            tier2,
        ],
        "not_served": {"pld": "the stock assisted loop takes one text at a time, not 2"},
    }


def shown(cell, width=160):
    out = io.StringIO()
    show_cell(Console(file=out, width=width), cell)
    return out.getvalue()


def test_tables_show_what_was_measured_and_what_was_not():
    text = shown(make_cell())

    speed, times, rounds = [line for line in text.splitlines() if "PARD tier 2" in line]
    assert speed.split() == "PARD tier 2 2.50 [2.25–2.75] 1.70 100% 250.0 3.25 0.56".split()
    assert times.split() == "PARD tier 2 50.0 – 2.75 × AR 91% – –".split()
    assert "1.00 (20%)" in rounds
    assert "3.50 (70%)" in rounds
    assert "repeated 4-grams 12.5% (references 25.0%)" in text
    assert "2 too long, left out" in text
    assert "a step of AR 2.00 ms · 19 MB a round · copies at 18.1 GB/s" in text
    assert "PLD: not served: the stock assisted loop takes one text at a time, not 2" in text


def test_16_bit_texts_are_shown_with_plain_generate_against_itself():
    cell = make_cell(batch_size=2)
    cell["routes"][2] |= {"identical_share": 0.5, "logit_gaps": [0.125, 0.0625]}
    cell["routes"].append(make_route("ar_plus", 1.5, identical_share=0.75, logit_gaps=[0.25]))
    cell["regrouped"] = {"batch_size": 1, "identical_share": 0.5, "logit_gaps": [0.03125, 0.0625]}

    text = shown(cell, width=240)

    assert "50% gap 0.12" in next(line for line in text.splitlines() if "PARD tier 2" in line)
    assert (
        "one row against a batch of 2: identical 50% gap 0.062 · eager against compiled: identical 75% gap 0.25"
        in text
    )


def test_tables_fit_80_columns_with_speedup_and_identity_first():
    """The longest names and numbers there are."""
    cell = make_cell()
    cell["routes"][2] |= {"identical_share": 0.875, "logit_gaps": [0.0625]}
    wide = {"speedup": 12.345, "speedup_range": [11.234, 13.456], "tokens_per_second": 12345.6, "peak_memory": 2**37}
    wide |= {"draft_seconds": 0.12345, "verify_seconds": 0.12345, "decode_tokens_per_second": 12345.6}
    wide |= {"bandwidth_share": 1.0, "compile_seconds": 1234.5, "baseline": "ar_plus"}
    cell["routes"].append({**cell["routes"][2], "route": "lookup_adaptive_compiled", **wide})

    text = shown(cell, width=80)

    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert re.search(r"route +speedup ÷ AR +÷ AR\+ +identical", text)
    for value in ("12.35 [11.23–13.46]", "88% gap 0.062", "12345.6", "123.45 (20%)", "2.75 × AR+", "131072"):
        assert value in text


def test_tables_are_not_read_as_markup():
    assert "[red]code" in shown(make_cell(prompts="[red]code"))


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
def test_plots_are_drawn_for_what_was_swept(tmp_path, cells, names):
    result = {"command": "pard bench", "device": "CPU", "cells": [make_cell(**cell) for cell in cells]}

    files = write_plots(result, tmp_path / "out.json")

    assert sorted(file.name for file in files) == [f"out_{name}.svg" for name in names]
    assert all(file.read_text().startswith("<?xml") for file in files)


def test_the_script_draws_next_to_the_result(tmp_path):
    (tmp_path / "out.json").write_text(json.dumps({"cells": [make_cell()]}))

    main([str(tmp_path / "out.json")])

    assert (tmp_path / "out_speedup.svg").exists()


def test_first_difference_is_a_sentence():
    cell = make_cell()
    where = {"prompts": "code", "prompt_index": 7, "position": 3, "expected": " x", "got": " y"}
    cell["routes"][2]["difference"] = where
    cell["routes"][1]["difference"] = where  # A rival route without a parallel draft.

    [(route, difference)] = differences([cell])

    assert difference_sentence(route, difference) == (
        "Expected the tokens of plain `generate` from PARD tier 2, got others: set code, prompt 7, new token 3: "
        "' x' expected, ' y' emitted."
    )


def test_json_leaves_out_what_was_not_measured():
    values = for_json({"a": None, "b": [1, {"c": None, "d": 0.123456789}], "e": {}})

    assert values == {"b": [1, {"d": 0.123457}], "e": {}}
