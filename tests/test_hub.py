"""Drafts on the Hub: pushed whole, loaded back the same, also from the cache; errors of the Hub pass through."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import MASK_TOKEN_ID, add_head, make_draft, make_model
from hub_server import READER, WRITER, publish, running_hub

from pard_hf import PardDraftModel
from pard_hf.draft.addons import ADDON_FILES

PROGRAM = Path(__file__).parent / "programs" / "hub.py"
OTHER_MASK_KEYS = {"mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config"}
CLOSED_PORT = "http://127.0.0.1:9"


def ask(calls, home, **environment):
    """Run calls in a process of their own whose Hub, cache and token are the given ones."""
    unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    paths = (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))
    run = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps([[name, arguments, keywords] for name, arguments, keywords in calls]),
        capture_output=True,
        text=True,
        env={**inherited, **settings, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def save_draft(folder, tokenizer, seed=3):
    """A draft whose config holds what engines must not see: another mask key, inside a nested part."""
    draft = make_draft(make_model("llama", seed=seed), 4)
    draft.config.nested = {"mask_token_id": 5, "kept": 1}
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return draft


def save_target(folder, tokenizer, family="qwen3", vocab_size=151936):
    """Config and tokenizer of a target; its weights are never read."""
    make_model(family, vocab_size=vocab_size).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    root = tmp_path_factory.mktemp("hub")
    save_draft(root / "draft", small_tokenizer)
    save_draft(root / "other", small_tokenizer, seed=4)
    save_draft(root / "trained", small_tokenizer)
    (root / "trained" / "provenance.json").write_text(json.dumps({"base": "org/small", "step": 30}))
    add_head(save_draft(root / "headed", small_tokenizer), 0.5).save_pretrained(root / "headed")
    make_model("llama").save_pretrained(root / "plain")
    save_target(root / "target", small_tokenizer)
    return root


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def answers(folders, hub):
    """Everything that needs a Hub, in one process, for each start costs seconds."""
    publish(hub, "org/private", folders / "draft", is_private=True)
    publish(hub, "org/gated", folders / "draft", is_gated=True)
    publish(hub, "org/plain", folders / "plain")
    publish(hub, "org/Qwen3-tuned", folders / "target")
    publish(hub, "amd/PARD-Qwen3-0.6B", folders / "other")
    calls = {
        "push": ("push", [str(folders / "draft"), "org/draft"], {"token": WRITER}),
        "load": ("load", ["org/draft"], {}),
        "encode": ("encode", ["org/draft", "abc"], {}),
        "push a revision": ("push", [str(folders / "other"), "org/draft"], {"token": WRITER, "revision": "v2"}),
        "load a revision": ("load", ["org/draft"], {"revision": "v2"}),
        "load again": ("load", ["org/draft"], {}),
        "push private": ("push", [str(folders / "draft"), "org/mine"], {"token": WRITER, "private": True}),
        "push again": ("push_again", ["org/draft", "org/copy"], {"token": WRITER}),
        "push trained": ("push", [str(folders / "trained"), "org/trained"], {"token": WRITER}),
        "push with a head": ("push", [str(folders / "headed"), "org/headed"], {"token": WRITER}),
        "load a head": ("load", ["org/headed"], {}),
        "push without the head": (
            *("push", [str(folders / "draft"), "org/headed"]),
            {"token": WRITER, "commit_message": "Leave the head off"},
        ),
        "load without the head": ("load", ["org/headed"], {}),
        "export": ("export", ["org/draft", str(folders / "exported")], {}),
        "for a Hub id": ("load_for", ["org/Qwen3-tuned"], {}),
        "for a folder": ("load_for", [str(folders / "target")], {"num_assistant_tokens": 3}),
        "for a live model": ("load_for", [str(folders / "target")], {"is_live": True}),
        "unknown": ("load", ["org/nobody"], {}),
        "unknown, logged in": ("load", ["org/nobody"], {"token": READER}),
        "private": ("load", ["org/private"], {}),
        "private, logged in": ("load", ["org/private"], {"token": READER}),
        "gated": ("load", ["org/gated"], {}),
        "no revision": ("load", ["org/draft"], {"revision": "v9"}),
        "not a draft": ("load", ["org/plain"], {}),
        "pair unknown": ("load_both", ["org/nobody", "org/draft"], {}),
        "target unknown": ("load_for", ["org/nobody"], {}),
        "export unknown": ("export", ["org/nobody", str(folders / "never")], {}),
        "push as a stranger": ("push", [str(folders / "draft"), "strangers/draft"], {"token": WRITER}),
        "push logged out": ("push", [str(folders / "draft"), "org/draft"], {}),
    }
    outcomes = ask(calls.values(), folders / "home", HF_ENDPOINT=hub.url)
    return dict(zip(calls, outcomes, strict=True))


@pytest.mark.parametrize("call", ["push", "push a revision", "push private", "push again", "push trained", "export"])
def test_calls_succeed(answers, call):
    assert "error" not in answers[call], answers[call]


def test_pushed_draft_loads_back_the_same(answers, folders):
    loaded = answers["load"]["value"]

    draft = PardDraftModel.from_pretrained(folders / "draft")
    assert loaded["weights"] == hashlib.sha256(draft.lm_head.weight.detach().numpy().tobytes()).hexdigest()
    assert loaded["proposals"] == draft.draft(torch.tensor([[5, 6, 7]])).argmax(-1).tolist()
    assert (loaded["mask_token_id"], loaded["num_assistant_tokens"]) == (MASK_TOKEN_ID, 4)


def test_pushed_repository_holds_what_engines_need(answers, hub):
    """Weights as safetensors through LFS, one mask key, tokenizer and card; nothing of this machine."""
    files = hub.files("org/draft")
    config = json.loads(files["config.json"])

    assert (config["pard_token"], config["spd_type"]) == (MASK_TOKEN_ID, "pard")
    assert not any(f'"{key}"'.encode() in files["config.json"] for key in OTHER_MASK_KEYS)
    assert config["nested"] == {"kept": 1}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in hub.large_files
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert b'"org/draft"' in files["README.md"]
    for path, content in files.items():
        assert str(Path.home()).encode() not in content, path


def test_heads_are_pushed_loaded_and_taken_away_again(answers, hub, folders):
    """A head that stayed behind would be loaded with a draft that it was not trained on."""
    first, second = list(hub.repos["org/headed"].commits.values())[1:]
    assert {name for name in first if "/" in name} == set(ADDON_FILES[:2])
    assert b"correction head" in first["README.md"]
    ids = torch.tensor([[5, 6, 7]])
    headed = PardDraftModel.from_pretrained(folders / "headed")
    assert answers["load a head"]["value"]["proposals"] == headed.draft(ids).argmax(-1).tolist()
    assert not any("/" in name for name in second)
    assert answers["load without the head"]["value"] == answers["load"]["value"]


def test_a_push_is_one_commit(answers, hub):
    assert len(hub.repos["org/draft"].commits) == 1 + 2  # the empty one, and two pushes
    assert hub.repos["org/mine"].is_private


def test_revisions_are_told_apart(answers):
    assert answers["load a revision"]["value"]["weights"] != answers["load"]["value"]["weights"]
    assert answers["load again"] == answers["load"]


def test_cards_are_rendered_once_and_then_a_persons(answers, hub):
    """What training wrote down comes along; a card that is there stays."""
    assert b"base_model: org/small" in hub.files("org/trained")["README.md"]
    assert json.loads(hub.files("org/trained")["provenance.json"])["step"] == 30
    assert hub.files("org/draft", "v2")["README.md"] == hub.files("org/draft")["README.md"]


def test_tokenizer_comes_along(answers, hub, small_tokenizer):
    assert answers["encode"]["value"] == small_tokenizer("abc")["input_ids"]
    assert hub.files("org/copy")["tokenizer.json"] == hub.files("org/draft")["tokenizer.json"]


@pytest.mark.parametrize("call", ["for a Hub id", "for a folder", "for a live model"])
def test_the_known_draft_of_a_target_is_loaded(answers, call):
    value = answers[call]["value"]

    assert value["architecture"] == "LlamaForCausalLM"
    assert value["num_assistant_tokens"] == (3 if call == "for a folder" else 4)


NOT_THERE = ["org/nobody", "not a valid model identifier", "hf auth login"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("unknown", NOT_THERE),
        ("unknown, logged in", NOT_THERE),
        ("private", ["org/private", "private", "hf auth login"]),
        ("private, logged in", ["connect"]),
        ("gated", ["org/gated", "gated"]),
        ("no revision", ["org/draft", "v9"]),
        ("pair unknown", NOT_THERE),
        ("target unknown", NOT_THERE),
        ("export unknown", ["org/nobody"]),
        ("push as a stranger", ["403", "token"]),
        ("push logged out", ["org/draft", "401"]),
    ],
)
def test_failures_are_those_of_the_hub(answers, call, words):
    """Errors of transformers and huggingface_hub pass through; all of them are `OSError`s."""
    failure = answers[call]

    assert failure["is_os_error"], failure
    assert all(word in failure["message"] for word in words), failure["message"]
    assert "Traceback" not in failure["message"]


def test_a_plain_checkpoint_is_not_a_draft(answers):
    assert answers["not a draft"]["error"] == "ValueError"
    assert "pard train" in answers["not a draft"]["message"]


def lay_out_cache(home, repo_id, folder):
    """What a download leaves: blobs under their hashes, snapshots of links to them, and refs that name snapshots."""
    cache = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    commit = "a" * 40
    snapshot = cache / "snapshots" / commit
    for path in (cache / "blobs", cache / "refs", snapshot):
        path.mkdir(parents=True)
    for path in folder.iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (cache / "refs" / "main").write_text(commit)
    (cache / "refs" / "v1").write_text(commit)


def test_cache_suffices_offline(folders, tmp_path):
    """With `HF_HUB_OFFLINE=1` nothing is asked of anybody, and what is missing is said to be missing."""
    lay_out_cache(tmp_path, "org/draft", folders / "draft")
    lay_out_cache(tmp_path, "org/Qwen3-tuned", folders / "target")
    lay_out_cache(tmp_path, "amd/PARD-Qwen3-0.6B", folders / "other")
    calls = [
        ("load", ["org/draft"], {}),
        ("load", ["org/draft"], {"revision": "v1"}),
        ("load", ["org/draft"], {"revision": "a" * 40}),
        ("encode", ["org/draft", "abc"], {}),
        ("load_for", ["org/Qwen3-tuned"], {}),
        ("load", ["org/missing"], {}),
        ("push", [str(folders / "draft"), "org/draft"], {"token": WRITER}),
    ]

    main, v1, commit, ids, known, missing, pushed = ask(calls, tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=CLOSED_PORT)

    assert main["value"] == v1["value"] == commit["value"]
    assert len(ids["value"]) == 3
    assert known["value"]["mask_token_id"] == MASK_TOKEN_ID
    for failure, word in ((missing, "cached"), (pushed, "HF_HUB_OFFLINE")):
        assert failure["is_os_error"]
        assert word in failure["message"]


def test_network_down(folders, tmp_path):
    """A push ends in the error of the HTTP client that `huggingface_hub` uses."""
    calls = [
        ("load_for", ["org/target"], {}),
        ("export", ["org/draft", str(tmp_path / "out")], {}),
        ("push", [str(folders / "draft"), "org/draft"], {"token": WRITER}),
        ("load", [str(folders / "draft")], {}),
    ]

    for_target, exported, pushed, local = ask(calls, tmp_path / "home", HF_ENDPOINT=CLOSED_PORT)

    assert "value" in local
    assert for_target["is_os_error"]
    assert "connect" in for_target["message"]
    assert exported["is_os_error"]
    assert "refused" in pushed["message"]


@pytest.mark.slow
def test_network_down_while_loading(tmp_path):
    """Half a minute: `huggingface_hub` asks for a file five times before it gives up."""
    (failure,) = ask([("load", ["org/draft"], {})], tmp_path, HF_ENDPOINT=CLOSED_PORT)

    assert failure["is_os_error"]
    assert "connect" in failure["message"]


def test_a_mask_token_that_text_contains_is_not_pushed(small_tokenizer):
    """Said before anything is created on the Hub: there is none here to ask."""
    draft = PardDraftModel.from_causal_lm(make_model("llama"), 50)

    with pytest.raises(ValueError, match="never produces"):
        draft.push_to_hub("org/draft", tokenizer=small_tokenizer)
