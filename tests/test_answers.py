"""Prompts in, the target's own answers out: nothing twice, nothing lost, and a draft changes none of them."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from families import TEMPLATE, make_draft, make_model
from transformers import AutoTokenizer

import pard_hf
from pard_hf import bundled_pair
from pard_hf.cli import main
from pard_hf.tokens import encode_prompt, next_prompt
from pard_hf.training.data import encode_row, read_rows, tokenize_rows
from pard_hf.training.responses import write_answers


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
    """Padding behind an end token belongs to no answer."""
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


def test_a_target_may_be_offloaded(target, tokenizer, tmp_path):
    write_answers(target, tokenizer, prompts("ab", "cdef"), tmp_path / "whole.jsonl", max_new_tokens=6)
    cpu_offload(target, execution_device=torch.device("cpu"))

    write_answers(target, tokenizer, prompts("ab", "cdef"), tmp_path / "offloaded.jsonl", max_new_tokens=6)

    assert rows_of(tmp_path / "offloaded.jsonl") == rows_of(tmp_path / "whole.jsonl")


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


def test_sampling_goes_on_with_the_same_samples(target, tokenizer, tmp_path):
    """Whole batches were lost: what is left falls into the batches it was in."""
    out, kwargs = tmp_path / "a.jsonl", {"batch_size": 2, "num_samples": 2, "temperature": 1.0, "max_new_tokens": 9}
    write_answers(target, tokenizer, prompts("ab", "c", "def"), out, **kwargs)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))

    write_answers(target, tokenizer, prompts("ab", "c", "def"), out, **kwargs)

    assert out.read_bytes() == whole


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


def stop(*_):
    raise KeyboardInterrupt


def shards_of(out):
    return sorted(out.with_name(out.name + ".shards").glob("*.jsonl"))


def test_the_file_appears_whole(target, tokenizer, tmp_path):
    """Until the last batch is there the batches lie beside it, and the call that is repeated answers the others."""
    out, kwargs = tmp_path / "a.jsonl", {"batch_size": 2, "num_samples": 2, "temperature": 1.0, "max_new_tokens": 9}
    asked = prompts("ab", "c", "def")
    write_answers(target, tokenizer, asked, tmp_path / "whole.jsonl", **kwargs)

    for num_shards in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            write_answers(target, tokenizer, asked, out, report=stop, **kwargs)
        assert not out.exists()
        assert len(shards_of(out)) == num_shards
        assert not manifest_of(out)["is_complete"]
    torn = out.with_name("a.jsonl.shards") / "3.jsonl.1.partial"
    torn.write_text('{"id": "torn')
    counts = write_answers(target, tokenizer, asked, out, **kwargs)

    assert (counts.new_rows, counts.rows) == (2, 6)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("a.jsonl*")) == [
        "a.jsonl", "a.jsonl.counts.json", "a.jsonl.manifest.json"
    ]  # fmt: skip
    assert manifest_of(out)["output"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [run["new_rows"] for run in manifest_of(out)["runs"]] == [2, 2, 2]


def test_restart_moves_an_unfinished_file_aside(target, tokenizer, out):
    with pytest.raises(KeyboardInterrupt):
        write_answers(target, tokenizer, prompts("ab", "c"), out, report=stop, batch_size=1, max_new_tokens=5)
    with pytest.raises(ValueError, match="`max_new_tokens` was 5 and is 6.*--restart"):
        write_answers(target, tokenizer, prompts("ab", "c"), out, max_new_tokens=6)

    write_answers(target, tokenizer, prompts("ab"), out, max_new_tokens=6, restart=True)

    assert len(shards_of(out.with_name("answers.1.jsonl"))) == 1
    assert [row["prompt"] for row in rows_of(out)] == ["ab"]


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


def test_every_turn_is_answered_in_sight_of_the_targets_own_answers(target, tokenizer, out):
    """Answers that a row brings are replaced, a system turn stays, and a training row is what the target saw."""
    tokenizer.chat_template = TEMPLATE
    given = [("system", "s"), ("user", "ab"), ("assistant", "zzz"), ("user", "cd"), ("assistant", "z"), ("user", "e")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in given]},
        {"turns": ["f", "gh"]},
        *prompts("i"),
    ]
    draft = make_draft(make_model("llama", seed=5), 4)

    counts = write_answers(target, tokenizer, rows, out, draft, batch_size=2, max_new_tokens=6)

    assert (counts.rows, counts.answers) == (3, 6)
    written = {len(row.get("messages", [])): row for row in rows_of(out)}
    assert [m["role"] for m in written[7]["messages"]] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in written[7]["messages"]][:2] == ["s", "ab"]
    assert "zzz" not in json.dumps(written[7]["messages"])
    for row in written.values():
        example = encode_row(tokenizer, row)
        answers = row["response_ids"] if "messages" in row else [row["response_ids"]]
        end, learned = 0, example["loss_mask"]
        for answer in answers:
            start = learned.index(1, end)
            end = start + len(answer)
            assert example["input_ids"][start:end] == answer
            assert answer == alone(target, tokenizer, example["input_ids"][:start], max_new_tokens=6, do_sample=False)
        assert sum(learned) == sum(map(len, answers))


def test_an_answers_own_tokens_stay_where_encoding_again_differs():
    """The target spelled a word that the tokenizer writes as one token; what comes after it stays the same."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_pair().target)
    tokenizer.chat_template = TEMPLATE.replace("</s>", tokenizer.eos_token)
    asked = [{"role": "user", "content": "ab"}]
    later = [*asked, {"role": "assistant", "content": "return"}, {"role": "user", "content": "c"}]
    past, end = encode_prompt(tokenizer, asked), tokenizer.eos_token_id
    [word] = tokenizer("return", add_special_tokens=False)["input_ids"]
    spelled = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "return"]
    tail = encode_prompt(tokenizer, later)[len(past) + 1 :]

    assert encode_prompt(tokenizer, later) == [*past, word, *tail]
    assert tail[0] == end
    assert next_prompt(tokenizer, later, past, [*spelled, end]) == [*past, *spelled, *tail]
    assert next_prompt(tokenizer, later, past, spelled) == [
        *past,
        *spelled,
        *tail,
    ]  # Cut short: the template closes it.


@pytest.mark.parametrize(
    ("ids", "problem"),
    [([[1], [2, 3]], None), ([[1]], "of 1 answers, and it has 2"), ([1, 2], "of 1 answers"), ("a", "no list")],
)
def test_training_rows_have_ids_for_each_answer(tmp_path, ids, problem):
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "response_ids": ids}))

    if problem is None:
        assert len(rows_of(path)) == 1
    else:
        with pytest.raises(ValueError, match=problem):
            rows_of(path)


def test_prompts_without_room_are_left_out_and_counted(target, tokenizer, out):
    """128 positions: the long prompt has no room at all, the conversation only for its first turn."""
    tokenizer.chat_template = TEMPLATE
    rows = [*prompts("a" * 120, "b"), {"turns": ["c", "d" * 110, "e"]}]

    counts = write_answers(target, tokenizer, rows, out, max_new_tokens=20)
    again = write_answers(target, tokenizer, rows, out, max_new_tokens=20)

    assert (counts.left_out, counts.shortened, counts.rows) == (1, 1, 2)
    assert (again.left_out, again.new_rows) == (1, 0)
    [short] = [row for row in rows_of(out) if "messages" in row]
    assert [m["role"] for m in short["messages"]] == ["user", "assistant"]
    assert len(list(tokenize_rows(tokenizer, rows_of(out), 64))) == 2


def test_what_the_template_refuses_is_named(target, tokenizer, out):
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [*prompts("a"), {"messages": system}]

    with pytest.raises(ValueError, match="row 2, but the target's chat template fails: no system"):
        write_answers(target, tokenizer, rows, out, max_new_tokens=3)
    counts = write_answers(target, tokenizer, rows, out, max_new_tokens=3, skip_bad_rows=True)

    assert (counts.bad_rows, counts.rows) == (1, 1)


@pytest.mark.parametrize(
    "row",
    [{"turns": ["c", "d"]}, {"messages": [{"role": role, "content": "x"} for role in ("system", "user")]}],
)
def test_roles_need_a_template(target, tokenizer, out, row):
    """Without one nothing would tell a system's words from a user's, or a question from an answer."""
    rows = [*prompts("a"), row, {"messages": [{"role": "user", "content": "ab"}]}]

    with pytest.raises(ValueError, match="row 2, but the target's tokenizer has no chat template.*`prompt`"):
        write_answers(target, tokenizer, rows, out, max_new_tokens=3)
    assert not out.exists()
    counts = write_answers(target, tokenizer, rows, out, max_new_tokens=3, skip_bad_rows=True)
    assert (counts.bad_rows, counts.rows) == (1, 2)


def test_an_edited_prompt_is_another(target, tokenizer, out):
    for prompt in ("ab", "ab", "abc"):
        write_answers(target, tokenizer, [{"id": 7, "prompt": prompt}], out, max_new_tokens=3)

    ids = [row["id"] for row in rows_of(out)]
    assert len(set(ids)) == 2
    assert all(name.startswith("7:") for name in ids)


def test_a_second_writer_loses_and_doubles_no_row(target, tokenizer, out):
    """The same command twice: whichever ends first leaves a whole file, and so does the other."""
    asked, kwargs = prompts("ab", "cdef", "g"), {"batch_size": 1, "max_new_tokens": 3}
    seen = []

    def second(counts, stats):
        if counts.new_rows == 2:
            seen.append(write_answers(target, tokenizer, asked, out, **kwargs))
            seen.append({row["prompt"] for row in rows_of(out)})

    counts = write_answers(target, tokenizer, asked, out, report=second, **kwargs)

    assert (seen[0].new_rows, seen[0].rows, seen[1]) == (1, 3, {"ab", "cdef", "g"})
    assert (counts.new_rows, counts.rows) == (3, 3)
    assert sorted(row["prompt"] for row in rows_of(out)) == ["ab", "cdef", "g"]
    assert not shards_of(out)


@pytest.fixture
def command(tmp_path, tokenizer, out):
    """`pard data` with a tiny pair in folders."""
    tokenizer.chat_template = TEMPLATE
    for name, model in (("target", make_model("llama")), ("draft", make_draft(make_model("llama", seed=5), 4))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float32"]
    return ["data", *pair, "--device", "cpu", "--max-new-tokens", "40", "--output", str(out)]


def write_prompts(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_a_killed_run_is_continued(command, tmp_path, out, capsys):
    """Killed with no chance to clean up: every answer is there once, as if nothing had happened."""
    rows = [{"prompt": "ab" * n + "c"} for n in range(1, 13)] + [{"turns": ["d" * n, "e"]} for n in range(1, 5)]
    source = write_prompts(tmp_path / "prompts.jsonl", rows)
    command += ["--prompts", source]
    paths = os.pathsep.join([str(Path(pard_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    program = [
        sys.executable,
        "-c",
        "import sys; from pard_hf.cli import main; sys.exit(main())",
        *command,
        "--batch-size",
        "1",
    ]

    process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(shards_of(out)) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_killed = len(shards_of(out))
    assert 2 <= num_killed < 16
    assert not out.exists()
    assert main(command) == 0
    whole = out.with_name("whole.jsonl")
    assert main([*command, "--output", str(whole)]) == 0

    resumed = {(row["id"], row["sample"]): row for row in rows_of(out)}
    assert len(rows_of(out)) == len(resumed) == 16
    assert resumed == {(row["id"], row["sample"]): row for row in rows_of(whole)}
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (result["new_rows"], result["rows"]) == (16 - num_killed, 16)
    assert [run["new_rows"] for run in manifest_of(out)["runs"]][-1] == 16 - num_killed


def test_the_manifest_records_how_and_never_where(command, tmp_path, out, capsys):
    source = write_prompts(tmp_path / "prompts.jsonl", prompts("ab", "cd", "ab"))

    assert main([*command, "--prompts", source]) == 0

    manifest = manifest_of(out)
    assert str(tmp_path) not in json.dumps(manifest)
    assert (manifest["target"], manifest["runs"][0]["draft"]) == ("target", "draft")
    assert manifest["is_complete"]
    assert manifest["counts"]["prompts"] == 2
    assert manifest["counts"]["ended"] + manifest["counts"]["cut"] == manifest["counts"]["answers"] == 2
    assert manifest["acceptance_length"] >= 1
    assert manifest["sources"][0]["name"] == "prompts.jsonl"
    said = Counter(token for row in map(json.loads, out.read_text().splitlines()) for token in row["response_ids"])
    counts = json.loads(out.with_name("answers.jsonl.counts.json").read_text())["token_counts"]
    assert {int(token): count for token, count in counts.items()} == said
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["acceptance_length"] == manifest["acceptance_length"]


def test_files_are_read_in_order_and_broken_lines_named(command, tmp_path, out, capsys):
    first = write_prompts(tmp_path / "first.jsonl.gz", [*prompts("a", "b"), {"text": "no prompt"}])
    second = write_prompts(
        tmp_path / "second.jsonl", [{"turns": ["c", "d"]}, {"messages": [{"role": "tool", "content": "x"}]}]
    )
    command += ["--prompts", first, "--prompts", second]

    assert main(command) == 2
    assert "in line 3 of" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--skip-bad-rows"]) == 0
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 2
    assert main([*command, "--skip-bad-rows", "--limit", "1", "--restart"]) == 0
    assert [row["prompt"] for row in rows_of(out)] == ["a"]
    assert manifest_of(out.with_name("answers.1.jsonl"))["sources"][1]["skipped"] == [2]


def test_target_alone_answers_as_with_a_draft(command, tmp_path, out):
    command += ["--prompts", write_prompts(tmp_path / "prompts.jsonl", prompts("a", "bc"))]
    assert main(command) == 0
    drafted = out.read_bytes()
    at = command.index("--draft")

    assert main([*command[:at], *command[at + 2 :], "--restart"]) == 0

    assert out.read_bytes() == drafted
    assert manifest_of(out)["acceptance_length"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "'--limit'"),
        (["--num-samples", "2"], "greedy"),
        (["--output", "answers.jsonl.gz"], "ends in `.jsonl`"),
        (["--prompts", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_bad_words_end_with_a_sentence(command, tmp_path, capsys, words, message):
    source = write_prompts(tmp_path / "prompts.jsonl", prompts("a"))

    assert main([*command, "--prompts", source, *words]) == 2

    assert message in capsys.readouterr().err


def test_no_prompts_end_with_a_sentence(command, capsys):
    assert main([*command, "--prompts", os.devnull]) == 2

    assert "at least one prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"id": "x", "messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "z"}]}, ""),
        ({"id": "x", "question": "ab"}, ":question"),
        ({"id": "x", "prompt": ["ab"]}, ""),
    ],
)
def test_a_hub_data_set_asks_by_one_of_its_fields(command, tmp_path, out, capsys, row, field):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write_prompts(folder / "train.jsonl", [row])

    assert main([*command, "--prompts", f"hub:{folder}:train{field}"]) == 0

    [answer] = rows_of(out)
    assert answer["prompt"] == "ab"
    assert answer["id"].startswith("x:")
    assert manifest_of(out)["sources"][0]["name"] == "set:train"
    assert main([*command, "--prompts", f"hub:{folder}:train:nothing"]) == 2
    assert "Name one of" in capsys.readouterr().err
