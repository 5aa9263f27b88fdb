"""A model enlarged to other sizes gives the same texts, and its new weights are not zeros."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from families import make_model, make_prompts
from transformers import AutoModelForCausalLM

from benchmarks.scaling import SHAPES, Shape, enlarge, enlarge_pair, enlarged_config
from pard_hf import PardDraftModel, load_pair

SAME = Shape("llama", 32, 64, 2, 4, 2, 8, 100, False)
LARGER = Shape("llama", 80, 112, 5, 10, 5, 16, 150, False)
SHAPE_CASES = {
    "same": SAME,
    "hidden size": replace(SAME, hidden_size=44),
    "one coordinate": replace(SAME, hidden_size=33, num_attention_heads=11, num_key_value_heads=11),
    "hidden size twice": replace(SAME, hidden_size=64),
    "units": replace(SAME, intermediate_size=100),
    "layers": replace(SAME, num_hidden_layers=5),
    "heads": replace(SAME, num_attention_heads=8),
    "groups of one": replace(SAME, num_attention_heads=8, num_key_value_heads=8),
    "groups of all": replace(SAME, num_attention_heads=8, num_key_value_heads=1),
    "head dimension twice": replace(SAME, head_dim=16),
    "head dimension four times": replace(SAME, head_dim=32),
    "vocabulary": replace(SAME, hidden_size=36, vocab_size=257),
    "all": LARGER,
    "all of qwen2": replace(LARGER, architecture="qwen2"),
}


def make_small(tied=False, **changes):
    """A Llama whose norms weigh, and whose `rms_norm_eps` shows."""
    model = tiny_llama(tie_word_embeddings=tied, rms_norm_eps=1e-2, **changes)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0)
    return model


@torch.no_grad()
def relative_error(small, big):
    """Largest difference of logits over the largest logit, on a batch with padding and on a hundred ids."""
    errors = []
    for inputs in (make_prompts(3), {"input_ids": torch.randperm(100)[None]}):
        ours, theirs = (model(**inputs).logits[..., : small.config.vocab_size].float() for model in (big, small))
        errors.append((ours - theirs).abs().max() / theirs.abs().max())
    return max(errors)


@pytest.fixture(scope="module")
def bundled():
    return load_pair(dtype="float32")


@pytest.mark.parametrize("name", SHAPE_CASES)
@pytest.mark.parametrize("tied", ["untied", "tied", "tied to untied"])
def test_logits_and_texts_are_the_small_models(name, tied):
    small = make_small(tied=tied != "untied")
    shape = replace(SHAPE_CASES[name], tie_word_embeddings=tied == "tied")
    before = {name: weight.clone() for name, weight in small.state_dict().items()}

    big = enlarge(small, shape)

    assert relative_error(small, big) < 1e-5
    prompts = make_prompts(3)
    texts = [model.generate(**prompts, max_new_tokens=8, do_sample=False) for model in (small, big)]
    assert torch.equal(*texts)
    assert big.config.model_type == shape.architecture
    assert big.config.tie_word_embeddings == shape.tie_word_embeddings
    for size in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(big.config, size) == getattr(shape, size)
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("big_heads", [(12, 12), (12, 2), (12, 4)])
def test_heads_of_any_grouping_find_a_place(heads, big_heads):
    small = make_small(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8, hidden_size=36)
    shape = replace(LARGER, hidden_size=96, num_attention_heads=big_heads[0], num_key_value_heads=big_heads[1])

    big = enlarge(small, shape)

    assert relative_error(small, big) < 1e-5
    assert big.config.num_key_value_heads >= big_heads[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_new_ids_never_win(dtype, tied):
    """Rows of zeros would: here every logit of the small model is negative at some positions."""
    ids = torch.arange(100)[None]
    for seed in range(3):
        small = make_small(tied, seed=seed, initializer_range=1.0)
        with torch.no_grad():
            # Rows that are nearly the same have logits of one sign.
            small.lm_head.weight.copy_(3.0 * torch.randn(32) + 0.05 * small.lm_head.weight)
            small.model.norm.weight *= -small(ids).logits.mean().sign()

            big = enlarge(small, replace(LARGER, tie_word_embeddings=tied, vocab_size=1000), dtype=dtype)
            logits = big(ids).logits.float()

        old, new = logits[..., :100], logits[..., 100:]
        assert (old.amax(-1) < 0).any()
        assert (new.amax(-1) < old.amin(-1)).all()
        # Nor are they sampled.
        assert logits.softmax(-1)[..., 100:].max() < 1e-20
        assert dtype != torch.float32 or relative_error(small, big) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_16_bit_is_as_exact_as_the_small_model_is(bundled, role, dtype):
    small = getattr(bundled, role)
    big = enlarge(small, Shape("llama", 300, 640, 14, 10, 5, 64, 3000, True), dtype=dtype)

    assert relative_error(small, big) < 2 * relative_error(small, copy.deepcopy(small).to(dtype))


def test_new_weights_are_random_and_repeatable():
    """Zeros are only where a random weight would change the function: few, in every matrix."""
    small = tiny_llama(tie_word_embeddings=True)
    shape = Shape("llama", 512, 1024, 8, 16, 8, 32, 4000, True)

    big, again, other = (enlarge(small, shape, seed=seed) for seed in (0, 0, 1))

    for name, weight in big.named_parameters():
        assert (weight == 0).float().mean() < 0.1, name
        assert torch.equal(weight, again.get_parameter(name))
        if weight.dim() == 2:
            # Half of a normal distribution lies within 0.67 standard deviations.
            assert 0.8 < weight.abs().median() / (0.67 * small.config.initializer_range) < 1.2
        assert not torch.equal(weight, other.get_parameter(name))
    assert relative_error(small, other) < 1e-5


@pytest.mark.parametrize("tree_size", [0, 24])
def test_bundled_pair_says_the_same_and_accepts_the_same(bundled, tree_size):
    big = enlarge_pair(
        bundled,
        Shape("llama", 320, 640, 14, 10, 5, 64, 3000, False),
        Shape("qwen2", 192, 384, 5, 6, 2, 64, 3200, True),
    )

    assert isinstance(big.draft, PardDraftModel)
    assert big.draft.mask_token_id == bundled.draft.mask_token_id
    assert big.draft.num_assistant_tokens == bundled.draft.num_assistant_tokens
    for text in ("def add(a, b):\n", "Sara has 4 bags with 6 apples each. How many apples does she have?\n"):
        inputs = bundled.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        outputs = [
            pair.target.generate(
                **inputs,
                assistant_model=pair.draft,
                assistant_tree_size=tree_size,
                max_new_tokens=32,
                do_sample=False,
                return_dict_in_generate=True,
            )
            for pair in (bundled, big)
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert outputs[0].stats == outputs[1].stats
        assert big.draft.correction_head.gate.weight[:, 96:].any()  # New weights are read, and read zeros.
        assert min(outputs[1].stats.num_rounds, outputs[1].stats.num_accepted) > 2
        plain = big.target.generate(**inputs, max_new_tokens=32, do_sample=False)
        assert torch.equal(plain, outputs[1].sequences)


def test_settings_of_generation_are_kept(bundled):
    for model in (bundled.target, bundled.draft):
        big = enlarge(model, replace(SHAPES["cpu-0.15b"], num_hidden_layers=12, vocab_size=2048), dtype=torch.bfloat16)
        assert big.generation_config.to_dict() == model.generation_config.to_dict()
        assert big.config.eos_token_id == model.config.eos_token_id
        assert big.config.max_position_embeddings == 32768
        assert big.dtype == torch.bfloat16


def test_saved_and_loaded_draft_is_a_draft(bundled, tmp_path):
    big = enlarge(bundled.draft, Shape("qwen2", 128, 256, 4, 4, 4, 32, 2100, True), max_position_embeddings=4096)
    big.save_pretrained(tmp_path)

    loaded = PardDraftModel.from_pretrained(tmp_path)

    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded.draft(ids), big.draft(ids))
    assert loaded.mask_token_id == bundled.draft.mask_token_id
    assert loaded.config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("name", "role", "billions", "num_key_value_heads"),
    [
        ("llama-3.1-8b", "target", 8.03, 8),
        ("llama-3.2-1b", "draft", 1.236, 8),
        ("qwen2.5-7b", "target", 7.616, 7),
        ("qwen2.5-0.5b", "draft", 0.494, 7),
        ("cpu-1.2b", "target", 1.2, 8),
        ("cpu-0.15b", "draft", 0.15, 8),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(bundled, name, role, billions, num_key_value_heads):
    """With the published key-value heads, that is, of which Qwen has too few for the bundled pair."""
    config = enlarged_config(getattr(bundled, role), name)
    assert config.num_key_value_heads == num_key_value_heads

    config.num_key_value_heads = SHAPES[name].num_key_value_heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    tolerance = 1.5e-2 if name.startswith("cpu") else 1e-3
    assert math.isclose(model.num_parameters() / 1e9, billions, rel_tol=tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 28}, "`hidden_size` to be at least the small model's 32, got 28"),
        ({"intermediate_size": 63}, "`intermediate_size`"),
        ({"num_hidden_layers": 1}, "`num_hidden_layers`"),
        ({"num_attention_heads": 2}, "`num_attention_heads`"),
        ({"head_dim": 4}, "`head_dim`"),
        ({"head_dim": 12}, "multiple of the small model's 8, .* got 12"),
        ({"vocab_size": 99}, "`vocab_size`"),
        ({"vocab_size": 101}, "2 more hidden coordinates .* got 0 more"),
        ({"tie_word_embeddings": True}, "Untie it"),
        ({"architecture": "gpt2"}, "'llama' or 'qwen2', got 'gpt2'"),
    ],
)
def test_a_shape_that_cannot_hold_the_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        enlarge(tiny_llama(), replace(SAME, **changes))


def test_models_and_names_not_known_are_refused():
    with pytest.raises(ValueError, match="got 'llama-4'"):
        enlarge(tiny_llama(), "llama-4")
    with pytest.raises(ValueError, match="without biases"):
        enlarge(tiny_llama(attention_bias=True), SAME)
    with pytest.raises(ValueError, match="default rotary"):
        enlarge(tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), SAME)
    with pytest.raises(ValueError, match="Expected a `LlamaForCausalLM`"):
        enlarge(make_model("gpt2"), SAME)
