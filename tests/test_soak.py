"""Compiled calls of changing shapes from two threads: what is kept stays bounded, and texts stay right."""

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.soak import LONGEST_PROMPT, Soak
from pard_hf.generation import compilation


@pytest.mark.slow
def test_what_compiled_calls_keep_is_bounded(monkeypatch, record_property):
    monkeypatch.setattr(compilation, "MOST_STEPS", 6)
    monkeypatch.setitem(LONGEST_PROMPT, "eager", 60)
    torch._dynamo.reset()
    counters.clear()
    soak = Soak("eager", seed=1)
    soak.shapes = [(1, 2, 0), (2, 2, 0)]

    result = soak.run(num_calls=40, sample_every=4)
    for number in range(20):  # No other thread compiles now, so each of these runs compiled.
        soak.call(is_compared=True)
        soak.sample(40 + number)

    record_property("soak", f"60 calls, {soak.samples[-1]['steps_compiled']} steps compiled")
    assert soak.samples[-1]["steps_compiled"] > 6
    assert max(sample["steps_kept"] for sample in soak.samples) == 6
    assert max(sample["caches_kept"] for sample in soak.samples) <= 4
    assert result["calls"] == 40
    assert soak.num_compared > 4
    assert soak.num_different == 0
