"""A recipe as a person runs it, on a tiny model: all stages from text to card, each done once."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT
from families import character_tokenizer, make_model
from huggingface_hub import ModelCard

from pard_hf.draft.packaged import load_packaged

TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
FILES = ("code_functions", "code_instruct", "math_gsm8k", "code_files", "code_leetcode", "stories")


def words(seed, number):
    """Text without a full stop, whose id is that of the recipe's mask token."""
    return "".join(random.Random(seed).choices("abcdefgh", k=number))


def write_rows(file, rows):
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def command(tmp_path):
    make_model("llama", tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(tmp_path / "target")
    character_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "target")
    for name in FILES:
        write_rows(
            tmp_path / f"{name}.jsonl.gz", [{"prompt": words(i, 20), "response": words(-i, 40)} for i in range(9)]
        )
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": words(0, 50)}]
    write_rows(tmp_path / "answers.jsonl.gz", [{"messages": messages}] * 9)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abcabc"}\n' * 2)
    words_of = {
        "target": tmp_path / "target", "data": tmp_path, "answers": tmp_path / "answers.jsonl.gz",
        "work": tmp_path / "work", "prompts": tmp_path / "prompts.jsonl", "minutes": 0.02, "batch-size": 2,
        "max-new-tokens": 8, "split-files": 0.01,
    }  # fmt: skip
    flags = [word for name, value in words_of.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "recipes" / "smollm2.py"), *flags, "--probes", "0@1e-3", "0,1@1e-3"]


def times(work):
    return {str(path.relative_to(work)): path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_smollm2s_draft_goes_on_where_it_was_interrupted(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    work = tmp_path / "work"
    subprocess.run(command, check=True, cwd=tmp_path)
    before = times(work)
    whole = (work / "packaged" / "packaged.safetensors").read_bytes()
    pieces = sorted(path for path in (work / "packaged").iterdir() if path.suffix[1:].isdigit())

    assert b"".join(piece.read_bytes() for piece in pieces) == whole
    assert load_packaged(work / "packaged", make_model("llama", tie_word_embeddings=True)).mask_token_id == 16
    measured = json.loads((work / "evaluation.json").read_text())["sets"]["prompts"]["acceptance"]
    assert measured["num_prompts"] == 2
    card = ModelCard.load(work / "draft" / "README.md")
    assert card.data.license == "apache-2.0"
    assert f"| `prompts` | 2 | 8 | {measured['acceptance_length']:.2f} |" in card.text

    (work / "draft" / "log.json").unlink()
    (work / "evaluation.json").unlink()
    subprocess.run(command, check=True, cwd=tmp_path)

    renewed = {name for name, time in times(work).items() if time != before[name]}
    assert {Path(name).parts[0] for name in renewed} == {"draft", "packaged", "evaluation.json"}
