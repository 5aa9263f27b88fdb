"""Targets with recurrent and convolution layers: the text of plain `generate`, in rounds of one forward."""

import copy
import functools

import pytest
from device import torch
from every_family import families, varied_model
from families import make_draft, make_model, make_prompts, make_scripted_draft, placed, texts_of
from transformers import Cache, CompileConfig

from benchmarks import hybrids
from pard_hf import with_pard, without_pard
from pard_hf.generation import batch as batch_module
from pard_hf.generation.compilation import compile_cache_of
from pard_hf.generation.recurrent import HybridCache
from pard_hf.host import CACHE_NAMES, forward_parameters

pytestmark = pytest.mark.skipif(not hasattr(Cache, "get_conv_state"), reason="no interface for states")

HYBRIDS = [
    "BailingHybrid",
    "Bamba",
    "FalconH1",
    "GraniteMoeHybrid",
    "KimiLinear",
    "LaraMini",
    "Lfm2",
    "Lfm2Moe",
    "Lfm3",
    "Mamba2",
    "NemotronH",
    "OlmoHybrid",
    "Qwen3_5MoeText",
    "Qwen3_5Text",
    "Qwen3Next",
    "Zamba2",
]
# One of each kind of state: a convolution's, a delta rule's, a scan's, all three without keys, and all beside keys.
KINDS = ["Lfm2", "Qwen3Next", "Bamba", "Mamba2", "FalconH1"]
NEW_TOKENS = 18


@functools.cache
def made(family):
    """A tiny target whose text varies, to be left as it is."""
    if f"{family}Config" not in families():
        pytest.skip(f"transformers has no {family} yet")
    model = varied_model(families()[f"{family}Config"])
    if forward_parameters(model).isdisjoint(CACHE_NAMES):
        pytest.skip(f"{family} takes its cache under a name of its own")
    return placed(model)


def plain(family, prompts, **arguments):
    return without_pard(made(family)).generate(
        **prompts, **{"do_sample": False, "max_new_tokens": NEW_TOKENS} | arguments
    )


def drafted(family, prompts, **arguments):
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    output = with_pard(made(family)).generate(**prompts, **settings | arguments)
    without_pard(made(family))
    return output


def drafts(prompts, texts, num_assistant_tokens):
    """Right up to a position and wrong after it, and of random weights."""
    script = texts_of(texts, prompts["attention_mask"])
    for first_miss in sorted({0, num_assistant_tokens // 2, num_assistant_tokens}):
        yield make_scripted_draft(script, first_miss, num_assistant_tokens)
    yield make_draft(make_model("llama", seed=5), num_assistant_tokens)


@pytest.mark.parametrize(("batch_size", "num_assistant_tokens"), [(1, 9), (5, 4)])
@pytest.mark.parametrize("family", HYBRIDS)
def test_every_hybrid_is_identical(family, batch_size, num_assistant_tokens):
    """Prompts of 1 to 18 tokens, shorter and longer than the convolutions, in rows that accept different counts."""
    prompts = make_prompts(batch_size)
    expected, accepted = plain(family, prompts), []
    assert len(set(expected[0, 18:].tolist())) > 8

    for draft in drafts(prompts, expected, num_assistant_tokens):
        got = drafted(family, prompts, assistant_model=draft)
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "own"
        accepted.append(got.stats.acceptance_length)
    assert max(accepted) > 2.5


@pytest.mark.parametrize(
    ("family", "batch_size"), [*((family, 1) for family in HYBRIDS), *((kind, 5) for kind in KINDS)]
)
def test_compiled_rounds_are_identical(family, batch_size):
    """Traced as every backend would be; states of one call do not reach the next, which uses the same cache."""
    prompts = make_prompts(batch_size)
    expected, config = plain(family, prompts), CompileConfig(backend="eager", mode=None)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), 2, 4)

    for _ in range(2):
        got = drafted(family, prompts, assistant_model=draft, compile_config=config)
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_compiled > 0
        assert got.stats.acceptance_length > 1.5
    assert compile_cache_of(made(family), draft).failure is None


def test_rounds_of_states_are_not_captured(caplog):
    """A recorded graph would leave states where Python put them once."""
    prompts = make_prompts(1)
    expected = plain("Lfm2", prompts)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), 2, 4)

    got = drafted("Lfm2", prompts, assistant_model=draft, compile_config=CompileConfig(backend="capture", mode=None))

    assert torch.equal(got.sequences, expected)
    assert got.stats.num_compiled == 0
    assert "keeps states" in caplog.text


@pytest.mark.parametrize(("batch_size", "num_assistant_tokens"), [(1, 1), (1, 4), (5, 1), (5, 9)])
@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next", "Bamba"])
def test_every_depth_is_identical(family, batch_size, num_assistant_tokens):
    prompts = make_prompts(batch_size)
    expected = plain(family, prompts)

    for draft in drafts(prompts, expected, num_assistant_tokens):
        assert torch.equal(drafted(family, prompts, assistant_model=draft).sequences, expected)


@functools.cache
def biased():
    """A convolution whose bias turns the zeros of padding into something else."""
    config = copy.deepcopy(made("Lfm2").config)
    assert not config.conv_bias
    config.conv_bias = True
    torch.manual_seed(1)
    model = type(made("Lfm2"))(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return placed(model)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_convolutions_with_a_bias_are_identical(batch_size):
    prompts, arguments = make_prompts(batch_size), {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = without_pard(biased()).generate(**prompts, **arguments)

    for draft in drafts(prompts, expected, 4):
        output = with_pard(biased()).generate(
            **prompts, **arguments, assistant_model=draft, return_dict_in_generate=True
        )
        assert output.stats.loop == "own"
        assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("num_columns", [1, 2, 3, 40])
@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next", "Bamba"])
def test_prompts_of_any_length_are_identical(family, num_columns):
    prompts = {name: tensor[:, :num_columns] for name, tensor in make_prompts(1, longest=40).items()}
    expected = plain(family, prompts)

    for draft in drafts(prompts, expected, 4):
        assert torch.equal(drafted(family, prompts, assistant_model=draft).sequences, expected)


@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next", "NemotronH"])
def test_prompts_in_chunks_are_identical(family, monkeypatch):
    """Chunks that are padding alone in some rows, and a last token that is read again."""
    monkeypatch.setattr(batch_module, "PREFILL_CHUNK", 4)
    prompts = make_prompts(5)
    expected = plain(family, prompts)

    for draft in drafts(prompts, expected, 4):
        assert torch.equal(drafted(family, prompts, assistant_model=draft).sequences, expected)


@pytest.mark.parametrize("first_miss", [0, 2, 4])
@pytest.mark.parametrize("family", KINDS)
def test_a_round_is_one_forward(family, first_miss):
    prompts, forwards = make_prompts(1), []
    expected = plain(family, prompts)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), first_miss, 4)
    drafted(family, prompts, assistant_model=draft)  # The first call of a model tries it out.
    hook = made(family).register_forward_hook(lambda *_: forwards.append(1))

    stats = drafted(family, prompts, assistant_model=draft, return_dict_in_generate=True).stats
    hook.remove()

    assert len(forwards) == stats.num_rounds


@pytest.mark.parametrize("column", [0, 1, 4, 7])
@pytest.mark.parametrize("family", KINDS)
def test_end_tokens_inside_blocks(family, column):
    """Rows end one after the other, and the batch shrinks."""
    prompts = make_prompts(5)
    free = plain(family, prompts)
    stop = {"eos_token_id": [int(free[row, 18 + column + row]) for row in range(5)]}
    expected = plain(family, prompts, **stop)

    for draft in drafts(prompts, free, 9):
        assert torch.equal(drafted(family, prompts, assistant_model=draft, **stop).sequences, expected)


@pytest.mark.parametrize("family", KINDS)
def test_sampling_with_the_same_seed_is_identical(family):
    prompts, settings = make_prompts(1), {"do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(5)
    expected = plain(family, prompts, **settings)

    for draft in drafts(prompts, expected, 4):
        torch.manual_seed(5)
        got = drafted(family, prompts, assistant_model=draft, **settings)
        assert torch.equal(got.sequences, expected)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", KINDS)
def test_lockstep_is_identical(family, batch_size):
    prompts, settings = make_prompts(batch_size), {"repetition_penalty": 1.3}
    expected = plain(family, prompts, **settings)

    for draft in drafts(prompts, expected, 4):
        got = drafted(family, prompts, assistant_model=draft, **settings)
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "lockstep"


@pytest.mark.parametrize("has_draft", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", KINDS)
def test_text_sources_are_identical(family, batch_size, has_draft):
    """Copies and successors propose a chain, alone or with a draft."""
    prompts = make_prompts(batch_size)
    expected = plain(family, prompts)
    script = texts_of(expected, prompts["attention_mask"])
    draft = make_scripted_draft(script, 2, 4) if has_draft else None

    for references in (None, script, [[3 + token % 90 for token in text] for text in script]):
        got = drafted(
            family, prompts, assistant_model=draft, prompt_lookup_num_tokens=5, assistant_reference_texts=references
        )
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "own"
        assert sum(got.stats.accepted_by_source.values()) == got.stats.num_accepted
        if references is script:
            assert got.stats.num_accepted > 10 * batch_size


@pytest.mark.parametrize("family", KINDS)
def test_trees_are_chains(family):
    prompts = make_prompts(5)
    expected = plain(family, prompts)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), 4, 4)

    got = drafted(family, prompts, assistant_model=draft, assistant_tree_size=8)

    assert torch.equal(got.sequences, expected)
    assert got.stats.num_drafted == drafted(family, prompts, assistant_model=draft).stats.num_drafted


@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next", "Mamba2"])
def test_embeddings_are_identical(family):
    prompts = make_prompts(1)
    embeds = made(family).get_input_embeddings()(prompts["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": prompts["attention_mask"]}
    expected = plain(family, inputs)

    got = drafted(family, inputs, assistant_model=make_draft(make_model("llama", seed=5), 4))

    assert torch.equal(got.sequences, expected)
    assert got.stats.loop == "own"


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=["own", "lockstep"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_returned_cache_is_that_of_plain_generate(family, settings):
    """Keys, values and states of every column but the last, padding behind a row's end included."""
    prompts = make_prompts(3)
    free = plain(family, prompts, **settings)
    ends = [int(free[row, 20 + 3 * row]) for row in range(3)]
    stop = {"eos_token_id": ends, "return_dict_in_generate": True, **settings}
    expected = plain(family, prompts, **stop)
    draft = make_scripted_draft(texts_of(free, prompts["attention_mask"]), 2, 4)

    got = drafted(family, prompts, assistant_model=draft, **stop)

    assert torch.equal(got.sequences, expected.sequences)
    ours, theirs = (output.get("cache", output.get("past_key_values")) for output in (got, expected))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for name in ("conv_states", "recurrent_states"):
            for index, states in getattr(other, name, {}).items():
                if states is not None:
                    torch.testing.assert_close(getattr(mine, name)[index], states, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("num_more", [1, 3])
@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next", "NemotronH", "FalconH1"])
def test_a_second_turn_is_identical(family, num_more):
    """On a cache of plain `generate` and on one of ours, and a third turn on what that leaves."""
    prompts, draft = make_prompts(1), make_draft(make_model("llama", seed=5), 4)
    ours, theirs = (
        drafted(family, prompts, assistant_model=draft),
        plain(family, prompts, return_dict_in_generate=True),
    )
    name = "cache" if "cache" in theirs else "past_key_values"
    for _ in range(2):
        more = torch.randint(3, 99, (1, num_more - 1))
        ids = torch.cat([theirs.sequences, more], dim=1)
        assert torch.equal(ours.sequences, theirs.sequences)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        theirs = plain(family, inputs, **{name: theirs[name]}, return_dict_in_generate=True)
        right = make_scripted_draft(theirs.sequences.tolist(), 2, 4)
        ours = drafted(family, inputs, **{name: ours[name]}, assistant_model=right)
        assert ours.stats.loop == "own"
    assert torch.equal(ours.sequences, theirs.sequences)


def test_a_cache_without_keys_is_left_to_plain_generate():
    """It does not tell how much of the text is in it."""
    prompts = make_prompts(1)
    first, again = (plain("Mamba2", prompts, return_dict_in_generate=True) for _ in range(2))
    name = "cache" if "cache" in first else "past_key_values"
    more = {"input_ids": torch.cat([first.sequences, torch.tensor([[7]])], dim=1)}
    expected = plain("Mamba2", more, **{name: first[name]})

    with pytest.warns(UserWarning, match="cannot be taken over"):
        got = drafted("Mamba2", more, **{name: again[name]}, assistant_model=make_draft(make_model("llama"), 4))

    assert torch.equal(got.sequences, expected)


@pytest.mark.parametrize("family", ["Jamba", "Mamba", "FalconMamba", "Zamba"])
def test_what_does_not_go_on_from_a_state_is_refused(family):
    draft = make_draft(make_model("llama", seed=5), 4)

    with pytest.raises(ValueError, match=rf"got `{family}ForCausalLM`: Several tokens after a state"):
        drafted(family, make_prompts(1), assistant_model=draft)


@pytest.mark.parametrize("family", ["Lfm2", "Qwen3Next"])
def test_a_hybrid_draft_is_refused(family):
    target = with_pard(make_model("llama"))

    with pytest.raises(ValueError, match="Expected a draft whose layers all attend"):
        target.generate(**make_prompts(1), assistant_model=make_draft(varied_model(families()[f"{family}Config"]), 4))


def test_a_call_that_fails_leaves_plain_generate_as_it_was():
    prompts = make_prompts(1)
    expected = plain("Qwen3Next", prompts)
    draft = make_draft(make_model("llama", seed=5), 4)
    mixer = next(module for module in made("Qwen3Next").modules() if hasattr(module, "in_proj_qkvz"))

    def fail(*_):
        raise RuntimeError("in a mixer")

    hook = mixer.in_proj_qkvz.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in a mixer"):
        drafted("Qwen3Next", prompts, assistant_model=draft)
    hook.remove()

    assert torch.equal(plain("Qwen3Next", prompts), expected)
    assert torch.equal(drafted("Qwen3Next", prompts, assistant_model=draft).sequences, expected)


def test_rejected_tokens_leave_no_trace_in_a_state():
    """Random wrong tokens, random accepted counts, and rows that only wait: logits as from scratch."""
    for family in KINDS:
        model = made(family)
        texts, lengths = torch.randint(3, 99, (4, 60)), torch.tensor([1, 5, 9, 14])
        drafted(family, make_prompts(1), assistant_model=make_draft(make_model("llama", seed=5), 4))
        cached = batch_module.CachedModel(model, HybridCache(model.config, 64))
        columns = torch.arange(14) - 14 + lengths.unsqueeze(1)
        with torch.no_grad():
            cached.forward(columns, 64, 1, input_ids=texts.gather(1, columns.clamp(min=0)))
        cached.cache.commit(lengths)
        for turn in range(6):
            new = torch.arange(5) + lengths.unsqueeze(1)
            right = torch.randint(0, 6, (4,))
            ids = torch.where(torch.arange(5) < right.unsqueeze(1), texts.gather(1, new), 50 + turn)
            with torch.no_grad():
                logits = cached.forward(new, 64, 5, input_ids=ids)
                for row in range(4):
                    end = int(lengths[row] + right[row])
                    whole = model(texts[row : row + 1, :end]).logits[0, int(lengths[row]) :]
                    torch.testing.assert_close(logits[row, : right[row]], whole, atol=2e-4, rtol=1e-3)
            lengths = lengths + right
            cached.cache.commit(lengths)


@pytest.mark.parametrize("chunk", [4, 4096])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_step_sizes_are_limited_in_prompts_only(batch_size, chunk, monkeypatch):
    """As in plain `generate`, whose functions for one token know no limit."""
    monkeypatch.setattr(batch_module, "PREFILL_CHUNK", chunk)
    target, prompts = copy.deepcopy(made("NemotronH")), make_prompts(batch_size)
    unlimited = plain("NemotronH", prompts)
    for module in target.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (2.0, float("inf"))
    expected = target.generate(**prompts, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert not torch.equal(expected, unlimited)

    for draft in drafts(prompts, expected, 4):
        got = with_pard(target).generate(
            **prompts, do_sample=False, max_new_tokens=NEW_TOKENS, assistant_model=draft, return_dict_in_generate=True
        )
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "own"


def test_the_benchmark_counts_states_and_what_a_round_keeps():
    """A convolution of 3 over 128 channels; the inputs of 5 tokens, and a column that says where each row begins."""
    target = placed(hybrids.hybrid("lfm2", 128, 4))
    draft = make_draft(make_model("llama", vocab_size=hybrids.VOCAB_SIZE), 4)
    ids = torch.arange(3, 20)[None].to(target.device)

    def rounds(**arguments):
        return with_pard(target).generate(ids, assistant_model=draft, do_sample=False, **arguments)

    found = hybrids.memory(target, rounds, 5)

    num_layers, channels = 2, 128 * 4
    assert found["state_bytes"] == num_layers * 3 * channels
    assert found["kept_bytes"] == num_layers * ((3 + 5) * channels + 8)
    assert hybrids.dense_like(target).num_parameters() == pytest.approx(target.num_parameters(), rel=0.01)
