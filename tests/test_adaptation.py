"""The adaptation benchmark, small: what it writes is what its runs measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import add_head, make_model

from pard_hf import PardDraftModel

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


@pytest.mark.slow
def test_heads_are_measured_as_chains_and_trees(tmp_path, words):
    result = run(tmp_path, "correction-head", *words, "--data", tmp_path / "rows.jsonl", "--timed-steps", "1")

    runs = {found["run"]: found["points"][-1]["acceptance_length"] for found in result["runs"]}
    assert set(runs) == {"frozen", "joint", "no head"}
    chain, head, tree, both = (f"target{way}_rows" for way in (" chain", " head", " tree 64", " head, tree 64"))
    # The draft stays as it is under a frozen head, and without a head there is nothing to leave off.
    first = [found["points"][0]["acceptance_length"] for found in result["runs"]]
    assert first[0][chain] == runs["frozen"][chain]
    assert runs["no head"][chain] == runs["no head"][head]
    assert runs["no head"][tree] == runs["no head"][both] >= runs["no head"][chain]


@pytest.mark.slow
def test_trees_are_measured_over_whole_sets(tmp_path, words, bundled_like_tokenizer):
    draft = PardDraftModel.from_causal_lm(make_model("llama", seed=1, vocab_size=104), 101, 5)
    add_head(draft, 0.5).save_pretrained(tmp_path / "draft")
    bundled_like_tokenizer.save_pretrained(tmp_path / "draft")
    flags = [
        *("--target", tmp_path / "target", "--draft", tmp_path / "draft", "--prompts", tmp_path / "rows.jsonl"),
        *("--tree-sizes", "4", "16", "--max-new-tokens", "12", "--output", tmp_path / "trees.json"),
    ]
    command = [sys.executable, SCRIPT.parent / "trees.py", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    [found] = json.loads((tmp_path / "trees.json").read_text())["sets"].values()
    assert list(found["ways"]) == ["chain", "chain + head", "tree 4", "tree 4 + head", "tree 16", "tree 16 + head"]
    assert {way["identical_share"] for way in found["ways"].values()} == {1.0}
    assert found["ratios_over_chain"]["chain"] == 1.0
    assert found["acceptance_lengths"]["tree 16"] >= found["acceptance_lengths"]["tree 4"]
    assert 0 <= found["repeated_4gram_share_of_references"] <= 1
