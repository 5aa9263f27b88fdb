"""Compiled rounds: the same tokens, few graphs, nothing compiled twice.

torch.compile with the "eager" backend traces and guards as inductor does, in a fraction of the time. What inductor is
given, with mutations taken out, runs in one test by "aot_eager", and inductor itself in another.
"""

import copy
import gc
import json
import logging
import threading
import time
import weakref

import pytest
from device import DEVICE, IS_FAKE, torch
from families import add_head, make_decoder, make_draft, make_model, make_prompts, make_self_draft
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from transformers import CompileConfig, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from pard_hf import AssistantMemory, with_pard
from pard_hf.generation.capture import CAPTURE, Repeated
from pard_hf.generation.compilation import CompiledSteps, compile_cache_of, default_config
from pard_hf.generation.schedule import Choice, Schedule
from pard_hf.generation.sources import Sources, Tables, encode_references
from pard_hf.host import CACHE_NAME

pytestmark = pytest.mark.skipif(IS_FAKE, reason="there is nothing to compile for")
TRACED = {"compile_config": CompileConfig(backend="eager", mode="default"), "disable_compile": False}
AOT = {"compile_config": CompileConfig(backend="aot_eager", mode="default")}
NEW_TOKENS = 30


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def make_llama(seed: int = 0, **changes):
    """One layer: the others are traced alike."""
    return make_model("llama", seed, **{"num_hidden_layers": 1, **changes})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def pard(target, draft, prompts, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **TRACED, **kwargs}
    return with_pard(target).generate(**prompts, assistant_model=draft, return_dict_in_generate=True, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_compiled_is_eager(family, batch_size):
    """Windows, learned positions, ragged rows and every accepted count, compiled."""
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    eager = pard(target, make_self_draft(target), prompts, disable_compile=True, compile_config=None)

    compiled = pard(target, make_self_draft(target), prompts, **(AOT if batch_size > 1 else TRACED))

    assert torch.equal(eager.sequences, expected)
    assert torch.equal(compiled.sequences, expected)
    assert compiled.stats == eager.stats
    assert compiled.compile_seconds > 0
    assert not eager.compile_seconds


@pytest.mark.parametrize(
    ("family", "batch_size", "tree_size", "looks_up", "do_sample"),
    [("llama", 1, 0, False, True), ("gemma3", 3, 12, False, False), ("gpt2", 3, 6, True, False)],
)
def test_captured_is_eager(family, batch_size, tree_size, looks_up, do_sample):
    """Whatever changes between calls reaches a capture: texts, end tokens, noise, what is copied from."""
    target = make_model(family, max_position_embeddings=1024)
    draft = add_head(make_self_draft(target), 0.3)
    captured = {"compile_config": CompileConfig(backend=CAPTURE), "assistant_tree_size": tree_size}
    for number, longest in enumerate((20, 26, 280, 30)):
        prompts = make_prompts(batch_size, longest=longest)
        kwargs = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": do_sample,
            "eos_token_id": [5 + number],
            "pad_token_id": 0,
        }
        torch.manual_seed(number)
        expected = target.generate(**prompts, **kwargs)
        if looks_up:
            captured |= {"prompt_lookup_num_tokens": 4, "assistant_reference_texts": [expected[0].tolist()] * number}
        torch.manual_seed(number)
        got = pard(target, draft, prompts, **kwargs, **captured)
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_compiled

    kept = compile_cache_of(target, draft)
    assert kept.failure is None
    assert all(step.replay is not None for key, step in kept.steps.items() if dict(key[1])["target cache"] == 256)
    assert graphs() == 0


class WithoutUploads(TorchFunctionMode):
    """What makes a tensor of values of the host, which a device that captures refuses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor), "values of the host are copied to the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arguments", [{}, {"assistant_tree_size": 9}, {"prompt_lookup_num_tokens": 6}], ids=str)
def test_captured_steps_upload_nothing(arguments, monkeypatch):
    replay = Repeated.__call__

    def without_uploads(repeated):
        with WithoutUploads():
            return replay(repeated)

    monkeypatch.setattr(Repeated, "__call__", without_uploads)
    target = make_model("llama")
    draft = make_draft(make_model("llama", seed=5))
    config = CompileConfig(backend=CAPTURE)

    got = pard(target, draft, make_prompts(1), max_new_tokens=24, compile_config=config, **arguments)

    assert got.stats.num_compiled > 1


def test_step_that_cannot_be_captured_runs_eagerly(monkeypatch, caplog):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("pard_hf.generation.capture.captured", refuse)
    target, prompts = make_llama(), make_prompts(2)
    draft = make_self_draft(target)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    got = pard(target, draft, prompts, compile_config=CompileConfig(backend=CAPTURE))

    assert torch.equal(got.sequences, expected)
    assert "not permitted" in compile_cache_of(target, draft).failure
    assert sum("cannot be compiled" in message for message in caplog.messages) == 3


@pytest.mark.parametrize(
    ("family", "batch_size", "tree_size"), [("llama", 3, 0), ("llama", 1, 12), ("gemma3", 3, 12), ("gpt2", 3, 12)]
)
def test_compiled_trees_and_heads_are_eager(family, batch_size, tree_size):
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafts = [add_head(make_self_draft(target), 0.3) for _ in range(2)]
    eager = pard(target, drafts[0], prompts, assistant_tree_size=tree_size, disable_compile=True, compile_config=None)

    compiled = pard(target, drafts[1], prompts, assistant_tree_size=tree_size)
    num_graphs = graphs()
    again = pard(target, drafts[1], prompts, assistant_tree_size=tree_size)

    assert compile_cache_of(target, drafts[1]).failure is None
    assert torch.equal(eager.sequences, expected)
    assert torch.equal(compiled.sequences, expected)
    assert torch.equal(again.sequences, expected)
    assert compiled.stats.histogram == eager.stats.histogram
    assert compiled.compile_seconds > 0
    assert graphs() == num_graphs


@pytest.mark.parametrize(("family", "batch_size", "has_draft"), [("gemma3", 1, False), ("gpt2", 3, True)])
def test_compiled_sources_are_eager(family, batch_size, has_draft):
    """Tables lie in static buffers, and go back to the caller's memory after a call; texts to copy from may change."""
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=14, do_sample=False)
    draft = make_draft(make_model("llama", seed=5), 2) if has_draft else None
    compiled, eager = AOT if batch_size > 1 else TRACED, {"disable_compile": True, "compile_config": None}
    rounds, memories = [], []
    for how in (eager, compiled):
        memory = AssistantMemory(with_pard(target))
        kept = {"assistant_memory": memory, "prompt_lookup_num_tokens": 4, "max_new_tokens": 14, **how}
        for number in range(2):
            before = graphs()
            texts = [[3] * number + expected[0].tolist()]
            output = pard(target, draft, prompts, **kept, assistant_reference_texts=texts)
            assert torch.equal(output.sequences, expected)
            assert output.stats.loop == "own"
            rounds.append(output.stats.num_rounds)
        assert graphs() == before
        memories.append(memory)

    assert compile_cache_of(target, draft or target).failure is None
    assert output.compile_seconds == 0
    assert compile_cache_of(target, draft or target).steps
    for number in range(2):  # Eager trees are less deep near the end of a text.
        assert abs(rounds[number] - rounds[2 + number]) <= batch_size
    assert max(rounds) < 11 * batch_size
    assert all(memory.num_tokens > 5 for memory in memories)


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inductor_is_eager(is_whole):
    target, prompts = make_llama(num_hidden_layers=2), make_prompts(2)
    draft = add_head(make_draft(make_llama(seed=5)), 0.3)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    compiled = {"compile_config": CompileConfig(fullgraph=is_whole), "assistant_tree_size": 8}
    output = pard(target, draft, prompts, **compiled)

    assert compile_cache_of(target, draft).failure is None
    assert torch.equal(output.sequences, expected)
    assert output.compile_seconds > 0


@pytest.mark.slow
def test_inductor_is_eager_without_a_draft():
    target, prompts = make_llama(), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=12, do_sample=False)
    arguments = {"prompt_lookup_num_tokens": 2, "assistant_tree_size": 4, "assistant_reference_texts": expected}

    compiled = {"compile_config": CompileConfig()}  # With CUDA graphs where there are any.
    output = pard(target, None, prompts, **arguments, **compiled, max_new_tokens=12)

    assert compile_cache_of(target, target).failure is None
    assert torch.equal(output.sequences, expected)
    assert output.compile_seconds > 0
    assert output.stats.num_accepted > 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_one_graph_serves_all_layers(family):
    """The graphs of a target: one before the layers, one for all of them whatever their kinds, one after."""
    kinds = ["sliding_attention", "full_attention"] * 3
    for num_layers in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        changes = {"layer_types": kinds[:num_layers]} if family == "gemma3" else {}
        target = make_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": num_layers}, **changes)
        draft, prompts = make_draft(make_llama(seed=5)), make_prompts(2)
        expected = target.generate(**prompts, max_new_tokens=9, do_sample=False)

        got = pard(target, draft, prompts, max_new_tokens=9)

        assert torch.equal(got.sequences, expected)
        kept = compile_cache_of(target, draft)
        assert kept.failure is None
        of_draft, of_target, of_acceptance = 3, 3, 1
        assert graphs() == of_draft + of_target + of_acceptance


@pytest.mark.parametrize("looks_up", [False, True])
def test_no_graph_grows_with_the_layers(looks_up):
    """Nor that of acceptance, though keys and values of the accepted path move in every layer."""
    sizes: list[list[int]] = []

    def counting(graph, inputs):
        sizes[-1].append(len(graph.graph.nodes))
        return graph.forward

    config = CompileConfig(backend=counting, mode="default", fullgraph=False)
    for num_layers in (2, 5):
        torch._dynamo.reset()
        sizes.append([])
        target, prompts = make_llama(num_hidden_layers=num_layers), make_prompts(2)
        draft = None if looks_up else make_self_draft(target)
        options = {"prompt_lookup_num_tokens": 3} if looks_up else {}
        expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

        got = pard(target, draft, prompts, assistant_tree_size=6, compile_config=config, **options)

        assert compile_cache_of(target, draft or target).failure is None
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_accepted > 2
    assert sizes[0] == sizes[1]


class Doubled(torch.nn.Linear):
    def forward(self, vectors):
        return 2 * super().forward(vectors)


def test_layer_that_changes_between_calls_is_seen():
    """Guards of later layers are checked once a call, as an adapter on one of them needs it."""
    target, prompts = make_llama(num_hidden_layers=3), make_prompts(1)
    draft = make_draft(make_llama(seed=5))
    for changed in (None, target.model.layers[2].self_attn.v_proj, target.model.layers[1].mlp.up_proj):
        if changed is not None:
            changed.__class__ = Doubled
        expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        for _ in range(2):
            got = pard(target, draft, prompts)
            assert torch.equal(got.sequences, expected)
            assert got.stats.num_rounds > 4
            assert compile_cache_of(target, draft).failure is None


def test_one_graph_serves_all_depths():
    """Of what looks up: one for all depths, beside three of the target and one of acceptance."""
    target, prompts = make_llama(), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=9, do_sample=False)
    for num_depths in (3, 9):
        torch._dynamo.reset()
        counters.clear()
        sizes = {"prompt_lookup_num_tokens": num_depths, "assistant_tree_size": 6}

        got = pard(target, None, prompts, max_new_tokens=9, **sizes)

        assert torch.equal(got.sequences, expected)
        assert compile_cache_of(target, target).failure is None
        assert graphs() == 3 + 1 + 1


@pytest.mark.parametrize("kind", ["plain", "head"])
def test_one_graph_serves_all_depths_of_a_draft(kind):
    """The draft sees less far than copies reach, so deeper nodes have no candidates of it."""
    target, prompts = make_llama(), make_prompts(2)
    draft = make_draft(make_llama(seed=5), 2)
    draft = add_head(draft, 0.3) if kind == "head" else draft
    sizes = {"prompt_lookup_num_tokens": 6, "assistant_tree_size": 6, "max_new_tokens": 14}
    expected = target.generate(**prompts, max_new_tokens=14, do_sample=False)
    eager = pard(target, draft, prompts, **sizes, disable_compile=True, compile_config=None)

    got = pard(target, draft, prompts, **sizes)

    assert compile_cache_of(target, draft).failure is None
    assert torch.equal(eager.sequences, expected)
    assert torch.equal(got.sequences, expected)
    assert graphs() == 3 + 3 + 1 + 1
    assert abs(got.stats.num_rounds - eager.stats.num_rounds) <= 2  # Eager trees are less deep at the end of a text.


def test_small_models_are_compiled_whole(monkeypatch):
    """Their layers take no longer than calls of compiled code."""
    assert default_config(make_llama()).fullgraph
    monkeypatch.setattr("pard_hf.generation.compilation.MIN_PARAMETERS", 0)
    assert default_config(make_llama()).fullgraph == (DEVICE.type == "cuda")


@pytest.mark.parametrize("tree_size", [0, 6])
def test_whole_model_is_one_graph_for_those_who_ask(tree_size):
    target, prompts = make_llama(num_hidden_layers=3), make_prompts(2)
    draft = add_head(make_self_draft(target), 0.3)
    expected = target.generate(**prompts, max_new_tokens=9, do_sample=False)
    whole = CompileConfig(backend="eager", mode="default", fullgraph=True)

    for config, num_graphs in ((whole, 3), (TRACED["compile_config"], 3 + 7)):
        got = pard(target, draft, prompts, max_new_tokens=9, assistant_tree_size=tree_size, compile_config=config)
        assert torch.equal(got.sequences, expected)
        assert graphs() == num_graphs


class ScalingModel(LlamaModel):
    """Scales the states between its layers, where no stand-in looks."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        states, cache = self.embed_tokens(input_ids), {CACHE_NAME: kwargs[CACHE_NAME]}
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **cache}
        given["attention_mask"] = create_causal_mask(config=self.config, inputs_embeds=states, **given)
        given["position_embeddings"] = self.rotary_emb(states, position_ids=position_ids)
        for layer in self.layers:
            states = layer(states * 0.5, **given)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), **cache)


def test_model_that_cannot_be_cut_is_compiled_whole():
    target, prompts = make_llama(num_hidden_layers=2), make_prompts(2)
    target.model.__class__ = ScalingModel
    draft = make_draft(make_llama(seed=5))
    expected = target.generate(**prompts, max_new_tokens=9, do_sample=False)

    got = pard(target, draft, prompts, max_new_tokens=9)

    assert torch.equal(got.sequences, expected)
    assert compile_cache_of(target, draft).failure is None
    assert graphs() == 3 + 1 + 1


def test_nothing_is_compiled_twice():
    """Other prompt lengths, lengths, sampling settings and processors in the same cache size find everything made."""
    target, draft = make_llama(), make_draft(make_llama(seed=5))
    pard(target, draft, make_prompts(2, longest=18))
    pard(target, draft, make_prompts(2, longest=18), do_sample=True, temperature=0.7)
    made = graphs()

    again = pard(target, draft, make_prompts(2, longest=7), max_new_tokens=45)
    warmer = pard(target, draft, make_prompts(2, longest=11), do_sample=True, temperature=1.3, top_k=7, top_p=0.9)
    pard(target, draft, make_prompts(2, longest=9), repetition_penalty=1.2)

    assert made > 0
    assert graphs() == made
    assert again.compile_seconds == warmer.compile_seconds == 0


def test_sampling_says_what_plain_generate_says():
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(1)
    torch.manual_seed(4)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.9, top_k=20)

    torch.manual_seed(4)
    got = pard(target, draft, prompts, do_sample=True, temperature=0.9, top_k=20)

    assert torch.equal(got.sequences, expected)


def test_long_text_crosses_cache_sizes():
    """512 is twice the smallest cache: the second half is decoded in the next size."""
    target = make_llama(max_position_embeddings=1024)
    draft = make_self_draft(target)
    prompts = make_prompts(1, longest=240)
    expected = target.generate(**prompts, max_new_tokens=60, do_sample=False)

    for compiled in ({}, {"disable_compile": True}):
        got = pard(target, draft, prompts, max_new_tokens=60, **compiled)
        assert torch.equal(got.sequences, expected)
    sizes = {dict(key[1][:5])["target cache"] for key in compile_cache_of(target, draft).steps}
    assert sizes == {256, 512}


@pytest.mark.parametrize(
    ("family", "batch_size", "tree_size", "looks_up"),
    [("llama", 1, 0, False), ("gemma3", 3, 12, False), ("gpt2", 3, 6, True), ("qwen3_moe", 2, 0, False)],
)
def test_further_cache_size_compiles_nothing(family, batch_size, tree_size, looks_up):
    """What is compiled reads the size of a cache from its buffers; three sizes, and the first again."""
    target = make_model(family, max_position_embeddings=2048)
    draft = add_head(make_self_draft(target), 0.3)
    kwargs = {"max_new_tokens": 10, "assistant_tree_size": tree_size}
    if looks_up:
        kwargs["prompt_lookup_num_tokens"] = 4
    sizes, made = (30, 300, 600, 30), []

    for longest in sizes:
        prompts = make_prompts(batch_size, longest=longest)
        expected = target.generate(**prompts, max_new_tokens=10, do_sample=False)
        got = pard(target, draft, prompts, **kwargs)
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_compiled
        made.append(graphs())

    assert made == made[:1] * len(sizes)
    kept = compile_cache_of(target, draft)
    assert kept.failure is None
    assert len({dict(key[1])["target cache"] for key in kept.steps}) == 3


def test_scores_and_cache_are_handed_back():
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(3)
    kwargs = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    expected = target.generate(**prompts, **kwargs)

    got = pard(target, draft, prompts, max_new_tokens=12, output_scores=True)

    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("looks_up", [False, True])
def test_rounds_ahead_of_the_host_say_the_same(looks_up):
    """What a CUDA device does: a round begins before the host knows how the last one ended."""
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(3)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    compiled = CompiledSteps(compile_cache_of(target, draft), TRACED["compile_config"], target)
    options, sources = {"num_assistant_tokens": 5}, {}
    if looks_up:  # Copies are longer than what the draft proposes: it has more to read than it may know of.
        draft, depth = make_self_draft(target, 2), 8
        sources = {"prompt_lookup_num_tokens": depth, "assistant_reference_texts": [t.tolist() for t in expected]}
        references = encode_references(sources["assistant_reference_texts"], None, 100)
        tables = compiled.tables(Tables.empty(100, target.device), target.device)
        options = {"num_assistant_tokens": 2, "schedule": Schedule(depth, 16 // 3)}
        options["sources"] = Sources(tables, references, 8, learns_successors=True, has_draft=True)
    decoder = make_decoder(target, draft, prompts, NEW_TOKENS, compiled=compiled, **options)
    assert decoder.can_overlap()
    decoder.num_ahead = 1

    with torch.no_grad():
        decoder.run()

    assert torch.equal(decoder.sequences(), expected)
    keys = decoder.batch.draft.cache.layers[0].keys.unflatten(0, (3, -1)).flatten(2).clone()
    assert decoder.stats == pard(target, draft, prompts, **sources).stats
    assert all(row[: length - 20].any(-1).all() for row, length in zip(keys, decoder.batch.lengths, strict=True))


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_leave_also_ahead_of_the_host(do_sample, monkeypatch):
    """The host waits for what is under way, and noise is drawn afresh for the row that is left."""
    monkeypatch.setattr("pard_hf.generation.decoder.WORTH_COMPILING", 1)
    target, draft, prompts = make_llama(), make_self_draft(make_llama()), make_prompts(2)
    free = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    compiled = CompiledSteps(compile_cache_of(target, draft), TRACED["compile_config"], target)
    options = {"num_assistant_tokens": 2, "do_sample": do_sample, "compiled": compiled}
    decoder = make_decoder(target, draft, prompts, NEW_TOKENS, eos_token_id=free[:1, 24], **options)
    decoder.num_ahead, sizes = 1, []
    keep, draw = decoder.batch.keep, decoder.noise.draw
    monkeypatch.setattr(decoder.batch, "keep", lambda kept: (sizes.append(len(kept)), keep(kept)))
    drawn = []
    monkeypatch.setattr(decoder.noise, "draw", lambda *shape: drawn.append(draw(*shape)) or drawn[-1])

    with torch.no_grad():
        decoder.run()

    if do_sample:
        rows = torch.cat([noise.flatten(0, 1) for noise in drawn])
        assert len(rows.unique(dim=0)) == len(rows)
    else:
        expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=free[:1, 24])
        assert torch.equal(decoder.sequences(), expected)
        assert sizes == [1]


def test_smaller_batch_is_used_where_it_is_made():
    """Rows that finish leave a compiled batch when a call of the smaller size was there before."""
    target, prompts = make_llama(num_hidden_layers=2), make_prompts(2)
    draft = make_draft(make_llama(seed=5))
    free = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    ends = {"eos_token_id": [int(free[0, 20])]}
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **ends)
    assert (expected[0, 21:] == 0).all()
    assert (expected[1, -1] != 0).all()

    assert torch.equal(pard(target, draft, prompts, **ends).sequences, expected)
    assert not {dict(key[1][:5])["batch size"] for key in compile_cache_of(target, draft).steps} - {2}
    pard(target, draft, make_prompts(1), **ends)
    made, (smaller,) = graphs(), [rows for key, rows in compile_cache_of(target, draft).rows.items() if key[0] == 1]
    smaller.lengths.zero_()
    assert torch.equal(pard(target, draft, prompts, **ends).sequences, expected)
    assert graphs() == made
    assert smaller.lengths > 18


def test_shapes_used_long_ago_make_room(monkeypatch):
    """A service sees ever new shapes: steps, caches and rows of the oldest go, those of a shape in use stay."""
    monkeypatch.setattr("pard_hf.generation.compilation.MOST_STEPS", 6)
    target, draft = (make_llama(seed) for seed in (0, 5))
    draft = make_draft(draft)
    kept, dropped, made = compile_cache_of(target, draft), [], []

    def eager(graph, inputs):
        made.append(weakref.ref(graph))
        return graph.forward

    config = CompileConfig(backend=eager, mode="default")
    prompts = {size: make_prompts(size) for size in (1, 2, 3)}
    expected = {size: target.generate(**given, max_new_tokens=9, do_sample=False) for size, given in prompts.items()}

    for size, is_new in ((1, True), (2, True), (1, False), (3, True), (1, False), (2, True)):
        output = pard(target, draft, prompts[size], max_new_tokens=9, compile_config=config)
        assert torch.equal(output.sequences, expected[size])
        assert (output.compile_seconds > 0) == is_new
        assert len(kept.steps) == (3 if size == 1 and is_new else 6)
        assert {key[1] for key in kept.caches} == {key[0] for key in kept.rows} == sizes_of(kept)
        dropped += [weakref.ref(cache.layers[0].keys) for key, cache in kept.caches.items() if key[1] == 3]

    for _ in range(3):  # What one collection ends, as with the code of a function, only the next one frees.
        gc.collect()
    assert len(dropped) == 4
    assert all(states() is None for states in dropped)
    # Steps with layers are three graphs: before, a layer and after.
    assert len(made) == 4 * 7
    assert sum(graph() is not None for graph in made) == 2 * 7


def sizes_of(kept):
    return {dict(key[1])["batch size"] for key in kept.steps}


def test_second_thread_does_not_share_buffers():
    """While a call holds the compiled rounds, another runs eagerly."""
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(2)
    expected = pard(target, draft, prompts).sequences
    outputs = []

    class Nested:
        """A streamer that generates with the same pair in the middle of a call."""

        def put(self, value):
            if not outputs:
                outputs.append(None)
                thread = threading.Thread(target=lambda: outputs.append(pard(target, draft, prompts)))
                thread.start()
                thread.join()

        def end(self):
            pass

    one = {name: tensor[:1] for name, tensor in prompts.items()}
    alone = pard(target, draft, one).sequences
    made = graphs()
    assert torch.equal(pard(target, draft, one, streamer=Nested()).sequences, alone)

    assert torch.equal(outputs[1].sequences, expected)
    assert not outputs[1].compile_seconds
    assert graphs() == made


def test_copies_and_checkpoints_carry_no_buffers(tmp_path):
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(1)
    pard(target, draft, prompts)

    copied = copy.deepcopy(target)
    target.save_pretrained(tmp_path)

    assert compile_cache_of(target, draft).steps
    assert not compile_cache_of(copied, draft).steps
    assert type(target).from_pretrained(tmp_path).state_dict().keys() == target.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_cannot_be_compiled_is_said_once(caplog):
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=8, do_sample=False)
    target.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}

    with caplog.at_level(logging.WARNING, logger="pard_hf"):
        for _ in range(2):
            assert torch.equal(pard(target, draft, prompts, max_new_tokens=8).sequences, expected)

    assert sum("without torch.compile" in message for message in caplog.messages) == 1
    assert graphs() == 0


@pytest.mark.parametrize("call", ["embeds", "past", "lockstep", "adaptive", "stop"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_call_is_served_compiled(call, batch_size):
    """What only some calls need says, compiled, what plain `generate` says."""
    target, prompts = make_llama(), make_prompts(batch_size)
    draft, more = make_self_draft(target), {}
    arguments = dict(prompts)
    if call == "embeds":
        arguments["inputs_embeds"] = target.get_input_embeddings()(arguments.pop("input_ids"))
    if call == "past":
        past = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        first = target.generate(**prompts, **past)
        columns = torch.ones(batch_size, 4, dtype=torch.long)
        arguments["input_ids"] = torch.cat([first.sequences[:, :18], 7 * columns], dim=1)
        arguments["attention_mask"] = torch.cat([prompts["attention_mask"], columns], dim=1)
    if call == "lockstep":
        more = {"repetition_penalty": 1.3}
    if call == "stop":
        more = {"eos_token_id": [int(target.generate(**prompts, max_new_tokens=9, do_sample=False)[0, -1])]}
    given = [copy.deepcopy(first.past_key_values) for _ in range(2)] if call == "past" else [None, None]
    expected = target.generate(
        **arguments, **more, past_key_values=given[0], max_new_tokens=NEW_TOKENS, do_sample=False
    )
    if call == "adaptive":
        more = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "adaptive"}

    for _ in range(2 if call == "adaptive" else 1):
        got = pard(target, draft, arguments, **more, past_key_values=given[1])
        assert torch.equal(got.sequences, expected)


def test_caches_of_the_two_grow_apart():
    """After an earlier cache the target's grows first: neither loses what it remembers when the other moves."""
    target = make_llama(max_position_embeddings=1024)
    draft, prompts = make_self_draft(target), make_prompts(1, longest=250)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    past = target.generate(**prompts, max_new_tokens=1, **settings).past_key_values
    new = {"input_ids": torch.randint(3, 99, (1, 5)), "attention_mask": torch.ones(1, 255, dtype=torch.long)}
    expected = target.generate(**new, past_key_values=copy.deepcopy(past), max_new_tokens=290, **settings).sequences

    got = pard(target, draft, new, past_key_values=past, max_new_tokens=290)

    assert torch.equal(got.sequences, expected)
    assert {dict(key[1][:5])["draft cache"] for key in compile_cache_of(target, draft).steps} == {256, 512}


def test_buffers_serve_any_mode_and_dtype():
    target, draft, prompts = make_llama(), make_self_draft(make_llama()), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=10, do_sample=False)

    with torch.inference_mode():
        assert torch.equal(pard(target, draft, prompts, max_new_tokens=10).sequences, expected)
    assert torch.equal(pard(target, draft, prompts, max_new_tokens=10).sequences, expected)
    target.double(), draft.double()
    assert torch.equal(pard(target, draft, prompts, max_new_tokens=10).sequences, expected)


def test_graph_that_breaks_runs_eagerly(caplog):
    """Dynamic rotary frequencies look at a tensor's value, which no whole graph can."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    target = make_llama(rope_parameters=rope)
    draft, prompts = make_draft(make_llama(seed=5)), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    with caplog.at_level(logging.WARNING, logger="pard_hf"):
        assert torch.equal(pard(target, draft, prompts).sequences, expected)

    assert any("cannot be compiled" in message for message in caplog.messages)


@pytest.fixture
def few_rounds(monkeypatch):
    """Stand in for inductor by what runs the graph, compile after few rounds, and do not ask whether it is faster."""
    monkeypatch.setattr("pard_hf.generation.compilation.NUM_TIMED", 1000)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *args, **kwargs: graph.forward)
    monkeypatch.setattr("pard_hf.generation.compilation.ROUNDS_BEFORE_COMPILING", 2)


def unasked(target, draft, prompts, **kwargs):
    """Generate over a static cache, and leave open when rounds are compiled."""
    static = {"cache_implementation": "static", "compile_config": None}
    return pard(target, draft, prompts, **{**static, **kwargs})


def test_no_short_text_waits_for_the_compiler():
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    for _ in range(2):
        got = unasked(target, draft, prompts)
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_rounds > 10
        assert got.stats.num_compiled == got.compile_seconds == graphs() == 0
    assert torch.equal(pard(target, draft, prompts).sequences, expected)
    assert graphs() > 0  # As `compile_config` asks for it.


CALLS = {
    "chain": (3, {}),
    "tree": (3, {"assistant_tree_size": 6}),
    "sources": (1, {"prompt_lookup_num_tokens": 4}),
    "no draft": (3, {"prompt_lookup_num_tokens": 4}),
    "lockstep": (3, {"repetition_penalty": 1.3}),
    "sampled": (1, {"do_sample": True, "temperature": 0.9}),
    "adaptive": (1, {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "adaptive"}),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_shape_is_compiled_once_it_ran_often(call, few_rounds):
    """The text stays the same, the first call compiles nothing, and the third finds everything made."""
    batch_size, more = CALLS[call]
    target, prompts = make_llama(), make_prompts(batch_size)
    draft = None if call == "no draft" else make_draft(make_llama(seed=5))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **more}
    plain = {name: value for name, value in settings.items() if "assistant" not in name and "lookup" not in name}
    torch.manual_seed(4)
    expected = target.generate(**prompts, **plain)
    made, compiled = [], []
    for _ in range(3):
        torch.manual_seed(4)
        got = unasked(target, draft, prompts, **settings)
        assert torch.equal(got.sequences, expected)
        made.append(graphs())
        compiled.append(got.stats.num_compiled)

    assert made[0] == compiled[0] == 0
    assert made[1] > 0
    assert 0 < compiled[1] < got.stats.num_rounds
    assert compile_cache_of(target, draft or target).failure is None
    if call != "adaptive":  # Which may come to choose another K.
        assert made[2] == made[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_shapes_have_rounds_of_their_own(dtype, few_rounds):
    """A text that grows beyond what is compiled goes on eagerly, and compiled in the next call."""
    target = make_llama(max_position_embeddings=1024).to(dtype)
    draft, long = make_self_draft(target), make_prompts(1, longest=240)
    expected = target.generate(**long, max_new_tokens=60, do_sample=False)
    sizes = []
    for prompts, new_tokens in ((make_prompts(1), 60), (long, 60), (long, 60), (make_prompts(2), NEW_TOKENS)):
        got = unasked(target, draft, prompts, max_new_tokens=new_tokens)
        assert dtype != torch.float32 or prompts is not long or torch.equal(got.sequences, expected)
        shapes = [dict(key[1][:5]) for key in compile_cache_of(target, draft).steps]
        sizes.append({(shape["batch size"], shape["target cache"]) for shape in shapes})

    assert sizes == [set(), {(1, 256)}, {(1, 256), (1, 512)}, {(1, 256), (1, 512)}]
    assert got.stats.num_compiled == 0


def test_layers_go_on_compiled_in_a_larger_cache(few_rounds, monkeypatch):
    """What layers are compiled for serves any size: a text that grows never goes back to eager rounds."""
    monkeypatch.setattr("pard_hf.generation.compilation.MIN_PARAMETERS", 0)
    target = make_llama(max_position_embeddings=1024)
    draft, prompts, made = make_self_draft(target), make_prompts(1, longest=240), []
    expected = target.generate(**prompts, max_new_tokens=60, do_sample=False)

    for _ in range(3):
        got = unasked(target, draft, prompts, max_new_tokens=60)
        assert torch.equal(got.sequences, expected)
        made.append((got.stats.num_compiled, got.stats.num_rounds, graphs()))

    assert made[0][0] == 0
    assert made[1] == made[2]
    assert made[1][0] == made[1][1] - 1
    assert {dict(key[1][:5])["target cache"] for key in compile_cache_of(target, draft).steps} == {256, 512}


def test_what_is_no_faster_compiled_runs_eagerly(few_rounds, monkeypatch):
    """A compiler whose code is slow: it is used for a call, measured there, and not again; of another shape it is."""

    def slow(graph, *args, **kwargs):
        def run(*inputs):
            time.sleep(0.03)
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr("pard_hf.generation.compilation.NUM_TIMED", 9)
    target, prompts = make_llama(), make_prompts(1)
    draft, num_compiled = make_draft(make_llama(seed=5)), []
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    for compiler in (slow, slow, slow, None):
        if compiler is not None:
            monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
        got = unasked(target, draft, prompts)
        assert torch.equal(got.sequences, expected)
        num_compiled.append(got.stats.num_compiled)
    other = [unasked(target, draft, prompts, num_assistant_tokens=3).stats.num_compiled for _ in range(2)]

    assert num_compiled[0] == 0 < num_compiled[1]
    assert num_compiled[2:] == [0, 0]
    assert other[0] == 0 < other[1]


class Stopping:
    """A streamer that stops the call at its sixth token."""

    def __init__(self, error):
        self.error, self.left = error, 6

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise self.error

    def end(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("full")], ids=["interrupt", "error"])
def test_call_that_was_stopped_loses_nothing(error, few_rounds):
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(1)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    for is_compiled in (False, True):
        with pytest.raises(type(error)):
            unasked(target, draft, prompts, streamer=Stopping(error))
        assert (graphs() > 0) == is_compiled

    got = unasked(target, draft, prompts)

    assert torch.equal(got.sequences, expected)
    assert got.stats.num_compiled > 10
    assert got.compile_seconds == 0


def test_compiling_that_was_interrupted_begins_anew(few_rounds, monkeypatch):
    def interrupted(graph, *args, **kwargs):
        raise KeyboardInterrupt

    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(1)
    expected = unasked(target, draft, prompts).sequences
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unasked(target, draft, prompts)

    got = unasked(target, draft, prompts)

    assert torch.equal(got.sequences, expected)
    assert got.stats.num_compiled > 10
    assert compile_cache_of(target, draft).failure is None


def test_compiler_that_fails_is_tried_once(few_rounds, monkeypatch, caplog):
    def no_compiler(graph, *args, **kwargs):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", no_compiler)
    target, draft, prompts = make_llama(), make_draft(make_llama(seed=5)), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    told = []
    for _ in range(3):
        with caplog.at_level(logging.WARNING, logger="pard_hf"):
            got = unasked(target, draft, prompts)
        assert torch.equal(got.sequences, expected)
        assert got.stats.num_compiled == 0
        told.append(sum("cannot be compiled" in message for message in caplog.messages))

    assert told == [0, 3, 3]  # Draft, target and acceptance.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tree_size", [0, 8])
def test_one_synchronisation_a_round(tree_size):
    """Rounds wait for the host through one event at most; anything implicit is an error."""
    target = make_llama().cuda()
    draft = add_head(make_self_draft(target), 0.3)
    prompts = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    compiled = CompiledSteps(compile_cache_of(target, draft), CompileConfig(), target)
    options = {"num_assistant_tokens": 5, "assistant_tree_size": tree_size, "compiled": compiled}
    decoder = make_decoder(target, draft, prompts, 72, **options)
    choice = Choice(5, tree_size)
    with torch.no_grad():
        for _ in range(3):
            decoder.round(choice)  # Prefill, compiling and the recording of CUDA graphs may wait.
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                decoder.round(choice)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert decoder.stats.num_rounds >= 2 * 5
