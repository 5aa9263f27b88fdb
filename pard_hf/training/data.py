"""Text in, token rows with loss masks out; prompts in, target-written answers out.

A row is one JSON object: `{"text": …}`, `{"prompt": …, "response": …}` or `{"messages": [{"role", "content"}, …]}`.
Loss falls on text, on responses and on assistant turns, and on the end token that closes them.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Row(dict[str, Any]):
    """A row that knows the file and line it came from."""

    place: str


def read_rows(path: str | Path, skip_bad_rows: bool = False) -> Iterator[Row]:
    """Read the rows of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: A line is no JSON object with one of the known shapes; the message names the line. With
            `skip_bad_rows` such lines are logged and left out.
    """
    for number, line in numbered_lines(Path(path)):
        if not line.strip():
            continue
        row, problem = parse(line)
        if problem is None:
            row.place = f"`{path}` line {number}"
            yield row
        elif skip_bad_rows:
            logger.warning("%s line %d skipped: %s", path, number, problem)
        else:
            raise ValueError(
                f"Expected a JSON object with `text`, `prompt` and `response`, or `messages` in line {number} of "
                f"`{path}`, but {problem}. Mend the line, or pass `--skip-bad-rows` to go on without it."
            )


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain or gzipped file, from 1; a file that breaks off is named."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from enumerate(file, start=1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"Expected `{path}` to be a whole gzip file, but: {error}. Fetch it again.") from error


def parse(line: bytes) -> tuple[Row, str | None]:
    """Parse one line; returns the row and what is wrong with it, if anything."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(), f"byte {error.start} is no UTF-8"
    except json.JSONDecodeError as error:
        return Row(), f"it is no JSON ({error.msg} at column {error.colno})"
    problem = what_is_wrong(row)
    return (Row(row), None) if problem is None else (Row(), problem)


def what_is_wrong(row: Any) -> str | None:
    """Say what keeps a parsed line from being a row; `None` when nothing does."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}"
    ids = row.get("response_ids", [])
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        return "its `response_ids` are no list of token ids"
    if isinstance(row.get("text"), str):
        return None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return None
    messages = row.get("messages")
    if isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    return f"it has {sorted(row)}"


def messages_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The conversation a row stands for; `None` for plain text."""
    if "messages" in row:
        return row["messages"]
    if "prompt" in row:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    return None


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


def encode_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids and loss mask of one row; every assistant turn ends in the end token, which is learned.

    A row of `write_answers` carries the target's own `response_ids`; they are taken as they are, for decoding and
    encoding again may cut words elsewhere, and an answer that was cut short teaches no end.
    """
    messages = messages_of(row)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if messages is None:
        text = tokenizer(row["text"])["input_ids"] + end
        return {"input_ids": text, "loss_mask": [1] * len(text)}
    ids: list[int] = []
    loss_mask: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The template writes everything before the answer; only what is new since the last answer is added.
        prompt = encode_prompt(tokenizer, messages[:turn])
        answer = row.get("response_ids") or tokenizer(message["content"], add_special_tokens=False)["input_ids"] + end
        given = prompt[len(ids) :] if prompt[: len(ids)] == ids else prompt
        if given is prompt:
            ids, loss_mask = [], []  # The template rewrites earlier turns (drops their thinking, say): start over.
        ids = ids + given + answer
        loss_mask = loss_mask + [0] * len(given) + [1] * len(answer)
    return {"input_ids": ids, "loss_mask": loss_mask}


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    max_length: int,
    skip_bad_rows: bool = False,
    overlong: str = "truncate",
) -> list[dict[str, Any]]:
    """Encode rows for training; each example says in `place` which row it is.

    Args:
        max_length (`int`):
            Tokens of the longest example.
        overlong (`str`, *optional*, defaults to `"truncate"`):
            What happens to longer rows: `"truncate"` cuts them, `"drop"` leaves them out. They are counted in the log.

    Raises:
        ValueError: A row has fewer than 2 tokens or nothing to learn within `max_length`; its file and line, or its
            number, are named. With `skip_bad_rows` such rows are logged and left out.
    """
    if overlong not in ("truncate", "drop"):
        raise ValueError(f"Expected `overlong` to be 'truncate' or 'drop', got {overlong!r}.")
    examples: list[dict[str, Any]] = []
    num_overlong = number = 0
    for number, row in enumerate(rows, start=1):
        place = row.place if isinstance(row, Row) else f"row {number}"
        encoded = encode_row(tokenizer, row)
        num_tokens = len(encoded["input_ids"])
        num_overlong += num_tokens > max_length
        if num_tokens > max_length and overlong == "drop":
            continue
        example = {name: values[:max_length] for name, values in encoded.items()}
        if len(example["input_ids"]) >= 2 and any(example["loss_mask"][1:]):
            examples.append({**example, "place": place})
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


def write_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    out: str | Path,
    batch_size: int = 32,
    **generate_kwargs: Any,
) -> int:
    """Let the target answer prompts: the text a draft should be trained on, for it is what it will have to propose.

    Appends `{"prompt", "response"}` rows to `out`, a batch at a time; prompts already answered there are left alone,
    so an interrupted run goes on. Prompts are batched by length. The answer's very tokens are kept as `response_ids`,
    up to and with the end token where there is one.

    Returns:
        The number of rows written by this call.
    """
    out = Path(out)
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    answered = {row["prompt"] for row in read_rows(out)} if out.exists() else set()
    encoded = [
        (encode_prompt(tokenizer, [{"role": "user", "content": prompt}]), prompt)
        for prompt in dict.fromkeys(prompts)
        if prompt not in answered
    ]
    encoded.sort(key=lambda item: len(item[0]))
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            sequences = target.generate(**padded.to(target.device), **generate_kwargs)
        answers = sequences[:, padded["input_ids"].shape[1] :].tolist()
        with out.open("a", encoding="utf-8") as file:
            for (_, prompt), answer in zip(batch, answers, strict=True):
                end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
                answer = answer[: end + 1]
                text = tokenizer.decode(answer, skip_special_tokens=True)
                row = {"prompt": prompt, "response": text, "response_ids": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(encoded)
