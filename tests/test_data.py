"""JSONL rows to token ids and loss masks; bad rows are named."""

import gzip
import json

import pytest
import torch
from families import TEMPLATE

from pard_hf.training.data import encode_row, read_rows, tokenize_rows


def decode(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def learned(tokenizer, example):
    kept = [i for i, keep in zip(example["input_ids"], example["loss_mask"], strict=True) if keep]
    return decode(tokenizer, kept)


def test_text_is_learned_whole_with_its_end(tokenizer):
    example = encode_row(tokenizer, {"text": "abc"})

    assert learned(tokenizer, example) == "abc</s>"


def test_responses_are_learned_and_prompts_are_not(tokenizer):
    example = encode_row(tokenizer, {"prompt": "ab", "response": "cd"})

    assert decode(tokenizer, example["input_ids"]) == "abcd</s>"
    assert learned(tokenizer, example) == "cd</s>"


def test_every_assistant_turn_is_learned_in_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")]

    example = encode_row(tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]})

    assert learned(tokenizer, example) == "cd</s>gh</s>"
    assert decode(tokenizer, example["input_ids"]).replace("<pad>", "") == "[u]ab[a]cd</s>[u]ef[a]gh</s>"


def test_the_targets_own_tokens_are_taken_as_they_are(tokenizer):
    """An answer that was cut short teaches no end."""
    example = encode_row(tokenizer, {"prompt": "ab", "response": "cd", "response_ids": [9, 8]})

    assert example["input_ids"][-2:] == [9, 8]
    assert example["loss_mask"][-2:] == [1, 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "no JSON"),
        ('{"text": "x", "response_ids": ["a"]}', "response_ids"),
        ("[1]", "a JSON list"),
        ('{"prompt": "x"}', r"it has \['prompt'\]"),
        ('{"messages": [1]}', "no list of objects"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_broken_line_is_named(tmp_path, line, problem, suffix):
    path = tmp_path / f"rows{suffix}"
    text = json.dumps({"text": "fine"}) + "\n\n" + line + "\n" + json.dumps({"text": "good"}) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())

    with pytest.raises(ValueError, match=f"line 3.*{problem}"):
        list(read_rows(path))
    assert [row["text"] for row in read_rows(path, skip_bad_rows=True)] == ["fine", "good"]


def test_broken_encodings_are_named(tmp_path):
    """A byte that is no UTF-8 names its line; a byte-order mark is none of the text; a torn gzip file is named."""
    path, torn = tmp_path / "rows.jsonl", tmp_path / "torn.jsonl.gz"
    path.write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n{"text": "\xff"}\n')
    torn.write_bytes(gzip.compress(b'{"text": "abc"}\n' * 500)[:-20])

    with pytest.raises(ValueError, match="line 2.*no UTF-8"):
        list(read_rows(path))
    assert [row["text"] for row in read_rows(path, skip_bad_rows=True)] == ["abc"]
    with pytest.raises(ValueError, match="torn.jsonl.gz"):
        list(read_rows(torn))


def test_short_row_is_named_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "rows{}.jsonl"
    path.write_text('{"text": "abc"}\n\n{"text": ""}\n')

    with pytest.raises(ValueError, match="line 3 of .*rows{}.jsonl"):
        list(tokenize_rows(tokenizer, read_rows(path), max_length=6))


def test_messages_without_a_template_are_refused(tokenizer, tmp_path):
    """Nothing would tell who says what: such rows were trained on as one text."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "ab", "response": "cd"}\n' + json.dumps(CHAT) + "\n")

    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl`.*no chat template.*--chat-template.*`prompt`"):
        list(tokenize_rows(tokenizer, read_rows(path), 64))
    assert len(list(tokenize_rows(tokenizer, read_rows(path), 64, skip_bad_rows=True))) == 1
    tokenizer.chat_template = TEMPLATE
    assert len(list(tokenize_rows(tokenizer, read_rows(path), 64))) == 2


def test_short_row_is_named(tokenizer):
    rows = [{"text": "abc"}, {"text": ""}, {"prompt": "abcdef", "response": "g"}]

    with pytest.raises(ValueError, match="row 2, but it has 1 tokens.*--max-length 6"):
        list(tokenize_rows(tokenizer, rows, max_length=6))
    assert len(list(tokenize_rows(tokenizer, rows, max_length=6, skip_bad_rows=True))) == 1
    with pytest.raises(ValueError, match="row 1, but it has .'prompt'"):
        list(tokenize_rows(tokenizer, [{"prompt": "no response"}], max_length=6))


def test_processes_encode_as_one_does(tokenizer, caplog):
    """The same rows in the same order, the same problems by name; the process's random state stays."""
    rows = [{"text": chr(97 + n % 26) * (n % 9)} for n in range(300)]
    before = torch.random.get_rng_state()

    alone, shared = (list(tokenize_rows(tokenizer, rows, 7, True, num_workers=count)) for count in (0, 2))

    assert alone == shared
    assert [row["source"] for row in shared[:2]] == ["row 2", "row 3"]
    assert torch.equal(before, torch.random.get_rng_state())
    half = len(caplog.messages) // 2
    assert caplog.messages[:half] == caplog.messages[half:]
    assert "row 1 skipped" in caplog.text
    with pytest.raises(ValueError, match="row 9, but it has 1 tokens"):
        list(tokenize_rows(tokenizer, rows[1:], 7, num_workers=2))


@pytest.mark.parametrize("end", ["</s>{% endgeneration %}", "{% endgeneration %}</s>"])
def test_marked_templates_need_no_prefix(tokenizer, end):
    """A template whose text up to an answer is another one without the answer: its marks say where answers are."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        + end
        + "{% else %}"
        "[{{ loop.length }}]{{ m['content'] }}{% endif %}{% endfor %}"
    )
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")]

    example = encode_row(tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]})

    assert decode(tokenizer, example["input_ids"]) == "[4]abcd</s>[4]efgh</s>"
    assert learned(tokenizer, example) == "cd</s>gh</s>"


TURNS = (("user", "hi"), ("assistant", "ab"), ("user", "yo"), ("assistant", "cd"))
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def set_template(tokenizer, answer, prompt="[a]", given="[{{ m['role'][0] }}]{{ m['content'] }}"):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + answer + "{% else %}" + given + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


def test_a_turn_ends_as_the_template_ends_it(tokenizer):
    """The end token of many a base model is not what its chat template writes after an answer."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<E>"]})
    set_template(tokenizer, "[a]{{ m['content'] }}<E>!")

    assert learned(tokenizer, encode_row(tokenizer, CHAT)) == "ab<E>cd<E>"


def test_what_the_template_adds_to_an_answer_is_learned(tokenizer):
    """An empty block of thinking, or the header where no generation prompt writes it."""
    set_template(tokenizer, "[a](){{ m['content'] }}</s>")
    assert learned(tokenizer, encode_row(tokenizer, CHAT)) == "()ab</s>()cd</s>"

    set_template(tokenizer, "[a]{{ m['content'] }}</s>", prompt="")
    assert learned(tokenizer, encode_row(tokenizer, CHAT)) == "[a]ab</s>[a]cd</s>"


def test_later_turns_are_asked_as_the_template_asks_them(tokenizer):
    """It drops the thinking of an earlier answer, or trims it: then so does the text that is trained on."""
    words = "{{ m['content'] if loop.last else m['content'].split(')')[-1] }}"
    set_template(tokenizer, "[a]" + words + "</s>")
    chat = {"messages": [dict(m) for m in CHAT["messages"]], "response_ids": [[], []]}
    chat["messages"][1]["content"] = "(x)ab"
    chat["response_ids"] = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in ("(x)ab", "cd")
    ]

    example = encode_row(tokenizer, chat)

    assert decode(tokenizer, example["input_ids"]) == "[u]hi[a]ab</s>[u]yo[a]cd</s>"
    assert learned(tokenizer, example) == "cd</s>"


def test_questions_stay_where_the_template_ends_them_too(tokenizer):
    set_template(tokenizer, "[a]{{ m['content'] }}", given="[u]{{ m['content'] }}</s>")
    chat = {**CHAT, "response_ids": [[9, 8], [7, 6]]}

    assert "[u]yo</s>" in decode(tokenizer, encode_row(tokenizer, chat)["input_ids"])


@pytest.mark.parametrize("mark", ["{%- generation -%}", "{%generation%}"])
def test_marks_may_be_written_as_transformers_allows(tokenizer, mark):
    set_template(tokenizer, "[a]" + mark + "{{ m['content'] }}</s>{% endgeneration %}")

    assert learned(tokenizer, encode_row(tokenizer, CHAT)) == "ab</s>cd</s>"


def test_fields_that_say_nothing_do_not_count(tokenizer):
    """Columns of a data set that are null in some rows."""
    row = {"prompt": "ab", "response": "cd", "messages": None}
    assert learned(tokenizer, encode_row(tokenizer, row)) == "cd</s>"
    assert learned(tokenizer, encode_row(tokenizer, {"text": "ab", "prompt": "x"})) == "ab</s>"


def test_templates_that_fail_name_the_row(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")

    with pytest.raises(ValueError, match="rows.jsonl`, but the chat template fails: no system turns"):
        list(tokenize_rows(tokenizer, read_rows(path), 64))
    assert list(tokenize_rows(tokenizer, read_rows(path), 64, skip_bad_rows=True)) == []


@pytest.mark.parametrize("line", [{"text": "ab<M>"}, {"prompt": "a", "response": "b", "response_ids": [5, 100]}])
def test_rows_must_not_contain_the_mask_token(tokenizer, tmp_path, line):
    """A special token that no chat contains may still stand in somebody's text."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<M>"]})
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n' + json.dumps(line) + "\n" + json.dumps({"text": "a" * 9 + "<M>"}) + "\n")

    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl`, but it has the mask token 100 .'<M>'.*--mask-tok"):
        list(tokenize_rows(tokenizer, read_rows(path), 8, mask_token_id=100))
    # What is cut off does no harm.
    assert len(list(tokenize_rows(tokenizer, read_rows(path), 8, skip_bad_rows=True, mask_token_id=100))) == 2
    assert len(list(tokenize_rows(tokenizer, read_rows(path), 8))) == 3
