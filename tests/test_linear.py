"""Linear layers with the weight on the left give the same products."""

import pytest
from device import DEVICE, torch
from families import make_draft, make_model, make_prompts

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
def test_compilers_are_given_ordinary_products(monkeypatch):
    """Rounds over a static cache stream them as long as they run eagerly."""
    monkeypatch.setattr(linear, "MIN_PARAMETERS", 1)
    model, calls, functions = make_model("llama", num_hidden_layers=1), [], []
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm: calls.append(1) or mm(*args))
    cached, positions = CachedModel(model, SlotCache.of(model, 16, is_static=True)), torch.arange(5).unsqueeze(0)
    ids = torch.randint(3, 99, (1, 5))

    def backend(graph, inputs):
        functions.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        eager = cached.forward(positions, 16, 5, input_ids=ids)
        num_streamed = len(calls)
        compiled = torch.compile(cached.forward, backend=backend, fullgraph=True)(positions, 16, 5, input_ids=ids)

    torch.testing.assert_close(compiled, eager)
    assert num_streamed == len(calls) == 7 + 1  # Of a layer and the LM head.
    assert functions.count(torch.nn.functional.linear) == 8


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_is_that_of_plain_generate(family, batch_size, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PARAMETERS", 1)
    target, draft, prompts = make_model(family), make_draft(make_model("llama", seed=5)), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=30, do_sample=False)

    got = with_pard(target).generate(**prompts, max_new_tokens=30, do_sample=False, assistant_model=draft)

    assert torch.equal(got, expected)
