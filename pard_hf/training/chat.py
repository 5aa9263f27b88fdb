"""Conversations as token ids, by a tokenizer's chat template: up to an answer, and the answer itself."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

# How a chat template says where answers are, https://huggingface.co/docs/transformers/chat_templating_writing.
ANSWER_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks answers."""
    return ANSWER_MARK.search(str(tokenizer.chat_template)) is not None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to the point where an answer begins.

    By the tokenizer's chat template, or, without one, the contents in order behind the tokenizer's own start token,
    with an end token after each answer.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("")["input_ids"]
        for message in messages:
            ids = ids + tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            if message["role"] == "assistant" and tokenizer.eos_token_id is not None:
                ids = [*ids, tokenizer.eos_token_id]
        return ids
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def ending_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may end a turn: the end token, and special tokens, for some templates write another one."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special if tokenizer.eos_token_id is None else special | {tokenizer.eos_token_id}


def written_answer(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Ids of the last of some messages, an answer, as the template writes it after the prompt, with what ends it."""
    content = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return content + end
    before = encode_prompt(tokenizer, messages[:-1])
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(before)] != before:
        return content + end
    answer, ends = whole[len(before) :], ending_ids(tokenizer)
    last = max((place for place, token in enumerate(answer) if token in ends), default=None)
    # What comes after the end of a turn, a line break say, belongs to the next.
    return answer + end if last is None else answer[: last + 1]


def next_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, past: list[int], answer: list[int]
) -> list[int]:
    """Token ids of a conversation up to where its next answer begins, the ids of the last answer kept as they are.

    Args:
        messages (`list[dict[str, str]]`):
            The conversation, the last answer and what was asked after it included.
        past (`list[int]`):
            Everything before the last answer, the ids of earlier answers as they are.
        answer (`list[int]`):
            The last answer, with its end token where it has one; empty where there was none yet.

    Returns:
        Ids that begin with `past + answer`; or, where the template rewrites earlier turns, ids that do not.
    """
    prompt = encode_prompt(tokenizer, messages)
    if not answer:
        return prompt
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    before = encode_prompt(tokenizer, messages[:last])
    rest, ends = prompt[len(before) :], ending_ids(tokenizer)
    if prompt[: len(before)] != before:
        return prompt
    if rest[: len(answer)] == answer:
        return past + rest
    # Text that is encoded again may cut words elsewhere: the same text stands before the token that ends the turn.
    stop = next((place for place, token in enumerate(rest) if token in ends), 0)
    is_ended = answer[-1] in ends
    spoken = answer[:-1] if is_ended else answer
    written, said = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (rest[:stop], spoken))
    if written != said:
        return prompt  # Trimmed, or its thinking dropped: what the target is asked with is what the template says.
    return past + answer + rest[stop + is_ended :]


def encode_marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Token ids and loss mask of a conversation, by a chat template that marks answers with `{% generation %}`."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, loss_mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    for place in range(1, len(ids)):
        # Many a template marks the words alone, and the end token after them is what stops a text.
        if ids[place] == tokenizer.eos_token_id and loss_mask[place - 1]:
            loss_mask[place] = 1
    return {"input_ids": ids, "loss_mask": loss_mask}
