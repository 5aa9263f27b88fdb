"""Parallel draft models for `generate()`: the same text, sooner.

>>> from pard_hf import PardDraftModel, with_pard
>>> draft = PardDraftModel.from_pretrained("amd/PARD-Qwen2.5-0.5B", dtype="auto")
>>> with_pard(target).generate(**inputs, assistant_model=draft)
"""

from importlib import import_module
from typing import Any

from .draft.model import PardDraftModel
from .generation.candidate_generator import PardCandidateGenerator
from .generation.config import PardGenerateOutput, PardGenerationConfig
from .generation.mixin import PardGenerationMixin, with_pard, without_pard
from .generation.stats import DecodingStats
from .loading import bundled_pair, load_pair

# Training needs the host's Trainer, whose import alone takes seconds: only when asked for.
LAZY = {
    "DataCollatorForPard": ".training.collator",
    "PardTrainer": ".training.trainer",
    "PardTrainingArguments": ".training.trainer",
}

__all__ = [
    "DataCollatorForPard",
    "DecodingStats",
    "PardCandidateGenerator",
    "PardDraftModel",
    "PardGenerateOutput",
    "PardGenerationConfig",
    "PardGenerationMixin",
    "PardTrainer",
    "PardTrainingArguments",
    "bundled_pair",
    "load_pair",
    "with_pard",
    "without_pard",
]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
