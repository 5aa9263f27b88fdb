"""Prompts in, the target's own answers out: nothing twice, nothing lost, and a draft changes none of them."""

import json

import pytest
import torch
from families import make_draft, make_model

from pard_hf.training.answers import write_answers
from pard_hf.training.data import read_rows

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'][0] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def tokenizer(bundled_like_tokenizer):
    return bundled_like_tokenizer


@pytest.fixture
def target():
    return make_model("llama")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def prompts(*texts):
    return [{"prompt": text} for text in texts]


def rows_of(path):
    return list(read_rows(path))


def manifest_of(path):
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())


def alone(target, tokenizer, ids, **kwargs):
    output = target.generate(torch.tensor([ids]), **kwargs)
    return output[0, len(ids) :].tolist()


def test_answers_end_at_any_end_token(target, tokenizer, out):
    """Padding after a row's end is nobody's answer."""
    target.generation_config.eos_token_id = list(range(3, 60))

    write_answers(target, tokenizer, prompts("ab", "cdef", "g"), out, max_new_tokens=9)

    for row in rows_of(out):
        assert 0 not in row["response_ids"]
        assert not any(3 <= token < 60 for token in row["response_ids"][:-1])


def test_answers_go_on_where_they_stopped(target, tokenizer, out):
    """Nothing twice, nothing lost, and each answer is the target's own."""
    asked = prompts("ab", "cdef", "ab", "g")

    first = write_answers(target, tokenizer, asked[:1], out, max_new_tokens=5)
    second = write_answers(target, tokenizer, asked, out, batch_size=2, max_new_tokens=5)

    assert (first.new_rows, second.new_rows, second.rows, second.duplicates) == (1, 2, 3, 1)
    rows = {row["prompt"]: row for row in rows_of(out)}
    assert len(out.read_text().splitlines()) == len(rows) == 3
    for prompt, row in rows.items():
        ids = tokenizer(prompt)["input_ids"]
        assert row["response_ids"] == alone(target, tokenizer, ids, max_new_tokens=5, do_sample=False)


def test_a_draft_changes_no_greedy_answer(target, tokenizer, tmp_path):
    asked = prompts("ab", "cdef", "g", "hello there")
    draft = make_draft(make_model("llama", seed=5), 4)

    write_answers(target, tokenizer, asked, tmp_path / "plain.jsonl", max_new_tokens=20)
    write_answers(target, tokenizer, asked, tmp_path / "drafted.jsonl", draft, batch_size=3, max_new_tokens=20)

    by_id = [{row["id"]: row for row in rows_of(tmp_path / f"{name}.jsonl")} for name in ("plain", "drafted")]
    assert by_id[0] == by_id[1]
    [run] = manifest_of(tmp_path / "drafted.jsonl")["runs"]
    assert run["acceptance_length"] >= 1


def test_samples_differ_and_are_the_same_again(target, tokenizer, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.jsonl"
        write_answers(
            target, tokenizer, prompts("ab", "cd"), out, num_samples=3, temperature=1.0, seed=seed, max_new_tokens=9
        )
        assert {(row["prompt"], row["sample"]) for row in rows_of(out)} == {
            (p, n) for p in ("ab", "cd") for n in range(3)
        }
        texts.append(out.read_text())

    assert texts[0] == texts[1] != texts[2]
    assert len({row["response"] for row in rows_of(tmp_path / "a.jsonl")}) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 2}, "`num_samples` of 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "`top_p` above 0"),
        ({"top_p": 0.5}, "greedy answers do not sample"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(target, tokenizer, out, settings, message):
    with pytest.raises(ValueError, match=message):
        write_answers(target, tokenizer, prompts("ab"), out, **settings)
    assert not out.exists()


def test_torn_last_line_is_mended(target, tokenizer, out):
    """A process killed in the middle of a write leaves half a row: the row is written again, the others stay."""
    asked = prompts("ab", "cdef", "g")
    write_answers(target, tokenizer, asked, out, max_new_tokens=5)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])

    counts = write_answers(target, tokenizer, asked, out, max_new_tokens=5)

    assert counts.new_rows == 1
    assert out.read_bytes() == whole


def test_other_settings_are_refused_and_restart_moves_aside(target, tokenizer, out):
    write_answers(target, tokenizer, prompts("ab"), out, max_new_tokens=5)
    before = out.read_bytes()

    with pytest.raises(ValueError, match="`max_new_tokens` was 5 and is 6.*--restart"):
        write_answers(target, tokenizer, prompts("ab"), out, max_new_tokens=6)
    with pytest.raises(ValueError, match="`weights_sha256`"):
        write_answers(make_model("llama", seed=3), tokenizer, prompts("ab"), out, max_new_tokens=5)
    assert out.read_bytes() == before
    write_answers(target, tokenizer, prompts("ab"), out, max_new_tokens=6, restart=True)

    assert (out.parent / "answers.1.jsonl").read_bytes() == before
    assert manifest_of(out.parent / "answers.1.jsonl")["settings"]["max_new_tokens"] == 5
    assert manifest_of(out)["settings"]["max_new_tokens"] == 6


def test_rows_without_a_manifest_are_left_alone(target, tokenizer, out):
    out.write_text('{"prompt": "a", "response": "b"}\n')

    with pytest.raises(ValueError, match="answers.jsonl.manifest.json.*--restart"):
        write_answers(target, tokenizer, prompts("ab"), out)
