"""A look at what a model does over a cache, where nothing tells beforehand.

Families of transformers are swept by the tests. Code that comes with a checkpoint, and versions of transformers newer
than the tests have seen, may count positions, mask or read a cache in ways of their own; models that count positions
by their cache may read one token at a time only. A few short forwards show it, once for each model.

What a call must satisfy before anything is touched, and in words what to do where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..draft.model import PardDraftModel
from ..host import (
    cache_argument,
    cache_in,
    check_num_assistant_tokens,
    compare_tokenizers,
    forward_parameters,
    input_device,
    is_callers,
    is_recurrent,
    is_tested,
    mask_length,
    masks_itself,
    masks_windows,
    num_positions,
    takes_cache,
    takes_cache_apart,
    takes_code_from_elsewhere,
    takes_images,
)
from .batch import Role
from .cache import SlotCache, attention_windows
from .schedule import check_schedule

LogitsOf = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
NUM_TOKENS, NUM_FIRST, NUM_SLOTS = 12, 7, 16
# The largest difference of logits over their standard deviation; rounding in 16 bit stays well below, a wrong position
# or mask well above.
MOST_DIFFERENCE = {torch.float32: 0.02, torch.float64: 0.02}
MOST_DIFFERENCE_16_BIT = 0.3

# What was found of models, over our cache and over an ordinary one.
over_slots: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
over_blocks: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def unsupported_by_slot_cache(model: PreTrainedModel) -> str | None:
    """Say that a model's logits over our cache are not those of a plain forward; `None` when they are."""
    if is_tested() and not takes_code_from_elsewhere(model):
        return None
    if found(model, over_slots, logits_over_slots):
        return None
    return f"Over our cache `{type(model).__name__}` has other logits than over its own"


def unsupported_by_stock_loop(model: PreTrainedModel) -> str | None:
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


# Vocabularies of one family are padded to multiples of 64 to 1024 rows; a larger difference is another tokenizer.
MAX_PADDING_ROWS = 1024
# Of each target the drafts that were found to share its tokenizer.
compared: WeakKeyDictionary[PreTrainedModel, WeakSet[PreTrainedModel]] = WeakKeyDictionary()
# Model arguments our loop makes itself; where the caller passes any other (images, token types …) another loop takes
# over. What transformers adds on its own is no concern: it adds more in every version.
KNOWN_KEYWORDS = {
    "attention_mask",
    "cache",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}


def check_mode(target: PreTrainedModel, generation_config: GenerationConfig) -> None:
    """Raise a `ValueError` for a target or a way of generating that a draft cannot speed up."""
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"Expected a decoder-only target, got the encoder-decoder `{type(target).__name__}`. Generate without "
            "`assistant_model`."
        )
    if is_recurrent(target):
        raise ValueError(
            f"Expected a target whose cache can drop rejected tokens, got `{type(target).__name__}`, which keeps "
            f"{what_is_kept(target)}. Generate without `assistant_model`."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"Expected `num_beams=1` with a draft, got {generation_config.num_beams}: beams have no draft to follow. "
            "Drop `num_beams` or `assistant_model`."
        )
    if generation_config.use_cache is False and target.config.use_cache is not False:
        raise ValueError("Expected `use_cache=True` with a draft, got False. Drop `use_cache` or `assistant_model`.")
    check_schedule(generation_config.num_assistant_tokens_schedule, generation_config.num_assistant_tokens)


def check_pair(
    target: PreTrainedModel, draft: PardDraftModel, num_assistant_tokens: int, tokenizer: Any, draft_tokenizer: Any
) -> None:
    """Raise a `ValueError` unless draft and target share a tokenizer and have room for K proposals.

    The output is exact either way; other tokenizers would only make every proposal wrong. They are compared when a
    pair is first met. Rows that only pad a vocabulary may differ.
    """
    if drops_caches(draft):
        raise ValueError(
            "Expected a draft that can keep a cache, got one in training mode with gradient checkpointing. Call "
            "`draft.eval()` or `draft.gradient_checkpointing_disable()` first."
        )
    check_num_assistant_tokens(num_assistant_tokens, target.config, draft.config)
    if draft in compared.setdefault(target, WeakSet()):
        return
    if tokenizer is None or draft_tokenizer is None:
        tokenizer, draft_tokenizer = (saved_tokenizer(model) for model in (target, draft))
    if tokenizer is not None and draft_tokenizer is not None:
        check_tokenizers(draft_tokenizer, tokenizer)
    else:
        check_vocabulary_sizes(draft, target)
    compared[target].add(draft)


def check_tokenizers(draft: Any, target: Any) -> None:
    """Raise a `ValueError` where two tokenizers give one id two meanings, or neither vocabulary holds the other."""
    difference = compare_tokenizers(draft, target, with_added_tokens=False)
    problem = difference.conflict
    if problem is None and difference.num_draft_only and difference.num_target_only:
        problem = (
            f"{difference.num_draft_only} ids are the draft's alone and {difference.num_target_only} the target's"
        )
    if problem is not None:
        raise ValueError(
            f"Expected draft and target to share a tokenizer, but {problem}. Use the draft of the target's family."
        )


def check_vocabulary_sizes(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raise a `ValueError` where two models whose tokenizers are not at hand differ by more than padding rows."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (draft, target))
    if abs(ours - theirs) > MAX_PADDING_ROWS or (min(ours, theirs) < MAX_PADDING_ROWS and ours != theirs):
        raise ValueError(
            f"Expected draft and target to share a tokenizer, got vocabularies of {ours} and {theirs} rows. Use the "
            "draft of the target's family; if only padding rows differ, pass `tokenizer=` and `assistant_tokenizer=` "
            "to show it."
        )


def saved_tokenizer(model: PreTrainedModel) -> Any:
    """Load the tokenizer beside a model's weights, from their folder or the Hub's cache; `None` without one."""
    name = model.config.name_or_path
    if not name:
        return None
    folder = Path(name)
    if not (folder / "tokenizer.json").is_file():
        try:
            cached = try_to_load_from_cache(name, "tokenizer.json")
        except HFValidationError:  # A folder without a tokenizer, not a Hub id.
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return AutoTokenizer.from_pretrained(folder)


def drops_caches(model: PreTrainedModel) -> bool:
    """Say whether a model computes without a cache, as layers under gradient checkpointing do while training."""
    return model.training and getattr(model, "is_gradient_checkpointing", False)


def full_attention_mask(
    input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> torch.Tensor:
    """The 2-D mask over everything the target has or gets to see; the host drops one that is all ones."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.long()
    return input_ids.new_ones(len(input_ids), mask_length(generation_config, input_ids.shape[1]))


def check_prompt(
    target: PreTrainedModel,
    draft: PardDraftModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    max_length: int,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise a `ValueError` for a prompt that plain decoding would get wrong too, or that does not fit."""
    num_columns, embeds = input_ids.shape[1], model_kwargs.get("inputs_embeds")
    past = cache_in(model_kwargs)
    num_past = past.get_seq_length() if is_callers(past) else 0
    if num_columns == 0 and embeds is None:
        raise ValueError("Expected a prompt of at least one token, got none. Start from the model's `bos_token_id`.")
    if num_columns and embeds is not None:
        raise ValueError("Expected `input_ids` or `inputs_embeds` with a draft, got both. Pass one of them.")
    if num_past and embeds is not None:
        raise ValueError("Expected no `inputs_embeds` after an earlier cache with a draft. Pass token ids instead.")
    if (mask[:, -1] == 0).any():
        raise ValueError(
            "Expected a left-padded batch, got padding at the end of a row. Set `tokenizer.padding_side = 'left'`."
        )
    if num_past and (mask.shape[1] < num_past + 1 or mask.shape[1] not in (num_columns, num_past + num_columns)):
        raise ValueError(
            f"Expected ids or an `attention_mask` that go on after the {num_past} cached tokens, got {num_columns} "
            f"ids and a mask of {mask.shape[1]}. Pass the whole text, or the new ids with a mask over everything."
        )
    known = num_columns + num_past if embeds is None else embeds.shape[1]
    if not num_past and mask.shape[1] != known:
        raise ValueError(
            f"Expected an `attention_mask` over the {known} columns of the prompt, got {mask.shape[1]}. A longer mask "
            "needs the cache it speaks of."
        )
    new = max_length - num_columns
    text, draft_text = (int(part.sum(-1).max()) for part in (mask, mask[:, mask.shape[1] - num_columns :]))
    for name, config, needed in (("target", target.config, text + new), ("draft", draft.config, draft_text + new)):
        if needed > num_positions(config):
            raise ValueError(
                f"Expected prompt and new tokens to fit the {num_positions(config)} positions of the {name}, got "
                f"{needed}. Shorten the prompt or lower `max_new_tokens` (or `max_length`)."
            )


def unsupported_by_any_loop(
    target: PreTrainedModel, length: int, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> str | None:
    """Say why no loop with a draft gives the text of plain decoding; `None` when one does."""
    if cache_in(model_kwargs) is None:
        return f"`generate` prepares no cache for `{type(target).__name__}`"
    if not takes_cache(target):
        return f"The forward of `{type(target).__name__}` takes no cache"
    if drops_caches(target):
        return f"`{type(target).__name__}` is in training mode with gradient checkpointing, which keeps no cache"
    window = smallest_window(target)
    if window is not None and length > window and not masks_windows(target):
        return f"`{type(target).__name__}` forgets what lies {window} tokens back, and does not mask it before"
    config = target.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        # The host chooses among two sets of frequencies by the last position of a forward, a proposal's included.
        original = parameters.get("original_max_position_embeddings", length)
        if parameters.get("rope_type") == "longrope" and length + generation_config.num_assistant_tokens > original:
            return f"`{type(config).__name__}` changes its rotary frequencies at position {original}"
    return None


def what_is_kept(model: PreTrainedModel) -> str:
    """Name what a model keeps besides keys and values, by the layers of its cache."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config.get_text_config()).layers}
    kinds -= {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    return f"a state that no token can be taken out of ({', '.join(sorted(kinds)) or 'in its own code'})"


def smallest_window(model: PreTrainedModel) -> int | None:
    """The smallest window of a model's ordinary cache; `None` where every layer keeps the whole text."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return min((layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer), default=None)


def unsupported_by_own_loop(
    target: PreTrainedModel,
    draft: PardDraftModel,
    mask: torch.Tensor,
    length: int,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
    keywords: frozenset[str],
) -> str | None:
    """Say why our own cache and loop cannot serve a call; `None` when they can."""
    for model in (target, draft):
        if "position_ids" not in forward_parameters(model):
            return f"`{type(model).__name__}` takes no `position_ids`: it counts positions by its cache"
        if getattr(model.config, "alibi", False):
            return f"`{type(model).__name__}` attends by distances (ALiBi), which it counts by its cache"
        if masks_itself(model):
            return f"`{type(model).__name__}` masks attention by the length of its cache"
        if model.config._attn_implementation not in ("sdpa", "eager"):
            return f"`{model.config._attn_implementation}` takes no mask by position"
        if takes_cache_apart(model):
            return f"`{type(model).__name__}` handles single layers of its cache"
        try:
            attention_windows(model.config)
        except ValueError as error:
            return str(error)
    if target.config.get_text_config() is not target.config or takes_images(target):
        return f"`{type(target).__name__}` is more than a text model"
    if synced_gpus:
        return "`synced_gpus` wants every process to run the same forwards"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "Attentions and hidden states are split by the stock loop only"
    if generation_config.cache_implementation in ("offloaded", "quantized"):
        return f"`cache_implementation={generation_config.cache_implementation!r}` is the stock loop's"
    other = {name for name in keywords if model_kwargs.get(name) is not None} - KNOWN_KEYWORDS
    if other:
        return f"Model arguments {sorted(other)} are passed on by the stock loop only"
    past = cache_in(model_kwargs)
    if is_callers(past) and not is_readable(past):
        return f"A `{type(past).__name__}` cannot be taken over"
    if not has_usual_positions(mask, model_kwargs.get("position_ids")):
        return "`position_ids` differ from those the attention mask implies"
    window = smallest_window(target)
    if window is not None and length > window and has_padding_inside(mask):
        # A row that ended before others did leaves some for the next turn. transformers' windows are of columns.
        return f"Padding inside a row counts in the sliding window of {window}"
    return unsupported_by_slot_cache(target)


def has_padding_inside(mask: torch.Tensor) -> bool:
    """Say whether any row has padding behind its first token."""
    return bool((mask.diff(dim=-1) < 0).any())


def is_readable(cache: Any) -> bool:
    """Say whether the entries of a user's cache can be copied column by column."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def has_usual_positions(mask: torch.Tensor, position_ids: torch.Tensor | None) -> bool:
    """Say whether `position_ids` count the text of a 2-D mask from 0, as our cache's slots do."""
    if position_ids is None:
        return True
    if position_ids.ndim != 2 or position_ids.shape[1] != mask.shape[1]:
        return False
    expected = mask.cumsum(-1) - 1
    return bool(((position_ids == expected) | (mask == 0)).all())
