"""Every family transformers can load: exact by our loop, by another with a word, or refused in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import transformers
from every_family import CASES, FAULTS, families, page, sweep, sweep_all

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
# One or two of every way to make positions, masks and caches.
FAST = [
    *("BartConfig", "BertConfig", "BloomConfig", "CpmAntConfig", "DeepseekV2Config", "DeepseekV32Config"),
    *("DogeConfig", "DoryConfig", "FalconConfig", "Gemma3TextConfig", "Gemma3nTextConfig", "Gemma4TextConfig"),
    *("GitConfig", "GPT2Config", "GPTNeoConfig", "GPTNeoXJapaneseConfig", "GptOssConfig", "Lfm2Config"),
    *("Llama4TextConfig", "MambaConfig", "MiniMaxConfig", "MoshiConfig", "OpenAIGPTConfig", "ProphetNetConfig"),
    *("Qwen3NextConfig", "XLNetConfig"),
]


def committed() -> str:
    """The page, where it speaks of the installed transformers."""
    text = PAGE.read_text()
    if f"in transformers `{transformers.__version__}`:" not in text:
        pytest.skip(f"docs/compatibility.md is about another transformers than {transformers.__version__}")
    return text


@pytest.mark.parametrize("family", FAST)
def test_a_family_is_exact_or_says_no(family):
    if family not in families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")

    verdict = sweep(family)

    assert not verdict.not_run
    assert not set(verdict.loops.values()) & set(FAULTS), verdict
    assert verdict.loops.keys() == CASES.keys()
    assert verdict.reason or set(verdict.loops.values()) == {"own"}, verdict
    assert verdict.row in committed().splitlines()
    points = [" ".join(point.split()) for point in committed().split("\n- ")]
    assert not verdict.why or any(p.startswith(f"{verdict.why}: ") and f"`{family}`" in p for p in points)


def test_the_page_has_every_family():
    rows = [line.split("`")[1] for line in committed().splitlines() if line.startswith("| `")]

    assert sorted(rows) == sorted(families())


@pytest.mark.families
def test_every_family_is_exact_or_says_no():
    verdicts = sweep_all(sorted(families(), key=str.lower))

    faults = [verdict for verdict in verdicts if set(verdict.loops.values()) & set(FAULTS)]
    assert not faults, "\n".join(map(str, faults))
    served = Counter(verdict.served for verdict in verdicts)
    assert served["own"] >= 95
    assert served["not run"] <= len(verdicts) // 10
    assert all(verdict.reason for verdict in verdicts if verdict.served in ("stock", "none", "refused"))
    assert page(verdicts) == committed()
