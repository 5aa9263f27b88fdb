"""Which vocabulary entry becomes the mask token: one that no text contains."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

# Ids of published drafts, https://huggingface.co/amd: Llama-3, Qwen2.5 and its distillations, Qwen3. The last two lie
# in rows that only pad the vocabulary, and the first is a reserved special token; in another family any of them may be
# a word, so each is checked.
KNOWN_IDS = {128020: "Llama-3", 151665: "Qwen2.5", 151670: "Qwen3"}
# Conversations that show what a chat template writes.
TURNS = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
RESERVED = re.compile(r"reserved|unused|extra", re.IGNORECASE)


def choose_mask_token(tokenizer: Any, vocab_size: int, named_ids: Collection[int] = ()) -> tuple[int, str]:
    """Choose an id that no text contains.

    First the ids of published drafts, then the first row that only pads the vocabulary, then a reserved special token,
    then the last special token that has no role and that the chat template does not write.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The base model's.
        vocab_size (`int`):
            Rows of the base model's embedding.
        named_ids (`Collection[int]`, *optional*):
            Ids that have a role in the model, as [`ids_named_in`] its configs finds them.

    Returns:
        The id, and in words why it was chosen.

    Raises:
        ValueError: Every id is taken; the message says what to do.
    """
    written = ids_written(tokenizer)
    for known, family in KNOWN_IDS.items():
        if known < vocab_size and why_not_mask(tokenizer, known, named_ids, written) is None:
            return known, f"the mask token of published {family} drafts, which this tokenizer never produces"
    free = max(tokenizer.get_vocab().values(), default=-1) + 1
    if free < vocab_size:
        return free, f"the first of {vocab_size - free} rows that only pad the vocabulary"
    special = {
        index: token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if index < vocab_size and why_not_mask(tokenizer, index, named_ids, written) is None
    }
    reserved = [index for index, token in special.items() if RESERVED.search(token)]
    if reserved:
        return reserved[0], f"the reserved special token {special[reserved[0]]!r}"
    if special:
        last = max(special)
        return last, f"the special token {special[last]!r}, which has no role and which the chat template never writes"
    raise ValueError(
        f"Expected an id below {vocab_size} that no text contains, got none: all {vocab_size} are used. Take a base "
        "whose vocabulary has rows to spare, or make a token that your texts never contain special in the base's "
        "tokenizer (`tokenizer.add_special_tokens({'additional_special_tokens': ['…']})`). Enlarging the base "
        "(`model.resize_token_embeddings(vocab_size + 64)`) comes last: vLLM and assisted generation on an untouched "
        "target refuse a vocabulary larger than the target's."
    )


def check_mask_token(tokenizer: Any, mask_token_id: int, named_ids: Collection[int] = ()) -> None:
    """Raise a `ValueError` for an id that text or the chat template may contain.

    A special token may be the mask where it has no role, in the tokenizer or among `named_ids`, and the chat template
    does not write it.
    """
    problem = why_not_mask(tokenizer, mask_token_id, named_ids, ids_written(tokenizer))
    if problem is not None:
        raise ValueError(
            f"Expected a mask token the tokenizer never produces, got {mask_token_id}, which is {problem}. Take a "
            f"special token that no text contains, or an id from {len(tokenizer)} on where the model's vocabulary is "
            "larger; `auto` looks for one."
        )


def why_not_mask(
    tokenizer: Any, mask_token_id: int, named_ids: Collection[int], written: Collection[int]
) -> str | None:
    """Say what an id is used for; `None` where it is free."""
    token = next((token for token, index in tokenizer.get_vocab().items() if index == mask_token_id), None)
    if token is None:
        return None
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    if added is None or not added.special:
        return f"{token!r}"
    role = next((role for role, named in roles(tokenizer) if named == added.content), None)
    if role is not None:
        return f"{token!r}, the tokenizer's {role}"
    if mask_token_id in named_ids:
        return f"{token!r}, which the model's config names"
    if added.content in str(tokenizer.chat_template or "") or mask_token_id in written:
        return f"{token!r}, which the chat template writes"
    return None


def roles(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """The special tokens that a tokenizer has a use for: what begins, ends and pads texts, what stands for images."""
    for role, token in tokenizer.special_tokens_map.items():
        if role != "mask_token" and isinstance(token, str):
            yield role, token


def ids_written(tokenizer: Any) -> set[int]:
    """Ids that a tokenizer puts around any text, and those its chat template writes, be it put together from names."""
    written = set(tokenizer("")["input_ids"])
    for turns in (TURNS, TURNS[1:]) if tokenizer.chat_template is not None else ():
        try:
            written.update(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        except Exception:  # Templates raise what they like at turns they do not know; rows are looked through as well.
            continue
    return written


def ids_named_in(*configs: Any) -> set[int]:
    """Ids that configs have a use for: every `…_token_id`, one or several, but for a mask's."""
    named = [
        value
        for config in configs
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and name != "mask_token_id"
    ]
    return {index for value in named for index in (value if isinstance(value, list) else [value]) if index is not None}
