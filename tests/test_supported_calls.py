"""What `docs/usage.md` says our loop serves, our loop serves: with rounds, and with the text of plain `generate`.

Then calls at the edge of those, each of which once failed.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from device import torch
from every_family import families, varied_model
from families import make_draft, make_model, make_prompts, make_scripted_draft, make_self_draft, placed, texts_of
from transformers import Cache, EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from pard_hf import with_pard, without_pard

USAGE = Path(__file__).parent.parent / "docs" / "usage.md"


class EndsAt(StoppingCriteria):
    """Ends every row at a length of its own choosing."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 25, device=input_ids.device)


def earlier_turn(model, **kwargs):
    """A second turn on the cache of the first."""
    prompts = make_prompts(1)
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**prompts, **arguments, **kwargs)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]], device=first.sequences.device)], dim=1)
    return model.generate(ids, past_key_values=first.past_key_values, **arguments, **kwargs)


def embeddings(model, **kwargs):
    embeds = model.get_input_embeddings()(make_prompts(1)["input_ids"])
    return model.generate(inputs_embeds=embeds, max_new_tokens=8, return_dict_in_generate=True, **kwargs)


def call(batch_size=1, **arguments):
    """A call of `generate` on prompts of different lengths."""

    def generate(model, **kwargs):
        settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, **arguments}
        return model.generate(**make_prompts(batch_size), **settings, **kwargs)

    return generate


# The rows of the table, by their first cell, with calls of each.
CALLS = {
    "greedy, sampling": [call(), call(do_sample=True, top_k=9)],
    "batches, left padding, `num_return_sequences`": [call(3), call(num_return_sequences=2, do_sample=True, top_k=1)],
    "prompt lookup, `prompt_lookup_num_tokens`": [call(3)],
    "`num_assistant_tokens` on the call": [call(num_assistant_tokens=3)],
    "logits processors": [call(3, suppress_tokens=[5, 6]), call(3, repetition_penalty=1.3)],
    "end tokens, `max_length`": [call(3, eos_token_id=list(range(3, 20))), call(max_new_tokens=None, max_length=25)],
    "stop strings, own stopping criteria": [call(3, stopping_criteria=StoppingCriteriaList([EndsAt()]))],
    "`past_key_values` of an earlier turn, `inputs_embeds`": [earlier_turn, embeddings],
    "sliding-window layers (Mistral, Gemma)": [call(3)],
    "vocabularies that differ by padding rows": [call(3)],
    "hybrid targets (Qwen3.5, Qwen3-Next, LFM2, Granite 4, Nemotron-H …)": [call(3)],
}
FAMILY = {"sliding-window layers (Mistral, Gemma)": "gemma3"}


def promised():
    """The rows to which the table says yes for our loop."""
    rows = re.findall(r"^\| (.+?) \| .+? \| (yes.*?) \|$", USAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name, _ in rows]


def test_every_promise_has_a_call():
    assert promised() == list(CALLS)


def hybrid_model():
    if not hasattr(Cache, "get_conv_state"):
        pytest.skip("no interface for states")
    return placed(varied_model(families()["Qwen3NextConfig"]))


@pytest.mark.parametrize(
    ("row", "index"), [(row, index) for row, calls in CALLS.items() for index in range(len(calls))]
)
@pytest.mark.parametrize("sources", ["draft", "lookup", "draft and lookup"])
def test_our_loop_serves_it(row, index, sources):
    settings = {"vocab_size": 2000} if "padding rows" in row else {}
    target = hybrid_model() if row.startswith("hybrid") else make_model(FAMILY.get(row, "llama"), **settings)
    draft = make_draft(make_model("llama")) if row.startswith("hybrid") else make_self_draft(target)
    if settings:
        draft = make_draft(make_model("llama", seed=4, vocab_size=2064))
    torch.manual_seed(3)
    expected = CALLS[row][index](without_pard(target))

    given = {"assistant_model": draft} if "draft" in sources else {}
    given |= {"prompt_lookup_num_tokens": 4} if "lookup" in sources else {}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*generating without")
        got = CALLS[row][index](with_pard(target), **given)

    assert got.stats.num_rounds > 0
    assert got.stats.loop in ("own", "lockstep")
    assert got.stats.fallback_reason is None
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
@pytest.mark.parametrize("seed", range(8))
def test_kept_cache_has_two_names(keyword, seed):
    """Both names of a cache, on every version of transformers: eight conversations of two turns."""
    target, draft = make_model("llama", seed=seed), make_self_draft(make_model("llama", seed=seed))
    texts = []
    for model, more in ((without_pard(target), {}), (with_pard(target), {"assistant_model": draft})):
        arguments = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, **more}
        first = model.generate(**make_prompts(1), **arguments)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]], device=first.sequences.device)], dim=1)
        name = keyword if more else "past_key_values"
        texts.append(model.generate(ids, **{name: first.past_key_values}, **arguments).sequences)
    assert torch.equal(*texts)


def test_both_names_of_a_cache_are_one_too_many():
    target, draft = with_pard(make_model("llama")), make_self_draft(make_model("llama"))
    arguments = {"max_new_tokens": 4, "return_dict_in_generate": True, "assistant_model": draft}
    past = target.generate(**make_prompts(1), **arguments).past_key_values

    with pytest.raises(ValueError, match="Expected one cache"):
        target.generate(**make_prompts(1), cache=past, past_key_values=past, **arguments)


def both(target, draft, prompts, **kwargs):
    kwargs = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    expected = without_pard(target).generate(**prompts, **kwargs)
    return expected, with_pard(target).generate(**prompts, **kwargs, assistant_model=draft)


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


def test_padding_takes_no_positions():
    target = make_model("llama", max_position_embeddings=32)
    ids = torch.cat([torch.zeros(1, 28).long(), torch.tensor([[5, 6, 7]])], dim=1)
    prompts = {"input_ids": ids, "attention_mask": (ids != 0).long()}

    expected, got = both(target, make_self_draft(target), prompts, max_new_tokens=8)

    assert torch.equal(got, expected)


def test_positional_assistant_and_none_for_the_count():
    target, prompts = with_pard(make_model("llama")), make_prompts(1)
    draft = make_draft(make_model("llama", seed=2), 4)
    output = target.generate(
        prompts["input_ids"], None, None, None, None, None, draft, max_new_tokens=9, return_dict_in_generate=True,
        num_assistant_tokens=None,
    )  # fmt: skip

    assert len(output.stats.histogram) == 5
