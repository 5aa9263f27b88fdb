"""What README's table says our loop serves, our loop serves: with rounds, and with the text of plain `generate`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from families import make_draft, make_model, make_prompts, make_self_draft
from transformers import StoppingCriteria, StoppingCriteriaList

from pard_hf import with_pard, without_pard

README = Path(__file__).parent.parent / "README.md"


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
    "`num_assistant_tokens` on the call": [call(num_assistant_tokens=3)],
    "logits processors": [call(3, suppress_tokens=[5, 6]), call(3, repetition_penalty=1.3)],
    "end tokens, `max_length`": [call(3, eos_token_id=list(range(3, 20))), call(max_new_tokens=None, max_length=25)],
    "stop strings, own stopping criteria": [call(3, stopping_criteria=StoppingCriteriaList([EndsAt()]))],
    "`past_key_values` of an earlier turn, `inputs_embeds`": [earlier_turn, embeddings],
    "sliding-window layers (Mistral, Gemma)": [call(3)],
    "vocabularies that differ by padding rows": [call(3)],
}
FAMILY = {"sliding-window layers (Mistral, Gemma)": "gemma3"}


def promised():
    """The rows to which the table says yes for our loop."""
    rows = re.findall(r"^\| (.+?) \| .+? \| (yes.*?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name, _ in rows]


def test_every_promise_has_a_call():
    assert promised() == list(CALLS)


@pytest.mark.parametrize(
    ("row", "index"), [(row, index) for row, calls in CALLS.items() for index in range(len(calls))]
)
def test_our_loop_serves_it(row, index):
    settings = {"vocab_size": 2000} if "padding rows" in row else {}
    target = make_model(FAMILY.get(row, "llama"), **settings)
    draft = make_self_draft(target)
    if settings:
        draft = make_draft(make_model("llama", seed=4, vocab_size=2064))
    torch.manual_seed(3)
    expected = CALLS[row][index](without_pard(target))

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without the draft")
        got = CALLS[row][index](with_pard(target), assistant_model=draft)

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
