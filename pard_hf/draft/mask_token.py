"""Choose the mask token: a vocabulary id that no text contains."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

# Mask tokens of published drafts, https://huggingface.co/amd. In another family each may be a word, so it is checked.
KNOWN_IDS = {128020: "Llama-3", 151665: "Qwen2.5", 151670: "Qwen3"}
# Conversations that show what a chat template writes.
MESSAGES = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
RESERVED = re.compile(r"reserved|unused|extra", re.IGNORECASE)


def choose_mask_token(tokenizer: Any, vocab_size: int, named_ids: Collection[int] = ()) -> tuple[int, str]:
    """Choose an id that no text contains.

    Candidates in order: ids of published drafts, the first padding row of the vocabulary, a reserved special token,
    the last special token that has no role and is not written by the chat template.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The base model's.
        vocab_size (`int`):
            Rows of the base model's embedding.
        named_ids (`Collection[int]`, *optional*):
            Ids that have a role in the model's configs, from [`ids_named_in`].

    Returns:
        The id, and the reason for the choice.

    Raises:
        ValueError: Every id is in use.
    """
    written = ids_written(tokenizer)
    for known, family in KNOWN_IDS.items():
        if known < vocab_size and use_of(tokenizer, known, named_ids, written) is None:
            return known, f"the mask token of published {family} drafts, which this tokenizer never produces"
    free = max(tokenizer.get_vocab().values(), default=-1) + 1
    if free < vocab_size:
        return free, f"the first of {vocab_size - free} rows that only pad the vocabulary"
    special = {
        index: token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if index < vocab_size and use_of(tokenizer, index, named_ids, written) is None
    }
    reserved = [index for index, token in special.items() if RESERVED.search(token)]
    if reserved:
        return reserved[0], f"the reserved special token {special[reserved[0]]!r}"
    if special:
        last = max(special)
        return last, f"the special token {special[last]!r}, which has no role and which the chat template never writes"
    raise ValueError(
        f"Expected an id below {vocab_size} that no text contains, got none: all {vocab_size} are used. Take a base "
        "with padding rows, or make a token that your texts never contain special in its tokenizer "
        "(`tokenizer.add_special_tokens({'additional_special_tokens': ['…']})`). Else enlarge the base "
        "(`model.resize_token_embeddings(vocab_size + 64)`), but then vLLM and assisted generation on an untouched "
        "target refuse its larger vocabulary."
    )


def check_mask_token(tokenizer: Any, mask_token_id: int, named_ids: Collection[int] = ()) -> None:
    """Raise a `ValueError` for an id that text or the chat template may contain, or that has a role."""
    use = use_of(tokenizer, mask_token_id, named_ids, ids_written(tokenizer))
    if use is not None:
        raise ValueError(
            f"Expected a mask token the tokenizer never produces, got {mask_token_id}, which is {use}. Take a special "
            f"token that no text contains, an id from {len(tokenizer)} on in a larger vocabulary, or `auto`."
        )


def use_of(tokenizer: Any, token_id: int, named_ids: Collection[int], written: Collection[int]) -> str | None:
    """Describe the use of an id; `None` for padding rows and special tokens without a role."""
    token = next((token for token, index in tokenizer.get_vocab().items() if index == token_id), None)
    if token is None:
        return None
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return f"{token!r}"
    for role, special in tokenizer.special_tokens_map.items():
        if special == added.content and role != "mask_token":
            return f"{token!r}, the tokenizer's {role}"
    if token_id in named_ids:
        return f"{token!r}, which the model's config names"
    if added.content in str(tokenizer.chat_template or "") or token_id in written:
        return f"{token!r}, which the chat template writes"
    return None


def ids_written(tokenizer: Any) -> set[int]:
    """Collect the ids that a tokenizer adds to any text and that its chat template writes."""
    written = set(tokenizer("")["input_ids"])
    for messages in (MESSAGES, MESSAGES[1:]) if tokenizer.chat_template is not None else ():
        try:
            written.update(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception:  # Templates raise errors of any class for roles that they refuse.
            continue
    return written


def ids_named_in(*configs: Any) -> set[int]:
    """Collect the ids under every `…_token_id` of some configs, except the mask token's."""
    named = [
        value
        for config in configs
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and name != "mask_token_id"
    ]
    return {index for value in named for index in (value if isinstance(value, list) else [value]) if index is not None}
