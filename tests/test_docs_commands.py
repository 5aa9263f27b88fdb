"""Every command and snippet of README and docs runs, in order, in a folder of its own.

Models of the Hub are answered with the bundled pair and runs are cut short by flags behind the document's own, which
the real parser has read by then. What this machine cannot run (engines, installing, a launcher) is parsed.
"""

import contextlib
import inspect
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from documents import DOCUMENTS, ROOT, Block, blocks_of, command_lines, inline_code
from test_docs import PYPROJECT

from benchmarks.plots import main as draw_plots
from pard_hf import bundled_pair
from pard_hf.cli import app, main, with_optional_values
from pard_hf.draft import model as draft_model
from pard_hf.draft.known_drafts import KNOWN_DRAFTS
from pard_hf.hub import checkpoint
from pard_hf.hub.model_card import card_source, model_card

EVALUATED = "--eval-steps 1 --eval-limit 1 --eval-max-new-tokens 4 --early-stopping-patience 9"
CPU = "--device cpu --dtype float32"
SHORT = {
    "generate": f"{CPU} --max-new-tokens 4",
    "data": f"{CPU} --limit 3 --max-new-tokens 6",
    "train": f"--device cpu --max-steps 1 --save-steps 1 --batch-size 2 --max-length 48 {EVALUATED}",
    "bench": f"{CPU} --limit 1 --repeats 1 --max-new-tokens 4 --batch-sizes 1 --num-assistant-tokens 2 --routes tier2",
    "check": "",
    "export": "",
    "card": "",
}
HUB_ID = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")
DRAFTS = {draft.name: draft for draft in KNOWN_DRAFTS}
TARGETS_OF_MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PROMPTS = ["def add(a, b):\n", "What is 2 + 2?\n", "class Stack:\n", "Sara has 4 bags. How many bags has she?\n"]


def answered(name, folder):
    """The folder that stands in for a model of the Hub."""
    if name is None or not HUB_ID.fullmatch(name) or (folder / name).exists():
        return name
    return bundled_pair().draft if name in DRAFTS else bundled_pair().target


class Workplace:
    """A folder with what the documents take for granted, and a way to run each of their lines there."""

    def __init__(self, folder, text):
        self.folder, self.text = folder, text
        self.names = {"prompts": PROMPTS, "torch": torch}
        for name in ("prompts", "code", "math", "held-out"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        (folder / "prompt.txt").write_text(PROMPTS[0])
        if "pard train" not in text:
            shutil.copytree(bundled_pair().draft, folder / "my-draft")

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.run_snippet(block.text)
        elif block.is_shell:
            for words in command_lines(block.text):
                getattr(self, f"run_{words[0]}")(*words[1:])

    def run_snippet(self, code):
        compiled = compile(code, "document", "exec")
        if "tensorrt_llm" in code:
            assert any(code.strip() in str(model_card(card_source(name))) for name in DRAFTS)
            return
        exec(compiled, self.names)

    def run_pard(self, *words):
        words, stdin, stdout = redirections(list(words))
        given = parsed(words)
        for name in ("target", "draft", "checkpoint", "base"):
            value = given.get(name)
            stand_in = bundled_pair().draft if name == "base" else answered(value, self.folder)
            words = [words[0], *(stand_in if word == value else word for word in words[1:])]
        written = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
            patch.setattr("sys.stdin", io.StringIO((self.folder / stdin).read_text() if stdin else ""))
            assert main([*words, *SHORT[words[0]].split()]) == 0, words
        assert written.getvalue().strip()
        if stdout:
            (self.folder / stdout).write_text(written.getvalue())

    def run_python(self, script, *words):
        if script == "benchmarks/plots.py":
            return draw_plots(words)
        app = pytest.importorskip("app")
        assert script == "app.py"
        assert {word for word in words if word.startswith("--")} <= flags_of_app(app)
        app.build_parser().parse_args(words)

    def run_make(self, *targets):
        assert targets
        assert set(targets) <= TARGETS_OF_MAKE

    def run_pip(self, verb, requirement):
        name, extras = re.fullmatch(r"([\w-]+|\.)(?:\[([\w,]+)\])?", requirement).groups()
        assert verb == "install"
        assert name in (".", PYPROJECT["project"]["name"])
        assert set(extras.split(",") if extras else []) <= PYPROJECT["project"]["optional-dependencies"].keys()

    def run_vllm(self, verb, target, flag, settings):
        config = json.loads(settings)
        assert (verb, flag) == ("serve", "--speculative-config")
        known = DRAFTS.get(config["model"])
        if known is None:
            assert (self.folder / config["model"] / "config.json").exists()
        else:
            assert not known.needs_export
            assert known.example == target
        [expected] = re.findall(r"'(\{.*?\})'", str(model_card(card_source(next(iter(DRAFTS))))))
        assert config == {**json.loads(expected), "model": config["model"]}

    def run_accelerate(self, *words):
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        launched = launch_command_parser().parse_args(words[1:])
        assert (launched.module, launched.training_script) == (True, "pard_hf.cli")
        words = launched.training_script_args
        assert words[0] == "train"
        assert parsed(words)["base"]

    def run_hf(self, verb, *words):
        from huggingface_hub.cli.upload import upload as hf_upload

        assert verb == "upload"
        names = list(inspect.signature(hf_upload).parameters)[: len(words)]
        repository, local_path, path_in_repo = words
        assert names == ["repo_id", "local_path", "path_in_repo"]
        assert HUB_ID.fullmatch(repository)
        assert (self.folder / local_path).is_file()
        assert path_in_repo == "README.md"


def redirections(words):
    """Words without `< file` and `> file`, and the two files."""
    files = {"<": None, ">": None}
    for sign in files:
        if sign in words:
            place = words.index(sign)
            files[sign] = words[place + 1]
            del words[place : place + 2]
    return words, files["<"], files[">"]


class RecordedHub:
    """A Hub that holds nothing and remembers what a commit brings."""

    commits: list[set[str]]

    def __init__(self, **kwargs):
        assert kwargs["library_name"] == "pard_hf"

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, *args, **kwargs):
        return False

    def upload_folder(self, folder_path, **kwargs):
        self.commits.append({path.name for path in Path(folder_path).iterdir()})


@pytest.fixture
def quick_compilation(monkeypatch):
    """Graphs are captured as ever and run as captured: inductor has tests of its own, and takes most of a minute."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, backend=None, mode=None, options=None, **kwargs: compiler(model, backend="eager", **kwargs),
    )


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(RecordedHub, "commits", [], raising=False)
    monkeypatch.setattr(draft_model, "HfApi", RecordedHub)
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **kwargs: answered(name, ROOT))
    return RecordedHub


DOCUMENTS_WITH_CODE = [path for path in DOCUMENTS if "```" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("document", DOCUMENTS_WITH_CODE, ids=lambda path: path.stem)
def test_document_runs(document, tmp_path, monkeypatch, stand_ins, quick_compilation, hub):
    text = document.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    workplace = Workplace(tmp_path, text)

    for block in blocks_of(text):
        workplace.run(block)

    assert ("push_to_hub" in "".join(b.text for b in blocks_of(text))) == bool(hub.commits)
    for files in hub.commits:
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files


def flags_of_app(app):
    return set(app.build_parser()._option_string_actions)


def flags_of_commands():
    """The flags of each command."""
    commands = typer.main.get_command(app).commands
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }


def parsed(words):
    """What the command of a line is given, once its flags are parsed."""
    name, *words = with_optional_values(words)
    return typer.main.get_command(app).commands[name].make_context(name, words).params


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_flags_in_prose_exist(document):
    """`--flag` alone is a flag of some command, `pard command --flag` of that command."""
    flags = flags_of_commands() | {"app.py": flags_of_app(pytest.importorskip("app"))}
    for code in inline_code(document.read_text(encoding="utf-8")):
        words = code.split()
        named = {word for word in words if re.fullmatch(r"--[a-z][\w-]+", word)}
        if words[0] == "pard":
            assert words[1] in ("COMMAND:", "COMMAND", "--help") or named <= flags[words[1]], code
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS_OF_MAKE, code
        elif words[0] not in ("vllm", "hf", "accelerate", "python", "pip"):
            assert named <= set.union(*flags.values()), code


def test_every_command_is_shown():
    """What a user can type stands in a block that was run, or in words in the README."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)

    assert all(f"pard {name}" in text for name in flags_of_commands() if name != "demo")
    assert "make demo" in text
