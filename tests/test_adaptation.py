"""The adaptation benchmark, small: what it writes is what its runs measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import make_model

SCRIPT = Path(__file__).parent.parent / "benchmarks/adaptation.py"


@pytest.fixture
def words(tmp_path, bundled_like_tokenizer):
    """Flags with a base, a target, rows and prompts made on the spot."""
    for name, seed in (("base", 1), ("target", 2)):
        make_model("llama", seed=seed, vocab_size=104).save_pretrained(tmp_path / name)
        bundled_like_tokenizer.save_pretrained(tmp_path / name)
    for name in ("rows", "others"):
        rows = [{"prompt": chr(97 + n), "response": "abcdefgh" * 2 + name} for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--base", tmp_path / "base", "--target", tmp_path / "target", "--prompts", tmp_path / "rows.jsonl"),
        *("--steps", "4", "--eval-steps", "2", "--limit", "3", "--batch-size", "2", "--max-length", "64"),
        *("--max-new-tokens", "12", "--num-assistant-tokens", "3", "--output", tmp_path / "result.json"),
    ]


def run(tmp_path, experiment, *flags):
    command = [sys.executable, SCRIPT, experiment, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "result.png").exists()
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
def test_dropping_is_compared_by_steps_and_seconds(tmp_path, words):
    result = run(tmp_path, "cod", *words, "--data", tmp_path / "rows.jsonl", "--timed-steps", "1")

    runs = {found["run"]: found for found in result["runs"]}
    assert [point["step"] for point in runs["paper"]["points"]] == [2, 4]
    assert runs["no dropping"]["points"][-1]["num_rows"] > runs["paper"]["points"][-1]["num_rows"]
    assert runs["no dropping"]["points"][-1]["num_tokens"] == runs["paper"]["points"][-1]["num_tokens"]
    for found in runs.values():
        last = found["points"][-1]
        assert last["seconds"] == pytest.approx(4 * found["step_seconds"][0], abs=0.01)
        assert 1 <= last["acceptance_length"]["target_rows"] <= 4
    own = runs["no dropping"]["seconds_to_reference"]["target_rows"]
    assert 0 <= own["seconds"] <= own["reference"]
    assert result["unadapted"]["target"]["rows"]["num_drafted"] > 0
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.slow
def test_each_file_gives_a_draft(tmp_path, words):
    files = ("--data", tmp_path / "rows.jsonl", tmp_path / "others.jsonl")

    result = run(tmp_path, "targets", *words, *files, "--timed-steps", "0")

    assert [found["run"] for found in result["runs"]] == ["rows", "others"]
    assert "seconds" not in result["runs"][0]["points"][0]
