"""Rows of prompts as conversations to be answered: what is asked, turn by turn, without anybody's answers.

Knows rows and their words; knows nothing of tokens, models and files of answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..json_lines import why_no_text
from .data import RowKind, are_messages

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
