"""Names and differences of the versions of transformers that we serve, in one place.

5.24 calls a model's cache `cache`, in forwards, outputs and arguments alike; before it was `past_key_values`. Models
with code of their own may keep the older name for longer, so a forward is asked by its signature.

How many positions a model has, and the cache that lets go of some again.

Subclasses made of a live model's class, under its own name.

Second models over the same weights.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
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
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

logger = logging.getLogger(__name__)


NEWEST_TESTED = "5.24"
# From the newest to the oldest.
CACHE_NAMES = ("cache", "past_key_values")
# What `generate()` calls a cache among the arguments of a model, and its outputs call theirs.
CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)

# Whether the assisted loop takes caches of a fixed size, whose entries it has to take back.
STOCK_LOOP_TAKES_STATIC = "crop" in vars(StaticLayer)


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """The names of what a model's forward takes; hooks that wrap it on the instance take the same."""
    return names_in_forwards(type(model).__mro__)


@cache
def names_in_forwards(classes: tuple[Any, ...]) -> frozenset[str]:
    """What the first forward of some classes takes, and the next ones as far as it passes on what it does not name."""
    names: set[str] = set()
    for forward in (owner.__dict__["forward"] for owner in classes if "forward" in owner.__dict__):
        parameters = inspect.signature(forward).parameters.values()
        names.update(parameter.name for parameter in parameters)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return frozenset(names)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model's forward takes its cache."""
    parameters = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAME)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model; `None` where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a model's output, or that of `generate`, holds."""
    return getattr(output, CACHE_NAME)


def with_host_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate()` with the cache under the name this version takes, whichever the caller used.

    Raises:
        ValueError: A cache came under both names.
    """
    given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"Expected one cache, got `{given[0]}` and `{given[1]}`. Pass one of them.")
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return {**others, CACHE_NAME: arguments[given[0]]} if given else others


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model's forward takes a cache by a name we know."""
    return any(name in forward_parameters(model) for name in CACHE_NAMES)


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model reads more than text, and may count what it has read otherwise for that."""
    return not {"pixel_values", "input_features", "input_values"}.isdisjoint(forward_parameters(model))


def looks_attention_up(model: PreTrainedModel) -> bool:
    """Whether a model attends by a function that it looks up by name, and not by code of its own.

    A class made of one of transformers, in a module of the user's, attends as that one does.
    """
    classes = takewhile(lambda owner: owner is not PreTrainedModel, type(model).__mro__)
    modules = {owner.__module__ for owner in classes if issubclass(owner, PreTrainedModel)}
    return any(hasattr(sys.modules.get(module), "ALL_ATTENTION_FUNCTIONS") for module in modules)


def masks_itself(model: PreTrainedModel) -> bool:
    """Whether a model's attention lays a causal mask of its own over the cache, besides the one it is given.

    Such a mask is a square buffer, cut by the cache's length. Models that look their attention up do not use one.
    """
    return not looks_attention_up(model) and any(
        buffer.ndim == 4 and buffer.dtype in (torch.bool, torch.uint8) and buffer.shape[2] == buffer.shape[3]
        for buffer in model.buffers()
    )


def masks_windows(model: PreTrainedModel) -> bool:
    """Whether the code of a model makes masks for layers that see a part of the text only."""
    makers = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    modules = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(module), maker) for module in modules for maker in makers)


def takes_cache_apart(model: PreTrainedModel) -> bool:
    """Whether a model's own forward handles single layers of its cache, which only an ordinary cache has."""
    return names_layers_of_cache(type(model.base_model).forward)


@cache
def names_layers_of_cache(function: Callable[..., Any]) -> bool:
    """Whether the code of a function names layers of a cache."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # Code without a file.
        return False
    return any(f"{name}.layers" in source for name in CACHE_NAMES)


def is_callers(past: Any) -> bool:
    """Whether the caller passed this cache to `generate()`."""
    return getattr(past, "_is_user_defined", False)


def is_refused_by_stock_loop(past: Any) -> bool:
    """Whether the assisted loop of this version raises over a cache."""
    return isinstance(past, StaticCache) and not STOCK_LOOP_TAKES_STATIC


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state that no token can be taken out of."""
    return model._is_stateful


def can_compile(model: PreTrainedModel) -> bool:
    """Whether the forward of a model compiles as one graph."""
    return getattr(model, "_can_compile_fullgraph", False)


def mask_length(generation_config: GenerationConfig, default: int) -> int:
    """Columns of the attention mask that `generate()` dropped because it was all ones."""
    return getattr(generation_config, "_mask_length", default)


def end_token_ids(generation_config: GenerationConfig) -> list[int]:
    """The end tokens of a generation config, which names one, several or none."""
    ends = generation_config.eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """The padding token as `generate()` settles on it: the first end token where none is named."""
    pad = generation_config.pad_token_id
    return next(iter(end_token_ids(generation_config)), None) if pad is None else int(pad)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its input ids: where its embedding computes, which a hook of accelerate may choose.

    Offloaded weights lie on the meta device between two forwards, so that of the model says nothing.
    """
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    devices += [parameter.device for parameter in islice(chain(embedding.parameters(), model.parameters()), 1)]
    device = next(device for device in devices if device is not None)
    # accelerate numbers its accelerators, and torch reads a number so.
    return torch.device(device)


def takes_code_from_elsewhere(model: PreTrainedModel) -> bool:
    """Whether a model's class is none of transformers."""
    return not type(model).__module__.startswith("transformers.")


def is_tested() -> bool:
    """Whether the tests have seen this version of transformers, or an older one."""
    return Version(transformers.__version__).release[:2] <= Version(NEWEST_TESTED).release


@lru_cache(maxsize=1)
def warn_where_untested() -> None:
    """Say, once, that this version of transformers is newer than what the tests have seen."""
    if not is_tested():
        logger.warning(
            "pard_hf was tested on transformers up to %s and this is %s: compare with plain `generate` once.",
            NEWEST_TESTED,
            transformers.__version__,
        )


def croppable_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache from which the host may take back any number of entries.

    Sliding layers forget what lies before their window, and the stock loop takes back more than was proposed; keeping
    every entry costs memory and changes no mask.
    """
    cache = DynamicCache(config=config)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return DynamicCache()
    return cache


class TokenizerDifference(NamedTuple):
    """What ids mean to a draft's and a target's tokenizer; `conflict` is `None` where no id has two meanings."""

    conflict: str | None
    num_draft_only: int
    num_target_only: int


def compare_tokenizers(draft: Any, target: Any, with_added_tokens: bool = True) -> TokenizerDifference:
    """Compare the vocabularies of a draft's and a target's tokenizer id by id.

    Args:
        with_added_tokens (`bool`, *optional*, defaults to `True`):
            Whether added tokens count. Families rename reserved and special ones from release to release, and text is
            made of the others.

    Returns:
        The first id that they read differently, such as `"id 35 is 'B' for the draft and 'A' for the target"`, and
        how many ids only one of them has.
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
    index = min((index for index in shared if ours[index] != theirs[index]), default=None)
    conflict = (
        None if index is None else f"id {index} is {ours[index]!r} for the draft and {theirs[index]!r} for the target"
    )
    return TokenizerDifference(conflict, len(ours) - len(shared), len(theirs) - len(shared))


def num_positions(config: PreTrainedConfig) -> int:
    """Positions a model was made for; without bound for the few configs that name none, or a number below 1."""
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


def subclass_named_as(base: Any, mixin: type, maker: Callable[[Any], type]) -> Any:
    """A subclass of `base` with `mixin` in front, under the name of `base`; `maker(base)` gives it again.

    A saved config names the class, so the name stays. Pickle would look the class up by that name and find `base`, so
    instances say how to make it instead.
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
    """An instance without state, for pickle to fill."""
    made: Any = maker(base)
    return made.__new__(made)


def sharing_weights(model: PreTrainedModel, model_class: Any) -> Any:
    """A second model of the given class over the same tensors, with generation settings and parts of its own."""
    twin = model_class.__new__(model_class)
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model._modules)
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def without_head(draft: Any) -> Any:
    """The same draft without its correction head."""
    twin = sharing_weights(draft, type(draft))
    twin.correction_head = None
    return twin


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Warn about something that holds for every call, at the first."""
    logger.warning(message)
