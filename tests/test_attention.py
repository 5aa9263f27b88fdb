"""Grouped heads attend as the heads of transformers do, and only inside our calls."""

import copy

import pytest
from device import torch
from families import make_draft, make_model, make_prompts, make_self_draft
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pard_hf import with_pard, without_pard
from pard_hf.generation.kernels import grouped_attention


@pytest.mark.parametrize("num_queries", [1, 5, 70])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("has_mask", [True, False])
def test_grouped_heads_equal_repeated_ones(num_queries, num_kv_heads, has_mask):
    query = torch.randn(3, 6, num_queries, 8)
    key, value = torch.randn(3, 80, num_kv_heads, 8).transpose(1, 2), torch.randn(3, num_kv_heads, 80, 8)
    mask = torch.rand(3, 1, num_queries, 80) < 0.5 if has_mask else None
    if mask is not None:
        mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // num_kv_heads, False

    with grouped_attention():
        ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)

    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


def test_plain_forwards_keep_every_bit():
    target, prompts = make_model("llama"), make_prompts(3)
    seen = []
    module = target.model.layers[0].self_attn
    module.register_forward_hook(lambda *args: seen.append(args[2][0]))
    target(**prompts)
    expected = seen.pop()
    drafting = with_pard(target).generate(**prompts, assistant_model=make_self_draft(target), max_new_tokens=6)
    assert drafting.shape[1] == 24
    seen.clear()

    without_pard(target)(**prompts)

    assert torch.equal(seen.pop(), expected)


def test_models_keep_the_name_of_their_attention():
    """A model may compare the name, and a copy made during a call keeps what it finds."""
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    seen = []

    def look(model, *_):
        seen.extend((model.config._attn_implementation, copy.deepcopy(model.config)._attn_implementation))

    target.register_forward_pre_hook(look)

    with_pard(target).generate(**make_prompts(1), assistant_model=draft, max_new_tokens=6)

    assert set(seen) == {"sdpa"}
