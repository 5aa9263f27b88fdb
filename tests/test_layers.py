"""A base of a target's layers computes what those layers compute, and other targets are refused."""

import pytest
from device import DEVICE, torch
from families import make_model

from pard_hf.draft.layers import base_from_layers, decoder_layers

IDS = [[1, 5, 9, 40, 7, 7, 31]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "cohere"])
def test_all_layers_are_the_target(family):
    target = make_model(family).eval()
    number = target.config.get_text_config().num_hidden_layers

    base = base_from_layers(target, number).to(target.device).eval()

    torch.testing.assert_close(
        base(torch.tensor(IDS, device=DEVICE)).logits, target(torch.tensor(IDS, device=DEVICE)).logits
    )


@pytest.mark.parametrize("chosen", [2, [0, 3], [3, 1]])
def test_chosen_layers_are_those_of_the_target(chosen):
    """A target whose other layers add nothing computes the same."""
    target = make_model("llama", num_hidden_layers=4).eval()
    base = base_from_layers(target, chosen).to(target.device).eval()
    indices = list(range(chosen)) if isinstance(chosen, int) else chosen
    layers = decoder_layers(target)[1]
    kept = [layers[index] for index in indices]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    target.model.layers = torch.nn.ModuleList(kept)
    target.config.num_hidden_layers = len(kept)

    ids = torch.tensor(IDS, device=DEVICE)
    torch.testing.assert_close(base(ids).logits, target(ids).logits)
    assert base.config.num_hidden_layers == len(kept)


def test_layer_types_are_those_of_the_chosen_layers():
    types = ["sliding_attention", "full_attention"] * 2
    target = make_model("gemma2", num_hidden_layers=4, layer_types=types)

    base = base_from_layers(target, [1, 2, 3])

    assert base.config.layer_types == types[1:]
    assert target.config.layer_types == types


def test_the_base_owns_its_weights():
    target = make_model("llama")
    base = base_from_layers(target, 1)
    before = target.model.layers[0].self_attn.q_proj.weight.clone()

    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.zero_()
        base.get_input_embeddings().weight.zero_()

    torch.testing.assert_close(target.model.layers[0].self_attn.q_proj.weight, before)
    assert target.get_input_embeddings().weight.any()


@pytest.mark.parametrize("chosen", [0, 3, [], [0, 2], [-1]])
def test_layers_that_do_not_exist_are_refused(chosen):
    with pytest.raises(ValueError, match="Expected layers from 0 to 1 of the target"):
        base_from_layers(make_model("llama"), chosen)


def test_targets_whose_layers_differ_are_refused():
    target = make_model("llama")
    target.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)

    with pytest.raises(ValueError, match="Expected layers that are alike"):
        base_from_layers(target, 1)
