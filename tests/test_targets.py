"""Targets and calls that do things their own way: the text of plain `generate`, or a refusal in words.

Each case was once wrong or crashed.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import transformers
from device import DEVICE, IS_FAKE, torch
from families import (
    COMMON,
    make_draft,
    make_model,
    make_prompts,
    make_scripted_draft,
    make_self_draft,
    placed,
)
from test_generation import make_bloom
from transformers import LogitsProcessor, LogitsProcessorList

from pard_hf import PardDraftModel, PardGenerationMixin, host, with_pard, without_pard

NEW_TOKENS = 20
SMALL = {"vocab_size": 100, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OWN_WAYS = {
    "falcon": ("Falcon", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "alibi": False}),
    "falcon_multi_query": ("Falcon", {"num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}),
    "falcon_new": (
        "Falcon",
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon_alibi": ("Falcon", {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"n_layers": 2, "n_heads": 4, "d_model": 32, "max_seq_len": 128, "expansion_ratio": 2}),
    "gpt_neo": ("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                           "window_size": 6, "max_position_embeddings": 128, "intermediate_size": 48}),
}  # fmt: skip


def make_target(name: str, initializer_range: float = 0.3, seed: int = 0):
    torch.manual_seed(seed)
    prefix, settings = OWN_WAYS[name]
    config = getattr(transformers, f"{prefix}Config")(**SMALL, **settings, initializer_range=initializer_range)
    return free_of_ends(getattr(transformers, f"{prefix}ForCausalLM")(config).eval())


def make_bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=100, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, is_decoder=True,
        is_encoder_decoder=False, init_std=0.3,
    )  # fmt: skip
    return free_of_ends(transformers.BartForCausalLM(config).eval())


def make_chunked(layer_types):
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **{**COMMON, "intermediate_size": 32, "intermediate_size_mlp": 32},
        attention_chunk_size=8,
        layer_types=layer_types,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return free_of_ends(transformers.Llama4ForCausalLM(config).eval())


def make_longrope():
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = transformers.LlamaConfig(**COMMON, rope_parameters=rope)
    return free_of_ends(transformers.LlamaForCausalLM(config).eval())


def free_of_ends(target):
    target.generation_config.eos_token_id = target.generation_config.forced_eos_token_id = None
    target.generation_config.pad_token_id = 0
    return placed(target)


def generate_both(target, draft, prompts, **kwargs):
    """The same call without and with the draft, or prompt lookup for `None`; of a sampled one the same seed."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    torch.manual_seed(5)
    expected = without_pard(target).generate(**prompts, **kwargs)
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        lookup = {"prompt_lookup_num_tokens": 4} if draft is None else {}
        got = with_pard(target).generate(**prompts, **kwargs, **lookup, assistant_model=draft)
    unused = "the draft" if draft is not None else "prompt lookup"
    is_said = any(f"generating without {unused}" in str(warning.message) for warning in warned)
    assert is_said == (got.stats.loop == "none")
    assert (got.stats.fallback_reason is None) == (got.stats.loop in ("own", "lockstep"))
    assert (got.stats.num_rounds > 0) == (got.stats.loop != "none")
    return expected, got


class CountsByItself(transformers.LlamaForCausalLM):
    """Code of a checkpoint's own, which takes `position_ids` and counts by its cache all the same."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        past = past_key_values if past_key_values is not None else kwargs.pop("cache", None)
        start = 0 if past is None else past.get_seq_length()
        positions = torch.arange(start, start + input_ids.shape[1]).unsqueeze(0)
        named = {host.CACHE_NAME: past}
        return super().forward(input_ids, attention_mask, position_ids=positions, **named, **kwargs)


@pytest.mark.parametrize("is_known", [False, True])
def test_custom_code_is_tried_out(is_known):
    torch.manual_seed(0)
    config = make_model("llama").config
    target = free_of_ends((transformers.LlamaForCausalLM if is_known else CountsByItself)(config).eval())
    with torch.no_grad():  # The initializer of this class is that of Llama.
        target.load_state_dict(make_model("llama").state_dict())

    expected, got = generate_both(target, make_self_draft(make_model("llama")), make_prompts(1))

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.loop == ("own" if is_known else "stock")


@pytest.mark.parametrize("seed", range(4))
def test_custom_code_is_not_judged_by_the_rounding_of_autocast(seed):
    target = make_model("llama", seed=seed, num_hidden_layers=6)
    target.__class__ = type("FromElsewhere", (type(target),), {"__module__": "checkpoint_code"})
    arguments = {**make_prompts(1), "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}

    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = with_pard(target).generate(**arguments, assistant_model=make_draft(make_model("llama", seed=5)))

    assert got.stats.loop == "own"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_custom_code_that_does_as_transformers_does_runs_in_our_loop(family):
    target = make_model(family)
    base = type(target)
    target.__class__ = type("FromElsewhere", (base,), {"__module__": "checkpoint_code"})

    expected, got = generate_both(target, make_draft(make_model("llama", seed=5)), make_prompts(3))

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.loop == "own"


@pytest.mark.parametrize("arguments", [{}, {"assistant_tree_size": 8}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", [*OWN_WAYS, "bart"])
def test_text_is_that_of_plain_generate(name, batch_size, arguments):
    target = make_bart() if name == "bart" else make_target(name)
    prompts = make_prompts(batch_size)
    tree_size = arguments.get("assistant_tree_size", 0)
    arguments = {key: value for key, value in arguments.items() if key != "assistant_tree_size"}
    if batch_size > 1 and arguments:
        pytest.skip("rows of a sampled batch keep the distribution only")
    for draft in (make_draft(make_model("llama", seed=5)), make_self_draft(target), None):
        if draft is not None:
            draft.generation_config.assistant_tree_size = tree_size

        expected, got = generate_both(target, draft, prompts, **arguments)

        assert len(set(expected.sequences[0, 18:].tolist())) > 1
        assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_chunked(["chunked_attention"] * 2),
        lambda: make_chunked(["chunked_attention", "full_attention"]),
        make_longrope,
    ],
    ids=["chunked", "chunked and full", "longrope"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_that_slots_cannot_express(make, batch_size):
    for draft in (make_draft(make_model("llama", seed=3)), None):
        expected, got = generate_both(make(), draft, make_prompts(batch_size))

        assert torch.equal(got.sequences, expected.sequences)
        assert got.stats.loop != "own"


class Alternating(LogitsProcessor):
    """Remembers how often it was called."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        return scores.index_fill(-1, torch.arange(3, 50) + 40 * (self.num_calls % 2), -torch.inf)


@pytest.mark.parametrize(
    ("batch_size", "arguments", "loop"),
    [
        (1, {}, "stock"),
        (1, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2, "output_scores": True}, "stock"),
        (1, {"logits_processor": LogitsProcessorList([Alternating()])}, "none"),
        (1, {"stop_strings": ["x"]}, "none"),
        (3, {}, "none"),
    ],
    ids=["greedy", "sampled", "stateful", "stop string", "batch"],
)
def test_lookup_leaves_our_loop_visibly(batch_size, arguments, loop, tokenizer):
    target = make_target("falcon_alibi")
    tokens = {"tokenizer": tokenizer} if "stop_strings" in arguments else {}

    expected, got = generate_both(target, None, make_prompts(batch_size), **arguments, **tokens)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.loop == loop
    assert "ALiBi" in got.stats.fallback_reason


@pytest.mark.parametrize("seed", range(3))
def test_lookup_in_the_stock_loop_ends_at_an_end_token(seed):
    """Also where the end token stands inside what is copied."""
    target, prompts = make_target("falcon_alibi", seed=seed), make_prompts(1)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    text = target.generate(**prompts, **arguments)
    prompts = {"input_ids": torch.cat([text, prompts["input_ids"]], dim=1)}
    for end in text[0, -NEW_TOKENS:].unique().tolist()[:5]:
        expected, got = generate_both(target, None, prompts, eos_token_id=end)
        assert torch.equal(got.sequences, expected.sequences)


def test_sources_of_a_draft_that_leaves_our_loop_are_named(caplog):
    host.warn_once.cache_clear()
    target, draft = make_target("falcon_alibi"), make_draft(make_model("llama", seed=5))

    expected, got = generate_both(target, draft, make_prompts(1), prompt_lookup_num_tokens=4)

    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.loop == "stock"
    assert any("only the draft proposes" in message for message in caplog.messages)


def test_encoder_decoder_keeps_the_lookup_of_transformers():
    torch.manual_seed(0)
    config = transformers.T5Config(
        **{**SMALL, "decoder_start_token_id": 0}, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    target = free_of_ends(transformers.T5ForConditionalGeneration(config).eval())
    arguments = {**make_prompts(1), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = target.generate(**arguments)

    assert torch.equal(with_pard(target).generate(**arguments, prompt_lookup_num_tokens=4), expected)
    with pytest.raises(ValueError, match="decoder-only target, .*`assistant_reference_texts`"):
        target.generate(**arguments, assistant_reference_texts=[[5, 6]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "`prompt_lookup_num_tokens` to be an integer above 0, got 0"),
        ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": -1}, "`max_matching_ngram_size`"),
        ({"assistant_reference_texts": [[5, 100]]}, r"token ids in \[0, 100\), got \[5, 100\]"),
        ({"assistant_reference_texts": [5, 6]}, "list of token ids in .* got 5"),
        ({"assistant_reference_texts": [[5]], "num_beams": 2}, r"greedy or sampled.*beam_search"),
        ({"assistant_reference_texts": [[5]], "assistant_model": "ordinary"}, "no assistant.*got `LlamaForCausalLM`"),
        ({"prompt_lookup_num_tokens": 4, "use_cache": False}, "`use_cache=True` with `prompt_lookup_num_tokens`"),
    ],
    ids=str,
)
def test_lookup_that_cannot_be_served_is_refused(arguments, message):
    target = with_pard(make_model("llama"))
    if "assistant_model" in arguments:
        arguments = {**arguments, "assistant_model": make_model("llama")}

    with pytest.raises(ValueError, match=message):
        target.generate(**make_prompts(1), max_new_tokens=5, **arguments)


@pytest.mark.parametrize("has_draft", [False, True])
def test_lookup_of_a_stateful_target_is_refused(has_draft):
    config = transformers.MambaConfig(**SMALL, num_hidden_layers=1)
    target = with_pard(transformers.MambaForCausalLM(config).eval())
    draft = make_draft(make_model("llama", seed=5)) if has_draft else None

    with pytest.raises(ValueError, match="assistant_model" if has_draft else "prompt_lookup_num_tokens"):
        target.generate(**make_prompts(1), max_new_tokens=5, prompt_lookup_num_tokens=4, assistant_model=draft)


def test_beams_look_nothing_up():
    """As in transformers, which tells so."""
    target = make_model("llama")
    arguments = {**make_prompts(2), "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = target.generate(**arguments)

    assert torch.equal(with_pard(target).generate(**arguments, prompt_lookup_num_tokens=4), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ratio_test_without_a_draft_is_sample_and_match(batch_size, caplog):
    """There is no distribution to divide by."""
    host.warn_once.cache_clear()
    target, prompts = make_model("llama"), make_prompts(batch_size)
    arguments = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2, "verification": "ratio_test"}
    plain = {key: arguments[key] for key in arguments if key != "verification"}
    torch.manual_seed(5)
    expected = target.generate(**prompts, **plain, max_new_tokens=NEW_TOKENS)

    torch.manual_seed(5)
    got = with_pard(target).generate(**prompts, **arguments, max_new_tokens=NEW_TOKENS, prompt_lookup_num_tokens=4)

    assert torch.equal(got, expected)
    assert any("sample-and-match" in message for message in caplog.messages)


def test_falcon_runs_in_our_loop():
    target = make_target("falcon")

    _, got = generate_both(target, make_self_draft(target), make_prompts(3), num_assistant_tokens=4)

    assert got.stats.loop == "own"


@pytest.mark.parametrize("kind", ["guidance", "own", "prefix_function"])
def test_processors_with_a_memory_are_never_called_for_refused_tokens(kind):
    """The stock loop, which serves models that count positions by their cache, asks them about every proposal."""
    target = make_bloom()
    arguments = [
        {
            "guidance": {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[5, 6, 7]])},
            "own": {"logits_processor": LogitsProcessorList([Alternating()])},
            "prefix_function": {"prefix_allowed_tokens_fn": Counting()},
        }[kind]
        for _ in range(2)
    ]
    torch.manual_seed(5)
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    expected = target.generate(**make_prompts(1), **kwargs, **arguments[0])

    with pytest.warns(UserWarning, match="without the draft"):
        got = with_pard(target).generate(
            **make_prompts(1), **kwargs, **arguments[1], assistant_model=make_draft(make_model("llama", seed=3))
        )

    assert torch.equal(got.sequences, expected.sequences)


class Counting:
    """Allows other tokens at every call."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, row, input_ids):
        self.num_calls += 1
        return list(range(3 + self.num_calls % 40, 60))


@pytest.mark.parametrize("output_scores", [False, True])
@pytest.mark.parametrize("warper", [{"top_k": 9}, {"temperature": 0.7, "repetition_penalty": 1.3}], ids=str)
def test_stock_loop_samples_what_plain_generate_samples(warper, output_scores):
    target = make_bloom()
    arguments = {"do_sample": True, "output_scores": output_scores, **warper}
    for draft in (make_draft(make_model("llama", seed=3)), make_draft(make_model("llama", seed=4), 2)):
        expected, got = generate_both(target, draft, make_prompts(1), **arguments)
        states = []
        for model, more in ((without_pard(target), {}), (with_pard(target), {"assistant_model": draft})):
            torch.manual_seed(3)
            model.generate(**make_prompts(1), do_sample=True, max_new_tokens=9, **more)
            states.append(torch.get_rng_state())

        assert got.stats.loop == "stock"
        assert torch.equal(got.sequences, expected.sequences)
        assert torch.equal(*states)
        if output_scores:
            torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("is_ours", [True, False], ids=["with_pard", "untouched"])
@pytest.mark.parametrize("seed", range(3))
def test_stock_loop_ends_at_an_end_token_inside_a_block(is_ours, seed):
    """Up to 5.22 that loop looks at the last token of a block only."""
    target, prompts = make_target("falcon_alibi", seed=seed), make_prompts(1)
    arguments = {**prompts, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    text = target.generate(**arguments)[0].tolist()
    draft = make_scripted_draft([text], first_miss=5)
    for end in dict.fromkeys(text[prompts["input_ids"].shape[1] :]):
        expected = without_pard(target).generate(**arguments, eos_token_id=end)
        model = (with_pard if is_ours else without_pard)(target)
        assert torch.equal(model.generate(**arguments, eos_token_id=end, assistant_model=draft), expected)


def test_stock_loop_takes_a_static_cache_on_every_version():
    target = make_bart()
    arguments = {"cache_implementation": "static", "disable_compile": True}

    for draft in (make_draft(make_model("llama", seed=5)), None):
        expected, got = generate_both(target, draft, make_prompts(1), **arguments)

        assert got.stats.loop == "stock"
        assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_class_made_of_one_of_transformers_attends_as_that_does(family):
    """A class in a module of the user's: no copy of the cache each layer, no loop of transformers."""
    base = type(make_model(family))
    made = type("Mine", (PardGenerationMixin, base), {"__module__": __name__})
    torch.manual_seed(0)
    target = free_of_ends(made(make_model(family).config).eval())
    expected = target.generate(**make_prompts(3), max_new_tokens=NEW_TOKENS, do_sample=False)

    got = target.generate(
        **make_prompts(3), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
        assistant_model=make_draft(make_model("llama", seed=5)),
    )  # fmt: skip

    assert host.uses_attention_interface(target)
    assert got.stats.loop == "own"
    assert torch.equal(got.sequences, expected)


@pytest.mark.skipif(IS_FAKE, reason="the stand-in is not for weights that come and go")
def test_stock_loop_takes_an_offloaded_target():
    accelerate = pytest.importorskip("accelerate")
    target, draft = make_target("falcon_alibi"), make_draft(make_model("llama", seed=5))
    accelerate.cpu_offload(target, execution_device=DEVICE)

    expected, got = generate_both(target, draft, make_prompts(1))

    assert got.stats.loop == "stock"
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("which", ["target", "draft", "both"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_generate(which, where, tmp_path):
    """Between two forwards offloaded weights lie on the meta device: inputs go where the embedding computes."""
    accelerate = pytest.importorskip("accelerate")
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    prompts = make_prompts(3)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    for name, model in (("target", target), ("draft", draft)):
        if which in (name, "both"):
            if where == "cpu":
                accelerate.cpu_offload(model, execution_device=DEVICE)
            else:
                accelerate.disk_offload(model, str(tmp_path / name), execution_device=DEVICE)

    got = with_pard(target).generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft)
    assert torch.equal(got, expected)


@pytest.mark.skipif(IS_FAKE, reason="the stand-in is not for weights that come and go")
def test_stock_loop_takes_an_offloaded_draft():
    accelerate = pytest.importorskip("accelerate")
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    prompts = make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    accelerate.cpu_offload(draft, execution_device=DEVICE)

    got = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft)

    assert torch.equal(got, expected)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("order", [(False, True), (True, False), (True, True)], ids=str)
def test_autocast_may_change_between_calls(order, settings):
    """Buffers of a call without autocast cannot hold the entries of one with it, and the other way round."""
    from transformers import CompileConfig

    if settings:
        settings = {**settings, "compile_config": CompileConfig(backend="eager"), "disable_compile": False}
    target, draft = with_pard(make_model("llama")), make_self_draft(make_model("llama"))
    for uses_autocast in order:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=uses_autocast):
            got = target.generate(
                **make_prompts(2), max_new_tokens=6, do_sample=False, assistant_model=draft, **settings
            )
        assert got.shape == (2, 24)


@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=str)
def test_autocast_may_change_between_turns(order):
    target, draft = make_model("llama"), make_self_draft(make_model("llama"))
    texts = []
    for model, more in ((without_pard(target), {}), (with_pard(target), {"assistant_model": draft})):
        ids, past = make_prompts(1)["input_ids"], None
        for uses_autocast in order:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=uses_autocast):
                arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **more}
                output = model.generate(ids, past_key_values=past, **arguments)
            past = output.past_key_values
            ids = torch.cat([output.sequences, torch.tensor([[7, 8]])], dim=1)
        texts.append((past.layers[0].keys.dtype, past.get_seq_length()))
    assert texts[0] == texts[1]


class Doubled(torch.nn.Parameter):
    """Weights with a product of their own, as quantized ones have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a matter of CPUs")
def test_weights_with_a_product_of_their_own_keep_it():
    from pard_hf.generation.kernels import StreamedLinear

    weight, rows = torch.randn(6, 4), torch.randn(3, 4)
    expected = torch.nn.functional.linear(rows, Doubled(weight, requires_grad=False))

    with StreamedLinear():
        got = torch.nn.functional.linear(rows, Doubled(weight, requires_grad=False))

    assert torch.equal(got, expected)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), 2 * rows @ weight.T)


def test_target_that_keeps_no_cache_does_without_the_draft():
    """While training with gradient checkpointing layers keep nothing."""
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    target.gradient_checkpointing_enable()
    target.train()

    expected, got = generate_both(target, draft, make_prompts(1))

    assert torch.equal(got.sequences, expected.sequences)
    assert "gradient checkpointing" in got.stats.fallback_reason


def test_draft_that_keeps_no_cache_is_refused():
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    draft.gradient_checkpointing_enable()
    draft.train()

    with pytest.raises(ValueError, match="gradient checkpointing"):
        with_pard(target).generate(**make_prompts(1), max_new_tokens=5, assistant_model=draft)


def test_draft_loaded_as_an_ordinary_model_is_named(tmp_path):
    target = with_pard(make_model("llama"))
    make_draft(make_model("llama", seed=5)).save_pretrained(tmp_path)
    assistant = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert not isinstance(assistant, PardDraftModel)

    with pytest.warns(UserWarning, match=r"PardDraftModel\.from_pretrained"):
        target.generate(**make_prompts(1), max_new_tokens=5, assistant_model=assistant)


def test_way_of_generating_that_takes_no_draft_is_named():
    target, draft = with_pard(make_model("llama")), make_draft(make_model("llama", seed=5))

    def custom(model, input_ids, generation_config, **kwargs):
        return input_ids

    with pytest.warns(UserWarning, match="without the draft"):
        target.generate(**make_prompts(1), max_new_tokens=5, assistant_model=draft, custom_generate=custom)


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 21:
            raise KeyboardInterrupt
        return scores


def test_random_state_after_an_interrupt_in_the_stock_loop_is_that_of_the_emitted_tokens():
    class Streamer:
        num_tokens = -18

        def put(self, tokens):
            self.num_tokens += tokens.numel()
            if self.num_tokens > 4:
                raise KeyboardInterrupt

        def end(self): ...

    target, streamer, draft = make_bloom(), Streamer(), make_draft(make_model("llama", seed=3))
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        with_pard(target).generate(
            **make_prompts(1), max_new_tokens=NEW_TOKENS, do_sample=True, streamer=streamer, assistant_model=draft
        )
    state = torch.get_rng_state()
    torch.manual_seed(3)

    without_pard(target).generate(**make_prompts(1), max_new_tokens=streamer.num_tokens, do_sample=True)

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stops_by", ["streamer", "processor"])
def test_random_state_after_an_interrupt_is_that_of_the_emitted_tokens(stops_by):
    class Streamer:
        num_said = 0

        def put(self, tokens):
            self.num_said += 1
            if self.num_said > 4:
                raise KeyboardInterrupt

        def end(self): ...

    more = {
        "streamer": lambda: {"streamer": Streamer()},
        "processor": lambda: {"logits_processor": LogitsProcessorList([Broken()])},
    }[stops_by]
    target, states = make_model("llama"), []
    for model, draft in ((without_pard(target), None), (with_pard(target), make_self_draft(make_model("llama")))):
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                **make_prompts(1), max_new_tokens=NEW_TOKENS, do_sample=True, assistant_model=draft, **more()
            )
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("source", ["draft", "lookup"])
def test_newer_transformers_than_tested_is_warned_of_once(source, caplog, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    host.warn_once.cache_clear()
    draft = {"assistant_model": make_draft(make_model("llama", seed=5))}
    for _ in range(2):
        proposing = draft if source == "draft" else {"prompt_lookup_num_tokens": 4}
        with_pard(make_model("llama")).generate(**make_prompts(1), max_new_tokens=3, **proposing)
    host.warn_once.cache_clear()

    assert sum("tested on transformers up to" in message for message in caplog.messages) == 1


def test_arguments_that_transformers_adds_are_no_concern(monkeypatch):
    """The next version may add another argument to every forward."""
    target, draft = make_model("llama"), make_self_draft(make_model("llama"))
    original = type(target)._prepare_cache_for_generation

    def prepare(self, generation_config, model_kwargs, *args, **kwargs):
        model_kwargs["added_by_transformers"] = torch.zeros(1)
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    monkeypatch.setattr(type(target), "_prepare_cache_for_generation", prepare)

    output = with_pard(target).generate(
        **make_prompts(1), max_new_tokens=8, assistant_model=draft, return_dict_in_generate=True
    )

    assert output.stats.loop == "own"


def test_copies_made_during_a_call_are_as_they_were():
    target, copies = make_model("llama"), []
    target.register_forward_pre_hook(lambda model, *_: copies.append(copy.deepcopy(model.config)))

    with_pard(target).generate(
        **make_prompts(1), max_new_tokens=4, assistant_model=make_draft(make_model("llama", seed=5))
    )

    assert all(config == target.config for config in copies)
    assert "pard" not in str(copies[0]._attn_implementation)
    assert sys.modules[type(target).__module__].__name__.endswith("modeling_llama")


@pytest.mark.parametrize("wrap", [with_pard, lambda model: make_draft(model)])
def test_models_can_be_pickled_and_copied(wrap):
    model = wrap(make_model("llama"))

    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
