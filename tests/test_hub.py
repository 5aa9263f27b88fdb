"""Drafts on the Hub: what a push uploads, and what loads from the cache, offline or with the network down."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import MASK_TOKEN_ID, add_head, make_draft, make_model
from huggingface_hub.utils import filter_repo_objects

from pard_hf import PardDraftModel
from pard_hf.draft import model as draft_model
from pard_hf.draft.addons import ADDON_FILES
from pard_hf.draft.model import UNNAMED_DRAFT

PROGRAM = Path(__file__).parent / "programs" / "hub.py"
OTHER_MASK_KEYS = {"mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config"}
CLOSED_PORT = "http://127.0.0.1:9"
COMMIT = "a" * 40


def save_draft(folder, tokenizer, seed=3):
    """A draft whose config holds what engines must not see: another mask key, inside a nested part."""
    draft = make_draft(make_model("llama", seed=seed), 4)
    draft.config.nested = {"mask_token_id": 5, "kept": 1}
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return draft


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    root = tmp_path_factory.mktemp("hub")
    save_draft(root / "draft", small_tokenizer)
    save_draft(root / "other", small_tokenizer, seed=4)
    save_draft(root / "trained", small_tokenizer)
    (root / "trained" / "provenance.json").write_text(json.dumps({"base": "org/small", "step": 30}))
    add_head(save_draft(root / "headed", small_tokenizer), 0.5).save_pretrained(root / "headed")
    # Config and tokenizer of a target; its weights are never read.
    make_model("qwen3", vocab_size=151936).config.save_pretrained(root / "target")
    small_tokenizer.save_pretrained(root / "target")
    return root


class Hub:
    """Stands in for `HfApi`: repositories as folders, and the calls that changed them."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", kwargs))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, branch, **kwargs):
        self.calls.append(("create_branch", branch))

    def file_exists(self, repo_id, filename, revision=None):
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, repo_id, folder_path, delete_patterns, **kwargs):
        """As the Hub does in one commit: what matches the patterns goes, what is uploaded comes."""
        self.calls.append(("upload_folder", kwargs))
        there = [path for path in (self.root / repo_id).rglob("*") if path.is_file()]
        for path in filter_repo_objects(
            there, allow_patterns=delete_patterns, key=lambda path: path.relative_to(self.root / repo_id).as_posix()
        ):
            path.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def files(self, repo_id):
        """Contents of a repository by path."""
        folder = self.root / repo_id
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(draft_model, "HfApi", hub)
    return hub


def test_a_pushed_draft_loads_back_the_same(folders, hub):
    draft = PardDraftModel.from_pretrained(folders / "draft")

    draft.push_to_hub("org/draft")

    loaded = PardDraftModel.from_pretrained(hub.root / "org" / "draft")
    assert torch.equal(loaded.lm_head.weight, draft.lm_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.draft(ids), draft.draft(ids))
    assert (loaded.mask_token_id, loaded.num_assistant_tokens) == (MASK_TOKEN_ID, 4)


def test_a_pushed_repository_holds_what_engines_need(folders, hub):
    """Safetensors, one mask key, tokenizer and card; no path of this machine."""
    PardDraftModel.from_pretrained(folders / "draft").push_to_hub("org/draft")

    files = hub.files("org/draft")
    config = json.loads(files["config.json"])
    assert (config["pard_token"], config["spd_type"]) == (MASK_TOKEN_ID, "pard")
    assert not any(f'"{key}"'.encode() in files["config.json"] for key in OTHER_MASK_KEYS)
    assert config["nested"] == {"kept": 1}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert files.keys() == {*names, "tokenizer.json", "tokenizer_config.json"}
    assert b'"org/draft"' in files["README.md"]
    for path, content in files.items():
        assert str(Path.home()).encode() not in content, path
        assert str(folders).encode() not in content, path


def test_a_push_is_one_upload_with_what_the_caller_states(folders, hub):
    draft = PardDraftModel.from_pretrained(folders / "draft")

    draft.push_to_hub("org/draft", private=True, revision="v2", commit_message="Better")

    names = [name for name, _ in hub.calls]
    calls = dict(hub.calls)
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert calls["create_repo"] == {"private": True, "exist_ok": True}
    assert calls["create_branch"] == calls["upload_folder"]["revision"] == "v2"
    assert calls["upload_folder"]["commit_message"] == "Better"
    assert not calls["upload_folder"]["create_pr"]


def test_heads_are_pushed_and_taken_away_again(folders, hub):
    """A head that stayed behind would be loaded with a draft that it was not trained on."""
    headed = PardDraftModel.from_pretrained(folders / "headed")
    headed.push_to_hub("org/headed")
    ids = torch.tensor([[5, 6, 7]])

    assert {name for name in hub.files("org/headed") if "/" in name} == set(ADDON_FILES[:2])
    assert b"correction head" in hub.files("org/headed")["README.md"]
    assert torch.equal(PardDraftModel.from_pretrained(hub.root / "org" / "headed").draft(ids), headed.draft(ids))

    draft = PardDraftModel.from_pretrained(folders / "draft")
    draft.push_to_hub("org/headed")

    assert not any("/" in name for name in hub.files("org/headed"))
    assert torch.equal(PardDraftModel.from_pretrained(hub.root / "org" / "headed").draft(ids), draft.draft(ids))


def test_a_card_is_written_once_and_provenance_comes_along(folders, hub):
    trained = PardDraftModel.from_pretrained(folders / "trained")

    trained.push_to_hub("org/trained")

    assert b"base_model: org/small" in hub.files("org/trained")["README.md"]
    assert json.loads(hub.files("org/trained")["provenance.json"])["step"] == 30
    (folders / "trained" / "README.md").write_text(f"---\ntags: [pard]\n---\n{UNNAMED_DRAFT}, rank 8")
    trained.push_to_hub("org/carded", tags=["code"])
    assert hub.files("org/carded")["README.md"] == b"---\ntags:\n- pard\n- code\n---\norg/carded, rank 8"
    (hub.root / "org" / "trained" / "README.md").write_text("Edited by its owner")
    trained.push_to_hub("org/trained")
    assert hub.files("org/trained")["README.md"] == b"Edited by its owner"


def test_the_tokenizer_beside_the_checkpoint_comes_along(folders, hub):
    PardDraftModel.from_pretrained(folders / "draft").push_to_hub("org/draft")

    assert hub.files("org/draft")["tokenizer.json"] == (folders / "draft" / "tokenizer.json").read_bytes()


def test_a_mask_token_that_text_contains_is_not_pushed(small_tokenizer, hub):
    """Refused before anything is created on the Hub."""
    draft = PardDraftModel.from_causal_lm(make_model("llama"), 50)

    with pytest.raises(ValueError, match="never produces"):
        draft.push_to_hub("org/draft", tokenizer=small_tokenizer)
    assert hub.calls == []


def test_a_plain_checkpoint_is_not_a_draft(tmp_path):
    make_model("llama").save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="pard train"):
        PardDraftModel.from_pretrained(tmp_path)


def ask(calls, home, **environment):
    """Run calls in a process of their own with the given cache and environment."""
    unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    paths = os.pathsep.join(filter(None, (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))))
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": CLOSED_PORT, "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env={**inherited, **settings, **environment},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def lay_out_cache(home, repo_id, folder):
    """What a download leaves: blobs under their hashes, snapshots of links to them, and refs that name snapshots."""
    cache = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = cache / "snapshots" / COMMIT
    for path in (cache / "blobs", cache / "refs", snapshot):
        path.mkdir(parents=True)
    for path in folder.iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in ("main", "v1"):
        (cache / "refs" / ref).write_text(COMMIT)


def test_the_cache_suffices_offline(folders, tmp_path):
    """With `HF_HUB_OFFLINE=1` the cache gives drafts by id and revision, known drafts of targets, tokenizers."""
    lay_out_cache(tmp_path, "org/draft", folders / "draft")
    lay_out_cache(tmp_path, "org/Qwen3-tuned", folders / "target")
    lay_out_cache(tmp_path, "amd/PARD-Qwen3-0.6B", folders / "other")
    target = str(folders / "target")
    loads = [("load", ["org/draft"]), ("load", ["org/draft", "v1"]), ("load", ["org/draft", COMMIT])]
    known = [("load_for", ["org/Qwen3-tuned"]), ("load_for", [target, 3]), ("load_for_live", [target])]
    others = [("encode", ["org/draft", "abc"]), ("check", ["org/draft"]), ("load", ["org/missing"])]

    outcomes = ask([*loads, *known, *others], tmp_path, HF_HUB_OFFLINE="1")

    *values, missing = [outcome.get("value", outcome) for outcome in outcomes]
    assert values[0] == values[1] == values[2]
    assert values[0][:2] == [MASK_TOKEN_ID, 4]
    assert [value[1] for value in values[3:6]] == [4, 3, 4]
    assert len(values[6]) == 3
    assert values[7] == []
    assert missing["is_os_error"]
    assert "cached files" in missing["message"]


def test_with_the_network_down_local_folders_load_and_the_rest_is_an_os_error(folders, tmp_path):
    """In the words of `huggingface_hub`; loading by Hub id takes it five attempts, half a minute, and is left out."""
    calls = [
        ("load", [str(folders / "draft")]),
        ("check", ["org/draft"]),
        ("export", ["org/draft", str(tmp_path / "out")]),
    ]

    local, *failures = ask(calls, tmp_path / "home")

    assert "value" in local
    assert all(failure["is_os_error"] for failure in failures), failures
    assert not (tmp_path / "out").exists()
