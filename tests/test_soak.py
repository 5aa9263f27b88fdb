"""Compiled calls of changing shapes from two threads: what is kept stays bounded, and texts stay right."""

import pytest
import torch

from benchmarks.soak import LONGEST_PROMPT, Soak
from pard_hf.generation import compilation


@pytest.mark.slow
def test_what_compiled_calls_keep_is_bounded(monkeypatch, record_property):
    monkeypatch.setattr(compilation, "MOST_STEPS", 8)
    monkeypatch.setitem(LONGEST_PROMPT, "eager", 60)
    torch._dynamo.reset()
    soak = Soak("eager", seed=1)
    soak.shapes = [(1, 2, 0), (2, 2, 0)]

    result = soak.run(num_calls=60, sample_every=5)

    record_property("soak", f"{result['calls']} calls, {result['samples'][-1]['steps_compiled']} steps compiled")
    assert result["calls_that_compiled"] > 2
    assert max(sample["steps_kept"] for sample in result["samples"]) <= 8
    assert max(sample["caches_kept"] for sample in result["samples"]) <= 4
    assert result["samples"][-1]["steps_compiled"] > 8
    assert result["compared"] > 0
    assert result["different"] == 0
