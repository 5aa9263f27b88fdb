"""Parallel draft models for `generate()`: the same text, sooner.

>>> from pard_hf import PardDraftModel, with_pard
>>> draft = PardDraftModel.from_pretrained("amd/PARD-Qwen2.5-0.5B", dtype="auto")
>>> with_pard(target).generate(**inputs, assistant_model=draft)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .draft.model import PardDraftModel
    from .generation.candidate_generator import PardCandidateGenerator
    from .generation.config import PardGenerateOutput, PardGenerationConfig
    from .generation.memory import AssistantMemory
    from .generation.mixin import PardGenerationMixin, with_pard, without_pard
    from .generation.stats import DecodingStats
    from .loading import bundled_pair, load_pair
    from .training.collator import DataCollatorForPard
    from .training.trainer import PardTrainer, PardTrainingArguments

__version__ = "0.1.0"

# Where each public name is; imported when it is asked for, since torch and transformers take seconds.
MODULES = {
    "AssistantMemory": "generation.memory",
    "DataCollatorForPard": "training.collator",
    "DecodingStats": "generation.stats",
    "PardCandidateGenerator": "generation.candidate_generator",
    "PardDraftModel": "draft.model",
    "PardGenerateOutput": "generation.config",
    "PardGenerationConfig": "generation.config",
    "PardGenerationMixin": "generation.mixin",
    "PardTrainer": "training.trainer",
    "PardTrainingArguments": "training.trainer",
    "bundled_pair": "loading",
    "load_pair": "loading",
    "with_pard": "generation.mixin",
    "without_pard": "generation.mixin",
}

__all__ = [
    "AssistantMemory",
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
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
