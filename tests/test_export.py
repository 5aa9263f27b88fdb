"""What vLLM and TensorRT-LLM need of a checkpoint: checked in words, and written."""

import json
import shutil

import pytest
import torch
from families import MASK_TOKEN_ID, VOCAB_SIZE, make_draft, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from pard_hf import PardDraftModel, bundled_pair
from pard_hf.cli import main
from pard_hf.hub import checkpoint
from pard_hf.hub.engines import Finding, check_draft, would_load
from pard_hf.hub.export import export_draft

PADDED = 128
OTHER_MASK_KEYS = {"mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config"}


@pytest.fixture
def tokenizer(bundled_like_tokenizer):
    """One that leaves the mask token's row, and the two before it, to padding."""
    vocabulary = json.loads(bundled_like_tokenizer.backend_tokenizer.to_str())
    entries = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = {token: index for token, index in entries.items() if index < MASK_TOKEN_ID - 2}
    backend = type(bundled_like_tokenizer.backend_tokenizer).from_str(json.dumps(vocabulary))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return type(bundled_like_tokenizer)(tokenizer_object=backend, **names)


def save_draft(folder, tokenizer, family="llama", dtype=torch.float32, max_shard_size="5GB", **changes):
    draft = make_draft(make_model(family, seed=3, **changes).to(dtype), 4)
    draft.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return draft


@pytest.fixture
def snapshot_of(monkeypatch):
    """Let a folder stand in for a repository of the Hub."""
    return lambda name, folder: monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda repo_id, **kwargs: {name: folder}[repo_id]
    )


@pytest.fixture
def draft_folder(tmp_path, tokenizer):
    folder = tmp_path / "draft"
    save_draft(folder, tokenizer)
    return folder


@pytest.fixture
def target_folder(tmp_path, tokenizer):
    """A target of the family with more padding rows; its weights are never read."""
    folder = tmp_path / "target"
    make_model("llama", vocab_size=PADDED).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_config(folder, name="config.json", remove=(), **changes):
    config = json.loads((folder / name).read_text())
    config.update(changes)
    for key in remove:
        config.pop(key, None)
    (folder / name).write_text(json.dumps(config))


def blocking(findings):
    return [finding for finding in findings if finding.is_blocking]


# Writing


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_exported_draft_proposes_the_same(tmp_path, tokenizer, family, tie_word_embeddings):
    """Padding rows change neither the other logits nor what is proposed."""
    changes = {"tie_word_embeddings": tie_word_embeddings}
    before = save_draft(tmp_path / "draft", tokenizer, family, **changes)
    ids = torch.randint(3, 90, (4, 9))

    folder = export_draft(tmp_path / "draft", tmp_path / "out", pad_vocab_to=PADDED)
    after = PardDraftModel.from_pretrained(folder)

    expected, proposed = before.draft(ids), after.draft(ids)
    assert proposed.shape == (4, 4, PADDED)
    assert torch.equal(proposed.argmax(-1), expected.argmax(-1))
    # The matrix product of another width may add up in another order.
    torch.testing.assert_close(proposed[..., :VOCAB_SIZE], expected, rtol=1e-5, atol=1e-5)
    assert after.config.tie_word_embeddings is tie_word_embeddings
    is_tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert is_tied is tie_word_embeddings
    for old, new in ((before.get_input_embeddings(), after.get_input_embeddings()),) + (
        (before.get_output_embeddings(), after.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:VOCAB_SIZE], old.weight)  # the mask token's row, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_padding_rows_never_win(tmp_path, tokenizer, tie_word_embeddings, dtype):
    """Their logit is the mean of the others', and their share of the probability at most their share of the rows."""
    save_draft(tmp_path / "draft", tokenizer, dtype=dtype, tie_word_embeddings=tie_word_embeddings)
    draft = PardDraftModel.from_pretrained(export_draft(tmp_path / "draft", tmp_path / "out", pad_vocab_to=PADDED))
    # Large and small, and with a mean: a zero row would win wherever all other logits are negative.
    states = torch.randn(20000, 32) * torch.logspace(-3, 2, 20000)[:, None] + torch.randn(1, 32)
    states = torch.cat([states, torch.zeros(1, 32)]).to(dtype)

    logits = draft.get_output_embeddings()(states).float()

    assert draft.dtype == dtype
    assert (logits.argmax(-1) < VOCAB_SIZE).all()
    share = logits.softmax(-1)[:, VOCAB_SIZE:].sum(-1)
    assert (share <= (PADDED - VOCAB_SIZE) / (PADDED - 1) * 1.01).all()
    others = torch.cat([logits[:, :MASK_TOKEN_ID], logits[:, MASK_TOKEN_ID + 1 : VOCAB_SIZE]], dim=-1)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(logits[:, -1], others.mean(-1), **tolerance)


def test_padding_row_of_a_head_with_bias(tmp_path, tokenizer):
    """A bias is part of the logit, so a padding row gets the mean of it as well."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    torch.nn.init.normal_(model.lm_head.bias)
    make_draft(model).save_pretrained(tmp_path / "draft")

    after = PardDraftModel.from_pretrained(export_draft(tmp_path / "draft", tmp_path / "out", pad_vocab_to=PADDED))

    bias = after.lm_head.bias
    expected = torch.cat([bias[:MASK_TOKEN_ID], bias[MASK_TOKEN_ID + 1 : VOCAB_SIZE]]).mean()
    torch.testing.assert_close(bias[VOCAB_SIZE:], expected.expand(PADDED - VOCAB_SIZE))


def test_the_target_gives_the_vocabulary(draft_folder, target_folder, tmp_path):
    """The checkpoint vLLM refuses is one it loads afterwards."""
    assert not would_load(check_draft(draft_folder, target_folder), "vLLM")

    out = export_draft(draft_folder, tmp_path / "out", target=target_folder)

    assert check_draft(out, target_folder) == []
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == PADDED
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["pard_token"], config["spd_type"]) == (MASK_TOKEN_ID, "pard")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (draft_folder / name).read_bytes()


def test_nothing_else_is_written(draft_folder, tmp_path):
    """No pickles, no training state, no temporary folder, and no trace of where it was made."""
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (draft_folder / name).write_bytes(b"0")
    edit_config(draft_folder, _name_or_path=str(draft_folder))

    out = export_draft(draft_folder, tmp_path / "deep" / "out")

    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # an engine runs as another user
    for path in out.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name


def test_stray_mask_keys_are_removed_everywhere(draft_folder, tmp_path):
    stray = {"mask_token_id": 5, "ptd_token_id": 5, "dflash_config": {"mask_token_id": 5}, "dspark_noise_token_id": 5}
    edit_config(draft_folder, **stray, nested={"mask_token_id": 5, "kept": 1})

    text = (export_draft(draft_folder, tmp_path / "out") / "config.json").read_text()

    assert not any(f'"{key}"' in text for key in OTHER_MASK_KEYS)
    assert json.loads(text)["nested"] == {"kept": 1}


def test_number_of_tokens_of_another_method_is_removed(draft_folder, tmp_path):
    edit_config(draft_folder, n_predict=3)

    out = export_draft(draft_folder, tmp_path / "out")

    assert check_draft(out) == []
    assert "n_predict" not in json.loads((out / "config.json").read_text())


def test_rope_is_written_for_readers_of_both_kinds(tmp_path, tokenizer):
    """Engines on transformers 4 read `rope_theta`, and take 10000 where only `rope_parameters` says otherwise."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    save_draft(tmp_path / "draft", tokenizer, rope_parameters={"rope_theta": 500000.0, **scaling})
    edit_config(tmp_path / "draft", remove=["rope_theta", "rope_scaling"])  # As transformers 5 writes it
    assert [finding.engine for finding in blocking(check_draft(tmp_path / "draft"))] == ["both"]

    out = export_draft(tmp_path / "draft", tmp_path / "out")

    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, scaling)
    assert check_draft(out) == []
    before, after = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "draft", out))
    assert after.rope_parameters == before.rope_parameters


def test_sharded_draft(tmp_path, tokenizer):
    before = save_draft(tmp_path / "draft", tokenizer, max_shard_size="30KB")
    assert (tmp_path / "draft" / "model.safetensors.index.json").exists()
    assert check_draft(tmp_path / "draft") == []

    after = PardDraftModel.from_pretrained(export_draft(tmp_path / "draft", tmp_path / "out"))

    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def test_training_checkpoint_takes_the_targets_tokenizer(draft_folder, target_folder, tmp_path):
    """A checkpoint of a run holds no tokenizer; the target's is the draft's."""
    for path in draft_folder.glob("tokenizer*"):
        path.unlink()

    out = export_draft(draft_folder, tmp_path / "out", target=target_folder)

    assert (out / "tokenizer.json").read_bytes() == (target_folder / "tokenizer.json").read_bytes()
    assert not list(export_draft(draft_folder, tmp_path / "bare").glob("tokenizer*"))


def test_larger_vocabulary_is_cut_where_it_is_padding(tmp_path, tokenizer, draft_folder, target_folder):
    wide = export_draft(draft_folder, tmp_path / "wide", pad_vocab_to=200)

    out = export_draft(wide, tmp_path / "out", target=target_folder)

    assert PardDraftModel.from_pretrained(out).get_input_embeddings().weight.shape[0] == PADDED
    cut, padded = (load_file(folder / "model.safetensors") for folder in (out, wide))
    assert torch.equal(cut["model.embed_tokens.weight"], padded["model.embed_tokens.weight"][:PADDED])


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(MASK_TOKEN_ID, "mask token"), (50, "tokenizer's largest id is 96")]
)
def test_vocabulary_in_use_is_never_cut(draft_folder, target_folder, tmp_path, vocab_size, message):
    edit_config(target_folder, vocab_size=vocab_size)

    with pytest.raises(ValueError, match=message):
        export_draft(draft_folder, tmp_path / "out", target=target_folder)
    assert not (tmp_path / "out").exists()


def test_what_no_engine_would_load_is_not_written(draft_folder, target_folder, tmp_path):
    """Export repairs keys and shapes; an id that the tokenizer produces is the user's to change."""
    edit_config(draft_folder, pard_token=50)

    with pytest.raises(ValueError, match="never produces"):
        export_draft(draft_folder, tmp_path / "out", target=target_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]


def test_what_one_engine_would_load_is_written(draft_folder, tmp_path, capsys):
    """A family that vLLM takes for another kind of draft is still one for TensorRT-LLM and transformers."""
    save = tmp_path / "mixed"
    save_draft(save, AutoTokenizer.from_pretrained(draft_folder), "gemma2")

    assert main(["export", str(save), "--output", str(tmp_path / "out")]) == 1

    printed = capsys.readouterr().out
    assert "vLLM >= 0.16: would not load it" in printed
    assert "TensorRT-LLM: would load it" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_export_says_that_its_folder_has_an_unlucky_name(draft_folder, tmp_path, capsys):
    assert main(["export", str(draft_folder), "--output", str(tmp_path / "dflash-out")]) == 1

    assert "method 'dflash'" in capsys.readouterr().out


def test_output_in_use_is_refused(draft_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export_draft(draft_folder, tmp_path / "empty") == tmp_path / "empty"
    before = (tmp_path / "empty" / "model.safetensors").stat()

    with pytest.raises(ValueError, match="not there yet or empty"):
        export_draft(draft_folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").stat() == before


def test_current_folder_is_no_output(draft_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    with pytest.raises(ValueError, match="other than the current one"):
        export_draft(draft_folder, ".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_vocab_to": 50}, "at least the draft's 100"),
        ({"pad_vocab_to": 128, "target": "x"}, "not both"),
        ({"target": "./nowhere"}, "folder or a Hub id"),
    ],
)
def test_bad_arguments_are_refused(draft_folder, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        export_draft(draft_folder, tmp_path / "out", **arguments)


def test_incomplete_weights_are_refused(draft_folder, tmp_path):
    """transformers would fill a missing tensor with noise."""
    tensors = load_file(draft_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match="up_proj"):
        export_draft(draft_folder, tmp_path / "out")


def test_weights_of_another_shape_are_refused(draft_folder, tmp_path):
    edit_config(draft_folder, intermediate_size=80)

    with pytest.raises(ValueError, match="cannot be loaded"):
        export_draft(draft_folder, tmp_path / "out")


# Checking


def test_bundled_draft_is_one_the_engines_load():
    findings = check_draft(bundled_pair().draft, bundled_pair().target)

    assert blocking(findings) == []
    assert would_load(findings, "vLLM")
    assert would_load(findings, "TensorRT-LLM")


def test_sound_draft_has_no_finding(draft_folder):
    assert check_draft(draft_folder) == []


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove_weights(folder)


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_tensor(folder):
    index = {"weight_map": {"lm_tail.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def lose_the_head(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")


def remove_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def edit(**changes):
    return lambda folder: edit_config(folder, **changes)


BOTH, VLLM = "both", "vLLM"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), BOTH, True, "has no config.json"),
    "invalid config": (lambda folder: (folder / "config.json").write_text("{"), BOTH, True, "not a JSON object"),
    "list as config": (lambda folder: (folder / "config.json").write_text("[]"), BOTH, True, "not a JSON object"),
    "no mask token": (edit(remove=["pard_token"]), BOTH, True, "no `pard_token`"),
    "mask token in words": (edit(pard_token="99"), BOTH, True, "an integer"),
    "mask token true": (edit(pard_token=True), BOTH, True, "an integer"),
    "AMD's default": (edit(pard_token=-1), BOTH, True, r"in \[0, 100\), got -1"),
    "mask token too large": (edit(pard_token=100), BOTH, True, r"in \[0, 100\), got 100"),
    "produced mask token": (edit(pard_token=50), BOTH, True, "never produces"),
    "nested mask token": (
        edit(remove=["pard_token"], language_config={"pard_token": 99}),
        BOTH,
        True,
        "`pard_token` stands in `language_config`",
    ),
    "mask_token_id": (edit(mask_token_id=5), VLLM, True, "`mask_token_id`.*before `pard_token`"),
    "the same mask_token_id": (edit(mask_token_id=99), VLLM, False, "`mask_token_id`"),
    "dspark": (edit(dspark_noise_token_id=5), VLLM, True, "`dspark_noise_token_id`"),
    "dspark null": (edit(dspark_noise_token_id=None), VLLM, True, "`dspark_noise_token_id`"),
    "dflash": (edit(dflash_config={"mask_token_id": 5}), VLLM, True, "`dflash_config`"),
    "ptd": (edit(ptd_token_id=5), VLLM, False, "`ptd_token_id`"),
    "other method": (edit(spd_type="pard2"), BOTH, False, "`spd_type`"),
    "no architecture": (edit(architectures=[]), BOTH, True, "names no architecture"),
    "other architecture": (edit(architectures=["LlamaModel"]), BOTH, True, "ForCausalLM"),
    "no vocabulary": (edit(remove=["vocab_size"]), BOTH, True, "`vocab_size`"),
    "embedding rows": (edit(vocab_size=104), BOTH, True, "100 rows"),
    "no weights": (remove_weights, BOTH, True, "no weights"),
    "pickled weights": (pickle_weights, BOTH, False, "pickle"),
    "truncated weights": (truncate_weights, BOTH, True, "truncated"),
    "lost shard": (lose_a_shard, BOTH, True, "model-00002-of-00002.safetensors"),
    "lost tensor": (lose_a_tensor, BOTH, True, "lm_tail.weight"),
    "broken index": (break_the_index, BOTH, True, "weight_map"),
    "lost head": (lose_the_head, BOTH, True, "lm_head.weight"),
    "no tokenizer": (remove_tokenizer, BOTH, False, "no tokenizer"),
    "broken tokenizer": (break_tokenizer, BOTH, False, "cannot be read"),
    "no K": (
        edit(name="generation_config.json", remove=["num_assistant_tokens"]),
        BOTH,
        False,
        "num_assistant_tokens",
    ),
    "no generation config": (
        lambda folder: (folder / "generation_config.json").unlink(),
        BOTH,
        False,
        "num_assistant_tokens",
    ),
    "n_predict that K does not fit": (edit(n_predict=3), VLLM, True, "`n_predict`.*got 3.*`pard export`"),
    "n_predict that K fits": (edit(n_predict=2), VLLM, False, "`n_predict`"),
    "n_predict larger than K": (edit(n_predict=9), VLLM, False, "`n_predict`"),
    "n_predict of none": (edit(n_predict=0), VLLM, True, "`n_predict`"),
    "n_predict in words": (edit(n_predict="3"), VLLM, True, "`n_predict`"),
    "unknown quantization": (edit(quantization_config={"quant_method": "qtip"}), VLLM, True, "`quant_method`.*'qtip'"),
    "quantization read by vLLM 0.16 only": (
        edit(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        VLLM,
        True,
        "'bitsandbytes'",
    ),
    "nameless quantization": (edit(quantization_config={"bits": 4}), VLLM, False, "`quant_method`, got none"),
    "M-RoPE": (
        edit(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}),
        VLLM,
        True,
        "M-RoPE",
    ),
    "M-RoPE beside the rope": (edit(mrope_section=[2, 1, 1]), VLLM, True, "M-RoPE"),
    "XD-RoPE": (edit(xdrope_section=[1, 1, 1, 1]), VLLM, True, "M-RoPE"),
    "layers of two kinds": (
        edit(layer_types=["sliding_attention", "full_attention"]),
        VLLM,
        True,
        "full_attention, sliding_attention.*--disable-hybrid-kv-cache-manager",
    ),
    "recurrent layers": (edit(layer_types=["linear_attention", "full_attention"]), VLLM, True, "one kind"),
    "impossible size": (edit(intermediate_size=-1), BOTH, True, "builds no causal LM"),
    "unknown model": (edit(model_type="never_heard_of"), BOTH, False, "never_heard_of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_draft_is_described(draft_folder, case):
    """One thing is wrong, and one finding says so."""
    breaks, engine, is_blocking, words = BROKEN[case]
    breaks(draft_folder)

    findings = check_draft(draft_folder)

    assert [(finding.engine, finding.is_blocking) for finding in findings] == [(engine, is_blocking)], findings
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(findings[0].message)
    assert str(draft_folder.parent) not in findings[0].message


@pytest.mark.parametrize("where", ["folder", "parent", "hub"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("EAGLE-llama", "eagle"),
        ("llama_Eagle3", "eagle3"),
        ("dflash", "dflash"),
        ("my-DSpark-draft", "dspark"),
        ("beagle", None),
        ("flash-eagle2", None),
    ],
)
def test_name_that_vllm_reads_as_another_method(draft_folder, tmp_path, monkeypatch, snapshot_of, name, method, where):
    """The name goes before `"method": "draft_model"`; a folder on the way counts, of a path as it is given."""
    if where == "hub":
        draft = f"org/{name}"
        snapshot_of(draft, draft_folder)
    else:
        draft = tmp_path / name if where == "folder" else tmp_path / name / "checkpoint"
        shutil.copytree(draft_folder, draft)

    findings = check_draft(draft)

    assert [(finding.engine, finding.is_blocking) for finding in findings] == ([(VLLM, True)] if method else [])
    assert method is None or f"method '{method}'" in findings[0].message
    assert str(tmp_path) not in "".join(finding.message for finding in findings)
    if where == "parent":
        monkeypatch.chdir(draft.parent)
        assert would_load(check_draft("checkpoint"), "vLLM")
        assert any("absolute path" in finding.message for finding in check_draft("checkpoint")) == bool(method)


@pytest.mark.parametrize(
    ("model_type", "architecture", "is_turned"),
    [
        ("qwen3_5_text", "Qwen3_5ForCausalLM", True),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", True),
        ("qwen3_next", "Qwen3NextForCausalLM", True),
        ("glm4_moe", "Glm4MoeForCausalLM", True),
        ("glm4_moe_lite", "Glm4MoeLiteForCausalLM", True),
        ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", True),
        ("exaone_moe", "ExaoneMoeForCausalLM", True),
        ("exaone4_5_text", "Exaone4_5ForCausalLM", True),
        ("mimo", "MiMoForCausalLM", True),
        ("deepseek_v3", "DeepseekV3ForCausalLM", True),
        ("longcat_flash", "LongcatFlashForCausalLM", True),
        ("mimo_mtp", "MiMoMTPModel", True),
        ("qwen3", "Qwen3ForCausalLM", False),
        ("qwen3_moe", "Qwen3MoeForCausalLM", False),
        ("glm4", "Glm4ForCausalLM", False),
        ("ernie4_5", "Ernie4_5ForCausalLM", False),
        ("exaone4", "Exaone4ForCausalLM", False),
        ("deepseek_v2", "DeepseekV2ForCausalLM", False),
        ("nemotron_h", "NemotronHForCausalLM", False),
    ],
)
def test_family_that_vllm_turns_into_mtp_layers(draft_folder, model_type, architecture, is_turned):
    edit_config(draft_folder, model_type=model_type, architectures=[architecture])

    said = [finding for finding in check_draft(draft_folder) if "(MTP)" in finding.message]

    assert [(finding.engine, finding.is_blocking) for finding in said] == ([(VLLM, True)] if is_turned else [])
    assert not is_turned or repr(model_type) in said[0].message


def test_n_predict_beside_no_k(draft_folder):
    """Without a stated K, only a value that divides every K is harmless."""
    edit_config(draft_folder, "generation_config.json", remove=["num_assistant_tokens"])
    for value, is_blocking in ((1, False), (2, True)):
        edit_config(draft_folder, n_predict=value)
        assert any(finding.is_blocking for finding in check_draft(draft_folder)) == is_blocking


def test_mtp_layers_that_the_config_declares(draft_folder):
    """NemotronH only where it has such layers."""
    edit_config(draft_folder, model_type="nemotron_h", num_nextn_predict_layers=1)
    assert any("(MTP)" in finding.message for finding in check_draft(draft_folder))


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("part", ["text_config", "thinker_config"])
def test_mrope_of_a_model_inside_another(draft_folder, part, key):
    rope = {"full_attention": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    inner = {key: rope if key == "rope_parameters" else rope["full_attention"], "vocab_size": VOCAB_SIZE}
    edit_config(draft_folder, **{part: inner if part == "text_config" else {"text_config": inner}})

    assert any("M-RoPE" in finding.message and finding.is_blocking for finding in check_draft(draft_folder))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed_tensors"},
        {"quant_method": "GPTQ", "bits": 4},
        {"quant_method": "auto-round"},
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
    ],
)
def test_quantization_that_vllm_reads(draft_folder, quantization):
    edit_config(draft_folder, quantization_config=quantization)

    assert check_draft(draft_folder) == []


LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3_ROPE = {**LINEAR_ROPE, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("ours", "theirs", "model_max_length", "reach"),
    [
        ({}, {}, None, None),
        ({}, {"max_position_embeddings": 4096}, None, 128),
        ({}, {"max_position_embeddings": 4096}, 128, None),
        ({}, {"max_position_embeddings": 64}, None, None),
        ({"n_positions": 64}, {}, None, 64),
        ({"max_position_embeddings": None, "seq_length": 64}, {}, None, 64),
        ({"max_position_embeddings": None}, {}, None, None),
        ({"rope_scaling": LINEAR_ROPE}, {"max_position_embeddings": 512}, None, None),
        ({"rope_parameters": LLAMA3_ROPE}, {"max_position_embeddings": 512}, None, 128),
        ({}, {"rope_scaling": LINEAR_ROPE}, None, 128),
    ],
)
def test_positions_are_counted_as_vllm_counts_them(draft_folder, target_folder, ours, theirs, model_max_length, reach):
    """By any of the keys, the rope's factor and the tokenizer that serves both. It loads, and drafts up to there."""
    edit_config(draft_folder, **ours)
    edit_config(target_folder, **theirs)
    edit_config(target_folder, "tokenizer_config.json", model_max_length=model_max_length)

    said = [finding for finding in check_draft(draft_folder, target_folder) if "positions" in finding.message]

    assert [(finding.engine, finding.is_blocking) for finding in said] == ([(BOTH, False)] if reach else [])
    assert reach is None or f"made for {reach} positions" in said[0].message


def test_target_whose_config_leaves_the_vocabulary_to_its_class(draft_folder, target_folder):
    """As published Gemma 3 does: engines read the config through its class."""
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}
    (target_folder / "config.json").write_text(json.dumps(config))
    size = AutoConfig.from_pretrained(target_folder).get_text_config().vocab_size

    said = [finding.message for finding in check_draft(draft_folder, target_folder)]

    assert any(f"the target's {size}, got {VOCAB_SIZE}" in message for message in said)
    assert not any("inf" in message.split() for message in said)


def test_target_that_says_no_number_of_positions(draft_folder, target_folder):
    edit_config(target_folder, remove=["max_position_embeddings"])

    assert not any("positions" in finding.message for finding in check_draft(draft_folder, target_folder))


@pytest.mark.parametrize("key", ["vision_config", "audio_config"])
def test_target_that_reads_images(draft_folder, target_folder, key):
    edit_config(target_folder, **{key: {}})

    said = [finding for finding in check_draft(draft_folder, target_folder) if "images" in finding.message]

    assert [(finding.engine, finding.is_blocking) for finding in said] == [(VLLM, False)]


def test_draft_is_compared_with_the_target(draft_folder, target_folder, tokenizer):
    edit_config(target_folder, max_position_embeddings=4096)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(target_folder)

    findings = check_draft(draft_folder, target_folder)

    assert [(finding.engine, finding.is_blocking) for finding in findings] == [
        (VLLM, True),
        (BOTH, False),
        (BOTH, False),
    ]
    assert "100" in findings[0].message
    assert "pard export" in findings[0].message
    assert "--max-model-len 128" in findings[1].message
    assert "1 token" in findings[2].message
    assert not would_load(findings, "vLLM")
    assert would_load(findings, "TensorRT-LLM")


def test_other_tokenizer_than_the_targets(draft_folder, tmp_path, bundled_like_tokenizer):
    target = tmp_path / "target"
    make_model("llama").config.save_pretrained(target)
    vocabulary = json.loads((draft_folder / "tokenizer.json").read_text())
    entries = vocabulary["model"]["vocab"]
    entries["A"], entries["B"] = entries["B"], entries["A"]
    shutil.copy(draft_folder / "tokenizer_config.json", target)
    (target / "tokenizer.json").write_text(json.dumps(vocabulary))

    (finding,) = check_draft(draft_folder, target)

    assert (finding.engine, finding.is_blocking) == (BOTH, True)
    assert "'A' for the draft and 'B' for the target" in finding.message


def test_weights_are_not_loaded(draft_folder, monkeypatch):
    """Headers say enough, whatever the size of the draft."""
    monkeypatch.setattr(PardDraftModel, "from_pretrained", None)
    header = (draft_folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(header[:8], "little")
    with (draft_folder / "model.safetensors").open("r+b") as file:
        file.truncate(length)  # and then a hole as large as the tensors: nothing there to read
        file.truncate(len(header))

    assert check_draft(draft_folder) == []


def test_broken_target_is_bad_input(draft_folder, target_folder):
    (target_folder / "config.json").unlink()

    with pytest.raises(ValueError, match="config.json"):
        check_draft(draft_folder, target_folder)


# The command line


def test_check_says_it_in_words(draft_folder, target_folder, capsys):
    assert main(["check", str(draft_folder)]) == 0
    assert capsys.readouterr().out.splitlines() == ["vLLM >= 0.16: would load it", "TensorRT-LLM: would load it"]

    assert main(["check", str(draft_folder), "--target", str(target_folder), "--json"]) == 1
    *words, last = capsys.readouterr().out.splitlines()
    assert words[:2] == ["vLLM >= 0.16: would not load it", "TensorRT-LLM: would load it"]
    assert words[2].startswith("must be fixed (vLLM): ")
    result = json.loads(last)
    assert result["engines"] == {"vLLM": False, "TensorRT-LLM": True}
    assert Finding(**result["findings"][0]).is_blocking


def test_export_writes_and_says_where(draft_folder, target_folder, tmp_path, capsys):
    out = tmp_path / "out"

    assert main(["export", str(draft_folder), "--output", str(out), "--target", str(target_folder)]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["draft"] == str(out)
    assert result["vocab_size"] == PADDED
    assert main(["check", str(out), "--target", str(target_folder)]) == 0


@pytest.mark.parametrize(
    "words", [["check", "./nowhere"], ["check", "a/b/c/d"], ["export", "./nowhere", "--output", "out"]]
)
def test_bad_input_ends_with_a_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"pard {words[0]}: Expected")
