"""Cases found by trying to break it; each failed once."""

import copy
import pickle

import pytest
from device import DEVICE, torch
from families import COMMON, make_draft, make_model, make_prompts, make_scripted_draft, make_self_draft, texts_of
from transformers import (
    EosTokenCriteria,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from pard_hf import PardDraftModel, with_pard, without_pard


def both(target, draft, prompts, **kwargs):
    kwargs = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    expected = without_pard(target).generate(**prompts, **kwargs)
    return expected, with_pard(target).generate(**prompts, **kwargs, assistant_model=draft)


def quiet(target):
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target.eval().to(DEVICE)


def make_chunked(layer_types):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{**COMMON, "intermediate_size": 32, "intermediate_size_mlp": 32},
        attention_chunk_size=8,
        layer_types=layer_types,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return quiet(Llama4ForCausalLM(config))


def make_gpt_neo():
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=100,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=8,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128,
        initializer_range=0.25,
    )
    return quiet(GPTNeoForCausalLM(config))


def make_longrope():
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    return quiet(LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=rope)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_chunked(["chunked_attention"] * 2),
        lambda: make_chunked(["chunked_attention", "full_attention"]),
        make_gpt_neo,
        make_longrope,
    ],
    ids=["chunked", "chunked and full", "gpt_neo", "longrope"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_that_slots_cannot_express(make, batch_size):
    target = make()

    expected, got = both(target, make_draft(make_model("llama", seed=3)), make_prompts(batch_size))

    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_sliding_draft_for_an_untouched_target(family, count):
    """The host takes one entry more back than was proposed; a layer that forgot it would be one short."""
    target, prompts = make_model("llama"), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)

    draft = make_draft(make_model(family, seed=7), count)

    assert torch.equal(target.generate(**prompts, max_new_tokens=20, do_sample=False, assistant_model=draft), expected)


def test_several_criteria_of_one_kind():
    target, prompts = make_model("llama"), make_prompts(1)
    free = target.generate(**prompts, max_new_tokens=20, do_sample=False)
    draft = make_scripted_draft(texts_of(free, prompts["attention_mask"]), 5)
    ends = [EosTokenCriteria(int(free[0, 18 + column])) for column in (5, 12)]
    lengths = [MaxLengthCriteria(30), MaxLengthCriteria(22)]

    for criteria in (ends, lengths):
        expected, got = both(target, draft, prompts, stopping_criteria=StoppingCriteriaList(criteria))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [10, 18])
def test_criterion_shorter_than_the_prompt_lets_one_token_pass(length):
    target, prompts = make_model("llama"), make_prompts(3)
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])

    expected, got = both(target, make_self_draft(target), prompts, stopping_criteria=criteria)

    assert torch.equal(got, expected)
    assert got.shape[1] == 19


def test_cache_after_an_end_token_holds_the_padding_plain_generate_reads():
    """A second turn whose mask covers the padding of finished rows sees the same entries."""
    target, prompts = make_model("llama"), make_prompts(3)
    draft = make_self_draft(target)
    free = target.generate(**prompts, max_new_tokens=12, do_sample=False)
    first = {"eos_token_id": int(free[0, 21]), "return_dict_in_generate": True, "max_new_tokens": 12}
    expected, got = both(target, draft, prompts, **first)
    turn = torch.randint(3, 90, (3, 4))
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, got.sequences.shape[1] - 18 + 4).long()], dim=1)
    second = {"input_ids": torch.cat([got.sequences, turn], dim=1), "attention_mask": mask}

    plain = without_pard(target).generate(
        **second, past_key_values=expected.past_key_values, max_new_tokens=9, do_sample=False
    )
    ours = with_pard(target).generate(
        **second, past_key_values=got.past_key_values, max_new_tokens=9, do_sample=False, assistant_model=draft
    )

    assert torch.equal(ours, plain)


def test_mask_longer_than_the_prompt_is_refused():
    target, prompts = make_model("llama"), make_prompts(1)

    with pytest.raises(ValueError, match="over the 18 columns"):
        with_pard(target).generate(
            prompts["input_ids"],
            attention_mask=torch.ones(1, 25).long(),
            assistant_model=make_draft(make_model("llama")),
        )


def test_int32_prompt():
    target, prompts = make_model("llama"), make_prompts(3)
    prompts["input_ids"] = prompts["input_ids"].int()

    expected, got = both(target, make_self_draft(target), prompts)

    assert torch.equal(got, expected)


def test_generator_is_left_where_plain_generate_leaves_it():
    """A second sampled call after the first goes on with the same noise."""
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)
    runs = []
    for arguments in ({}, {"assistant_model": draft}):
        target = with_pard(target) if arguments else without_pard(target)
        torch.manual_seed(0)
        runs.append(
            [
                target.generate(
                    **prompts, do_sample=True, eos_token_id=list(range(3, 9)), max_new_tokens=20, **arguments
                )
                for _ in range(3)
            ]
        )

    assert all(torch.equal(plain, ours) for plain, ours in zip(*runs, strict=True))


def test_padding_takes_no_positions():
    target = make_model("llama", max_position_embeddings=32)
    ids = torch.cat([torch.zeros(1, 28).long(), torch.tensor([[5, 6, 7]])], dim=1)
    prompts = {"input_ids": ids, "attention_mask": (ids != 0).long()}

    expected, got = both(target, make_self_draft(target), prompts, max_new_tokens=8)

    assert torch.equal(got, expected)


@pytest.mark.parametrize("wrap", [with_pard, lambda model: make_draft(model)])
def test_models_can_be_pickled_and_copied(wrap):
    model = wrap(make_model("llama"))

    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_positional_assistant_and_none_for_the_count():
    target, prompts = with_pard(make_model("llama")), make_prompts(1)
    draft = make_draft(make_model("llama", seed=2), 4)
    output = target.generate(
        prompts["input_ids"], None, None, None, None, None, draft, max_new_tokens=9, return_dict_in_generate=True,
        num_assistant_tokens=None,
    )  # fmt: skip

    assert len(output.stats.histogram) == 5


def test_stats_are_there_even_without_a_draft():
    target = make_gpt_neo()

    output = with_pard(target).generate(
        **make_prompts(3),
        max_new_tokens=5,
        assistant_model=make_draft(make_model("llama")),
        return_dict_in_generate=True,
    )

    assert output.stats.num_rounds == 0


@pytest.mark.parametrize("count", [0, -2, 128])
def test_draft_checks_its_count(count):
    with pytest.raises(ValueError, match="num_assistant_tokens"):
        make_draft(make_model("llama")).draft(torch.tensor([[5, 6]]), num_assistant_tokens=count)


def test_no_draft_from_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        make_draft(make_model("llama")).draft(torch.zeros(1, 0).long())
    with pytest.raises(ValueError, match="transformers model"):
        PardDraftModel.from_causal_lm(torch.nn.Linear(2, 2), 1)
