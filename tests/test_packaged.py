"""A draft in the small form proposes what the whole one does, and holds nothing of the target's twice."""

import pytest
from device import DEVICE, torch
from families import make_model

from pard_hf import PardDraftModel
from pard_hf.draft.correction_head import CorrectionHead
from pard_hf.draft.layers import base_from_layers
from pard_hf.draft.packaged import load_packaged, save_packaged


@pytest.fixture
def target():
    return make_model("llama", num_hidden_layers=3, tie_word_embeddings=True).eval()


def make_draft(target):
    torch.manual_seed(5)
    draft = PardDraftModel.from_causal_lm(base_from_layers(target, [0, 2]).to(DEVICE).eval(), 99, 5)
    draft.correction_head = CorrectionHead(100, 32, rank=7).to(DEVICE)
    torch.nn.init.normal_(draft.correction_head.output.weight)
    return draft


def test_proposals_are_those_of_the_whole_draft(tmp_path, target):
    draft = make_draft(target)
    save_packaged(draft, tmp_path)

    loaded = load_packaged(tmp_path, target)

    ids = torch.tensor([[1, 8, 30, 44, 9]], device=DEVICE)
    expected, got = (one.draft(ids)[..., :99].softmax(-1) for one in (draft, loaded))
    assert loaded.num_assistant_tokens == 5
    assert loaded.mask_token_id == 99
    assert 0 < (expected - got).abs().max() < 0.1


def test_weights_are_near_and_small(tmp_path, target):
    draft = make_draft(target)
    save_packaged(draft, tmp_path)
    weights = dict(draft.named_parameters())

    for name, weight in load_packaged(tmp_path, target).named_parameters():
        row = weights[name].abs().amax(-1, keepdim=True)
        assert ((weight - weights[name]).abs() <= 0.006 * row + 1e-6).all(), name
    own = sum(weight.numel() for name, weight in weights.items() if "embed" not in name)
    assert (tmp_path / "packaged.safetensors").stat().st_size < 2 * own


def test_embedding_is_the_targets_memory_and_moves_alone(tmp_path, target):
    save_packaged(make_draft(target), tmp_path)
    loaded = load_packaged(tmp_path, target)

    theirs, own = (model.get_input_embeddings().weight for model in (target, loaded))
    assert own.data_ptr() == theirs.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    loaded.to(torch.bfloat16)
    assert theirs.dtype == torch.float32


def test_another_target_is_refused(tmp_path, target):
    save_packaged(make_draft(target), tmp_path)

    with pytest.raises(ValueError, match=r"Expected the target this draft was made of.*\(100, 32\), got \(100, 48\)"):
        load_packaged(tmp_path, make_model("llama", hidden_size=48))
