"""What we ask of transformers beyond its documented API: names that differ between versions, and facts of models.

In order: versions, a model's cache, a model's code, configs and tokenizers, classes and copies of live models.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.utils import logging

NEWEST_TESTED = "5.24"
warn_once: Any = logging.get_logger(__name__).warning_once


def is_tested() -> bool:
    """Return whether the tests have run on this version of transformers, or on a newer one."""
    return Version(transformers.__version__).release[:2] <= Version(NEWEST_TESTED).release


def warn_where_untested() -> None:
    """Warn, once, that this version of transformers is newer than those tested."""
    if not is_tested():
        warn_once(
            f"pard_hf was tested on transformers up to {NEWEST_TESTED} and this is {transformers.__version__}: "
            "compare with plain `generate` once."
        )


# 5.24 calls a model's cache `cache`, in forwards, outputs and arguments; before it was `past_key_values`, and custom
# code may keep that name for longer.
CACHE_NAMES = ("cache", "past_key_values")
# The name among the arguments and outputs of `generate()`.
CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
# The layers whose entries follow each other by column.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# Layers without any entry, where a version has them.
EMPTY_LAYERS: tuple[Any, ...] = tuple(
    vars(cache_utils)[name] for name in ("DummyLayer",) if hasattr(cache_utils, name)
)


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which a model's forward takes its cache."""
    return next((name for name in CACHE_NAMES if name in forward_parameters(model)), CACHE_NAME)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a model, under either name; `None` without one."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward or of `generate()`."""
    return getattr(output, CACHE_NAME)


def with_cache_renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename the cache among arguments of `generate()` to the name that this version takes.

    Raises:
        ValueError: A cache came under both names.
    """
    given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"Expected one cache, got `{given[0]}` and `{given[1]}`. Pass one of them.")
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return {**others, CACHE_NAME: arguments[given[0]]} if given else others


def is_callers(past: Any) -> bool:
    """Return whether a cache was passed to `generate()` by its caller."""
    return getattr(past, "_is_user_defined", False)


def cached_columns(past: Any) -> int:
    """Count the tokens whose keys and values are in a cache; 0 without one, or where all its layers keep states."""
    has_keys = past is not None and any(isinstance(layer, CacheLayerMixin) for layer in past.layers)
    return past.get_seq_length() if has_keys else 0


def is_refused_by_stock_loop(past: Any) -> bool:
    """Return whether the assisted loop raises over a cache: some versions cannot crop static ones."""
    return isinstance(past, StaticCache) and "crop" not in vars(StaticLayer)


MOST_CONFIGS = 64
layers_by_content: dict[str, tuple[Any, ...]] = {}


def cache_layers(config: PreTrainedConfig) -> tuple[Any, ...]:
    """Return the layers, without entries, of the cache that transformers makes for a config.

    Making them takes a millisecond, so they are kept, of `MOST_CONFIGS` configs, while the config is the same.
    """
    text_config = config.get_text_config(decoder=True)
    content = f"{type(text_config)} {vars(text_config)}"
    if content not in layers_by_content:
        if len(layers_by_content) >= MOST_CONFIGS:
            layers_by_content.clear()
        layers_by_content[content] = tuple(DynamicCache(config=config).layers)
    return layers_by_content[content]


def croppable_cache(config: PreTrainedConfig) -> DynamicCache:
    """Make a cache that any number of entries can be cropped from.

    Sliding layers drop entries before their window, and the stock loop crops more than was proposed; keeping
    every entry costs memory and changes no mask.
    """
    is_plain = all(type(layer) in PLAIN_LAYERS for layer in cache_layers(config))
    return DynamicCache() if is_plain else DynamicCache(config=config)


@cache
def names_in_forwards(classes: tuple[Any, ...]) -> frozenset[str]:
    """Collect parameters of the first `forward` of some classes, and of the next ones while `**kwargs` reach them."""
    names: set[str] = set()
    for forward in (owner.__dict__["forward"] for owner in classes if "forward" in owner.__dict__):
        parameters = inspect.signature(forward).parameters.values()
        names.update(parameter.name for parameter in parameters)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return frozenset(names)


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of a model's forward arguments; hooks that wrap it on the instance take the same."""
    return names_in_forwards(type(model).__mro__)


def can_compile(model: PreTrainedModel) -> bool:
    """Return whether the forward of a model compiles as one graph."""
    return getattr(model, "_can_compile_fullgraph", False)


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Return whether a model, or its base class in transformers, looks its attention function up by name."""
    classes = takewhile(lambda owner: owner is not PreTrainedModel, type(model).__mro__)
    modules = {owner.__module__ for owner in classes if issubclass(owner, PreTrainedModel)}
    return any(hasattr(sys.modules.get(module), "ALL_ATTENTION_FUNCTIONS") for module in modules)


def masks_by_buffer(model: PreTrainedModel) -> bool:
    """Return whether a model slices its own causal mask, a square buffer, by the length of its cache."""
    return not uses_attention_interface(model) and any(
        buffer.ndim == 4 and buffer.dtype in (torch.bool, torch.uint8) and buffer.shape[2] == buffer.shape[3]
        for buffer in model.buffers()
    )


def masks_windows(model: PreTrainedModel) -> bool:
    """Return whether the code of a model makes masks for sliding-window or chunked layers."""
    makers = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    modules = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(module), maker) for module in modules for maker in makers)


@cache
def names_cache_layers(function: Callable[..., Any]) -> bool:
    """Return whether the source of a forward names single layers of its cache, which only an ordinary cache has."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # Code without a file.
        return False
    return any(f"{name}.layers" in source for name in CACHE_NAMES)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's input ids: its embedding's, which a hook of accelerate may choose.

    Offloaded weights lie on the meta device between two forwards, so `model.device` does not tell.
    """
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    devices += [parameter.device for parameter in islice(chain(embedding.parameters(), model.parameters()), 1)]
    # accelerate numbers its accelerators, as torch does.
    return torch.device(next(device for device in devices if device is not None))


def num_positions(config: PreTrainedConfig) -> int:
    """Return the positions a model was made for; `sys.maxsize` for configs that name none, or a number below 1."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else sys.maxsize


def check_num_assistant_tokens(num_assistant_tokens: int, *configs: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless K is a positive integer that fits the positions of every model."""
    if isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1:
        raise ValueError(
            f"Expected `num_assistant_tokens` to be an integer of at least 1, got {num_assistant_tokens!r}."
        )
    for config in configs:
        positions = num_positions(config)
        if num_assistant_tokens >= positions:
            raise ValueError(
                f"Expected `num_assistant_tokens` below the {positions} positions of `{type(config).__name__}`, got "
                f"{num_assistant_tokens}. Common values are 4 to 16."
            )


def end_token_ids(generation_config: GenerationConfig) -> list[int]:
    """Return the end tokens of a generation config, which names one, several or none."""
    ends = generation_config.eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """Return the padding token that `generate()` chooses: the first end token where none is named."""
    pad = generation_config.pad_token_id
    return next(iter(end_token_ids(generation_config)), None) if pad is None else int(pad)


class TokenizerDifference(NamedTuple):
    """Differences between the vocabularies of a draft's and a target's tokenizer."""

    conflict: str | None  # The first id with two meanings, as "id 35 is 'B' for the draft and 'A' for the target".
    num_draft_only: int  # Ids that only the draft's has.
    num_target_only: int


def compare_tokenizers(draft: Any, target: Any, with_added_tokens: bool = True) -> TokenizerDifference:
    """Compare the vocabularies of a draft's and a target's tokenizer id by id.

    Families rename reserved and special tokens from release to release, and text is made of the others:
    `with_added_tokens=False` leaves added tokens out.
    """
    ours, theirs = (
        {
            index: token
            for token, index in tokenizer.get_vocab().items()
            if with_added_tokens or index not in tokenizer.added_tokens_decoder
        }
        for tokenizer in (draft, target)
    )
    shared = ours.keys() & theirs.keys()
    first = min((index for index in shared if ours[index] != theirs[index]), default=None)
    conflict = None
    if first is not None:
        conflict = f"id {first} is {ours[first]!r} for the draft and {theirs[first]!r} for the target"
    return TokenizerDifference(conflict, len(ours) - len(shared), len(theirs) - len(shared))


def subclass_named_as(base: Any, mixin: type, maker: Callable[[Any], type]) -> Any:
    """Make a subclass of `base` with `mixin` in front, under the name of `base`, which saved configs hold.

    Pickle would look the class up by that name and find `base`, so instances are made by `maker(base)` instead.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return make_empty, (maker, base), object.__reduce_ex__(self, protocol)[2]

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": mixin.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "config_class": base.config_class,
    }
    return type(base.__name__, (mixin, base), names)


def make_empty(maker: Callable[[Any], type], base: type) -> Any:
    """Make an instance without state, for pickle to fill."""
    made: Any = maker(base)
    return made.__new__(made)


def sharing_weights(model: PreTrainedModel, model_class: Any) -> Any:
    """Make a second model of a class over the same tensors, with its own generation config and submodule table."""
    twin = model_class.__new__(model_class)
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model._modules)
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def without_head(draft: Any) -> Any:
    """Copy a draft, over the same tensors, without its correction head."""
    twin = sharing_weights(draft, type(draft))
    twin.correction_head = None
    return twin
