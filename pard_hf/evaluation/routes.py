"""The ways to generate that a benchmark compares, all on one copy of each model's weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import CompileConfig

from ..generation.compilation import compile_cache_of, not_compilable_reason
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
    `is_pard`: a parallel draft proposes, and in float32 the tokens must be those of plain `generate`.
    """

    name: str
    title: str
    loop: Literal["none", "stock", "own"] = "own"
    is_pard: bool = True
    is_compiled: bool = False
    uses_head: bool = False
    uses_tree: bool = False
    is_adaptive: bool = False

    @property
    def is_compiled_by_transformers(self) -> bool:
        return self.is_compiled and self.loop != "own"


TREE_AND_HEAD: dict[str, Any] = {"uses_tree": True, "uses_head": True}
ADAPTIVE = {**TREE_AND_HEAD, "is_adaptive": True}
ROUTES = {
    route.name: route
    for route in (
        Route("ar", "AR", "none", is_pard=False),
        Route("ar_plus", "AR+", "none", is_pard=False, is_compiled=True),
        Route("ad", "AD", "stock", is_pard=False),
        Route("pld", "PLD", "stock", is_pard=False),
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
    )
}


class RouteRunner:
    """Run any route of one pair; compiled forwards belong to its model objects, so one runner serves every cell."""

    def __init__(self, pair: Pair, num_assistant_tokens: int = 1, tree_size: int = DEFAULT_TREE_SIZE):
        self.target, self.draft = pair.target, pair.draft
        self.num_assistant_tokens, self.tree_size = num_assistant_tokens, tree_size
        self.plain = without_pard(sharing_weights(pair.target, type(pair.target)))
        self.headless = without_head(pair.draft)
        # The stock loop reads K from the settings of its assistant: copies have settings of their own.
        self.token_by_token = sharing_weights(pair.draft, type(pair.draft).__bases__[-1])
        self.parallel = without_head(pair.draft)
        self.pad_token_id = pad_token_id(pair.target.generation_config)

    def unsupported_reason(self, route: Route, batch_size: int) -> str | None:
        """Return why a route cannot run here; `None` when it can."""
        if batch_size > 1 and route.loop == "stock":
            return f"the stock assisted loop takes one text at a time, not {batch_size}"
        if route.loop == "stock" and route.name != "pld":
            sizes = [model.config.get_text_config().vocab_size for model in (self.target, self.draft)]
            if sizes[0] != sizes[1]:
                return f"the stock assisted loop needs equal vocabularies, not {sizes[0]} and {sizes[1]} rows"
        if route.uses_head and not route.is_adaptive and self.draft.correction_head is None:
            return "the draft has no correction head"
        if route.is_adaptive and self.num_assistant_tokens not in COUNTS[1:]:
            return f"the adaptive schedule chooses up to a K of {COUNTS[1:]}, not {self.num_assistant_tokens}"
        if route.is_compiled:
            return not_compilable_reason(self.target, self.draft if route.loop == "own" else self.target)
        return None

    def arguments(self, route: Route) -> dict[str, Any]:
        if route.loop == "own":
            return {
                "assistant_model": self.draft if route.uses_head else self.headless,
                "assistant_tree_size": self.tree_size if route.uses_tree else 0,
                "num_assistant_tokens": self.num_assistant_tokens,
                "num_assistant_tokens_schedule": "adaptive" if route.is_adaptive else "constant",
                **({"cache_implementation": "static"} if route.is_compiled else {"disable_compile": True}),
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
        return compile_cache_of(self.target, self.draft if route.uses_head else self.headless).failure


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
