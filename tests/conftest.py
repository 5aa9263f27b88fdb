"""Tiny models made on the spot: no downloads, float32, seeded."""

import random
import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from device import IS_FAKE
from families import character_tokenizer, placed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pard_hf import PardDraftModel, bundled_pair
from pard_hf.draft.known_drafts import KNOWN_DRAFTS

TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large weights, or every model of this size says the same token for ever.
    "initializer_range": 0.3,
}


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return placed(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval())


# Tiny matrices: a second thread costs more than it gives, and tests may share the machine.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--screenshots", help="keep the pictures that tests/test_app.py takes in this folder")
    parser.addoption("--cases", type=int, help="run at most so many cases of each test, drawn by its name")
    parser.addoption("--until", type=float, help="skip what has not begun by this time, in seconds as of `date +%%s`")


def pytest_collection_modifyitems(config, items):
    most, tests, kept = config.getoption("cases"), {}, set()
    for item in items:
        # The stand-in is not for models that are saved and loaded.
        if not (IS_FAKE and "tmp_path" in item.fixturenames):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for (_, name), cases in tests.items():
        kept.update(cases if most is None else random.Random(name).sample(cases, min(most, len(cases))))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        pytest.skip("no time left")


def pytest_terminal_summary(terminalreporter):
    """Say what the tests that draw their calls have drawn, also where workers ran them."""
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            if name in ("fuzz", "soak"):
                terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def tiny_target() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tiny_draft() -> PardDraftModel:
    return PardDraftModel.from_causal_lm(tiny_llama(seed=7), mask_token_id=99, num_assistant_tokens=5)


@pytest.fixture
def bundled_like_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many ids as the tiny models have."""
    return character_tokenizer("éßø", padding_side="left")


@pytest.fixture
def tokenizer(bundled_like_tokenizer) -> PreTrainedTokenizerFast:
    return bundled_like_tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with the ids from 97 on left to padding: a mask token has a row no text contains."""
    return character_tokenizer()


@pytest.fixture
def stand_ins(monkeypatch):
    """Hub ids are answered with the bundled pair; everything else is a document's own code.

    Targets of a draft whose family has several vocabulary sizes get rows that the draft has not.
    """

    def answered(load, path, name, **kwargs):
        kwargs = {keyword: value for keyword, value in kwargs.items() if keyword != "device_map"}
        found = load(name if Path(name).exists() else path, **kwargs)
        known = next((draft for draft in KNOWN_DRAFTS if re.fullmatch(draft.targets, str(name))), None)
        if known and known.needs_export and isinstance(found, PreTrainedModel):
            found.resize_token_embeddings(found.config.vocab_size + 64)
        return found

    pair = bundled_pair()
    for kind, path in (
        (AutoModelForCausalLM, pair.target),
        (AutoTokenizer, pair.target),
        (PardDraftModel, pair.draft),
    ):
        monkeypatch.setattr(kind, "from_pretrained", partial(answered, kind.from_pretrained, path))
