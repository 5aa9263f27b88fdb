"""JSONL rows to token ids and loss masks, by the tokenizer's chat template.

A training row is `{"text": …}`, `{"prompt": …, "response": …}` or `{"messages": [{"role": …, "content": …}, …]}`, a
prompt row `{"prompt": …}`, `{"turns": [texts of a user, …]}` or `{"messages": …}`. Loss falls on text, responses and
assistant turns, and on the end token of each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ..io import numbered_lines, parse_line, text_problem
from ..tokens import Message, encode_prompt, next_prompt, turn_end_ids
from .top_logits import TopLogits

logger = logging.getLogger(__name__)

# What rows are read for: the fields that are expected of them.
TRAINING = "`text`, `prompt` and `response`, or `messages`"
PROMPTS = "`prompt`, `messages` or `turns`"

# How a chat template marks answers, https://huggingface.co/docs/transformers/chat_templating_writing.
ANSWER_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Row(dict[str, Any]):
    """A valid JSONL row, with the file and line it was read from in `source`."""

    def __init__(self, fields: dict[str, Any], source: str):
        super().__init__(fields)
        self.source = source


def read_rows(
    path: str | Path, skip_bad_rows: bool = False, fields: str = TRAINING, skipped: list[int] | None = None
) -> Iterator[Row]:
    """Read the rows of a `.jsonl` or `.jsonl.gz` file, which have the fields of `TRAINING` or of `PROMPTS`.

    A bad line raises a `ValueError` with its file and number; with `skip_bad_rows` it is logged and left out, and its
    number appended to `skipped`.
    """
    return check_rows(numbered_lines(Path(path)), f"line {{}} of `{path}`", fields, skip_bad_rows, skipped)


def check_rows(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    fields: str,
    skip_bad_rows: bool = False,
    skipped: list[int] | None = None,
) -> Iterator[Row]:
    """Yield the valid rows among lines or parsed values, as [`read_rows`] does; `source` has `{}` for their number."""
    for number, value in numbered:
        name = value.source if isinstance(value, Row) else source.replace("{}", str(number), 1)
        row, problem = parse_line(value) if isinstance(value, bytes) else (value, None)
        if not isinstance(value, bytes | Row):
            problem = text_problem(value)
        problem = problem or row_problem(row, fields)
        if problem is None:
            yield Row(row, name)
        else:
            skip_or_raise(f"a JSON object with {fields}", name, problem, skip_bad_rows)
            if skipped is not None:
                skipped.append(number)


def skip_or_raise(expected: str, source: str, problem: str, skip_bad_rows: bool) -> None:
    """Log a bad row that is left out; raise a `ValueError` that names it unless bad rows are skipped."""
    if not skip_bad_rows:
        raise ValueError(
            f"Expected {expected} in {source}, but {problem}. Fix it, or pass `--skip-bad-rows` to leave it out."
        )
    logger.warning("%s skipped: %s", source, problem)


def row_problem(row: Any, fields: str = TRAINING) -> str | None:
    """Return what is wrong with a parsed row that is to have `fields`; `None` if it is valid."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}"
    messages = row.get("messages")
    has_messages = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    has_text = isinstance(row.get("text"), str) or all(isinstance(row.get(f), str) for f in ("prompt", "response"))
    if messages is not None and not has_messages and not (fields == TRAINING and has_text):
        return "its `messages` are no list of objects with the texts `role` and `content`"
    if fields == PROMPTS:
        return prompt_problem(row)
    if not has_text and not has_messages:
        return f"it has {sorted(row)}"
    if "response_ids" not in row:
        return "it has `top_logits`, and no `response_ids` that they belong to" if "top_logits" in row else None
    answers = response_ids(row)
    num_answers = 1 if has_text else sum(message["role"] == "assistant" for message in messages or ())
    if not isinstance(answers, list) or not all(are_token_ids(answer) for answer in answers):
        return "its `response_ids` are no list of token ids, nor one list for each answer"
    if len(answers) != num_answers:
        return f"its `response_ids` are of {len(answers)} answers, and it has {num_answers}"
    return top_logits_problem(row, sum(map(len, answers))) if "top_logits" in row else None


def top_logits_problem(row: dict[str, Any], num_tokens: int) -> str | None:
    """Return what is wrong with what a row says of a teacher."""
    try:
        found = len(TopLogits.from_json(row["top_logits"]).ids)
    except ValueError as error:
        return str(error)
    return None if found == num_tokens else f"its `top_logits` are of {found} tokens, its answers of {num_tokens}"


def prompt_problem(row: dict[str, Any]) -> str | None:
    """Return what is wrong with a row of prompts, apart from its `messages`."""
    if not isinstance(row.get("id", ""), str | int):
        return "its `id` is neither text nor a number"
    turns = row.get("turns") or []
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        return "its `turns` are no list of texts"
    if row.get("messages") is None and not turns and not isinstance(row.get("prompt"), str):
        return f"it has {sorted(row)}"
    messages = given_messages(row)
    unknown = sorted({message["role"] for message in messages} - {"system", "developer", "user", "assistant"})
    if unknown:
        return f"it has turns of {unknown}, which respond to text that this target did not write"
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        return "it has no message of a user"
    return None


def are_token_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)


def response_ids(row: dict[str, Any]) -> Any:
    """Return the token ids of each answer of a row; a single list of ids is one answer."""
    ids = row["response_ids"]
    return [ids] if are_token_ids(ids) else ids


def given_messages(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row of prompts, with the answers it may have."""
    if row.get("messages") is not None:
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return [{"role": "user", "content": text} for text in row.get("turns") or [row["prompt"]]]


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template marks answers with `{% generation %}`."""
    return ANSWER_MARK.search(str(tokenizer.chat_template)) is not None


def encode_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> dict[str, Any]:
    """Encode a training row: `input_ids` and `loss_mask`; with `top_logits`, `top_ids` and `top_logprobs` too.

    The target's own `response_ids` are kept as they are: text that is encoded again may split words elsewhere, and an
    answer that was cut short teaches no end token. What a teacher says of them is `[num_tokens, k]`.

    Raises:
        ValueError: The row has `messages` and the tokenizer no chat template.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(row.get("text"), str):
        text = tokenizer(row["text"])["input_ids"] + end
        return {"input_ids": text, "loss_mask": [1] * len(text)}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        contents = [("user", row["prompt"]), ("assistant", row["response"])]
        messages = [{"role": role, "content": content} for role, content in contents]
    elif tokenizer.chat_template is None:
        raise ValueError(
            "it has `messages`, and the tokenizer has no chat template. Give one with `--chat-template`, name a "
            "`--target` that has one, or write rows with `prompt` and `response`"
        )
    else:
        messages = row["messages"]
    if has_marks(tokenizer) and not row.get("response_ids"):
        return encode_marked(tokenizer, messages)
    given_answers = iter(response_ids(row) if row.get("response_ids") else list[list[int]]())
    past, answer = list[int](), list[int]()
    loss_mask: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = past + answer
        past = next_prompt(tokenizer, messages[:turn], past, answer)
        answer = next(given_answers, []) or encode_last_answer(tokenizer, messages[: turn + 1])
        # A template that rewrites earlier turns (drops their thinking, say) leaves nothing of them to learn.
        kept = loss_mask if past[: len(before)] == before else []
        loss_mask = kept + [0] * (len(past) - len(kept)) + [1] * len(answer)
    if "top_logits" not in row:
        return {"input_ids": past + answer, "loss_mask": loss_mask}
    top_ids, top_logprobs = TopLogits.from_json(row["top_logits"]).at(loss_mask)
    return {"input_ids": past + answer, "loss_mask": loss_mask, "top_ids": top_ids, "top_logprobs": top_logprobs}


def encode_marked(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> dict[str, list[int]]:
    """Encode a conversation by a chat template that marks answers."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, loss_mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    for index in range(1, len(ids)):
        # Many templates mark the words alone; the end token after them must be learned, too.
        if ids[index] == tokenizer.eos_token_id and loss_mask[index - 1]:
            loss_mask[index] = 1
    return {"input_ids": ids, "loss_mask": loss_mask}


def encode_last_answer(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Encode the last message, an answer, as the chat template writes it after the prompt, with its end token."""
    content = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return content + end
    before = encode_prompt(tokenizer, messages[:-1])
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(before)] != before:
        return content + end
    answer, ends = whole[len(before) :], turn_end_ids(tokenizer)
    last = max((index for index, token in enumerate(answer) if token in ends), default=None)
    # What follows the end of a turn, a line break say, belongs to the next turn.
    return answer + end if last is None else answer[: last + 1]


class Encoded(NamedTuple):
    """What became of a row: an example to train on, or none because it is too long or has a `problem`."""

    source: str
    example: dict[str, Any] | None
    is_overlong: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class RowEncoder(Dataset[list[Encoded]]):
    """Encode lists of rows, here or in the processes of a `DataLoader`; a list is its own index."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overlong: Literal["truncate", "drop"]
    mask_token_id: int | None

    def __getitem__(self, rows: list[Row]) -> list[Encoded]:
        return [self.encode(row) for row in rows]

    def encode(self, row: Row) -> Encoded:
        try:
            encoded = encode_row(self.tokenizer, row)
            is_overlong = len(encoded["input_ids"]) > self.max_length
            if is_overlong and self.overlong == "drop":
                return Encoded(row.source, None, is_overlong)
            example = {name: values[: self.max_length] for name, values in encoded.items()}
            check_example(self.tokenizer, example, self.max_length, self.mask_token_id)
        except Exception as error:  # Chat templates raise errors of many kinds.
            problem = str(error) if isinstance(error, ValueError) else f"the chat template fails: {error}"
            return Encoded(row.source, None, problem=problem)
        return Encoded(row.source, example, is_overlong)


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    max_length: int,
    skip_bad_rows: bool = False,
    overlong: Literal["truncate", "drop"] = "truncate",
    mask_token_id: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Encode rows for training, in their order: `input_ids`, `loss_mask` and the `source` of each.

    Rows of more than `max_length` tokens are cut (`overlong="truncate"`) or left out (`"drop"`), and counted in the
    log. A row that cannot be encoded, contains the mask token, or has nothing to learn within `max_length` raises a
    `ValueError` with its source; with `skip_bad_rows` it is logged and left out. With `num_workers` other processes
    encode, and a few hundred rows are in memory.
    """
    encoder = RowEncoder(tokenizer, max_length, overlong, mask_token_id)
    lists = in_lists(check_rows(enumerate(rows, start=1), "row {}", TRAINING, skip_bad_rows), 64 if num_workers else 1)
    # A generator of its own leaves the process's random state alone.
    options: dict[str, Any] = {"sampler": lists, "num_workers": num_workers, "generator": torch.Generator()}
    num_rows = num_overlong = 0
    for encoded in chain.from_iterable(DataLoader(encoder, batch_size=None, collate_fn=as_it_is, **options)):
        num_rows += 1
        num_overlong += encoded.is_overlong
        if encoded.problem is not None:
            skip_or_raise("a row to train on", encoded.source, encoded.problem, skip_bad_rows)
        elif encoded.example is not None:
            yield {**encoded.example, "source": encoded.source}
    if num_overlong:
        done = f"{max_length} tokens and were {'cut there' if overlong == 'truncate' else 'left out'}"
        logger.warning("%d of %d rows are longer than %s.", num_overlong, num_rows, done)


def in_lists(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while found := list(islice(rows, size)):
        yield found


def as_it_is(encoded: list[Encoded]) -> list[Encoded]:
    return encoded


def check_example(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], max_length: int, mask_token_id: int | None
) -> None:
    """Raise a `ValueError` if an example contains the mask token or has nothing to learn."""
    ids, loss_mask = example["input_ids"], example["loss_mask"]
    if mask_token_id in ids:
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise ValueError(f"it has the mask token {mask_token_id} ({token!r}): name another with `--mask-token-id`")
    if len(ids) < 2 or not any(loss_mask[1:]):
        raise ValueError(f"it has {len(ids)} tokens within `--max-length {max_length}` and nothing to learn in them")
