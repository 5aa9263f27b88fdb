"""Options of a draft on the generation config: they reach the loop, are saved and loaded, and stay out of models."""

import pytest
from families import make_draft, make_model, make_prompts, make_self_draft
from transformers import GenerationConfig

from pard_hf import PardGenerationConfig, with_pard
from pard_hf.generation.config import OPTIONS

LIMITS = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


def drafted_by(config, **kwargs):
    """Proposals of a call: a tree of 16 nodes makes more of them than a chain of 5."""
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=5))
    output = target.generate(**make_prompts(1), generation_config=config, assistant_model=draft, **kwargs)
    return output.stats.num_drafted / output.stats.num_rounds


def test_options_of_the_config_reach_the_loop():
    assert drafted_by(PardGenerationConfig(**LIMITS)) <= 5
    assert drafted_by(PardGenerationConfig(**LIMITS, assistant_tree_size=16)) > 12
    assert drafted_by(PardGenerationConfig(**LIMITS, assistant_tree_size=16), assistant_tree_size=0) <= 5


def test_options_survive_saving(tmp_path):
    config = PardGenerationConfig(**LIMITS, assistant_tree_size=16, verification="ratio_test")
    config.save_pretrained(tmp_path)

    for loaded in (PardGenerationConfig.from_pretrained(tmp_path), GenerationConfig.from_pretrained(tmp_path)):
        assert loaded.assistant_tree_size == 16
        assert loaded.verification == "ratio_test"
        assert drafted_by(loaded, verification="sample_and_match") > 12


def test_a_models_own_config_gives_defaults():
    target, draft = with_pard(make_model("llama")), make_self_draft(make_model("llama"))
    target.generation_config = PardGenerationConfig(
        **LIMITS, eos_token_id=None, pad_token_id=0, assistant_tree_size=16
    )

    per_round = []
    for more in ({}, {"assistant_tree_size": 0}):
        stats = target.generate(**make_prompts(1), assistant_model=draft, **more).stats
        per_round.append(stats.num_drafted / stats.num_rounds)

    assert per_round[0] > 12
    assert per_round[1] <= 5


def test_a_call_writes_nothing_to_shared_configs():
    target, draft = with_pard(make_model("llama")), make_self_draft(make_model("llama"))
    given = GenerationConfig(**LIMITS)
    configs = (given, target.generation_config, draft.generation_config, target.config, draft.config)
    before = [dict(vars(config)) for config in configs]

    target.generate(**make_prompts(1), generation_config=given, assistant_model=draft, assistant_tree_size=8)
    target.generate(**make_prompts(1), **LIMITS, verification="sample_and_match", measure_rounds=True)

    assert [dict(vars(config)) for config in configs] == before


@pytest.mark.parametrize(
    "options", [{"verification": "guess"}, {"assistant_tree_size": -1}, {"assistant_tree_size": 2.5}]
)
def test_unknown_options_are_refused(options):
    target = with_pard(make_model("llama"))

    with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}` to be"):
        PardGenerationConfig(**options)
    with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}` to be"):
        target.generate(**make_prompts(1), **LIMITS, **options)
    assert set(options) <= set(OPTIONS)
