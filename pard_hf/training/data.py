"""Conversations as token ids, by a tokenizer's chat template: up to an answer, and the answer itself.

Text in, token rows with loss masks out.

A row is one JSON object: `{"text": …}`, `{"prompt": …, "response": …}` or `{"messages": [{"role", "content"}, …]}`.
Loss falls on text, on responses and on assistant turns, and on the end token that closes them.

Rows of prompts as conversations to be answered: what is asked, turn by turn, without anybody's answers.

Knows rows and their words; knows nothing of tokens, models and files of answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..io import numbered_lines, parse_line, why_no_text
from ..tokens import encode_prompt, next_prompt, turn_end_ids

logger = logging.getLogger(__name__)


Messages = list[dict[str, str]]

# How a chat template says where answers are, https://huggingface.co/docs/transformers/chat_templating_writing.
ANSWER_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks answers."""
    return ANSWER_MARK.search(str(tokenizer.chat_template)) is not None


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
    answer, ends = whole[len(before) :], turn_end_ids(tokenizer)
    last = max((place for place, token in enumerate(answer) if token in ends), default=None)
    # What comes after the end of a turn, a line break say, belongs to the next.
    return answer + end if last is None else answer[: last + 1]


def encode_marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Token ids and loss mask of a conversation, by a chat template that marks answers with `{% generation %}`."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, loss_mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    for place in range(1, len(ids)):
        # Many a template marks the words alone, and the end token after them is what stops a text.
        if ids[place] == tokenizer.eos_token_id and loss_mask[place - 1]:
            loss_mask[place] = 1
    return {"input_ids": ids, "loss_mask": loss_mask}


class Row(dict[str, Any]):
    """A row that knows the file and line it came from."""

    place: str


def place_of(row: dict[str, Any], number: int) -> str:
    """Where a row came from, or which of all it is."""
    return row.place if isinstance(row, Row) else f"row {number}"


class RowKind(NamedTuple):
    """What rows of a file are for: the fields they may have, in words, and what is wrong with one that has others."""

    fields: str
    problem_of: Callable[[Any], str | None]


def what_is_wrong(row: Any) -> str | None:
    """Say what keeps a parsed line from being a training row; `None` when nothing does."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}"
    if isinstance(row.get("text"), str):
        num_answers = 1
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        num_answers = 1
    elif are_messages(row.get("messages")):
        num_answers = sum(message["role"] == "assistant" for message in row["messages"])
    elif row.get("messages") is not None:
        return "its `messages` are no list of objects with the texts `role` and `content`"
    else:
        return f"it has {sorted(row)}"
    if "response_ids" not in row:
        return None
    answers = answer_ids(row)
    if not isinstance(answers, list) or not all(are_token_ids(answer) for answer in answers):
        return "its `response_ids` are no list of token ids, nor one list for each answer"
    if len(answers) != num_answers:
        return f"its `response_ids` are of {len(answers)} answers, and it has {num_answers}"
    return None


def are_messages(messages: Any) -> bool:
    """Say whether a parsed value is a list of messages, each with the text of a role."""
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def are_token_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)


def answer_ids(row: dict[str, Any]) -> Any:
    """The token ids of each answer of a row that has them: one list of ids stands for one answer."""
    ids = row["response_ids"]
    return [ids] if are_token_ids(ids) else ids


TRAINING = RowKind("`text`, `prompt` and `response`, or `messages`", what_is_wrong)


def read_rows(
    path: str | Path, skip_bad_rows: bool = False, kind: RowKind = TRAINING, skipped: list[int] | None = None
) -> Iterator[Row]:
    """Read the rows of a `.jsonl` or `.jsonl.gz` file.

    Args:
        path (`str` or `Path`):
            The file.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Log broken lines and leave them out.
        kind (`RowKind`, *optional*, defaults to training rows):
            What the rows are for.
        skipped (`list[int]`, *optional*):
            Is given the numbers of the lines left out.

    Raises:
        ValueError: A line is no JSON object with one of the known shapes; the message names the line.
    """
    return check_rows(numbered_lines(Path(path)), f"line {{}} of `{path}`", kind, skip_bad_rows, skipped)


def check_rows(
    numbered: Iterable[tuple[int, Any]], place: str, kind: RowKind, skip_bad_rows: bool, skipped: list[int] | None
) -> Iterator[Row]:
    """The rows among numbered lines, or numbered objects, that are of one kind; errors as for [`read_rows`]."""
    for number, value in numbered:
        row, problem = parse_line(value) if isinstance(value, bytes) else (value, why_no_text(value))
        problem = problem or kind.problem_of(row)
        if problem is None:
            row = Row(row)
            row.place = place.format(number)
            yield row
        elif skip_bad_rows:
            logger.warning("%s skipped: %s", place.format(number), problem)
            if skipped is not None:
                skipped.append(number)
        else:
            raise ValueError(
                f"Expected a JSON object with {kind.fields} in {place.format(number)}, but {problem}. Mend it, or "
                "pass `--skip-bad-rows` to go on without it."
            )


def messages_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The conversation a row stands for; `None` for plain text."""
    if isinstance(row.get("text"), str):
        return None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    return row["messages"]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids and loss mask of one row; every assistant turn ends in the end token, which is learned.

    A row of `write_answers` carries the target's own `response_ids`, one list for each answer (or one list of ids for
    the only answer); they are taken as they are, for decoding and encoding again may cut words elsewhere, and an
    answer that was cut short teaches no end.
    """
    messages = messages_of(row)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if messages is None:
        text = tokenizer(row["text"])["input_ids"] + end
        return {"input_ids": text, "loss_mask": [1] * len(text)}
    if has_marks(tokenizer) and not row.get("response_ids"):
        return encode_marked(tokenizer, messages)
    given_answers = iter(answer_ids(row) if row.get("response_ids") else list[list[int]]())
    past, answer = list[int](), list[int]()
    loss_mask: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        said = past + answer
        past = next_prompt(tokenizer, messages[:turn], past, answer)
        answer = next(given_answers, []) or written_answer(tokenizer, messages[: turn + 1])
        # A template that rewrites earlier turns (drops their thinking, say) leaves nothing of them to learn.
        kept = loss_mask if past[: len(said)] == said else []
        loss_mask = kept + [0] * (len(past) - len(kept)) + [1] * len(answer)
    return {"input_ids": past + answer, "loss_mask": loss_mask}


def why_not_encoded(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str | None:
    """Say why a row cannot become tokens, and what to do; `None` when it can."""
    problem = None if isinstance(row, Row) else why_no_text(row)
    if problem is not None:
        return f"{problem}. Mend the row, or pass `--skip-bad-rows` to go on without it."
    if tokenizer.chat_template is None and messages_of(row) is row.get("messages") is not None:
        return (
            "it has `messages`, and the tokenizer has no chat template that would write who says what. Give one with "
            "`--chat-template`, name a `--target` that has one, or write rows with `prompt` and `response`."
        )
    return None


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    max_length: int,
    skip_bad_rows: bool = False,
    overlong: str = "truncate",
    mask_token_id: int | None = None,
) -> list[dict[str, Any]]:
    """Encode rows for training; each example says in `place` which row it is.

    Args:
        max_length (`int`):
            Tokens of the longest example.
        overlong (`str`, *optional*, defaults to `"truncate"`):
            What happens to longer rows: `"truncate"` cuts them, `"drop"` leaves them out. They are counted in the log.
        mask_token_id (`int`, *optional*):
            A token that no row may contain.

    Raises:
        ValueError: A row cannot be encoded, contains the mask token, or has fewer than 2 tokens or nothing to learn
            within `max_length`; its file and line, or its number, are named. With `skip_bad_rows` such rows are logged
            and left out.
    """
    if overlong not in ("truncate", "drop"):
        raise ValueError(f"Expected `overlong` to be 'truncate' or 'drop', got {overlong!r}.")
    examples: list[dict[str, Any]] = []
    num_overlong = number = 0
    for number, row in enumerate(rows, start=1):
        place = place_of(row, number)
        problem = why_not_encoded(tokenizer, row)
        if problem is not None and not skip_bad_rows:
            raise ValueError(f"Expected a row that can be encoded in {place}, but {problem}")
        if problem is not None:
            logger.warning("%s skipped: %s", place, problem)
            continue
        try:
            encoded = encode_row(tokenizer, row)
        except Exception as error:  # Templates raise what they like at turns they do not know.
            if not skip_bad_rows:
                raise ValueError(
                    f"Expected a row that the chat template can write in {place}, but it fails: {error}. Mend the "
                    "row, or pass `--skip-bad-rows` to go on without it."
                ) from error
            logger.warning("%s skipped: %s", place, error)
            continue
        num_tokens = len(encoded["input_ids"])
        num_overlong += num_tokens > max_length
        if num_tokens > max_length and overlong == "drop":
            continue
        example = {name: values[:max_length] for name, values in encoded.items()}
        if mask_token_id in example["input_ids"]:
            token = tokenizer.convert_ids_to_tokens(mask_token_id)
            problem = f"it has the mask token {mask_token_id} ({token!r})"
            if not skip_bad_rows:
                raise ValueError(
                    f"Expected a row that never contains the mask token in {place}, but {problem}. Name another with "
                    "`--mask-token-id`, or pass `--skip-bad-rows` to go on without the row."
                )
            logger.warning("%s skipped: %s", place, problem)
            continue
        if len(example["input_ids"]) >= 2 and any(example["loss_mask"][1:]):
            examples.append({**example, "source": place})
        elif skip_bad_rows:
            logger.warning("%s skipped: %d tokens, none to learn", place, num_tokens)
        else:
            raise ValueError(
                f"Expected at least 2 tokens with something to learn among the first {max_length}, got "
                f"{num_tokens} tokens in {place}. Raise `--max-length`, drop the row, or pass `--skip-bad-rows` to go "
                "on without it."
            )
    if num_overlong:
        done = "cut there" if overlong == "truncate" else "left out"
        logger.warning("%d of %d rows are longer than %d tokens and were %s.", num_overlong, number, max_length, done)
    return examples


Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What is asked of the target.

    Args:
        id (`str`):
            A digest of the turns, behind the row's own `id` and a colon where it has one: an edited prompt is another.
        turns (`tuple[tuple[Message, ...], ...]`):
            The messages up to each answer; each turn ends in a message of the user.
        place (`str`):
            Where the row is from, for messages.
    """

    id: str
    turns: tuple[tuple[Message, ...], ...]
    place: str

    @property
    def digest(self) -> str:
        return digest_of(self.id)


def digest_of(conversation_id: str) -> str:
    """The part of a conversation's id that depends on its words alone."""
    return conversation_id.rpartition(":")[2]


def why_no_conversation(row: Any) -> str | None:
    """Say what keeps a parsed line from being a prompt; `None` when nothing does."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}"
    if not isinstance(row.get("id", ""), str | int):
        return "its `id` is neither text nor a number"
    if row.get("messages") is not None and not are_messages(row["messages"]):
        return "its `messages` are no list of objects with `role` and `content`"
    turns = row.get("turns") or []
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        return "its `turns` are no list of texts"
    if row.get("messages") is None and not turns and not isinstance(row.get("prompt"), str):
        return f"it has {sorted(row)}"
    messages = given_messages(row)
    unknown = sorted({message["role"] for message in messages} - {"system", "developer", "user", "assistant"})
    if unknown:
        return f"it has turns of {unknown}, which answer to what this target did not say"
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        return "it asks nothing"
    return None


PROMPTS = RowKind("`prompt`, `messages` or `turns`", why_no_conversation)


def given_messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row of prompts, answers that it may bring included."""
    if row.get("messages") is not None:
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return [{"role": "user", "content": text} for text in row.get("turns") or [row["prompt"]]]


def conversation_of(row: dict[str, Any], place: str) -> Conversation:
    """The conversation a row of prompts asks for; answers that it brings are left out.

    Raises:
        ValueError: The row asks nothing, or has no known shape.
    """
    problem = why_no_conversation(row) or why_no_text(row)
    if problem is not None:
        raise ValueError(f"Expected a row with {PROMPTS.fields} in {place}, but {problem}. Mend the row.")
    turns: list[tuple[Message, ...]] = []
    waiting: list[Message] = []
    for message in given_messages(row):
        if message["role"] == "assistant":
            continue
        waiting.append(message)
        if message["role"] == "user":
            turns.append(tuple(waiting))
            waiting = []
    words = json.dumps([[message["role"], message["content"]] for turn in turns for message in turn])
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return Conversation(f"{row['id']}:{digest}" if "id" in row else digest, tuple(turns), place)


def distinct(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The conversations without those that say the same again, in order."""
    by_digest: dict[str, Conversation] = {}
    for conversation in conversations:
        by_digest.setdefault(conversation.digest, conversation)
    return list(by_digest.values())
