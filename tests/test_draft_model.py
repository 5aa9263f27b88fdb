"""A draft is an ordinary checkpoint: AMD's layout in, AMD's layout out."""

import json

import pytest
from device import DEVICE, torch
from families import FAMILIES, load_draft, make_draft, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pard_hf import PardDraftModel


@pytest.fixture
def amd_folder(tmp_path):
    """What AMD's script writes: an ordinary directory with two more keys in its config."""
    model = make_model("qwen2", seed=3)
    model.config.pard_token, model.config.spd_type = 99, "pard"
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_live_model_becomes_a_draft_in_place(family):
    model = make_model(family)
    names = list(model.state_dict())

    draft = PardDraftModel.from_causal_lm(model, mask_token_id=99)

    assert draft is model
    assert isinstance(draft, PardDraftModel)
    assert isinstance(draft, PreTrainedModel)
    assert list(draft.state_dict()) == names
    assert (draft.mask_token_id, draft.num_assistant_tokens) == (99, 12)


def test_loads_what_amd_writes(amd_folder):
    draft = PardDraftModel.from_pretrained(amd_folder, dtype=torch.bfloat16, attn_implementation="eager")

    assert isinstance(draft, PardDraftModel)
    assert draft.mask_token_id == 99
    assert draft.dtype == torch.bfloat16
    assert draft.config._attn_implementation == "eager"
    assert draft.num_assistant_tokens == 12


def test_writes_what_engines_load(amd_folder, tmp_path):
    """`pard_token` and `spd_type`, no other mask key, the base model's architecture and tensor names."""
    out = tmp_path / "out"
    draft = PardDraftModel.from_pretrained(amd_folder, num_assistant_tokens=6)
    draft.save_pretrained(out)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["pard_token"], config["spd_type"]) == (99, "pard")
    assert not {"mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config"} & config.keys()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 6
    assert generation["num_assistant_tokens_schedule"] == "constant"
    assert generation["assistant_confidence_threshold"] == 0.0
    theirs, ours = load_file(amd_folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert PardDraftModel.from_pretrained(out).num_assistant_tokens == 6
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Qwen2ForCausalLM"


class LowRank(torch.nn.Module):
    """What an adapter puts in a linear layer's place, under the names that peft gives."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, states):
        return self.base_layer(states) + self.lora_B["default"](self.lora_A["default"](states))

    def merged(self):
        self.base_layer.weight.data += self.lora_B["default"].weight.data @ self.lora_A["default"].weight.data
        return self.base_layer


def add_adapter(draft):
    draft.model.layers[1].self_attn.q_proj = LowRank(draft.model.layers[1].self_attn.q_proj).to(DEVICE)


def add_parametrization(draft):
    torch.nn.utils.parametrizations.weight_norm(draft.model.layers[0].mlp.up_proj)


def drop_a_layer(draft):
    del draft.model.layers[1]


def widen(draft):
    draft.model.embed_tokens = torch.nn.Embedding(104, 32)


def leave_the_config_behind(draft):
    draft.lm_head = torch.nn.Linear(32, 100, bias=True)


CHANGES = {
    "lora_[AB].default.weight": add_adapter,
    "parametrizations.weight.original": add_parametrization,
    "model.layers.1": drop_a_layer,
    "embed_tokens.weight": widen,
    "lm_head.bias": leave_the_config_behind,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_be_loaded_as_another_draft_is_not_saved(tiny_draft, tmp_path, name):
    """Names and shapes that the class and the config do not have are lost, or made up, when the draft is loaded."""
    CHANGES[name](tiny_draft)

    with pytest.raises(ValueError, match=f"Expected the weights of `LlamaForCausalLM`.*{name}.*another draft"):
        tiny_draft.save_pretrained(tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
    with pytest.raises(ValueError, match=name):
        tiny_draft.save_pretrained(tmp_path / "draft", state_dict=tiny_draft.state_dict())


def test_a_merged_adapter_is_saved(tiny_draft, tmp_path):
    add_adapter(tiny_draft)
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny_draft.draft(ids)
    attention = tiny_draft.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.merged()

    tiny_draft.save_pretrained(tmp_path)

    torch.testing.assert_close(load_draft(tmp_path).draft(ids), expected)


def test_a_draft_under_peft_is_saved_once_merged(tiny_draft, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_draft, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = tiny_draft.draft(torch.tensor([[5, 6, 7]]))

    with pytest.raises(ValueError, match="merge_and_unload"):
        tiny_draft.save_pretrained(tmp_path / "draft")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "draft")

    got = load_draft(tmp_path / "draft").draft(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_drafts_of_all_families_are_saved(family, is_tied, tmp_path):
    draft = PardDraftModel.from_causal_lm(make_model(family, tie_word_embeddings=is_tied), 99)
    state = torch.get_rng_state()

    draft.save_pretrained(tmp_path)

    assert torch.equal(torch.get_rng_state(), state)
    expected = draft.draft(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(load_draft(tmp_path).draft(torch.tensor([[5, 6, 7]])), expected)


def test_other_mask_keys_are_dropped():
    """vLLM reads `mask_token_id` before `pard_token`: a stray one would win."""
    model = make_model("llama")
    model.config.mask_token_id = 5

    assert "mask_token_id" not in PardDraftModel.from_causal_lm(model, 99).config.to_dict()


def test_one_forward_gives_all_proposals(tiny_draft):
    forwards = []
    tiny_draft.register_forward_hook(lambda *_: forwards.append(1))

    scores = tiny_draft.draft(torch.tensor([[5, 6, 7]]), num_assistant_tokens=4)

    assert scores.shape == (1, 4, 100)
    assert len(forwards) == 1
    assert (scores[..., 99] == -torch.inf).all()


def test_proposals_do_not_depend_on_padding_or_cache(tiny_draft):
    """Left padding is invisible, and a cache over earlier tokens changes nothing."""
    from transformers import DynamicCache

    ids = torch.tensor([[5, 6, 7, 8]])
    expected = tiny_draft.draft(ids)
    padded = tiny_draft.draft(torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    cache = DynamicCache(config=tiny_draft.config)
    tiny_draft.draft(ids[:, :2], past_key_values=cache)

    assert cache.get_seq_length() == 2  # real tokens only
    torch.testing.assert_close(padded, expected)
    torch.testing.assert_close(tiny_draft.draft(ids, past_key_values=cache), expected)


@pytest.mark.parametrize("count", [0, -2, 128])
def test_draft_checks_its_count(count):
    with pytest.raises(ValueError, match="num_assistant_tokens"):
        make_draft(make_model("llama")).draft(torch.tensor([[5, 6]]), num_assistant_tokens=count)


def test_no_draft_from_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        make_draft(make_model("llama")).draft(torch.zeros(1, 0).long())
    with pytest.raises(ValueError, match="transformers model"):
        PardDraftModel.from_causal_lm(torch.nn.Linear(2, 2), 1)


def test_plain_generate_of_a_draft_is_the_base_models(tiny_draft):
    base = make_model("llama", seed=3)
    ids = torch.tensor([[5, 6, 7]])
    expected = base.generate(ids, max_new_tokens=8, do_sample=False)

    draft = PardDraftModel.from_causal_lm(base, 99)

    assert torch.equal(draft.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_checkpoint_without_mask_token_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="has no `pard_token`"):
        PardDraftModel.from_pretrained(tmp_path)
    assert PardDraftModel.from_pretrained(tmp_path, mask_token_id=98).mask_token_id == 98


@pytest.mark.parametrize("mask_token_id", [-1, 100, "99", None])
def test_mask_token_outside_the_vocabulary_is_refused(mask_token_id):
    model = make_model("llama")
    before = str(model.config)

    with pytest.raises(ValueError, match=r"an id in \[0, 100\)"):
        PardDraftModel.from_causal_lm(model, mask_token_id)
    assert str(model.config) == before
    assert not isinstance(model, PardDraftModel)


def test_pickled_weights_are_refused_unless_asked_for(amd_folder):
    """Pickle can run code; the user has to ask for it."""
    state = load_file(amd_folder / "model.safetensors")
    (amd_folder / "model.safetensors").unlink()
    torch.save(state, amd_folder / "pytorch_model.bin")

    with pytest.raises(OSError, match="safetensors"):
        PardDraftModel.from_pretrained(amd_folder)
    assert PardDraftModel.from_pretrained(amd_folder, use_safetensors=False).mask_token_id == 99


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))

    with pytest.raises(ValueError, match="decoder-only"):
        PardDraftModel.from_causal_lm(model, 19)
