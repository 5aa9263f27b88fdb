"""`pard generate` on files of prompts: in batches, printed in order."""

import json
import os
import pty
import subprocess
import sys

import pytest
from documents import ROOT
from families import make_draft, make_model

from pard_hf.cli import main

PROMPTS = ["hello", "a", "some longer text", "bb"]


@pytest.fixture
def command(tmp_path, bundled_like_tokenizer):
    make_model("llama", max_position_embeddings=256).save_pretrained(tmp_path / "target")
    make_draft(make_model("llama", max_position_embeddings=256), 4).save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        bundled_like_tokenizer.save_pretrained(tmp_path / name)
    pair = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float32"]
    return ["generate", *pair, "--max-new-tokens", "12"]


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(file)


def test_prompts_of_a_file_are_answered_in_order(command, prompts_file, capsys):
    one_by_one = []
    for prompt in PROMPTS:
        main([*command, prompt, "--json"])
        one_by_one.append(json.loads(capsys.readouterr().out)["text"])

    assert main([*command, "--file", prompts_file, "--json", "--batch-size", "3"]) == 0

    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["prompt"] for result in results] == PROMPTS
    assert [result["text"] for result in results] == one_by_one
    assert [result["num_new_tokens"] for result in results] == [12] * 4
    assert captured.err.startswith("48 tokens")


def test_several_files_are_several_prompts(command, prompts_file, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("two\nlines")

    assert main([*command, "--file", prompts_file, "--file", str(tmp_path / "more.txt")]) == 0

    out = capsys.readouterr().out
    assert "[1/5] hello\n\n" in out
    assert "[5/5] two\nlines\n\n" in out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('{"prompt": "a"}\n{"promt": "b"}\n', [], "line 2"),
        ("\n", [], "at least one prompt"),
        ('{"prompt": " "}\n', [], "only white space"),
        ('{"prompt": "a"}\n', ["--batch-size", "0"], "'--batch-size': "),
        ('{"prompt": "a"}\n', ["and another"], "got both"),
    ],
)
def test_bad_files_are_a_sentence(command, tmp_path, capsys, text, arguments, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)

    assert main([*command, *arguments, "--file", str(file)]) == 2

    assert message in capsys.readouterr().err


def on_a_terminal(words):
    """What a command writes to a terminal as its standard error, and to a pipe as its output."""
    reading, writing = pty.openpty()
    program = "import sys; from pard_hf.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writing, env=environment, text=True) as process:
        os.close(writing)
        shown = b""
        while chunk := read_terminal(reading):
            shown += chunk
        out = process.stdout.read()
    os.close(reading)
    assert process.returncode == 0, shown.decode()
    return out, shown.decode()


def read_terminal(reading):
    try:
        return os.read(reading, 1 << 16)
    except OSError:  # Linux reports the end of a terminal so.
        return b""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
@pytest.mark.parametrize("name", ["generate", "data"])
def test_a_terminal_shows_progress_with_rate_and_remaining_time(command, prompts_file, tmp_path, name):
    words = [*command, "--batch-size", "2", "--device", "cpu"]
    if name == "generate":
        words += ["--file", prompts_file, "--json"]
    else:
        words = ["data", *words[1:], "--prompts", prompts_file, "--output", str(tmp_path / "out.jsonl")]

    out, shown = on_a_terminal(words)

    assert "4/4" in shown
    assert "tokens/s" in shown
    assert "100%" in shown
    assert "0:00:00" in shown
    assert "\033" not in out
