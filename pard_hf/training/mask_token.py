"""Which vocabulary entry becomes the mask token: one that no text contains."""

from __future__ import annotations

import re
from typing import Any

# Ids of published drafts, https://huggingface.co/amd: Llama-3, Qwen2.5 and its distillations, Qwen3. The last two lie
# in rows that only pad the vocabulary, and the first is a reserved special token; in another family any of them may be
# a word, so each is checked.
KNOWN_IDS = {128020: "Llama-3", 151665: "Qwen2.5", 151670: "Qwen3"}
RESERVED = re.compile(r"reserved|unused|extra", re.IGNORECASE)


def choose_mask_token(tokenizer: Any, vocab_size: int) -> tuple[int, str]:
    """Choose an id that the tokenizer never produces.

    First the ids of published drafts, then the first row that only pads the vocabulary, then a reserved special token.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The base model's.
        vocab_size (`int`):
            Rows of the base model's embedding.

    Returns:
        The id, and in words why it was chosen.

    Raises:
        ValueError: Every id is taken; the message says what to do.
    """
    for known, family in KNOWN_IDS.items():
        if known < vocab_size and why_not_mask(tokenizer, known) is None:
            return known, f"the mask token of published {family} drafts, which this tokenizer never produces"
    free = max(tokenizer.get_vocab().values(), default=-1) + 1
    if free < vocab_size:
        return free, f"the first of {vocab_size - free} rows that only pad the vocabulary"
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index < vocab_size and RESERVED.search(token.content) and why_not_mask(tokenizer, index) is None:
            return index, f"the reserved special token {token.content!r}"
    raise ValueError(
        f"Expected an id below {vocab_size} that the tokenizer never produces, got none: all {vocab_size} are used. "
        "Enlarge the base model (`model.resize_token_embeddings(vocab_size + 64)`), or name an id you know to be "
        "unused with `--mask-token-id`."
    )


def check_mask_token(tokenizer: Any, mask_token_id: int) -> None:
    """Raise a `ValueError` for an id that text or the chat template may contain; tokens named as reserved are fine."""
    problem = why_not_mask(tokenizer, mask_token_id)
    if problem is not None:
        raise ValueError(
            f"Expected a mask token the tokenizer never produces, got {mask_token_id}, which is {problem}. Take a "
            f"reserved special token, or an id from {len(tokenizer)} on where the model's vocabulary is larger; "
            "`auto` looks for one."
        )


def why_not_mask(tokenizer: Any, mask_token_id: int) -> str | None:
    """Say what an id is used for; `None` where it is free."""
    token = next((token for token, index in tokenizer.get_vocab().items() if index == mask_token_id), None)
    if token is None:
        return None
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    if added is None or not added.special:
        return f"{token!r}"
    if not RESERVED.search(token):
        return f"the special token {token!r}"  # Named for a use, whoever writes it.
    if added.content in str(tokenizer.chat_template or ""):
        return f"{token!r}, which the chat template writes"
    return None
