"""Count what other proposals would have been accepted, on recorded answers of a target.

A target's greedy answer is the same whatever drafts for it, so no target runs again: a round proposes K tokens after
the text so far, and keeps those that come next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pard_hf.generation.stats import DecodingStats
from pard_hf.tokens import pad_left

# From texts so far, as a left-padded batch `input_ids` and `attention_mask` `[B, columns]`, to `[B, K]` proposals.
Propose = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@torch.no_grad()
def replay(
    propose: Propose, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch_size: int = 16
) -> DecodingStats:
    """Count the rounds that greedy answers (token ids, one for each prompt) would have taken."""
    emitted = [0] * len(answers)
    stats = DecodingStats()
    while open_texts := [index for index, answer in enumerate(answers) if emitted[index] < len(answer)][:batch_size]:
        texts = [prompts[index] + answers[index][: emitted[index]] for index in open_texts]
        proposed = propose(pad_left(texts, 0))
        stats += DecodingStats((0,) * (proposed.shape[1] + 1))
        for index, proposals in zip(open_texts, proposed.tolist(), strict=True):
            rest = answers[index][emitted[index] :]
            most = min(len(proposals), len(rest) - 1)  # The last token of an answer is a bonus token.
            n = next((i for i in range(most) if proposals[i] != rest[i]), most)
            stats = stats.record(n, most)
            emitted[index] += n + 1
    return stats


def autoregressive(model: Any, num_assistant_tokens: int) -> Propose:
    """Propose as an ordinary small model does: greedily, one forward a token."""

    def propose(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sequences = model.generate(
            **{name: tensor.to(model.device) for name, tensor in batch.items()},
            do_sample=False,
            max_new_tokens=num_assistant_tokens,
            min_new_tokens=num_assistant_tokens,
        )
        return sequences[:, batch["input_ids"].shape[1] :]

    return propose


def next_token_accuracy(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch_size: int = 16
) -> tuple[float, float]:
    """Return the shares of prompt tokens, the first of each left out, and of answer tokens that a model predicts.

    It reads all the tokens before each; prompts and answers are token ids.
    """
    right, total = [0, 0], [0, 0]
    for start in range(0, len(prompts), batch_size):
        parts = list(zip(prompts[start : start + batch_size], answers[start : start + batch_size], strict=True))
        ids, mask = (t.to(model.device) for t in pad_left([prompt + answer for prompt, answer in parts], 0).values())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            guesses = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].argmax(-1)
        is_right = (guesses == ids[:, 1:]).tolist()
        for row, (prompt, answer) in zip(is_right, parts, strict=True):
            for part, guessed in enumerate((row[len(row) + 1 - len(prompt) - len(answer) : -len(answer) or None],
                                            row[len(row) - len(answer) :])):  # fmt: skip
                right[part] += sum(guessed)
                total[part] += len(guessed)
    of_prompts, of_answers = (r / t if t else 0.0 for r, t in zip(right, total, strict=True))
    return of_prompts, of_answers
