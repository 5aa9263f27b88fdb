"""Check what is refused, what falls back to another loop, and why.

Three kinds of functions: `check_*` raise a `ValueError` before anything is touched; `unsupported_by_*` return why a
loop would not give the text of plain `generate`, or `None`; and where configs and code do not tell (custom code, new
versions of transformers), a few short forwards of the model do, once a model.
"""

from __future__ import annotations

import filecmp
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..draft.model import PardDraftModel
from ..host import (
    CACHE_NAMES,
    PLAIN_LAYERS,
    cache_argument,
    cache_in,
    cache_layers,
    cached_columns,
    check_num_assistant_tokens,
    compare_tokenizers,
    forward_parameters,
    input_device,
    is_callers,
    is_tested,
    masks_by_buffer,
    masks_windows,
    names_cache_layers,
    num_positions,
)
from .batch import CachedModel
from .cache import SlotCache, attention_windows
from .config import CALL_ARGUMENTS, text_sources
from .recurrent import HybridCache, cache_for, can_take_over, is_hybrid, unsupported_states
from .schedule import check_schedule

TOKENIZER_FILE = "tokenizer.json"
# Vocabularies of one family are padded to multiples of 64 to 1024 rows; a larger difference is another tokenizer.
MAX_PADDING_ROWS = 1024
# Model arguments that our loop makes itself. Any other that the caller passes (images, token types …) is for the loop
# of transformers; what transformers adds on its own differs between versions and does not count.
KNOWN_KEYWORDS = {"attention_mask", "inputs_embeds", "logits_to_keep", "position_ids", "use_cache", *CACHE_NAMES}
# Inputs of models that read more than text, and may count positions otherwise for that.
OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}

# Of each target the drafts that were found to share its tokenizer.
compared: WeakKeyDictionary[PreTrainedModel, WeakSet[PreTrainedModel]] = WeakKeyDictionary()


def check_mode(target: PreTrainedModel, generation_config: GenerationConfig, has_draft: bool) -> None:
    """Raise a `ValueError` for a target or a way of generating that neither a draft nor lookup can speed up."""
    name, option = type(target).__name__, "`assistant_model`" if has_draft else "`prompt_lookup_num_tokens`"
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"Expected a decoder-only target, got the encoder-decoder `{name}`. Generate without {option}."
        )
    if target._is_stateful and (reason := unsupported_by_states(target)):
        raise ValueError(
            f"Expected a target whose state can be kept at the last accepted token, got `{name}`: {reason}. Generate "
            f"without {option}."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"Expected `num_beams=1` with a draft, got {generation_config.num_beams}: beams have no draft to follow. "
            "Drop `num_beams` or `assistant_model`."
        )
    if generation_config.use_cache is False and target.config.use_cache is not False:
        raise ValueError(f"Expected `use_cache=True` with {option}, got False. Drop `use_cache` or {option}.")
    has_chains = not text_sources(generation_config)
    check_schedule(
        generation_config.num_assistant_tokens_schedule or "constant",
        generation_config.num_assistant_tokens,
        has_chains,
    )


def check_call_arguments_unused(generation_config: GenerationConfig, assistant: Any, generation_mode: Any) -> None:
    """Raise a `ValueError` where a call that is left to transformers has arguments of ours."""
    names = [name for name in CALL_ARGUMENTS if getattr(generation_config, f"_{name}") is not None]
    if names:
        unused = " and ".join(f"`{name}`" for name in names)
        got = generation_mode.value if assistant is None else f"`{type(assistant).__name__}`"
        raise ValueError(
            "Expected a decoder-only target, greedy or sampled, with a `PardDraftModel` or no assistant for "
            f"{unused}, got {got}. Drop {unused}."
        )


def check_pair(
    target: PreTrainedModel, draft: PardDraftModel, num_assistant_tokens: int, tokenizer: Any, draft_tokenizer: Any
) -> None:
    """Raise a `ValueError` unless draft and target share a tokenizer and have room for K proposals.

    The output is exact either way; with another tokenizer no proposal would be accepted. Tokenizers, passed or saved
    with the weights, are compared when a pair is first met. Rows that only pad a vocabulary may differ.
    """
    if keeps_no_cache(draft):
        raise ValueError(
            "Expected a draft that can keep a cache, got one in training mode with gradient checkpointing. Call "
            "`draft.eval()` or `draft.gradient_checkpointing_disable()` first."
        )
    if is_hybrid(draft.config):
        raise ValueError(
            f"Expected a draft whose layers all attend, got `{type(draft).__name__}`: its mask tokens would stay in "
            "the state of the others. Use a draft without recurrent or convolution layers."
        )
    check_num_assistant_tokens(num_assistant_tokens, target.config, draft.config)
    if draft in compared.setdefault(target, WeakSet()):
        return
    if tokenizer is None or draft_tokenizer is None:
        if not check_saved_tokenizers(draft.config.name_or_path, target.config.name_or_path):
            check_vocabulary_sizes(draft, target)
    else:
        check_tokenizers(draft_tokenizer, tokenizer)
    compared[target].add(draft)


def check_saved_tokenizers(draft: str | None, target: str | None) -> bool:
    """Compare the tokenizers saved with weights, by folder or Hub id, loaded only where their files differ.

    Returns whether both are there.
    """
    ours, theirs = tokenizer_folder(draft), tokenizer_folder(target)
    if ours is None or theirs is None:
        return False
    if not filecmp.cmp(ours / TOKENIZER_FILE, theirs / TOKENIZER_FILE, shallow=False):
        check_tokenizers(AutoTokenizer.from_pretrained(ours), AutoTokenizer.from_pretrained(theirs))
    return True


def keeps_no_cache(model: PreTrainedModel) -> bool:
    """Return whether a model computes without a cache, as layers under gradient checkpointing in training do."""
    return model.training and getattr(model, "is_gradient_checkpointing", False)


def tokenizer_folder(name_or_path: str | None) -> Path | None:
    """Return where the tokenizer of a model's weights is, their folder or the Hub's cache; `None` without one."""
    if not name_or_path:
        return None
    folder = Path(name_or_path)
    if (folder / TOKENIZER_FILE).is_file():
        return folder
    try:
        cached = try_to_load_from_cache(name_or_path, TOKENIZER_FILE)
    except HFValidationError:  # A folder without a tokenizer, not a Hub id.
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def check_tokenizers(draft: Any, target: Any) -> None:
    """Raise a `ValueError` where an id has two meanings, or neither vocabulary contains the other."""
    problem, num_ours, num_theirs = compare_tokenizers(draft, target, with_added_tokens=False)
    if problem is None and num_ours and num_theirs:
        problem = f"{num_ours} ids are the draft's alone and {num_theirs} the target's"
    if problem is not None:
        raise ValueError(
            f"Expected draft and target to share a tokenizer, but {problem}. Use the draft of the target's family."
        )


def check_vocabulary_sizes(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raise a `ValueError` where models without tokenizers at hand differ by more than padding rows."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (draft, target))
    if abs(ours - theirs) > MAX_PADDING_ROWS or (min(ours, theirs) < MAX_PADDING_ROWS and ours != theirs):
        raise ValueError(
            f"Expected draft and target to share a tokenizer, got vocabularies of {ours} and {theirs} rows. Use the "
            "draft of the target's family; if only padding rows differ, pass `tokenizer=` and `assistant_tokenizer=` "
            "to show it."
        )


def full_attention_mask(
    input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the 2-D mask over all the target has read or will read; transformers drops one that is all ones."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.long()
    return input_ids.new_ones(len(input_ids), getattr(generation_config, "_mask_length", input_ids.shape[1]))


def check_prompt(
    target: PreTrainedModel,
    draft: PardDraftModel | None,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    max_length: int,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise a `ValueError` for a prompt that plain decoding would get wrong too, or that does not fit."""
    num_columns, embeds = input_ids.shape[1], model_kwargs.get("inputs_embeds")
    past = cache_in(model_kwargs)
    num_past = cached_columns(past) if is_callers(past) else 0
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
            f"Expected ids or an `attention_mask` that continue after the {num_past} cached tokens, got {num_columns} "
            f"ids and a mask of {mask.shape[1]}. Pass the whole text, or the new ids with a mask over everything."
        )
    known = num_columns if embeds is None else embeds.shape[1]
    if not num_past and mask.shape[1] != known:
        raise ValueError(
            f"Expected an `attention_mask` over the {known} columns of the prompt, got {mask.shape[1]}. A longer mask "
            "needs the cache that it covers."
        )
    new = max_length - num_columns
    # The draft reads the prompt's columns only; the target has read those of an earlier cache too.
    text_of_draft = mask[:, mask.shape[1] - num_columns :]
    for name, model, text in (("target", target, mask), ("draft", draft, text_of_draft)):
        if model is None:
            continue
        needed, positions = int(text.sum(-1).max()) + new, num_positions(model.config)
        if needed > positions:
            raise ValueError(
                f"Expected prompt and new tokens to fit the {positions} positions of the {name}, got {needed}. "
                "Shorten the prompt or lower `max_new_tokens` (or `max_length`)."
            )


def unsupported_by_any_loop(
    target: PreTrainedModel, length: int, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> str | None:
    """Return why no loop with a draft gives the text of plain decoding up to `length` columns."""
    name = type(target).__name__
    if cache_in(model_kwargs) is None:
        return f"`generate` prepares no cache for `{name}`"
    if forward_parameters(target).isdisjoint(CACHE_NAMES):
        return f"The forward of `{name}` takes no cache"
    if keeps_no_cache(target):
        return f"`{name}` is in training mode with gradient checkpointing, which keeps no cache"
    window = smallest_window(target)
    if length > window and not masks_windows(target):
        return f"`{name}` forgets what lies {window} tokens back, and does not mask it before"
    config = target.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        # Such a model chooses its frequencies by the last position of a forward, a proposal's included.
        original = parameters.get("original_max_position_embeddings", length)
        depth = max(generation_config.num_assistant_tokens or 0, generation_config.prompt_lookup_num_tokens or 0)
        if parameters.get("rope_type") == "longrope" and length + depth > original:
            return f"`{type(config).__name__}` changes its rotary frequencies at position {original}"
    return None


def unsupported_by_states(model: PreTrainedModel) -> str | None:
    """Return why the states of a model with recurrent or convolution layers cannot follow the accepted tokens.

    Whether a forward over several tokens goes on from a state is not written anywhere, so it is tried, once a model.
    """
    if not is_hybrid(model.config):
        layers = cache_layers(model.config.get_text_config())
        kinds = sorted({type(layer).__name__ for layer in layers if type(layer) not in PLAIN_LAYERS})
        return f"It keeps what no slot can hold ({', '.join(kinds)})" if kinds else "It keeps a state in its own code"
    if (reason := unsupported_states(model.config)) is not None:
        return reason
    if not passes(model, states_passed, logits_over_states):
        return "Several tokens after a state do not give the logits of a plain forward"
    return None


def smallest_window(model: PreTrainedModel) -> int:
    """Return the smallest sliding window of a model's layers; `sys.maxsize` where all attend to the whole text."""
    layers = cache_layers(model.config.get_text_config())
    windows = (layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer)
    return min(windows, default=sys.maxsize)


def unsupported_by_own_loop(
    target: PreTrainedModel,
    draft: PardDraftModel | None,
    mask: torch.Tensor,
    length: int,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
    keywords: list[str],
) -> str | None:
    """Return why our loop and its cache cannot serve a call whose caller passed the arguments `keywords`."""
    reason = unsupported_by_slots(target) or (draft and unsupported_by_slots(draft))
    if reason is not None:
        return reason
    if target.config.get_text_config() is not target.config or forward_parameters(target) & OTHER_INPUTS:
        return f"`{type(target).__name__}` is more than a text model"
    if synced_gpus:
        return "`synced_gpus` requires every process to run the same forwards"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "Attentions and hidden states are split by the stock loop only"
    if generation_config.cache_implementation in ("offloaded", "quantized"):
        return f"`cache_implementation={generation_config.cache_implementation!r}` is the stock loop's"
    other = {name for name in keywords if model_kwargs.get(name) is not None} - KNOWN_KEYWORDS
    if other:
        return f"Model arguments {sorted(other)} are passed on by the stock loop only"
    past = cache_in(model_kwargs)
    is_readable = type(past) is DynamicCache and (
        can_take_over(target.config, past, mask)
        if is_hybrid(target.config)
        else all(type(layer) in PLAIN_LAYERS for layer in past.layers)
    )
    if is_callers(past) and not is_readable:  # Entries are copied column by column.
        return f"A `{type(past).__name__}` cannot be taken over"
    if not has_usual_positions(mask, model_kwargs.get("position_ids")):
        return "`position_ids` differ from those the attention mask implies"
    window = smallest_window(target)
    if length > window and bool((mask.diff(dim=-1) < 0).any()):
        # A row that ended before others leaves padding for the next turn. transformers' windows are of columns.
        return f"Padding inside a row counts in the sliding window of {window}"
    is_swept_by_tests = type(target).__module__.startswith("transformers.") and is_tested()
    if not is_swept_by_tests and not passes(target, slots_passed, logits_over_slots):
        return f"Over our cache `{type(target).__name__}` has other logits than over its own"
    return None


def unsupported_by_slots(model: PreTrainedModel) -> str | None:
    """Return why a model cannot decode over a `SlotCache`, by its config and code."""
    name, attention = type(model).__name__, model.config._attn_implementation
    has_attention = any(isinstance(layer, CacheLayerMixin) for layer in cache_layers(model.config))
    if "position_ids" not in forward_parameters(model) and has_attention:
        return f"`{name}` takes no `position_ids`: it counts positions by its cache"
    if getattr(model.config, "alibi", False):
        return f"`{name}` attends by distances (ALiBi), which it counts by its cache"
    if masks_by_buffer(model):
        return f"`{name}` masks attention by the length of its cache"
    if attention not in ("sdpa", "eager"):
        return f"`{attention}` takes no mask by position"
    if names_cache_layers(type(model.base_model).forward):
        return f"`{name}` handles single layers of its cache"
    if is_hybrid(model.config):
        return unsupported_by_states(model)
    try:
        attention_windows(model.config)
    except ValueError as error:
        return str(error)
    return None


def has_usual_positions(mask: torch.Tensor, position_ids: torch.Tensor | None) -> bool:
    """Return whether `position_ids` count the text of a 2-D mask from 0, as the slots of our cache do."""
    if position_ids is None:
        return True
    if position_ids.ndim != 2 or position_ids.shape[1] != mask.shape[1]:
        return False
    return bool(((position_ids == mask.cumsum(-1) - 1) | (mask == 0)).all())


def unsupported_by_stock_loop(model: PreTrainedModel) -> str | None:
    """Return why a model cannot read several tokens after a cache as it reads them one by one.

    Only models that count positions by their cache are tested.
    """
    if "position_ids" in forward_parameters(model) or passes(model, blocks_passed, logits_over_blocks):
        return None
    return f"`{type(model).__name__}` reads one token at a time after its cache"


LogitsOf = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
NUM_TOKENS, NUM_FIRST, NUM_SLOTS = 12, 7, 16
# The largest difference of logits over their standard deviation: rounding stays well below, a wrong position or mask
# well above.
MAX_DIFFERENCE = {torch.float32: 0.02, torch.float64: 0.02}
MAX_DIFFERENCE_16_BIT = 0.3
# Whether models were found to have the logits of a plain forward over our cache, and in blocks over an ordinary one.
slots_passed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
blocks_passed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
# And whether they were found to go on from the states of our cache.
states_passed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def passes(model: PreTrainedModel, known: WeakKeyDictionary[PreTrainedModel, bool], logits_of: LogitsOf) -> bool:
    """Test a model by short forwards, once; one in training mode has no two forwards alike, and is not tested."""
    if model not in known:
        if model.training:
            return False
        known[model] = is_close(model, logits_of)
    return known[model]


@torch.no_grad()
def is_close(model: PreTrainedModel, logits_of: LogitsOf) -> bool:
    """Compare logits of a plain forward with those of forwards over a cache; one that raises is not close.

    The result holds for later calls, so the rounding of this one under autocast must not decide it.
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
    return bool(difference <= MAX_DIFFERENCE.get(model.dtype, MAX_DIFFERENCE_16_BIT))


def logits_over_slots(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits after the first tokens over our cache, with rejected entries in the slots after them."""
    cached = CachedModel(model, SlotCache.of(model, NUM_SLOTS))
    positions = torch.arange(NUM_TOKENS, device=ids.device).unsqueeze(0)
    cached.forward(positions, NUM_SLOTS, 1, input_ids=ids.flip(1))
    cached.forward(positions[:, :NUM_FIRST], NUM_SLOTS, 1, input_ids=ids[:, :NUM_FIRST])
    return cached.forward(positions[:, NUM_FIRST:], NUM_SLOTS, NUM_TOKENS - NUM_FIRST, input_ids=ids[:, NUM_FIRST:])


def logits_over_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits after the first tokens over our cache, once a block of them was rejected in part."""
    cache = cache_for(model, NUM_SLOTS)
    assert isinstance(cache, HybridCache)
    cache.is_all_prompt = True
    cached, positions = CachedModel(model, cache), torch.arange(NUM_TOKENS, device=ids.device).unsqueeze(0)
    wrong = torch.cat([ids[:, :NUM_FIRST], ids[:, NUM_FIRST:].flip(1)], dim=1)
    cached.forward(positions, NUM_SLOTS, NUM_TOKENS - 2, input_ids=wrong)
    cache.commit(positions[:, NUM_FIRST])
    return cached.forward(positions[:, NUM_FIRST:], NUM_SLOTS, NUM_TOKENS - NUM_FIRST, input_ids=ids[:, NUM_FIRST:])


def logits_over_blocks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits after the first tokens over an ordinary cache, cropped after a block one token too long."""
    past = {cache_argument(model): DynamicCache()}
    model(input_ids=ids[:, : NUM_FIRST + 1], use_cache=True, **past)
    next(iter(past.values())).crop(-1)
    return model(input_ids=ids[:, NUM_FIRST:], use_cache=True, **past).logits
