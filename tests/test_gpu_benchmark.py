"""What `make gpu` runs on a GPU runs on a CPU too: every check and measurement, on a pair of two layers."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
from documents import ROOT

from benchmarks.gpu import CHECKS, EAGER, OF_MANY, OF_ONE, Case, Run

SETTINGS = ["--device", "cpu", "--shapes", "tiny", "--backend", "eager", "--batch-sizes", "1", "2"]
SETTINGS += ["--max-new-tokens", "24", "--tree-size", "16", "--repeats", "1"]
MEASURED = ["first_token_seconds", "full_speed_seconds", "tokens_per_second", "milliseconds_a_round"]
MEASURED += ["bound_milliseconds", "bandwidth_share", "kernels_a_round", "spent_seconds"]


def run(output, *words):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *SETTINGS, *words, "--output", output]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_case_is_measured_and_exact(tmp_path):
    done = run(tmp_path / "gpu.json", "--seconds", "600")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

    result = json.loads((tmp_path / "gpu.json").read_text())
    entries = result["exactness"] + result["cases"]
    assert len(entries) == len(CHECKS) + len(OF_ONE) + len(OF_MANY)
    assert {entry["identical_share"] for entry in entries} == {1.0}
    assert result["command"].startswith("python benchmarks/gpu.py --device cpu")
    assert result["copy_bandwidth"] > 0
    for entry in result["cases"]:
        assert all(entry[name] > 0 for name in MEASURED)
        if entry["name"] not in ("ar", "tier1"):
            assert entry["speedup_over_ar_plus" if entry["name"] != "ar_plus" else "speedup_over_ar"] > 0
        if entry["name"].startswith(("tier2", "tree")):
            assert entry["acceptance_length"] > 1
            assert entry["step_bytes"].keys() == entry["step_bandwidth_shares"].keys() == {"draft", "verify"}
            assert (entry["compile_seconds"] > 0) == (entry["way"] != EAGER)
            assert entry["full_speed_seconds"] > entry["compile_seconds"] / 2


def test_what_there_is_no_time_for_is_listed(tmp_path):
    done = run(tmp_path / "gpu.json", "--seconds", "0")
    assert done.returncode == 0, done.stderr[-2000:]

    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {entry["skipped"] for entry in result["exactness"] + result["cases"]} == {"no time left"}
    assert json.loads(done.stdout.splitlines()[-1]) == {"exact": True, "skipped": len(CHECKS + OF_ONE + OF_MANY)}


@pytest.mark.parametrize("is_exact", [True, False])
def test_result_is_kept_case_by_case_and_failures_count(tmp_path, is_exact):
    run, seen = Run(Namespace(output=tmp_path / "gpu.json", seconds=60.0), {}), []
    run.result["cases"] = []

    def call(case):
        if (tmp_path / "gpu.json").exists():
            seen.append(json.loads((tmp_path / "gpu.json").read_text())["cases"][-1])
        if case.batch_size == 2:
            raise RuntimeError("no such kernel\nand more")
        return {"identical_share": 0.5 if case.batch_size == 3 else 1.0}

    for sizes, is_right in (((1, 4), True), ((3, 4), not is_exact), ((2, 4), False)):
        run.is_right = True
        run.go_through([Case("tier2", EAGER, size) for size in sizes], call, run.result["cases"], is_exact)
        assert run.is_right == is_right
    assert [entry["batch_size"] for entry in seen] == [1, 4, 3, 4, 2]
    assert seen[-1]["failed"] == "RuntimeError: no such kernel"
