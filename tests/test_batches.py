"""Rows that finish leave, caches grow with the text, long prompts are read in parts."""

import pytest
from device import torch
from families import make_draft, make_model, make_prompts, make_self_draft

from pard_hf import with_pard
from pard_hf.generation import batch as batch_module


def ends_for(target, prompts, columns):
    """End tokens that stop row i after about `columns[i]` new tokens."""
    free = target.generate(**prompts, max_new_tokens=40, do_sample=False)
    return [int(free[row, prompts["input_ids"].shape[1] + column]) for row, column in enumerate(columns)]


def record(model, what):
    """A list that fills with `what(arguments)` of every forward."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(what(kwargs)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("sources", ["draft", "lookup", "draft and lookup"])
@pytest.mark.parametrize("returns_dict", [False, True])
def test_finished_rows_leave(returns_dict, sources):
    """8 rows shrink to 1, and every output a caller may ask for is that of plain `generate`."""
    target, prompts = make_model("llama"), make_prompts(8)
    given = {"assistant_model": make_draft(make_model("llama", seed=5))} if "draft" in sources else {}
    given |= {"prompt_lookup_num_tokens": 4} if "lookup" in sources else {}
    kwargs = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ends_for(target, prompts, range(2, 16, 2))}
    if returns_dict:
        kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = target.generate(**prompts, **kwargs)
    sizes = record(target, lambda kwargs: len(kwargs["position_ids"]))

    got = with_pard(target).generate(**prompts, **kwargs, **given)

    assert sizes[0] == 8
    assert {4, 2}.issubset(sizes)
    assert set(sizes) <= {8, 4, 2, 1}
    if not returns_dict:
        assert torch.equal(got, expected)
        return
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        seen = prompts["attention_mask"].bool()
        columns = seen.shape[1]
        # Left padding holds no entries of ours; the columns of the text do, those after a row's end included.
        for row in range(8):
            first = int((~seen[row]).sum())
            torch.testing.assert_close(ours.keys[row, :, first:], theirs.keys[row, :, first:], atol=1e-4, rtol=1e-4)
        assert ours.keys.shape[-2] == theirs.keys.shape[-2] > columns
    # Plain `generate` goes on scoring rows that have ended; ours are compared while their rows speak.
    for column, (ours, theirs) in enumerate(zip(got.logits, expected.logits, strict=True)):
        speaks = got.sequences[:, 18 + column] != 0
        torch.testing.assert_close(ours[speaks], theirs[speaks], atol=1e-4, rtol=1e-4)


def test_sampled_rows_leave_too():
    target, prompts = make_model("llama"), make_prompts(8)
    draft = make_self_draft(target)
    ends = list(range(3, 40))

    output = with_pard(target).generate(
        **prompts, assistant_model=draft, do_sample=True, eos_token_id=ends, max_new_tokens=40
    )

    new = output[:, 18:]
    for row in new.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        assert all(token == 0 for token in row[end + 1 :])


def test_chat_goes_on_after_rows_left():
    """The cache of a batch that shrank continues as that of plain `generate` does."""
    target, prompts = make_model("llama"), make_prompts(4)
    draft = make_draft(make_model("llama", seed=5))
    ends = {"eos_token_id": ends_for(target, prompts, [1, 3, 5, 30])}
    kwargs = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}

    texts = []
    for arguments in ({}, {"assistant_model": draft}):
        model = with_pard(target)
        first = model.generate(**prompts, **kwargs, **ends, **arguments)
        ids = torch.cat([first.sequences, torch.randint(3, 99, (4, 5), generator=torch.Generator().manual_seed(0))], 1)
        mask = torch.cat([prompts["attention_mask"], torch.ones(4, ids.shape[1] - 18, dtype=torch.long)], 1)
        second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **kwargs, **arguments)
        texts.append(second.sequences)

    assert torch.equal(*texts)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_caches_grow_with_the_text(batch_size):
    target = make_model("qwen2", max_position_embeddings=1024)
    draft, prompts = make_draft(make_model("qwen2", seed=5, max_position_embeddings=1024)), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=290, do_sample=False)

    got = with_pard(target).generate(**prompts, max_new_tokens=290, do_sample=False, assistant_model=draft)

    assert torch.equal(got, expected)


def test_room_grows_for_padding_of_rows_that_ended_early():
    """A long row that ends at once is padded further than any text reaches: its cache still comes back whole."""
    target = make_model("llama", max_position_embeddings=1024)
    draft = make_draft(make_model("llama", seed=5, max_position_embeddings=1024))
    prompts = make_prompts(2, longest=230)
    prompts["attention_mask"][1, :215] = 0
    kwargs = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    free = target.generate(**prompts, **kwargs).sequences
    ends = {"eos_token_id": [int(free[0, 231])]}
    expected = target.generate(**prompts, **kwargs, **ends)

    got = with_pard(target).generate(**prompts, **kwargs, **ends, assistant_model=draft)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_long_prompts_are_read_in_parts(batch_size, monkeypatch):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = make_draft(make_model("llama", seed=5))
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)
    monkeypatch.setattr("pard_hf.generation.decoder.PREFILL_CHUNK", 4)
    monkeypatch.setattr(batch_module, "PREFILL_CHUNK", 4)
    widths = record(target, lambda kwargs: kwargs["input_ids"].shape[1])

    for sources in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        widths.clear()
        got = with_pard(target).generate(**prompts, max_new_tokens=20, do_sample=False, **sources)

        assert torch.equal(got, expected)
        assert widths[:5] == [4, 4, 4, 4, 2]


def test_memory_that_is_not_there_is_named():
    target, draft = make_model("llama", max_position_embeddings=2**40), make_draft(make_model("llama", seed=5))
    draft.config.max_position_embeddings = 2**40
    cache = batch_module.SlotCache(target.config, 2**38)

    with pytest.raises(torch.OutOfMemoryError, match=r"Expected .* GiB for a cache of 1 x .*Lower the batch size"):
        cache.layers[0].lazy_initialization(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


def test_clock_counts_every_round():
    target, prompts = make_model("llama"), make_prompts(2)
    draft = make_draft(make_model("llama", seed=5))

    arguments = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}

    output = with_pard(target).generate(**prompts, **arguments, assistant_model=draft, measure_rounds=True)
    unmeasured = with_pard(target).generate(**prompts, **arguments, assistant_model=draft)

    clock = output.round_times
    assert unmeasured.round_times is None
    assert 1 <= clock.num_rounds < output.stats.num_rounds
    assert min(clock.prefill, clock.draft, clock.verify, clock.loop) > 0
    assert clock.loop < clock.draft + clock.verify
