"""Linear layers with the weight on the left give the same products."""

import pytest
from device import DEVICE, torch
from families import make_draft, make_model, make_prompts
from transformers import CompileConfig

from pard_hf import with_pard
from pard_hf.generation import kernels as linear
from pard_hf.generation.batch import CachedModel
from pard_hf.generation.cache import SlotCache
from pard_hf.generation.kernels import StreamedLinear, can_stream


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 9, 16), (3, 7, 16), (4, 40, 16), (5, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_the_same(shape, has_bias):
    layer, rows = torch.nn.Linear(16, 24, bias=has_bias).to(DEVICE), torch.randn(*shape)
    expected = layer(rows)

    with StreamedLinear():
        got = layer(rows)

    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a matter of CPUs")
def test_only_large_float32_models_take_part(monkeypatch):
    model, calls = make_model("llama"), []
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm: calls.append(1) or mm(*args))
    ids = torch.randint(3, 99, (1, 5))

    for fewest, dtype in ((10**9, torch.float32), (1, torch.float64), (1, torch.float32)):
        monkeypatch.setattr(linear, "MIN_PARAMETERS", fewest)
        cached = CachedModel(model.to(dtype), SlotCache.of(model, 16))
        with torch.no_grad():
            cached.forward(torch.arange(5).unsqueeze(0), 16, 1, input_ids=ids)
        assert bool(calls) == can_stream(model) == (fewest == 1 and dtype == torch.float32)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a matter of CPUs")
@pytest.mark.parametrize("is_whole", [True, False])
def test_compilers_are_given_the_same_products(is_whole, monkeypatch):
    """Whole models and single layers alike: a compiler leaves products to the libraries that pack weights."""
    monkeypatch.setattr(linear, "MIN_PARAMETERS", 1)
    target, draft, prompts = make_model("llama"), make_draft(make_model("llama", seed=5)), make_prompts(2)
    expected, functions = target.generate(**prompts, max_new_tokens=20, do_sample=False), set()

    def backend(graph, inputs):
        functions.update(node.target for node in graph.graph.nodes)
        return graph.forward

    config = CompileConfig(backend=backend, mode="default", fullgraph=is_whole)
    kwargs = {"assistant_model": draft, "compile_config": config, "return_dict_in_generate": True}
    got = with_pard(target).generate(**prompts, max_new_tokens=20, do_sample=False, **kwargs)

    assert torch.equal(got.sequences, expected)
    assert got.stats.num_compiled
    assert torch.mm in functions
    assert torch.nn.functional.linear not in functions


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a matter of CPUs")
def test_attention_after_products_takes_the_fast_kernel(monkeypatch):
    """Products come as rows: of columns, whose last stride is not 1, torch computes attention the slow way."""
    monkeypatch.setattr(linear, "MIN_PARAMETERS", 1)
    target, prompts = make_model("llama"), make_prompts(3)
    draft = make_draft(make_model("llama", seed=5))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with_pard(target).generate(
            **prompts, max_new_tokens=6, do_sample=False, assistant_model=draft, num_assistant_tokens=1
        )

    calls = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in name for name in calls)
    assert "aten::_scaled_dot_product_attention_math" not in calls


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_is_that_of_plain_generate(family, batch_size, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PARAMETERS", 1)
    target, draft, prompts = make_model(family), make_draft(make_model("llama", seed=5)), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=30, do_sample=False)

    got = with_pard(target).generate(**prompts, max_new_tokens=30, do_sample=False, assistant_model=draft)

    assert torch.equal(got, expected)
