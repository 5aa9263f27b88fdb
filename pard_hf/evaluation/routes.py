"""The ways to generate that a benchmark compares, all on one copy of each model's weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import CompileConfig

from ..generation.compilation import compile_cache_of, default_config, not_compilable_reason
from ..generation.config import DEFAULT_DEPTH, TEXT_SOURCES
from ..generation.memory import AssistantMemory
from ..generation.mixin import without_pard
from ..generation.schedule import COUNTS
from ..generation.stats import DecodingStats
from ..host import pad_token_id, sharing_weights, without_head
from ..loading import Pair

# A sweep compiles one forward for each batch size and cache length: more than torch keeps by default.
NUM_COMPILED = 64
DEFAULT_TREE_SIZE = 64


@dataclass(frozen=True)
class Route:
    """One way to generate: its name in JSON and flags, its title in tables.

    `loop` is `"none"` (plain decoding), `"stock"` (the assisted loop of transformers, one text at a time) or `"own"`.
    `is_pard`: a parallel draft proposes, or our loop runs; in float32 the tokens must be those of plain `generate`.
    `sources` propose beside the draft, or alone where there is none (`is_drafted`); `keeps_memory` from text to text.
    """

    name: str
    title: str
    loop: Literal["none", "stock", "own"] = "own"
    is_pard: bool = True
    is_drafted: bool = True
    is_compiled: bool = False
    uses_head: bool = False
    uses_tree: bool = False
    is_adaptive: bool = False
    sources: tuple[str, ...] = ()
    keeps_memory: bool = False

    @property
    def is_compiled_by_transformers(self) -> bool:
        return self.is_compiled and self.loop != "own"


TREE_AND_HEAD: dict[str, Any] = {"uses_tree": True, "uses_head": True}
ADAPTIVE = {**TREE_AND_HEAD, "is_adaptive": True}
PLAIN: dict[str, Any] = {"loop": "none", "is_pard": False, "is_drafted": False}
LOOKUP: dict[str, Any] = {"is_drafted": False, "uses_tree": True, "sources": TEXT_SOURCES}
EVERY_SOURCE: dict[str, Any] = {**TREE_AND_HEAD, "sources": TEXT_SOURCES}
ROUTES = {
    route.name: route
    for route in (
        Route("ar", "AR", **PLAIN),
        Route("ar_plus", "AR+", **PLAIN, is_compiled=True),
        Route("ad", "AD", "stock", is_pard=False),
        Route("pld", "PLD", "stock", is_pard=False, is_drafted=False),
        Route("tier1", "PARD tier 1", "stock"),
        Route("tier1_compiled", "PARD tier 1, compiled", "stock", is_compiled=True),
        Route("tier2", "PARD tier 2"),
        Route("tier2_compiled", "PARD tier 2, compiled", is_compiled=True),
        Route("head", "PARD + head", uses_head=True),
        Route("tree", "PARD tree", uses_tree=True),
        Route("tree_head", "PARD tree + head", **TREE_AND_HEAD),
        Route("tree_head_compiled", "PARD tree + head, compiled", **TREE_AND_HEAD, is_compiled=True),
        Route("adaptive", "PARD tier 2, adaptive K", **ADAPTIVE),
        Route("adaptive_compiled", "PARD tier 2, adaptive K, compiled", **ADAPTIVE, is_compiled=True),
        Route("copy", "Copy", **{**LOOKUP, "sources": ("copy",)}),
        Route("successors", "Successors", **{**LOOKUP, "sources": ("successors",)}),
        Route("lookup", "Lookup", **LOOKUP),
        Route("lookup_compiled", "Lookup, compiled", **LOOKUP, is_compiled=True),
        Route("lookup_kept", "Lookup, memory kept", **LOOKUP, keeps_memory=True),
        Route("lookup_adaptive", "Lookup, adaptive N", **LOOKUP, is_adaptive=True),
        Route(
            "lookup_adaptive_compiled", "Lookup, adaptive N, compiled", **LOOKUP, is_adaptive=True, is_compiled=True
        ),
        Route("every_source", "Every source", **EVERY_SOURCE),
        Route("every_source_compiled", "Every source, compiled", **EVERY_SOURCE, is_compiled=True),
        Route("every_source_adaptive", "Every source, adaptive N", **EVERY_SOURCE, is_adaptive=True),
    )
}


class RouteRunner:
    """Run any route of one pair; compiled forwards belong to its model objects, so one runner serves every cell.

    Sources beside the draft propose paths of `lookup_num_tokens` at most. `memory` is that of routes that keep one.
    """

    def __init__(
        self,
        pair: Pair,
        num_assistant_tokens: int = 1,
        tree_size: int = DEFAULT_TREE_SIZE,
        lookup_num_tokens: int = DEFAULT_DEPTH,
    ):
        self.target, self.draft = pair.target, pair.draft
        self.num_assistant_tokens, self.tree_size = num_assistant_tokens, tree_size
        self.lookup_num_tokens, self.memory = lookup_num_tokens, AssistantMemory(pair.target)
        self.plain = without_pard(sharing_weights(pair.target, type(pair.target)))
        if pair.draft is not None:
            self.headless = without_head(pair.draft)
            # The stock loop reads K from the settings of its assistant: copies have settings of their own.
            self.token_by_token = sharing_weights(pair.draft, type(pair.draft).__bases__[-1])
            self.parallel = without_head(pair.draft)
        self.pad_token_id = pad_token_id(pair.target.generation_config)

    def unsupported_reason(self, route: Route, batch_size: int) -> str | None:
        """Return why a route cannot run here; `None` when it can."""
        if route.is_drafted and self.draft is None:
            return "it needs a draft"
        if batch_size > 1 and route.loop == "stock":
            return f"the stock assisted loop takes one text at a time, not {batch_size}"
        if route.loop == "stock" and route.is_drafted:
            sizes = [model.config.get_text_config().vocab_size for model in (self.target, self.draft)]
            if sizes[0] != sizes[1]:
                return f"the stock assisted loop needs equal vocabularies, not {sizes[0]} and {sizes[1]} rows"
        if route.uses_head and not (route.is_adaptive or route.sources) and self.draft.correction_head is None:
            return "the draft has no correction head"
        if route.is_adaptive and not route.sources and self.num_assistant_tokens not in COUNTS[1:]:
            return f"the adaptive schedule chooses up to a K of {COUNTS[1:]}, not {self.num_assistant_tokens}"
        if route.is_compiled:
            draft = self.draft_of(route) or self.target
            return not_compilable_reason(self.target, draft, of_rounds=route.loop == "own")
        return None

    def draft_of(self, route: Route) -> Any:
        """Return what drafts in our loop: with the correction head, without it, or nothing."""
        if route.loop != "own" or not route.is_drafted:
            return None
        return self.draft if route.uses_head else self.headless

    def arguments(self, route: Route) -> dict[str, Any]:
        if route.loop == "own":
            at_once: dict[str, Any] = {"compile_config": default_config(self.target)}
            sources = {"assistant_sources": route.sources, "prompt_lookup_num_tokens": self.lookup_num_tokens}
            return {
                "assistant_model": self.draft_of(route),
                "assistant_tree_size": self.tree_size if route.uses_tree else 0,
                "num_assistant_tokens": self.num_assistant_tokens if route.is_drafted else None,
                "num_assistant_tokens_schedule": "adaptive" if route.is_adaptive else "constant",
                **(sources if route.sources else {}),
                **({"assistant_memory": self.memory} if route.keeps_memory else {}),
                **(at_once if route.is_compiled else {"disable_compile": True}),
            }
        if route.name == "pld":
            return {"prompt_lookup_num_tokens": self.num_assistant_tokens}
        static = {"cache_implementation": "static", "compile_config": compile_anywhere()}
        compiled = static if route.is_compiled else {}
        if route.loop == "none":
            return compiled
        assistant = self.token_by_token if route.name == "ad" else self.parallel
        assistant.generation_config.num_assistant_tokens = self.num_assistant_tokens
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        return {"assistant_model": assistant, **compiled}

    def generate(self, route: Route, inputs: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any) -> Any:
        """Generate greedily by `route`; `kwargs` go to `generate`."""
        model = self.target if route.loop == "own" else self.plain
        kwargs |= {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.pad_token_id}
        limit = torch._dynamo.config.patch(recompile_limit=NUM_COMPILED)
        with limit if route.is_compiled_by_transformers else nullcontext():
            return model.generate(**inputs, **self.arguments(route), **kwargs)

    def compile_failure(self, route: Route) -> str | None:
        """Return why our rounds ran eagerly though `route` compiles them."""
        return compile_cache_of(self.target, self.draft_of(route) or self.target).failure


def compile_anywhere() -> CompileConfig:
    """Compile in transformers at its fastest, one graph a shape, and on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    return config


class RoundStreamer:
    """Count the rounds of the stock assisted loop, which streams one block of tokens a round."""

    def __init__(self, num_assistant_tokens: int, max_new_tokens: int):
        self.num_assistant_tokens, self.budget = num_assistant_tokens, max_new_tokens
        self.stats: DecodingStats | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.stats is None:  # The prompt comes first.
            self.stats = DecodingStats()
            return
        self.stats = self.stats.record(value.numel() - 1, min(self.num_assistant_tokens, self.budget - 1))
        self.budget -= value.numel()

    def end(self) -> None: ...
