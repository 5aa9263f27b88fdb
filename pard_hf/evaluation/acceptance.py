"""Measure the acceptance length of a draft on prompt sets, with the real decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..generation.mixin import with_pard
from ..generation.stats import DecodingStats
from ..host import end_token_ids, input_device, pad_token_id, sharing_weights, without_head
from ..tokens import encode_prompt
from .metrics import repeated_share
from .prompts import choose_rows, load_prompt_sets, make_batches


@dataclass
class AcceptanceEvaluator:
    """Measure acceptance of a draft against one target, greedily, on the token ids of named prompt sets.

    K and N (`tree_size`; 0 is a chain) default to the draft's own; `uses_head=False` leaves its correction head out.
    After a call, `texts` has the answers of each set, in the order of the prompts.
    """

    target: Any
    prompts: Mapping[str, Sequence[list[int]]]
    num_assistant_tokens: int | None = None
    max_new_tokens: int = 100
    batch_size: int = 16
    tree_size: int | None = None
    uses_head: bool = True
    texts: dict[str, list[list[int]]] = field(default_factory=dict, init=False)

    def __call__(self, draft: Any, part: tuple[int, int] = (0, 1)) -> dict[str, DecodingStats]:
        """Return statistics of each set; with `part` `(i, n)`, over every n-th prompt from the i-th."""
        target = with_pard(sharing_weights(self.target, type(self.target)))
        was_training = draft.training
        draft.eval()
        try:
            return {
                name: self.measure(target, draft, name, prompts[part[0] :: part[1]])
                for name, prompts in self.prompts.items()
            }
        finally:
            draft.train(was_training)

    @torch.no_grad()
    def measure(self, target: Any, draft: Any, name: str, prompts: Sequence[list[int]]) -> DecodingStats:
        config, stats, texts = target.generation_config, DecodingStats(), dict[int, list[int]]()
        draft = draft if self.uses_head else without_head(draft)
        kwargs = {} if self.num_assistant_tokens is None else {"num_assistant_tokens": self.num_assistant_tokens}
        for batch in make_batches(prompts, self.batch_size, pad_token_id(config), input_device(target)):
            output = target.generate(
                **batch.inputs,
                assistant_model=draft,
                assistant_tree_size=self.tree_size,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                return_dict_in_generate=True,
                disable_compile=True,  # Weights change between two measurements; compiling would outlast this one.
                **kwargs,
            )
            stats += output.stats
            texts |= batch.new_texts(output.sequences, end_token_ids(config))
        self.texts[name] = [texts[index] for index in range(len(prompts))]
        return stats

    def repeated_4gram_share(self, name: str) -> float:
        return repeated_share(self.texts[name])


def prepare_evaluator(settings: Any, tokenizer: Any, longest: int) -> Callable[[Any], AcceptanceEvaluator]:
    """Read and encode the prompts of `pard train` before weights are loaded; return the evaluator of a target.

    Raises:
        ValueError: Two sets have one name, a prompt is empty, or prompt and answer exceed `longest` positions.
    """
    prompts = dict[str, list[list[int]]]()
    for name, rows in load_prompt_sets(settings.eval_prompts).items():
        texts = [rows[index]["prompt"] for index in choose_rows(rows, settings.eval_limit, settings.seed)]
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"Expected prompts with words to evaluate on in {name!r}, got an empty one.")
        prompts[name] = [encode_prompt(tokenizer, text) for text in texts]
    most = max(len(ids) for rows in prompts.values() for ids in rows)
    if most + settings.eval_max_new_tokens > longest:
        raise ValueError(
            f"Expected evaluation prompts and answers within the {longest} positions of both models, got a prompt of "
            f"{most} tokens and `--eval-max-new-tokens {settings.eval_max_new_tokens}`. Shorten either."
        )
    return partial(
        AcceptanceEvaluator,
        prompts=prompts,
        num_assistant_tokens=settings.num_assistant_tokens or settings.num_draft_tokens,
        max_new_tokens=settings.eval_max_new_tokens,
        batch_size=settings.eval_batch_size,
    )
