"""Prompts as left-padded batches of like length, and the texts that come back.

Knows token ids; knows nothing of models and of how a text was generated.

The ways to generate that are compared, all on one copy of each model's weights.

Knows how each is asked for and when it cannot run; knows nothing of prompts and clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig

from ..generation.compilation import why_not_compiled, workspace_of
from ..generation.mixin import with_pard, without_pard
from ..generation.schedule import COUNTS
from ..generation.stats import DecodingStats
from ..host import pad_token_id, sharing_weights, without_head
from ..loading import Pair
from ..tokens import pad_left

# Rows of the batches that single rows are compared with.
REGROUPED_SIZE = 4


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts of a list: which ones, and their padded `input_ids` and `attention_mask` `[B, columns]`."""

    indices: tuple[int, ...]
    inputs: dict[str, torch.Tensor]

    @property
    def num_columns(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def new_texts(self, sequences: torch.Tensor, end_token_ids: Sequence[int]) -> dict[int, list[int]]:
        """New tokens of each row of `sequences` `[B, columns + new]`, up to and with the first end token."""
        rows = sequences[:, self.num_columns :].tolist()
        return {index: cut(row, end_token_ids) for index, row in zip(self.indices, rows, strict=True)}


def cut(text: list[int], end_token_ids: Sequence[int]) -> list[int]:
    """The text up to and with its first end token."""
    return next((text[: place + 1] for place, token in enumerate(text) if token in end_token_ids), text)


def make_batches(
    encoded: list[list[int]], batch_size: int, pad_token_id: int | None, device: torch.device | str
) -> list[PromptBatch]:
    """Batches of prompts of like length, longest first: the first batch shows whether memory and positions suffice."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    batches = []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = pad_left([encoded[index] for index in indices], pad_token_id)
        batches.append(PromptBatch(tuple(indices), {name: tensor.to(device) for name, tensor in inputs.items()}))
    return batches


def regroup(encoded: list[list[int]], batches: list[PromptBatch], pad_token_id: int | None) -> list[PromptBatch]:
    """Batches of other sizes: the rows of `batches` one at a time, or four at a time where each came alone.

    Rows that come alone in either way are left out; some come again to fill a batch.
    """
    device = batches[0].inputs["input_ids"].device
    together = [index for batch in batches if len(batch.indices) > 1 for index in batch.indices]
    size = 1 if together else REGROUPED_SIZE
    indices = together or [index % len(encoded) for index in range(len(encoded) + -len(encoded) % size)]
    made = make_batches([encoded[index] for index in indices], size, pad_token_id, device)
    return [PromptBatch(tuple(indices[place] for place in batch.indices), batch.inputs) for batch in made]


# One compiled forward a batch size and cache length: a sweep needs more of them than torch keeps by default.
NUM_COMPILED = 64


@dataclass(frozen=True)
class Route:
    """One way to generate.

    Args:
        name (`str`):
            Its id in JSON and flags.
        title (`str`):
            What a table calls it.
        takes_batches (`bool`, *optional*, defaults to `True`):
            Whether it takes more than one text at a time.
        is_pard (`bool`, *optional*, defaults to `False`):
            Whether a parallel draft proposes: such a route is to say what plain `generate` says.
        in_our_loop (`bool`, *optional*, defaults to `False`):
            Whether the target has the mixin.
        needs_head (`bool`, *optional*, defaults to `False`):
            Whether it is there only for drafts with a correction head.
        baseline (`str`, *optional*):
            The plain route that runs forwards as this one's rounds do, eagerly or compiled. Only where every round has
            the same K, so that the mean of its parts says something.
    """

    name: str
    title: str
    takes_batches: bool = True
    is_pard: bool = False
    in_our_loop: bool = False
    baseline: str | None = None
    needs_head: bool = False


# Plain `generate`, and the same compiled over a static cache. The stock assisted loop with the draft's own weights
# proposing token by token, with prompt lookup, and with the parallel draft, as it stands and compiled. Our loop with a
# chain, as it stands and compiled, with a correction head, with a tree, with both, and with what has paid of these.
OURS: dict[str, Any] = {"is_pard": True, "in_our_loop": True}
ROUTES = {
    route.name: route
    for route in (
        Route("ar", "AR"),
        Route("ar_plus", "AR+"),
        Route("ad", "AD", takes_batches=False),
        Route("pld", "PLD", takes_batches=False),
        Route("tier1", "PARD tier 1", takes_batches=False, is_pard=True),
        Route("tier1_compiled", "PARD tier 1, compiled", takes_batches=False, is_pard=True),
        Route("tier2", "PARD tier 2", baseline="ar", **OURS),
        Route("tier2_compiled", "PARD tier 2, compiled", baseline="ar_plus", **OURS),
        Route("head", "PARD + head", baseline="ar", needs_head=True, **OURS),
        Route("tree", "PARD tree", baseline="ar", **OURS),
        Route("tree_head", "PARD tree + head", baseline="ar", needs_head=True, **OURS),
        Route("tree_head_compiled", "PARD tree + head, compiled", baseline="ar_plus", needs_head=True, **OURS),
        Route("adaptive", "PARD tier 2, adaptive K", **OURS),
        Route("adaptive_compiled", "PARD tier 2, adaptive K, compiled", **OURS),
    )
}


COMPILED_BY_HOST = ("ar_plus", "tier1_compiled")
COMPILED = ("tier2_compiled", "tree_head_compiled", "adaptive_compiled")
DEFAULT_TREE_SIZE = 64


class RouteRunner:
    """Runs any route of one pair at one K and, where it drafts a tree, one tree size.

    What is compiled belongs to a draft as an object, so runners of one pair share `headless`, the one without a head.
    Between calls the target has the mixin, as in every [`Pair`].
    """

    def __init__(
        self, pair: Pair, num_assistant_tokens: int, tree_size: int = DEFAULT_TREE_SIZE, headless: Any = None
    ):
        self.target, self.draft = pair.target, pair.draft
        self.headless = headless or without_head(pair.draft)
        self.num_drafts, self.tree_size = num_assistant_tokens, tree_size
        self.pad_token_id = pad_token_id(pair.target.generation_config)
        self.arguments = self.arguments_of_routes()

    def arguments_of_routes(self) -> dict[str, dict[str, Any]]:
        """What each route adds to the arguments of `generate`."""
        size = {"num_assistant_tokens": self.num_drafts, "num_assistant_tokens_schedule": "constant"}
        constant = {"assistant_model": self.headless, **size, "assistant_tree_size": 0}
        head = {**constant, "assistant_model": self.draft}
        tree = {**constant, "assistant_tree_size": self.tree_size}
        both = {**head, "assistant_tree_size": self.tree_size}
        adaptive = {**both, "num_assistant_tokens_schedule": "adaptive"}
        # The stock loop reads K from its assistant's own settings; ours stay as they were loaded.
        token_by_token = sharing_weights(self.draft, type(self.draft).__bases__[-1])
        parallel = sharing_weights(self.headless, type(self.headless))
        for assistant in (token_by_token, parallel):
            assistant.generation_config.num_assistant_tokens = self.num_drafts
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
        compiled = {"cache_implementation": "static", "compile_config": compile_anywhere()}
        return {
            "ar": {},
            "ar_plus": compiled,
            "ad": {"assistant_model": token_by_token},
            "pld": {"prompt_lookup_num_tokens": self.num_drafts},
            "tier1": {"assistant_model": parallel},
            "tier1_compiled": {"assistant_model": parallel, **compiled},
            "tier2": {**constant, "disable_compile": True},
            "tier2_compiled": {**constant, "cache_implementation": "static"},
            "head": {**head, "disable_compile": True},
            "tree": {**tree, "disable_compile": True},
            "tree_head": {**both, "disable_compile": True},
            "tree_head_compiled": {**both, "cache_implementation": "static"},
            "adaptive": {**adaptive, "disable_compile": True},
            "adaptive_compiled": {**adaptive, "cache_implementation": "static"},
        }

    def why_not_served(self, route: Route, batch_size: int) -> str | None:
        """Say why a route cannot run here; `None` when it can."""
        if batch_size > 1 and not route.takes_batches:
            return f"the stock assisted loop takes one text at a time, not {batch_size}"
        if route.name in ("ad", "tier1", "tier1_compiled"):
            sizes = [model.config.get_text_config().vocab_size for model in (self.target, self.draft)]
            if sizes[0] != sizes[1]:
                return f"the stock assisted loop wants equal vocabularies, not {sizes[0]} and {sizes[1]} rows"
        if route.name in COMPILED_BY_HOST:
            return why_not_compiled(self.target, self.target)
        if route.needs_head and self.draft.correction_head is None:
            return "the draft has no correction head"
        if route.name in COMPILED and why_not_compiled(self.target, self.draft):
            return why_not_compiled(self.target, self.draft)
        if route.name.startswith("adaptive") and self.num_drafts not in COUNTS[1:]:
            return f"the adaptive schedule chooses up to a K of {COUNTS[1:]}, not {self.num_drafts}"
        return None

    def compile_failure(self, route: Route) -> str | None:
        """Why our rounds could not be compiled, if so."""
        return workspace_of(self.target, self.arguments[route.name].get("assistant_model", self.draft)).failure

    def generate(self, route: Route, inputs: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any) -> Any:
        """Generate greedily by `route`; `kwargs` go to `generate`."""
        compiling: AbstractContextManager[Any] = nullcontext()
        if route.name in COMPILED_BY_HOST:
            compiling = torch._dynamo.config.patch(recompile_limit=NUM_COMPILED)
        model = with_pard(self.target) if route.in_our_loop else without_pard(self.target)
        try:
            with compiling:
                return model.generate(
                    **inputs,
                    **self.arguments[route.name],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.pad_token_id,
                    **kwargs,
                )
        finally:
            with_pard(self.target)


def compile_anywhere() -> CompileConfig:
    """The host's own compilation, on a CPU too, at its fastest: one graph a shape."""
    config = CompileConfig(fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    return config


class RoundStreamer:
    """Counts the rounds of the stock assisted loop, which hands over one block of tokens a round.

    Args:
        num_drafts (`int`):
            K.
        max_new_tokens (`int`):
            Of the call.
    """

    def __init__(self, num_drafts: int, max_new_tokens: int):
        self.num_drafts, self.budget = num_drafts, max_new_tokens
        self.stats: DecodingStats | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.stats is None:  # The prompt comes first.
            self.stats = DecodingStats()
            return
        num_tokens = value.numel()
        self.stats = self.stats.record(num_tokens - 1, min(self.num_drafts, self.budget - 1))
        self.budget -= num_tokens

    def end(self) -> None:
        """The loop says so; there is nothing to finish."""
