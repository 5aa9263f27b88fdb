"""`pard train` from files to a draft: checked before, killed in between, spread over processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path

import pytest
from device import DEVICE, torch
from families import add_head, make_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from pard_hf import DecodingStats, PardDraftModel, training
from pard_hf.cli import main

pytest.importorskip("accelerate")
from pard_hf.hub.model_card import draft_card
from pard_hf.training.data import tokenize_rows
from pard_hf.training.responses import write_answers
from pard_hf.training.settings import TrainingSettings
from pard_hf.training.token_file import TokenFile, write_token_file
from pard_hf.training.train import train_draft

only_on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="runs on the CPU whatever the device")
FLAGS = ["--mask-token-id", "102", "--max-length", "64", "--device", "cpu", "--learning-rate", "0.01"]


@pytest.fixture
def base(tmp_path, bundled_like_tokenizer):
    make_model("llama", vocab_size=104, initializer_range=0.05).save_pretrained(tmp_path / "base")
    bundled_like_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": chr(97 + n) * 2, "response": "".join(chr(97 + (n + i) % 26) for i in range(8))} for n in range(16)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_rows_are_tokenized_once(base, data, tmp_path, monkeypatch):
    """A run that goes on, and one that begins anew, read the file; other rows or settings write another."""
    out, encoded = tmp_path / "out", []
    encode = training.data.encode_row
    monkeypatch.setattr(training.data, "encode_row", lambda *a: encoded.append(1) or encode(*a))

    train(base, data, out, max_steps=2)
    first = len(encoded)
    train(base, data, out, max_steps=4)
    train(base, data, out, max_steps=2, restart=True)
    assert (first, len(encoded)) == (16, 16)
    [kept] = (out / "tokens").iterdir()

    train(base, data, out, max_steps=2, restart=True, pack=True)
    assert len(encoded) == 32
    data.write_text(data.read_text() + '\n{"prompt": "zz", "response": "yyyy"}')
    train(base, data, out, max_steps=2, restart=True)
    assert len(encoded) == 32 + 17
    assert kept.name not in {file.name for file in (out / "tokens").iterdir()}


def test_large_files_are_tokenized_in_processes(base, data, tmp_path, monkeypatch):
    """And become the same file; where the number of processes is named, that many, and batches are built there too."""
    counts, tokenize = [], training.train.tokenize_rows
    monkeypatch.setattr(training.train, "tokenize_rows", lambda *a: counts.append(a[-1]) or tokenize(*a))
    monkeypatch.setattr(training.train, "num_cores", lambda: 2)

    files = []
    for out, settings, least in (("small", {}, 2**24), ("large", {}, 1), ("named", {"workers": 1}, 2**24)):
        monkeypatch.setattr(training.train, "SHARED_BYTES", least)
        train(base, data, tmp_path / out, max_steps=1, **settings)
        files.append(next((tmp_path / out / "tokens").iterdir()).read_bytes())

    assert counts == [0, 2, 1]
    assert files[0] == files[1] == files[2]


def test_answers_with_their_teacher_need_no_target(base, bundled_like_tokenizer, tmp_path, caplog):
    answers, target = tmp_path / "answers.jsonl", make_model("llama", seed=1)
    prompts = [{"prompt": chr(97 + n)} for n in range(8)]
    write_answers(target, bundled_like_tokenizer, prompts, answers, max_new_tokens=9, top_logits=4)

    draft = train(base, answers, tmp_path / "out", objective="kd", pack=True)

    assert "no target runs in the steps" in caplog.text
    assert not torch.equal(weights(draft)["lm_head.weight"], weights(base)["lm_head.weight"])
    with pytest.raises(ValueError, match="temperature of 1 with stored"):
        train(base, answers, tmp_path / "warm", objective="kd", distillation_temperature=2.0)


def test_what_decides_how_a_run_learns_is_logged(base, data, tmp_path, caplog):
    train(base, data, tmp_path / "out", max_steps=1, dtype="bfloat16")

    assert "up to 5e-05, after a warm-up of 3% of the steps, then cosine. Weights in bfloat16" in caplog.text
    assert "lose updates" in caplog.text


def test_rows_that_were_not_packed_to_the_end_are_not_taken_for_packed(base, data, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def broken(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.train, "choose_bins", broken)
        with pytest.raises(KeyboardInterrupt):
            train(base, data, out, max_steps=2, pack=True)
    train(base, data, out, max_steps=2, pack=True)

    [file] = (out / "tokens").iterdir()
    tokens = TokenFile(file)
    assert len(tokens) < tokens.num_texts == 16


def test_memory_does_not_grow_with_rows(base, tmp_path):
    """Rows are written as they come; of the rest, 5 bytes a token, no list is made."""
    peaks = []
    for count in (2000, 6000):
        rows = ({"text": "abcdefghij" * 10} for _ in range(count))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tracemalloc.start()
        write_token_file(tokenize_rows(tokenizer, rows, 100), tmp_path / f"{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] - peaks[0] < 4000 * 100 // 2


def train(base, data, out, max_steps=4, evaluation=None, **settings):
    """Run `train_draft`; settings that are none of ours are training arguments."""
    given = {
        "mask_token_id": 102, "max_length": 64, "max_steps": max_steps, "batch_size": 2, "save_steps": 2,
        "learning_rate": 5e-5, "device": "cpu" if DEVICE.type == "cpu" else "auto", **settings,
    }  # fmt: skip
    names = {field.name for field in fields(TrainingSettings)}
    ours = {name: value for name, value in given.items() if name in names}
    others = {"disable_tqdm": True, **ours.pop("training_arguments", {})}
    others |= {name: value for name, value in given.items() if name not in names}
    if evaluation is not None:
        ours = {"target": str(base), "eval_prompts": ["some"], **ours}
    return train_draft(
        TrainingSettings(str(base), [data], out, **ours, training_arguments=others), evaluation, draft_card
    )


def command(base, data, out, *flags):
    return [
        *(sys.executable, "-m", "pard_hf.cli", "train", "--base", str(base), "--data", str(data)),
        *("--output", str(out), *FLAGS, *flags),
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_settings_load_no_library():
    """The command line is built from them: torch and transformers would make `pard --help` wait for seconds."""
    file = Path(training.__file__).parent / "settings.py"
    code = (
        f"import runpy, sys; runpy.run_path({str(file)!r}); print(*({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_base_and_rows_become_a_draft(base, data, tmp_path):
    out = tmp_path / "draft"

    train(base, data, out, command="pard train")

    draft = PardDraftModel.from_pretrained(out)
    assert draft.mask_token_id == 102
    assert (out / "tokenizer.json").exists()
    train(base, data, out, restart=True)
    assert (out / "checkpoints.1" / "checkpoint-4").is_dir()  # moved aside, not gone on from


@pytest.mark.parametrize(("layers", "chosen"), [("1", [0]), ("1,0", [1, 0])])
def test_layers_of_the_target_become_a_draft(base, data, tmp_path, layers, chosen):
    """A full checkpoint, with the target's embedding as it was; the rows are learned."""
    out = tmp_path / "draft"

    train(base, data, out, layers=layers, freeze_embeddings=True, max_steps=2)

    draft = PardDraftModel.from_pretrained(out)
    assert draft.config.num_hidden_layers == len(chosen)
    theirs, own = (weights(folder)["model.embed_tokens.weight"] for folder in (base, out))
    assert torch.equal(theirs, own)
    name = "mlp.up_proj.weight"
    for number, index in enumerate(chosen):
        old, new = weights(base)[f"model.layers.{index}.{name}"], weights(out)[f"model.layers.{number}.{name}"]
        assert 0 < (old - new).abs().max() < 0.01


@pytest.mark.parametrize(
    ("layers", "problem"),
    [("0", "layers from 0 to 1"), ("0,2", "layers from 0 to 1"), ("a", "Expected `--layers` as")],
)
def test_layers_that_do_not_exist_end_before_weights_are_loaded(base, data, tmp_path, layers, problem):
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=problem):
        train(base, data, tmp_path / "draft", layers=layers)


def test_checkpoints_say_where_they_come_from(base, data, tmp_path):
    (tmp_path / "rows.jsonl.manifest.json").write_text('{"target": "somebody/target"}')

    train(base, data, tmp_path / "draft", command="pard train --base base")

    for folder in (tmp_path / "draft", tmp_path / "draft/checkpoints/checkpoint-2"):
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["command"] == "pard train --base base"
        assert provenance["base"] == "base"
        assert provenance["counts"] == {"num_rows": 16, "num_tokens": 16 * 11}
        assert provenance["settings"]["mask_token_id"] == 102
        [file] = provenance["data"]
        assert file["file"] == "rows.jsonl"
        assert file["manifest"] == {"target": "somebody/target"}
        assert len(file["sha256"]) == 64
        assert str(tmp_path) not in (folder / "provenance.json").read_text()
        card = (folder / "README.md").read_text()
        assert "| K_train, r, r_min | 8, 0.7, 0.2 |" in card
        assert str(tmp_path) not in card


def test_bad_settings_end_before_weights_are_loaded(base, data, tmp_path, monkeypatch, bundled_like_tokenizer):
    """The base's weights are gone: only what is checked before can be what is complained about."""
    (base / "model.safetensors").unlink()
    other = tmp_path / "other"
    bundled_like_tokenizer.add_tokens(["zz"])
    make_model("llama", vocab_size=104).save_pretrained(other)
    bundled_like_tokenizer.save_pretrained(other)
    template, broken, empty = tmp_path / "template", tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    broken.write_text('{"text": "abc"}\n{oops\n')
    empty.write_text("\n")
    out = tmp_path / "draft"

    for problem, arguments in {
        "within the 128 positions": {"max_length": 129},
        "never produces": {"mask_token_id": 50},
        "below `--max-length`": {"num_draft_tokens": 64},
        "Expected a target for the objective": {"objective": "kd"},
        "1 ids are in one of them only": {"target": str(other)},
        "where the answer begins cannot be told": {"chat_template": template},
        "line 2 of": {"data": broken},
        "got none": {"data": empty},
        "Expected something to evaluate": {"early_stopping_patience": 2},
        "something to evaluate, got none": {"eval_steps": 2},
        "to evaluate, got none. Give": {"training_arguments": {"eval_steps": 2}},
        "an id in .0, 104.": {"mask_token_id": 104},
        "no teacher": {"divergence_weight": 1.0},
        "`--retention-rate` in": {"retention_rate": 2.0},
        "a dtype such as": {"dtype": "float23"},
        "weights by name, got 'auto'": {"dtype": "auto"},
        "such as 'float32'.* got 'bfloat61'": {"target": str(base), "target_dtype": "bfloat61"},
        "got output_dir": {"output_dir": "elsewhere"},
        "label_smoothing_factor": {"label_smoothing_factor": 0.1},
        "of `PardTrainingArguments`, got learning_rat": {"learning_rat": 1.0},
        "one of truncate, drop": {"overlong": "wrap"},
    }.items():
        with pytest.raises(ValueError, match=problem):
            train(base, arguments.pop("data", data), out, **arguments)


@only_on_cpu
def test_vocabulary_that_is_all_used_keeps_its_size(base, data, tmp_path, bundled_like_tokenizer, capsys):
    """`auto` takes a special token that nobody writes, and rows that contain it are named."""
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<gh_stars>", "<empty>", "<end>", "<x>"]})
    bundled_like_tokenizer.save_pretrained(base)
    config = GenerationConfig.from_pretrained(base)
    config.eos_token_id = [2, 103]
    config.save_pretrained(base)
    words = [*command(base, data, tmp_path / "draft")[3:], "--mask-token-id", "auto", "--max-steps", "1"]

    assert main(words) == 0
    draft = PardDraftModel.from_pretrained(tmp_path / "draft")
    assert (draft.mask_token_id, draft.config.vocab_size) == (102, 104)
    data.write_text('{"text": "ab"}\n{"text": "a<end>"}\n')
    assert main([*words, "--restart"]) == 2
    assert f"line 2 of `{data}`, but it has the mask token 102 ('<end>')" in capsys.readouterr().err
    assert main([*words[:-4], "--mask-token-id", "103", "--max-steps", "1", "--restart"]) == 2
    assert "got 103, which is '<x>', which the model's config names" in capsys.readouterr().err
    assert main([*words[:-4], "--mask-token-id", "100", "--max-steps", "1", "--restart"]) == 0


@pytest.mark.parametrize("mode", [None, "frozen"])
def test_what_lies_beside_a_draft_is_not_lost_in_silence(base, data, tmp_path, caplog, mode):
    """A head belongs to one draft's hidden states, a trimmed vocabulary to its rows: training changes both."""
    draft = add_head(PardDraftModel.from_causal_lm(make_model("llama", vocab_size=104), 102, 5), 0.5)
    draft.trim_vocabulary(range(60)).save_pretrained(base)

    train(base, data, tmp_path / "new", 1, correction_head=mode, correction_head_rank=8)

    assert ("base's correction head is left off" in caplog.text) == (mode is None)
    assert ("--correction-head joint" in caplog.text) == (mode is None)
    assert "base's trimmed vocabulary is left off" in caplog.text
    assert (tmp_path / "new/correction_head/config.json").exists() == (mode == "frozen")
    assert PardDraftModel.from_pretrained(base).correction_head is not None


@pytest.mark.parametrize("out", ["base", "base/../base"])
def test_base_is_not_written_over(base, data, tmp_path, out):
    with pytest.raises(ValueError, match="Expected an `--output` beside the base model"):
        train(base, data, tmp_path / out)


def test_tokenizer_of_another_model_is_refused(base, data, tmp_path):
    make_model("llama", vocab_size=90).save_pretrained(base)

    with pytest.raises(ValueError, match="ids up to 99 for 90 rows"):
        train(base, data, tmp_path / "draft")


@only_on_cpu
def test_bad_evaluations_end_before_weights_are_loaded(base, data, tmp_path, capsys):
    (base / "model.safetensors").unlink()
    same = tmp_path / "again"
    same.mkdir()
    (same / "rows.jsonl").write_text(data.read_text())
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": " "}))

    for problem, flags in {
        "within the 128 positions of both models": ("--eval-prompts", data, "--eval-max-new-tokens", "127"),
        "`rows` twice": ("--eval-prompts", data, "--eval-prompts", same / "rows.jsonl"),
        "with words to evaluate on": ("--eval-prompts", empty),
        "`--eval-batch-size` of at least 1": ("--eval-prompts", data, "--eval-batch-size", "0"),
    }.items():
        words = command(base, data, tmp_path / "draft", "--target", str(base), *map(str, flags))[3:]
        assert main(words) == 2
        assert problem in capsys.readouterr().err


def test_run_does_not_go_on_under_other_settings(base, data, tmp_path):
    train(base, data, tmp_path / "draft")

    with pytest.raises(ValueError, match=r"num_draft_tokens was 8 and is 3; retention_rate was 0.7 and is 1.0"):
        train(base, data, tmp_path / "draft", 8, num_draft_tokens=3, retention_rate=1.0)
    data.write_text(data.read_text() + "\n")
    with pytest.raises(ValueError, match="data was"):
        train(base, data, tmp_path / "draft", 8)
    train(base, data, tmp_path / "draft", 8, restart=True)
    assert last_checkpoint(tmp_path / "draft") == 8


def test_template_of_the_target_is_taken(base, data, tmp_path, caplog, bundled_like_tokenizer):
    """A base model without one would be trained on other text than its target is asked with."""
    target = tmp_path / "target"
    make_model("llama", vocab_size=104).save_pretrained(target)
    bundled_like_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    bundled_like_tokenizer.save_pretrained(target)

    train(base, data, tmp_path / "draft", 1, target=str(target))

    assert "the target's is taken" in caplog.text
    assert "[a]" in (tmp_path / "draft/chat_template.jinja").read_text()


def test_overlong_rows_are_counted(base, data, tmp_path, caplog):
    data.write_text(data.read_text() + "\n" + json.dumps({"text": "a" * 100}))

    train(base, data, tmp_path / "cut", max_steps=1)
    assert "1 of 17 rows are longer than 64 tokens and were cut there" in caplog.text
    train(base, data, tmp_path / "dropped", max_steps=1, overlong="drop")
    assert "1 of 17 rows are longer than 64 tokens and were left out" in caplog.text


def scripted(*histograms, targets=None):
    """Evaluations with given outcomes, the last again and again; targets are added to `targets`."""
    left = list(histograms)

    def evaluator(draft, share):
        return {"some": DecodingStats(left.pop(0) if len(left) > 1 else left[0], 8)}

    def prepare(settings, tokenizer, longest):
        assert longest == 128
        return lambda target: evaluator if targets is None else targets.append(target) or evaluator

    return prepare


def test_run_stops_when_blocks_grow_no_more(base, data, tmp_path):
    train(base, data, tmp_path / "draft", 40, scripted((3, 1)), early_stopping_patience=2)

    assert last_checkpoint(tmp_path / "draft") == 6  # The first evaluation is the best, two more are not better.


def test_card_speaks_of_the_checkpoint_that_is_kept(base, data, tmp_path):
    """The blocks of the first evaluation are the longest: its weights are the draft, and its figures on the card."""
    evaluations = scripted((0, 4), (3, 1))
    train(base, data, tmp_path / "draft", 6, evaluations, command="pard train", save_total_limit=5)

    provenance = json.loads((tmp_path / "draft/provenance.json").read_text())
    assert provenance["step"] == 2
    assert provenance["metrics"]["eval_some_acceptance_length"] == 2.0
    assert "| `some` | 2.00 | 1.00 |" in (tmp_path / "draft/README.md").read_text()
    for name, weight in weights(tmp_path / "draft/checkpoints/checkpoint-2").items():
        assert torch.equal(weights(tmp_path / "draft")[name], weight), name
    assert (tmp_path / "draft/model.safetensors").stat().st_mode & 0o044


def test_evaluations_need_not_fall_on_saves(base, data, tmp_path):
    """As `--eval-steps 3` asks beside the default `--save-steps`: the best draft is saved when it is found."""
    evaluations = scripted((3, 1), (0, 4), (3, 1))
    train(base, data, tmp_path / "draft", 8, evaluations, eval_steps=3, save_steps=7, save_total_limit=5)

    assert history(tmp_path / "draft", 8, "eval_some_acceptance_length").tolist() == [1.25, 2.0, 1.25]
    assert json.loads((tmp_path / "draft/provenance.json").read_text())["step"] == 6
    for name, weight in weights(tmp_path / "draft/checkpoints/checkpoint-6").items():
        assert torch.equal(weights(tmp_path / "draft")[name], weight), name


def test_kept_draft_needs_an_evaluation(base, data, tmp_path):
    with pytest.raises(ValueError, match="Expected evaluations to keep the best draft by"):
        train(base, data, tmp_path / "draft", load_best_model_at_end=True)


@only_on_cpu
@pytest.mark.parametrize(
    "flag", ["--eval-steps", "--save-steps", "--batch-size", "--gradient-accumulation-steps", "--max-length"]
)
def test_counts_are_refused_by_their_flag(base, data, tmp_path, capsys, flag):
    evaluated = ("--target", str(base), "--eval-prompts", str(data))
    assert main([*command(base, data, tmp_path / "draft", *evaluated)[3:], flag, "0"]) == 2
    assert f"`{flag}` of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_target_has_a_dtype_of_its_own(base, data, tmp_path, named, expected):
    """The checkpoint's is bfloat16; a CPU computes in float32 unless told otherwise, whatever the draft's."""
    target, seen = tmp_path / "target", []
    make_model("llama", vocab_size=104).to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)

    dtypes = {"dtype": "bfloat16" if named is None else "float32", "target_dtype": named, "device": "cpu"}
    evaluations = scripted((3, 1), targets=seen)
    train(base, data, tmp_path / "draft", 1, evaluations, target=str(target), objective="kd", **dtypes)

    assert [target.dtype for target in seen] == [expected]
    settings = json.loads((tmp_path / "draft/provenance.json").read_text())["settings"]
    assert settings["target_dtype"] == str(expected).removeprefix("torch.")


def last_checkpoint(folder):
    found = [int(path.name.split("-")[1]) for path in folder.glob("checkpoints/checkpoint-*")]
    return max(found, default=0)


@pytest.mark.slow
@only_on_cpu
def test_killed_run_resumes_to_the_same_draft(base, data, tmp_path):
    """SIGKILL, whenever it comes, twice; the same command goes on, and ends in the weights of a run left alone."""
    flags = ("--max-steps", "24", "--save-steps", "3", "--batch-size", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert main(command(base, data, tmp_path / "whole", *flags)[3:]) == 0
    for until in (3, 9):
        run = subprocess.Popen(
            command(base, data, tmp_path / "killed", *flags),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        deadline = time.monotonic() + 120
        while last_checkpoint(tmp_path / "killed") < until and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.poll() is None, "the run ended before it was killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert until <= last_checkpoint(tmp_path / "killed") < 24
    assert main(command(base, data, tmp_path / "killed", *flags)[3:]) == 0

    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, weight in whole.items():
        assert torch.equal(killed[name], weight), name


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def history(folder, step, metric):
    state = json.loads((folder / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text())
    return torch.tensor([entry[metric] for entry in state["log_history"] if metric in entry])


def launch(*words):
    """Two processes; what `accelerate launch` starts on GPUs, and on CPUs would ask MPI for."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PARD_TEST_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@only_on_cpu
def test_two_processes_are_one_with_doubled_accumulation(base, data, tmp_path):
    """The same losses and weights, and a checkpoint of the one is gone on from by the other."""
    flags = ("--save-steps", "3", "--batch-size", "2", "--training-arguments", "logging_steps=1")
    gloo = ("--training-arguments", "ddp_backend=gloo")
    evaluated = ("--target", str(base), "--eval-prompts", str(data), "--eval-limit", "5", "--eval-max-new-tokens", "9")
    launch(*command(base, data, tmp_path / "two", "--max-steps", "6", *evaluated, *flags, *gloo)[1:])
    accumulated = ("--gradient-accumulation-steps", "2", *evaluated, *flags)
    assert main(command(base, data, tmp_path / "one", "--max-steps", "6", *accumulated)[3:]) == 0

    for metric in ("loss", "eval_acceptance_length"):
        two, one = (history(tmp_path / run, 6, metric) for run in ("two", "one"))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    one, last = weights(tmp_path / "one/checkpoints/checkpoint-6"), "two/checkpoints/checkpoint-6"
    for name, weight in one.items():
        torch.testing.assert_close(weights(tmp_path / last)[name], weight, atol=1e-5, rtol=1e-4, msg=name)

    # Half of the way by two processes, the rest by one.
    (tmp_path / "two/checkpoints").rename(tmp_path / "all")
    (tmp_path / "two/checkpoints").mkdir()
    (tmp_path / "all/checkpoint-3").rename(tmp_path / "two/checkpoints/checkpoint-3")
    assert main(command(base, data, tmp_path / "two", "--max-steps", "6", *accumulated)[3:]) == 0
    for name, weight in one.items():
        torch.testing.assert_close(weights(tmp_path / last)[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@only_on_cpu
@pytest.mark.parametrize("version", [1, 2])
def test_sharded_weights_have_the_same_gradients(version):
    """FSDP sees a forward that returns a loss, whatever it reads on the way: backbone, head in chunks, teacher."""
    found = json.loads(launch(Path(__file__).parent / "programs/sharded_loss.py", version).splitlines()[-1])

    assert found["norm"] == pytest.approx(found["expected"], rel=1e-5)
