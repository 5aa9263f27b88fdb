"""Packed heads attend as the host's heads do."""

import pytest
import torch
from families import make_draft, make_model, make_prompts
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pard_hf import with_pard
from pard_hf.generation.attention import packed_attention, sdpa_packed_forward


@pytest.mark.parametrize("num_queries", [1, 5, 70])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("has_mask", [True, False])
def test_packed_heads_equal_repeated_ones(num_queries, num_kv_heads, has_mask):
    query = torch.randn(3, 6, num_queries, 8)
    key, value = torch.randn(3, 80, num_kv_heads, 8).transpose(1, 2), torch.randn(3, num_kv_heads, 80, 8)
    mask = torch.rand(3, 1, num_queries, 80) < 0.5 if has_mask else None
    if mask is not None:
        mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // num_kv_heads, False

    ours, _ = sdpa_packed_forward(module, query, key, value, mask, scaling=0.3)

    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


def test_models_attend_as_before_afterwards():
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    seen = []
    target.register_forward_pre_hook(lambda model, *_: seen.append(model.config._attn_implementation))

    with_pard(target).generate(**make_prompts(1), assistant_model=draft, max_new_tokens=6)

    assert set(seen) == {"sdpa_packed"}
    assert target.config._attn_implementation == draft.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError), packed_attention(target):
        raise RuntimeError
    assert target.config._attn_implementation == "sdpa"


def test_eager_attention_stays_eager():
    target = make_model("llama")
    target.set_attn_implementation("eager")

    with packed_attention(target):
        assert target.config._attn_implementation == "eager"
    assert target.config._attn_implementation == "eager"
