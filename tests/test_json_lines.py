"""One reader of JSON Lines for all commands: what one writes the others read, and broken lines are named."""

import gzip
import json

import pytest
from families import make_model

from pard_hf import bundled_pair
from pard_hf.cli import main
from pard_hf.evaluation.prompts import load_prompts, read_prompts
from pard_hf.io import write_whole
from pard_hf.training.data import PROMPTS, read_rows, tokenize_rows
from pard_hf.training.responses import write_answers

# `str.splitlines` cuts a line at each of these; JSON holds the last three as they are.
BREAKS = "a\x0b\x0c\x1c\x1d\x1eb\x85c\u2028d\u2029e"
READERS = {
    "training rows": read_rows,
    "rows of prompts": lambda path: read_rows(path, fields=PROMPTS),
    "prompts": read_prompts,
    "a prompt set": lambda path: load_prompts(str(path))[1],
}
HALF = r'{"prompt": "cut \ud83d", "response": "x"}'


@pytest.fixture(params=READERS, ids=lambda name: name.replace(" ", "-"))
def read(request):
    return READERS[request.param]


def write(path, *lines):
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_ends_at_a_line_feed_only(tmp_path, read, name):
    rows = [{"prompt": BREAKS, "response": BREAKS}, {"prompt": "next", "response": "x"}]
    path = write(tmp_path / name, *(json.dumps(row, ensure_ascii=False) + "\r" for row in rows), "")

    assert list(read(path)) == rows


@pytest.mark.parametrize(
    "line", ["{oops", "[1]", '{"response": "x"}', HALF, HALF.replace("cut ", "").replace("x", "y")]
)
def test_broken_lines_are_named(tmp_path, read, line):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "fine", "response": "x"}', "", line)

    with pytest.raises(ValueError, match="line 3 of .*rows.jsonl`, but "):
        list(read(path))


def test_bytes_that_are_no_text_are_named(tmp_path, read):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "fine", "response": "x"}\n{"prompt": "\xff"}\n')

    with pytest.raises(ValueError, match="line 2 of .*no UTF-8"):
        list(read(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("field", ["prompt", "response", "id", "kept"])
def test_half_a_character_is_refused_wherever_it_stands(tmp_path, field):
    """`"\\ud83d"` is legal JSON and no text: no tokenizer takes it and no file can hold it."""
    row = {"prompt": "fine", "response": "x", field: "cut \ud83d"}
    path = write(tmp_path / "rows.jsonl", '{"prompt": "fine", "response": "x"}', json.dumps(row))

    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl`, but .*half of a character.*--skip-bad-rows"):
        list(read_rows(path))
    assert [row["prompt"] for row in read_rows(path, skip_bad_rows=True)] == ["fine"]


def test_whole_characters_in_escapes_are_fine(tmp_path, read):
    assert list(read(write(tmp_path / "rows.jsonl", r'{"prompt": "\ud83d\ude00", "response": "x"}')))


def test_half_a_character_in_rows_of_ones_own(tokenizer, tmp_path):
    rows = [{"prompt": "cut \ud83d", "response": "x"}, {"prompt": "ab", "response": "x"}]

    with pytest.raises(ValueError, match="row 1, but .*half of a character"):
        list(tokenize_rows(tokenizer, rows, 64))
    assert len(list(tokenize_rows(tokenizer, rows, 64, skip_bad_rows=True))) == 1
    with pytest.raises(ValueError, match="row 1, but .*half of a character"):
        write_answers(make_model("llama"), tokenizer, rows, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_commands_refuse_half_a_character_by_its_place(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "fine", "response": "x"}', HALF)
    out = tmp_path / "out"
    for words in (
        ("data", "--prompts", path, "--output", f"{out}.jsonl"),
        ("train", "--base", bundled_pair().draft, "--data", path, "--output", out),
        ("generate", "--file", path),
        ("bench", "--prompts", path, "--output", out),
    ):
        assert main(list(map(str, words))) == 2
        assert f"line 2 of `{path}`, but it has half of a character" in capsys.readouterr().err, words[0]
    assert main(["generate", "half a \udcff"]) == 2
    assert "but it has half of a character" in capsys.readouterr().err


def test_data_leaves_rows_with_half_a_character_out(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", HALF, '{"prompt": "fine"}')
    out = tmp_path / "out.jsonl"

    words = ["data", "--prompts", path, "--output", out, "--max-new-tokens", 3, "--skip-bad-rows"]
    assert main(list(map(str, words))) == 0
    assert [row["prompt"] for row in read_rows(out)] == ["fine"]
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 1


def test_text_files_that_are_no_text_are_named(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    rows = write(tmp_path / "rows.jsonl", '{"prompt": "fine", "response": "x"}')
    base = ["train", "--base", bundled_pair().draft, "--data", rows, "--output", tmp_path / "out"]

    for words in (["generate", "--file", tmp_path / "latin.txt"], [*base, "--chat-template", tmp_path / "latin.txt"]):
        assert main(list(map(str, words))) == 2
        assert f"Expected UTF-8 text in `{tmp_path / 'latin.txt'}`, got byte 3 of another" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", None)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
