"""Everything plain `generate` honours is honoured mid-block, and what cannot be served is refused in words."""

import copy
import gc
from contextlib import nullcontext

import families
import pytest
from device import DEVICE, torch
from families import make_draft, make_model, make_prompts, make_scripted_draft, make_self_draft, texts_of
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pard_hf import PardGenerateOutput, PardGenerationMixin, with_pard, without_pard
from pard_hf.host import warn_once

NEW_TOKENS = 24


@pytest.fixture(params=[0, 12], ids=["chain", "tree"], autouse=True)
def tree_size(request, monkeypatch):
    """Everything here holds for trees as well."""
    monkeypatch.setattr(families, "TREE_SIZE", request.param)
    return request.param


def compare(target, draft, prompts, **kwargs):
    """Plain output and ours, both as dicts, of the same greedy or sampled call."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    torch.manual_seed(5)
    expected = without_pard(target).generate(**prompts, **kwargs)
    torch.manual_seed(5)
    got = with_pard(target).generate(**prompts, **kwargs, assistant_model=draft)
    return expected, got


def right_draft(target, prompts, first_miss=5, **kwargs):
    free = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    return make_scripted_draft(texts_of(free, prompts["attention_mask"]), first_miss)


PROCESSOR_ARGUMENTS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 8]]},
    {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    {"min_length": 25, "eos_token_id": list(range(3, 60))},
    {"forced_eos_token_id": 4},
    {"suppress_tokens": [10, 11, 12]},
    {"begin_suppress_tokens": [10, 11]},
    {"sequence_bias": [[[20], 4.0], [[21, 22], 6.0]]},
    {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 9},
    {"encoder_repetition_penalty": 1.3},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"guidance_scale": 1.4},
    {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + row * 5, 60))},
]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("arguments", PROCESSOR_ARGUMENTS, ids=lambda a: next(iter(a)))
def test_every_processor_argument(arguments, batch_size):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = right_draft(target, prompts)

    expected, got = compare(target, draft, prompts, **arguments)

    assert torch.equal(got.sequences, expected.sequences)


class CountingProcessor(LogitsProcessor):
    """Looks at the number of its calls and at the whole batch, as no block-wise call could imitate."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, (input_ids[:, -1].sum() + torch.arange(self.calls)) % 90, -torch.inf)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stateful_processor_sees_the_calls_of_plain_generate(batch_size):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = right_draft(target, prompts)
    plain = without_pard(target).generate(
        **prompts,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        logits_processor=LogitsProcessorList([CountingProcessor()]),
    )

    got = with_pard(target).generate(
        **prompts,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        assistant_model=draft,
        logits_processor=LogitsProcessorList([CountingProcessor()]),
    )

    assert torch.equal(got, plain)


class StopAfterToken(StoppingCriteria):
    """Ends a row one token after any of `tokens`: neither an end token nor a length."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] < 20:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return torch.isin(input_ids[:, -2], self.tokens)


@pytest.mark.parametrize("eos_token_id", [None, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_custom_criteria_end_where_plain_ends(batch_size, eos_token_id):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = right_draft(target, prompts)
    free = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    criteria = StoppingCriteriaList([StopAfterToken(free[:, 25].tolist())])

    expected, got = compare(target, draft, prompts, stopping_criteria=criteria, eos_token_id=eos_token_id)

    assert torch.equal(got.sequences, expected.sequences)
    assert expected.sequences.shape[1] < 18 + NEW_TOKENS


def test_own_max_length_criterion_counts():
    target, prompts = make_model("llama"), make_prompts(1)
    draft = right_draft(target, prompts)

    expected, got = compare(
        target, draft, prompts, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=27)])
    )

    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences.shape[1] == 27


def test_max_time_stops():
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)

    got = with_pard(target).generate(
        **prompts, max_new_tokens=100, do_sample=False, assistant_model=draft, max_time=0.0
    )

    assert got.shape[1] == 18 + 1


def test_stop_strings(bundled_like_tokenizer):
    """Always an error in the stock loop; here text ends with the very token that completes the string."""
    tokenizer = bundled_like_tokenizer
    target, prompts = make_model("llama"), make_prompts(1)
    draft = right_draft(target, prompts)
    free = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    stop = tokenizer.decode(free[0, 26:28])

    expected, got = compare(target, draft, prompts, stop_strings=[stop], tokenizer=tokenizer)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences.shape[1] <= 28


class RecordingStreamer:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_streamer_gets_what_plain_generate_puts(batch_size, arguments):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = right_draft(target, prompts, first_miss=3)
    plain, ours = RecordingStreamer(), RecordingStreamer()

    without_pard(target).generate(**prompts, max_new_tokens=9, do_sample=False, streamer=plain, **arguments)
    with_pard(target).generate(
        **prompts, max_new_tokens=9, do_sample=False, streamer=ours, assistant_model=draft, **arguments
    )

    assert ours.puts == plain.puts
    assert ours.ended == plain.ended == 1


@pytest.mark.parametrize("arguments", [{}, {"no_repeat_ngram_size": 3}])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_and_logits(batch_size, arguments):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = right_draft(target, prompts, first_miss=3)

    expected, got = compare(target, draft, prompts, output_scores=True, output_logits=True, **arguments)

    assert isinstance(got, PardGenerateOutput)
    for name in ("scores", "logits"):
        ours, plain = getattr(got, name), getattr(expected, name)
        assert len(ours) == len(plain) == NEW_TOKENS
        torch.testing.assert_close(torch.stack(ours), torch.stack(plain), atol=1e-4, rtol=1e-4)


def test_generation_config_object_keeps_the_drafts_count():
    """The host's default K, 20, never replaces the draft's; a K in the object, or on the call, does."""
    target, prompts = with_pard(make_model("llama")), make_prompts(1)
    draft = make_self_draft(without_pard(make_model("llama")))
    for given, expected in (({}, 5), ({"num_assistant_tokens": 3}, 3)):
        config = GenerationConfig(max_new_tokens=12, return_dict_in_generate=True, **given)
        output = target.generate(prompts["input_ids"], config, assistant_model=draft)
        assert len(output.stats.histogram) == expected + 1
        assert config.num_assistant_tokens == given.get("num_assistant_tokens")


def test_num_return_sequences_and_call_count():
    target, prompts = make_model("llama"), make_prompts(2)
    draft = make_self_draft(target)

    output = with_pard(target).generate(
        **prompts,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        assistant_model=draft,
        num_assistant_tokens=2,
        return_dict_in_generate=True,
    )

    assert output.sequences.shape == (6, 26)
    assert len(output.stats.histogram) == 3  # 0, 1 or 2 accepted: the call's K, not the draft's 5
    assert draft.num_assistant_tokens == 5


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_second_turn_goes_on_from_an_earlier_cache(family, batch_size):
    """The stock loop gets this wrong: whole conversations come back with the cache of the turn before."""
    target, prompts = make_model(family), make_prompts(batch_size)
    draft = make_self_draft(target)
    expected, got = compare(target, draft, prompts, max_new_tokens=7)
    turn = torch.randint(3, 90, (batch_size, 5))
    mask = torch.cat([prompts["attention_mask"], torch.ones(batch_size, 12, dtype=torch.long)], dim=1)
    second = {"input_ids": torch.cat([got.sequences, turn], dim=1), "attention_mask": mask}

    plain = without_pard(target).generate(
        **second, past_key_values=expected.past_key_values, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    ours = with_pard(target).generate(
        **second,
        past_key_values=got.past_key_values,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        assistant_model=draft,
    )

    assert torch.equal(ours, plain)
    # The caller's cache was extended in place, as plain `generate` does.
    whole = second["input_ids"].shape[1] + NEW_TOKENS - 1
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == whole


def test_cache_of_rows_that_ended_early_is_whole():
    """A row that ended while others went on has its end token in the cache it hands on."""
    target, prompts = make_model("llama"), make_prompts(3)
    draft = make_self_draft(target)
    free = target.generate(**prompts, max_new_tokens=12, do_sample=False)
    expected, got = compare(target, draft, prompts, max_new_tokens=12, eos_token_id=int(free[0, 21]))
    turn = torch.randint(3, 90, (3, 4))
    lengths = [
        row.index(int(free[0, 21])) + 1 if int(free[0, 21]) in row else 12 for row in got.sequences[:, 18:].tolist()
    ]
    new = torch.tensor([[int(i < n) for i in range(got.sequences.shape[1] - 18)] for n in lengths])
    mask = torch.cat([prompts["attention_mask"], new, torch.ones_like(turn)], dim=1)
    second = {"input_ids": torch.cat([got.sequences, turn], dim=1), "attention_mask": mask}

    plain = without_pard(target).generate(
        **second, past_key_values=expected.past_key_values, max_new_tokens=9, do_sample=False
    )
    ours = with_pard(target).generate(
        **second, past_key_values=got.past_key_values, max_new_tokens=9, do_sample=False, assistant_model=draft
    )

    assert min(lengths) < 12
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_cache_holds_an_end_token_that_the_draft_did_not_propose(family):
    """Rows in lockstep: the row that ends is done, and the others go on past it in the same round."""
    target, prompts = make_model(family), make_prompts(3)
    free = target.generate(**prompts, max_new_tokens=12, do_sample=False)
    script, ends = texts_of(free, prompts["attention_mask"]), [int(free[1, 19])]
    script[1][-11] = 7
    draft = make_scripted_draft(script, first_miss=5)

    expected, got = compare(target, draft, prompts, max_new_tokens=8, eos_token_id=ends, streamer=RecordingStreamer())

    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences[:, 20].count_nonzero() == 2
    for ours, plain in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        column = 20 - got.sequences.shape[1]  # The last new token of all is in no cache.
        torch.testing.assert_close(ours.keys[1, :, column], plain.keys[1, :, column], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [9, 40])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_padding_inside_a_row_counts_in_a_window(batch_size, window):
    """As a row that ended before others did leaves it for a second turn: the windows of transformers count columns."""
    target, prompts = make_model("mistral", sliding_window=window), make_prompts(batch_size)
    prompts["attention_mask"][batch_size // 2, 12:16] = 0
    draft = make_self_draft(target)
    expected = target.generate(**prompts, max_new_tokens=12, do_sample=False)
    is_shifted = window < 18 + 12

    with pytest.warns(UserWarning, match="window") if is_shifted and batch_size > 1 else nullcontext():
        got = with_pard(target).generate(**prompts, max_new_tokens=12, do_sample=False, assistant_model=draft)

    assert torch.equal(got, expected)


def test_new_ids_only_after_a_cache():
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)
    expected, got = compare(target, draft, prompts, max_new_tokens=7)
    # The last token of turn one is not in the cache yet, so it is the first of the new ids.
    new = torch.cat([got.sequences[:, -1:], torch.randint(3, 90, (1, 5))], dim=1)
    mask = torch.ones(1, 24 + 6, dtype=torch.long)

    plain = without_pard(target).generate(
        new, attention_mask=mask, past_key_values=expected.past_key_values, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    ours = with_pard(target).generate(
        new,
        attention_mask=mask,
        past_key_values=got.past_key_values,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        assistant_model=draft,
    )

    assert torch.equal(ours, plain)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_inputs_embeds(batch_size):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = make_self_draft(target)
    embeds = {
        "inputs_embeds": target.get_input_embeddings()(prompts["input_ids"]),
        "attention_mask": prompts["attention_mask"],
    }

    expected, got = compare(target, draft, embeds)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.num_rounds > 0


@pytest.mark.parametrize("cache", ["static", "object"])
def test_static_caches_do_no_harm(cache):
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    asked = {"compile_config": CompileConfig(backend="eager"), "disable_compile": False}
    given = {"cache_implementation": "static", **asked}
    if cache == "object":
        given = {"past_key_values": StaticCache(config=target.config, max_cache_len=64)}

    got = with_pard(target).generate(
        **prompts, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft, **given
    )

    assert torch.equal(got, expected)


def test_hidden_states_come_from_the_stock_loop():
    target, prompts = make_model("llama"), make_prompts(1)

    expected, got = compare(target, make_self_draft(target), prompts, output_hidden_states=True)

    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.hidden_states) == len(expected.hidden_states)
    assert got.stats.num_rounds > 0


def test_other_assistants_stay_stock():
    target, prompts = make_model("llama"), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    got = with_pard(target).generate(
        **prompts, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=make_model("llama", seed=9)
    )
    looked_up = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=3)

    assert torch.equal(got, expected)
    assert torch.equal(looked_up, expected)


def test_with_pard_is_idempotent_and_reversible(tmp_path):
    target = make_model("qwen2")
    plain_class = type(target)

    assert with_pard(target) is target
    assert with_pard(target) is target
    assert isinstance(target, PardGenerationMixin)
    target.save_pretrained(tmp_path)
    assert without_pard(target) is target
    assert type(target) is plain_class
    assert without_pard(target) is target
    assert '"Qwen2ForCausalLM"' in (tmp_path / "config.json").read_text()


def test_mixin_on_a_class():
    model_class = type(make_model("llama"))

    class MyModel(PardGenerationMixin, model_class):
        pass

    plain = make_model("llama")
    mine = MyModel(plain.config).eval().to(DEVICE)
    mine.load_state_dict(plain.state_dict())
    mine.generation_config = plain.generation_config
    prompts = make_prompts(3)

    got = mine.generate(**prompts, max_new_tokens=9, do_sample=False, assistant_model=make_self_draft(plain))

    assert torch.equal(got, plain.generate(**prompts, max_new_tokens=9, do_sample=False))
    with pytest.raises(ValueError, match="own class has the mixin"):
        without_pard(mine)


def test_wrapped_objects_are_refused():
    with pytest.raises(ValueError, match="can generate"):
        with_pard(torch.nn.Linear(2, 2))


def bad_calls():
    right_padded = {
        "input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    return {
        "beams": ({"num_beams": 2}, "num_beams=1"),
        "no cache": ({"use_cache": False}, "use_cache=True"),
        "K of 0": ({"num_assistant_tokens": 0}, "at least 1"),
        "K beyond the positions": ({"num_assistant_tokens": 128}, "128 positions"),
        "text beyond the positions": ({"max_new_tokens": 500}, "128 positions of the target"),
        "right padding": (right_padded, "left-padded"),
        "unknown verification": ({"verification": "luck"}, "sample_and_match"),
        "ratio test with a penalty": (
            {"verification": "ratio_test", "do_sample": True, "repetition_penalty": 1.2},
            "advance on their own",
        ),
        "ids and embeddings": ({"inputs_embeds": torch.zeros(1, 18, 32)}, "got both"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_refused_and_change_nothing(name):
    arguments, message = bad_calls()[name]
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=4))
    before = (str(target.config), str(target.generation_config), str(draft.config), str(draft.generation_config))

    with pytest.raises(ValueError, match=message):
        target.generate(**{**make_prompts(1), "max_new_tokens": 9, **arguments}, assistant_model=draft)

    assert before == (
        str(target.config),
        str(target.generation_config),
        str(draft.config),
        str(draft.generation_config),
    )


def test_empty_prompt_is_refused():
    target = with_pard(make_model("llama"))

    with pytest.raises(ValueError, match="at least one token|at least 1"):
        target.generate(torch.zeros(1, 0, dtype=torch.long), assistant_model=make_draft(make_model("llama", seed=4)))


def test_cache_that_the_text_does_not_go_on_from_is_refused():
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)
    past = DynamicCache(config=target.config)
    target(prompts["input_ids"], past_key_values=past)

    with pytest.raises(ValueError, match="continue after the 18 cached tokens"):
        with_pard(target).generate(**prompts, past_key_values=past, max_new_tokens=5, assistant_model=draft)
    assert past.get_seq_length() == 18


def test_padded_vocabulary_works_and_other_vocabularies_do_not():
    """Qwen2.5 pads 151936 rows to 152064 in its larger models; a tenth of the vocabulary is another tokenizer."""
    wide = make_model("llama", vocab_size=2100)
    prompts = make_prompts(3)
    expected = wide.generate(**prompts, max_new_tokens=9, do_sample=False)

    for vocab_size in (2000, 2112):
        draft = make_draft(make_model("llama", seed=4, vocab_size=vocab_size))
        got = with_pard(wide).generate(**prompts, max_new_tokens=9, do_sample=False, assistant_model=draft)
        assert torch.equal(got, expected)
        wide.generate(**prompts, max_new_tokens=9, do_sample=True, verification="ratio_test", assistant_model=draft)
    with pytest.raises(ValueError, match="share a tokenizer"):
        wide.generate(**prompts, assistant_model=make_draft(make_model("llama", vocab_size=5000)))
    with pytest.raises(ValueError, match="share a tokenizer"):
        wide.generate(**prompts, assistant_model=make_draft(make_model("llama", vocab_size=100)))


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "top_k": 5}])
def test_target_without_slots_goes_through_the_stock_loop(arguments, tree_size, caplog):
    """One that counts positions by its cache: that of transformers can be rolled back, one row at a time."""
    warn_once.cache_clear()
    target, prompts = make_bloom(), make_prompts(1)
    draft = make_draft(make_model("llama", seed=3))

    expected, got = compare(target, draft, prompts, **arguments)

    assert got.stats.num_rounds > 0
    compare(target, draft, prompts, **arguments)
    assert caplog.text.count("a chain is drafted instead of a tree") == (1 if tree_size else 0)  # Once, not each time.
    assert got.stats.loop == "stock"
    assert "counts positions by its cache" in got.stats.fallback_reason
    assert torch.equal(got.sequences, expected.sequences)


def test_what_no_loop_serves_is_generated_without_the_draft():
    target, prompts = make_bloom(), make_prompts(3)

    with pytest.warns(UserWarning, match="without the draft") as warned:
        expected, got = compare(target, make_draft(make_model("llama", seed=3)), prompts)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.num_rounds == 0
    assert got.stats.loop == "none"
    assert got.stats.fallback_reason in str(warned[0].message)
    assert warned[0].filename == __file__


def make_bloom():
    """A target that counts positions by its cache."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, pad_token_id=0)
    target = BloomForCausalLM(config).eval().to(DEVICE)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


def test_encoder_decoder_target_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    target = with_pard(T5ForConditionalGeneration(config).eval().to(DEVICE))

    with pytest.raises(ValueError, match="decoder-only target"):
        target.generate(torch.tensor([[5, 6]]), assistant_model=make_draft(make_model("llama")))


def test_different_tokenizers_are_named(bundled_like_tokenizer, tmp_path):
    """The first id that means two things is named, from tokenizers passed along or found beside the weights."""
    other = tmp_path / "other"
    bundled_like_tokenizer.save_pretrained(other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"A": 35', '"A": 36').replace('"B": 36', '"B": 35'))
    swapped = type(bundled_like_tokenizer).from_pretrained(other)
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=2))
    prompts = make_prompts(1)

    with pytest.raises(ValueError, match="id 35 is 'B' for the draft and 'A' for the target"):
        target.generate(
            **prompts, tokenizer=bundled_like_tokenizer, assistant_tokenizer=swapped, assistant_model=draft
        )
    # Families rename reserved tokens from release to release; text is not made of them.
    renamed = copy.deepcopy(bundled_like_tokenizer)
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    renamed.add_special_tokens({"additional_special_tokens": ["<|right_pad|>"]})
    target.generate(
        **prompts,
        max_new_tokens=3,
        tokenizer=bundled_like_tokenizer,
        assistant_tokenizer=renamed,
        assistant_model=draft,
    )
    bundled_like_tokenizer.save_pretrained(tmp_path / "target")
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=2))
    target.config.name_or_path, draft.config.name_or_path = str(tmp_path / "target"), str(other)
    with pytest.raises(ValueError, match="share a tokenizer"):
        target.generate(**prompts, assistant_model=draft)


def test_tokenizers_of_equal_files_are_not_loaded(bundled_like_tokenizer, tmp_path, monkeypatch):
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=2))
    for model, name in ((target, "target"), (draft, "draft")):
        bundled_like_tokenizer.save_pretrained(tmp_path / name)
        model.config.name_or_path = str(tmp_path / name)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)

    target.generate(**make_prompts(1), max_new_tokens=3, assistant_model=draft)


def test_tokenizers_are_compared_when_a_pair_is_first_met(bundled_like_tokenizer, monkeypatch):
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=2))
    tokenizers = {"tokenizer": bundled_like_tokenizer, "assistant_tokenizer": bundled_like_tokenizer}
    target.generate(**make_prompts(1), max_new_tokens=3, assistant_model=draft, **tokenizers)
    monkeypatch.setattr(type(bundled_like_tokenizer), "get_vocab", None)

    target.generate(**make_prompts(1), max_new_tokens=3, assistant_model=draft, **tokenizers)


@pytest.mark.parametrize("num_assistant_tokens", [4, 12])
def test_nothing_is_left_for_the_garbage_collector(num_assistant_tokens):
    """Caches of a call that is over are gone at once: a server would hold those of dozens of calls."""
    target, prompts = with_pard(make_model("llama")), make_prompts(3)
    draft = make_self_draft(make_model("llama"), num_assistant_tokens)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "assistant_model": draft}

    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    target.generate(**prompts, **arguments)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        target.generate(**prompts, **arguments, return_dict_in_generate=True)
        assert tensors() == before
    finally:
        gc.enable()
