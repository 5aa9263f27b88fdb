"""A draft whose weights lie on several devices, whole on each: to draft with, which no wrapper knows how to do."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoModelForCausalLM

from ..draft_model import PardDraftModel


def whole_draft(draft: PardDraftModel, wrapped: Any) -> PardDraftModel:
    """The draft itself, or a copy with all weights where FSDP has sharded them.

    Processes decode different prompts in different numbers of rounds, so none may wait for another's weights. Drafts
    are small: a copy costs less than it would to keep them in step. Every process must call this at the same time.

    Args:
        draft ([`PardDraftModel`]):
            The draft, without wrappers.
        wrapped (`torch.nn.Module`):
            What is trained: the draft, or the wrapper around it.
    """
    is_sharded = isinstance(wrapped, FSDPModule | FullyShardedDataParallel)
    if not is_sharded:
        return draft
    weights: dict[str, Any] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    copy = AutoModelForCausalLM.from_config(draft.config, dtype=draft.dtype)
    copy.load_state_dict(weights)
    whole = PardDraftModel.from_causal_lm(copy, draft.mask_token_id, draft.num_assistant_tokens)
    return whole.to(next(iter(weights.values())).device).eval()
