"""The stock loop's contract."""

import pytest
from device import torch
from families import make_draft, make_model, make_prompts, make_self_draft

from pard_hf import PardCandidateGenerator


def make_generator(**changes):
    target = make_model("llama")
    settings = {"num_assistant_tokens": 4, "max_length": 30, "vocab_size": 100, **changes}
    return PardCandidateGenerator(make_self_draft(target), **settings)


def test_proposals_are_appended_and_need_no_logits():
    ids = make_prompts(1)["input_ids"]

    candidates, logits = make_generator().get_candidates(ids)

    assert candidates.shape == (1, 22)
    assert torch.equal(candidates[:, :18], ids)
    assert logits is None
    assert (candidates != 99).all()


def test_budget_shrinks_towards_the_end():
    """The bonus token needs no proposal."""
    generator = make_generator(max_length=21)
    ids = make_prompts(1)["input_ids"]

    assert generator.get_candidates(ids)[0].shape == (1, 20)
    assert generator.get_candidates(torch.cat([ids, ids[:, :2]], dim=1))[0].shape == (1, 20)


def test_cache_keeps_real_tokens_only():
    generator = make_generator()
    ids = make_prompts(1)["input_ids"]
    first, _ = generator.get_candidates(ids)
    generator.update_candidate_strategy(first[:, :20], None, 1)

    second, _ = generator.get_candidates(first[:, :20])

    fresh, _ = make_generator().get_candidates(first[:, :20])
    assert torch.equal(second, fresh)
    assert generator.cache.get_seq_length() == 20
    assert generator.stats.histogram == (0, 1)


def test_ids_beyond_the_targets_vocabulary_are_not_proposed():
    candidates, _ = make_generator(vocab_size=50).get_candidates(make_prompts(1)["input_ids"].clamp(max=49))

    assert (candidates < 50).all()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_sliding_draft_for_an_untouched_target(family, count):
    """The stock loop takes back one entry more than was proposed; a layer that forgot it would be one short."""
    target, prompts = make_model("llama"), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)

    draft = make_draft(make_model(family, seed=7), count)

    assert torch.equal(target.generate(**prompts, max_new_tokens=20, do_sample=False, assistant_model=draft), expected)
