"""A look at what a model does over our cache, where nothing tells beforehand.

Families of transformers are swept by the tests. Code that comes with a checkpoint, and versions of transformers newer
than the tests have seen, may count positions, mask or read a cache in ways of their own: two short forwards show it,
once for each model.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..host import is_tested, takes_code_from_elsewhere
from .cache import SlotCache
from .role import Role

NUM_TOKENS, NUM_FIRST, NUM_SLOTS = 12, 7, 16
# The largest difference of logits over their standard deviation; rounding in 16 bit stays well below, a wrong position
# or mask well above.
MOST_DIFFERENCE = {torch.float32: 0.02, torch.float64: 0.02}
MOST_DIFFERENCE_16_BIT = 0.3

results: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def why_other_logits(model: PreTrainedModel) -> str | None:
    """Say that a model's logits over our cache are not those of a plain forward; `None` when they are."""
    if is_tested() and not takes_code_from_elsewhere(model):
        return None
    if model not in results:
        difference = relative_difference(model)
        is_close = difference <= MOST_DIFFERENCE.get(model.dtype, MOST_DIFFERENCE_16_BIT)
        results[model] = None if is_close else (
            f"The logits of `{type(model).__name__}` over a cache with a slot for each position are not those of a "
            f"plain forward (they differ by {difference:.2g} standard deviations)"
        )  # fmt: skip
    return results[model]


@torch.no_grad()
def relative_difference(model: PreTrainedModel) -> float:
    """The largest difference between logits of a plain forward and of two forwards over our cache, in deviations."""
    role = Role(model, SlotCache(model.config, NUM_SLOTS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, NUM_TOKENS), generator=generator)
    positions = torch.arange(NUM_TOKENS).unsqueeze(0)
    ids, positions = ids.to(role.device), positions.to(role.device)
    expected = model(input_ids=ids, use_cache=False).logits[:, NUM_FIRST:].float()
    # What a round refused lies in the slots behind.
    role.forward(positions, NUM_SLOTS, 1, input_ids=ids.flip(1))
    role.forward(positions[:, :NUM_FIRST], NUM_SLOTS, 1, input_ids=ids[:, :NUM_FIRST])
    rest = NUM_TOKENS - NUM_FIRST
    got = role.forward(positions[:, NUM_FIRST:], NUM_SLOTS, rest, input_ids=ids[:, NUM_FIRST:]).float()
    difference = ((got - expected).abs().max() / expected.std()).item()
    return difference if difference == difference else float("inf")
