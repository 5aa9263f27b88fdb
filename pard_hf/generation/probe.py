"""A look at what a model does over a cache, where nothing tells beforehand.

Families of transformers are swept by the tests. Code that comes with a checkpoint, and versions of transformers newer
than the tests have seen, may count positions, mask or read a cache in ways of their own; models that count positions
by their cache may read one token at a time only. A few short forwards show it, once for each model.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from ..host import cache_argument, forward_parameters, input_device, is_tested, takes_code_from_elsewhere
from .cache import SlotCache
from .role import Role

LogitsOf = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
NUM_TOKENS, NUM_FIRST, NUM_SLOTS = 12, 7, 16
# The largest difference of logits over their standard deviation; rounding in 16 bit stays well below, a wrong position
# or mask well above.
MOST_DIFFERENCE = {torch.float32: 0.02, torch.float64: 0.02}
MOST_DIFFERENCE_16_BIT = 0.3

# What was found of models, over our cache and over an ordinary one.
over_slots: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
over_blocks: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def why_other_logits(model: PreTrainedModel) -> str | None:
    """Say that a model's logits over our cache are not those of a plain forward; `None` when they are."""
    if is_tested() and not takes_code_from_elsewhere(model):
        return None
    if found(model, over_slots, logits_over_slots):
        return None
    return f"Over our cache `{type(model).__name__}` has other logits than over its own"


def why_no_blocks(model: PreTrainedModel) -> str | None:
    """Say that a model cannot read several tokens behind a cache as it reads them one by one; `None` when it can.

    Only models that count positions by their cache are looked at.
    """
    if "position_ids" in forward_parameters(model):
        return None
    if found(model, over_blocks, logits_over_blocks):
        return None
    return f"`{type(model).__name__}` reads one token at a time behind its cache"


def found(model: PreTrainedModel, known: WeakKeyDictionary[PreTrainedModel, bool], logits_of: LogitsOf) -> bool:
    """Look at a model, or at what was found of it before. One that is training has no two forwards alike."""
    if model not in known:
        if model.training:
            return False
        known[model] = is_close(model, logits_of)
    return known[model]


@torch.no_grad()
def is_close(model: PreTrainedModel, logits_of: LogitsOf) -> bool:
    """Compare logits of a plain forward with those of forwards over a cache; one that raises is not close.

    What is found holds for later calls, so the rounding of this one under autocast must not decide it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, NUM_TOKENS), generator=generator)
    device = input_device(model)
    try:
        ids = ids.to(device)
        positions = torch.arange(NUM_TOKENS, device=device).unsqueeze(0)
        known = {"position_ids": positions} if "position_ids" in forward_parameters(model) else {}
        with torch.autocast(device.type, enabled=False):
            expected = model(input_ids=ids, use_cache=False, **known).logits[:, NUM_FIRST:].float()
            got = logits_of(model, ids).float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError, KeyError):
        return False
    difference = (got - expected).abs().max() / expected.std()
    return bool(difference <= MOST_DIFFERENCE.get(model.dtype, MOST_DIFFERENCE_16_BIT))


def logits_over_slots(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits behind the first tokens over our cache, where what a round refused lies in the slots behind."""
    role = Role(model, SlotCache.of(model, NUM_SLOTS))
    positions = torch.arange(NUM_TOKENS, device=ids.device).unsqueeze(0)
    role.forward(positions, NUM_SLOTS, 1, input_ids=ids.flip(1))
    role.forward(positions[:, :NUM_FIRST], NUM_SLOTS, 1, input_ids=ids[:, :NUM_FIRST])
    return role.forward(positions[:, NUM_FIRST:], NUM_SLOTS, NUM_TOKENS - NUM_FIRST, input_ids=ids[:, NUM_FIRST:])


def logits_over_blocks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits behind the first tokens over an ordinary cache, which a block left with one token too many."""
    past = {cache_argument(model): DynamicCache()}
    model(input_ids=ids[:, : NUM_FIRST + 1], use_cache=True, **past)
    next(iter(past.values())).crop(-1)
    return model(input_ids=ids[:, NUM_FIRST:], use_cache=True, **past).logits
