"""What to generate, in the words of `generate()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, StoppingCriteriaList


@dataclass
class DecodingRequest:
    """One call of `generate()`, as our loop reads it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, num_columns)`):
            Prompt, left-padded; no columns when `inputs_embeds` is given.
        attention_mask (`torch.LongTensor` of shape `(batch_size, mask_length)`):
            1 for text, 0 for padding. Longer than the prompt where the prompt goes on after an earlier cache, `past`.
        num_assistant_tokens (`int`):
            K, draft tokens a round, at most.
        tree_size (`int`, *optional*, defaults to 0):
            N, nodes of a round's tree, at most; 0 for a chain.
        max_length (`int`):
            Columns of the longest output, prompt included.
        returns_cache (`bool`, *optional*, defaults to `False`):
            Whether the target's cache is asked for afterwards.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_assistant_tokens: int
    max_length: int
    pad_token_id: int | None
    eos_token_id: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    past: Cache | None = None
    do_sample: bool = False
    ratio_test: bool = False
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: Any = None
    output_scores: bool = False
    output_logits: bool = False
    returns_cache: bool = False
    tree_size: int = 0
