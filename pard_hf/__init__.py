"""Parallel draft models for `generate()`: the same text, sooner.

>>> from pard_hf import PardDraftModel, with_pard
>>> draft = PardDraftModel.from_pretrained("amd/PARD-Qwen2.5-0.5B", dtype="auto")
>>> with_pard(target).generate(**inputs, assistant_model=draft)
"""

from .draft_model import PardDraftModel
from .generation.candidate_generator import PardCandidateGenerator
from .generation.mixin import PardGenerateOutput, PardGenerationMixin, with_pard, without_pard
from .generation.stats import DecodingStats

__all__ = [
    "DecodingStats",
    "PardCandidateGenerator",
    "PardDraftModel",
    "PardGenerateOutput",
    "PardGenerationMixin",
    "with_pard",
    "without_pard",
]
