"""Token ids between text and a model: chat templates, left padding, end tokens, text as tokens arrive."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], raw: bool = False) -> list[int]:
    """Encode a prompt, or a conversation up to its next answer.

    Args:
        prompt (`str` or `list[dict[str, str]]`):
            The text of a user, or messages with `role` and `content`. Without a chat template, the contents follow the
            start token, with an end token after each answer.
        raw (`bool`, *optional*, defaults to `False`):
            Encode a text without the chat template.
    """
    if isinstance(prompt, str):
        if raw or tokenizer.chat_template is None:
            return tokenizer(prompt)["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
    ids = tokenizer("")["input_ids"]
    for message in prompt:
        ids = ids + tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        if message["role"] == "assistant" and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
    return ids


def next_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], past: list[int], answer: list[int]
) -> list[int]:
    """Encode a conversation up to its next answer, keeping the ids of the last one: text encoded again may differ.

    `past` are the ids before the last answer, `answer` its ids with an end token if it has one, or empty before the
    first. Return ids that begin with `past + answer`, or the template's where it rewrites earlier turns.
    """
    prompt = encode_prompt(tokenizer, messages)
    if not answer:
        return prompt
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    before = encode_prompt(tokenizer, messages[:last])
    rest, ends = prompt[len(before) :], turn_end_ids(tokenizer)
    if prompt[: len(before)] != before:
        return prompt
    if rest[: len(answer)] == answer:
        return past + rest
    # Compare texts up to the token that ends the turn: the answer's own ids may split words elsewhere.
    stop = next((index for index, token in enumerate(rest) if token in ends), 0)
    is_ended = answer[-1] in ends
    content = answer[:-1] if is_ended else answer
    if tokenizer.decode(rest[:stop], skip_special_tokens=True) != tokenizer.decode(content, skip_special_tokens=True):
        return prompt  # The template trimmed the answer, or dropped its thinking.
    return past + answer + rest[stop + is_ended :]


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that may end a turn: the end token and, as templates may write another, special tokens."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special if tokenizer.eos_token_id is None else special | {tokenizer.eos_token_id}


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """Pad token ids on the left; return `input_ids` and `attention_mask`, each `[B, longest]`."""
    width, pad = max(map(len, rows)), pad_token_id or 0
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def until_end(ids: list[int], end_token_ids: Collection[int]) -> list[int]:
    """Cut ids after their first end token."""
    return next((ids[: index + 1] for index, token in enumerate(ids) if token in end_token_ids), ids)


class IncrementalDetokenizer:
    """Decode tokens as they arrive, into pieces whose concatenation is the text of all.

    A character whose bytes are in several tokens is held back until all have arrived.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that more tokens complete."""
        self.ids += ids
        text = self.decoded()
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if text.endswith("\n"):  # Decode no more than a line again; the break keeps the space of the next token.
            self.ids = self.ids[-1:]
            self.shown = self.decoded()
        return new

    def rest(self) -> str:
        """Return the held-back text, which ends inside a character."""
        return self.decoded()[len(self.shown) :]

    def decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)
