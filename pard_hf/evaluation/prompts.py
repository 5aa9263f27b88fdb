"""Prompt sets by name, file or Hub data set, as token ids and as batches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch

from ..io import numbered_lines, parse_line, text_problem
from ..locate import check_hub
from ..tokens import pad_left, until_end

DEMO_PROMPTS = (
    'def is_palindrome(text: str) -> bool:\n    """Return True if text reads the same backwards."""\n',
    'def binary_search(arr, x):\n    """Find the index of x in the sorted list arr, or return -1."""\n',
    'def count_vowels(word):\n    """Count the vowels in a word.\n\n    >>> count_vowels("banana")\n    3\n    """\n',
    "Tom has 3 boxes of pencils. Each box holds 12 pencils. He gives 8 pencils to his sister. How many pencils does "
    "Tom have left?\n",
    "A shop sells apples for $2 each and oranges for $3 each. Anna buys 5 apples and 4 oranges. How much does she pay "
    "in total?\n",
    "A train travels 60 miles each hour. How many miles does it travel in 4 hours?\n",
)
# What a person asks a chat model.
CHAT_PROMPTS = (
    "Write a Python function that checks whether a text is a palindrome.",
    "Write a Python function that finds the largest number of a list, with an example.",
    "Anna buys 5 apples for $2 each and 4 oranges for $3 each. How much does she pay?",
    "What is the capital of France, and what is it known for?",
    "A box holds 12 pencils. Tom has 7 boxes and gives 20 pencils away. How many are left?",
)
NAMED_SETS = {"demo": DEMO_PROMPTS}
HUB_PREFIX = "hub:"
# Fields that hold the reference answer in common sets.
ANSWER_FIELDS = ("reference", "solution", "response", "answer")
# Rows of the batches that single rows are compared with.
REGROUPED_SIZE = 4


def load_prompt_sets(sources: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Read prompt sets by name, see [`load_prompts`]; raise a `ValueError` if two have the same name."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        name, rows = load_prompts(source)
        if name in sets:
            raise ValueError(f"Expected prompt sets of different names, got `{name}` twice. Rename one of the files.")
        sets[name] = rows
    return sets


def load_prompts(source: str) -> tuple[str, list[dict[str, Any]]]:
    """Read a prompt set; return its name, free of folders, and its JSONL rows, each with a `prompt`.

    `source` is a `.jsonl` or `.jsonl.gz` file, a named set (`demo`), or a Hub data set as
    `hub:org/name[:split[:field]]`, where `org/name/config` chooses among configurations.

    Raises:
        ValueError: There is no such set, it is empty, or a row has no prompt.
    """
    if source in NAMED_SETS:
        return source, [{"prompt": prompt} for prompt in NAMED_SETS[source]]
    if source.startswith(HUB_PREFIX):
        name, rows = read_hub_prompts(source)
    elif Path(source).is_file():
        name, rows = Path(source.removesuffix(".gz")).stem, read_prompts(source)
    else:
        raise ValueError(
            f"Expected a prompt set, got {source!r}. Name a `.jsonl` file that exists, one of "
            f"{', '.join(sorted(NAMED_SETS))}, or a Hub data set as `hub:org/name[:split[:field]]`."
        )
    if not rows:
        raise ValueError(f"Expected at least one prompt in {source!r}, got none. Choose another set.")
    return name, rows


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects with a `prompt`; a `ValueError` names the line that is none."""
    prompts: list[dict[str, Any]] = []
    for number, line in numbered_lines(Path(path)):
        row, problem = parse_line(line)
        problem = problem or field_problem(row, "prompt")
        if problem is not None:
            raise ValueError(
                f"Expected a JSON object with a `prompt` in line {number} of `{path}`, but {problem}. Fix the line."
            )
        prompts.append(row)
    return prompts


def field_problem(row: Any, field: str) -> str | None:
    """Return why a parsed JSONL row has no text in `field`; `None` if it has."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}"
    return None if isinstance(row.get(field), str) else f"its `{field}` is no text; it has {sorted(row)}"


def read_hub_prompts(source: str) -> tuple[str, list[dict[str, Any]]]:
    """Read `hub:org/name[/config][:split[:field]]`; split and field default to `test` and `prompt`."""
    name, field, rows = read_hub_rows(source, "test")
    field = field or "prompt"
    for number, row in enumerate(rows, start=1):
        problem = text_problem(row) or field_problem(row, field)
        if problem is not None:
            raise ValueError(
                f"Expected a text field {field!r} in row {number} of {source!r}, but {problem}. Name another field."
            )
    return name, [{**row, "prompt": row[field]} for row in rows]


def read_hub_conversations(source: str) -> tuple[str, list[dict[str, Any]]]:
    """Read a Hub data set that `pard data` answers, see [`read_hub_rows`]; the split defaults to `train`.

    The JSONL rows have one field, and `id` if the set has it: `prompt` for a text, `turns` for a list of texts, else
    `messages`. The field of the set defaults to the first of these that it has.
    """
    fields = ("messages", "turns", "prompt")
    name, field, rows = read_hub_rows(source, "train")
    if rows and not field:
        field = next((name for name in fields if name in rows[0]), "")
    if rows and field not in rows[0]:
        raise ValueError(
            f"Expected one of the fields {', '.join(fields)} in {source!r}, got {sorted(rows[0])}. Name one of "
            "these as `hub:org/name:split:field`."
        )
    conversations = []
    for row in rows:
        value = row[field]
        is_turns = isinstance(value, list) and all(isinstance(turn, str) for turn in value)
        kind = "prompt" if isinstance(value, str) else "turns" if is_turns else "messages"
        conversations.append({kind: value, **({"id": row["id"]} if isinstance(row.get("id"), str | int) else {})})
    return name, conversations


def read_hub_rows(source: str, default_split: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Read `hub:org/name[/config][:split[:field]]`; return its name with the split, the field or `""`, the rows."""
    path, split, field, *rest = [*source.removeprefix(HUB_PREFIX).split(":"), "", ""]
    if not path or any(rest):
        raise ValueError(f"Expected `hub:org/name[:split[:field]]`, got {source!r}. Drop the other parts.")
    if not Path(path).exists():
        check_hub([])  # A Hub that does not answer is not waited for, and `datasets` has a cache of its own.
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ModuleNotFoundError:
        raise ValueError(
            f"Expected the package `datasets` for {source!r}, got none. Do `pip install 'pard-hf[bench]'`."
        ) from None
    split = split or default_split
    # A folder may lie anywhere; a Hub id has one slash, and a third part is the configuration.
    config = None
    if not Path(path).exists() and path.count("/") == 2:
        path, config = path.rsplit("/", 1)
    try:
        rows = [dict(row) for row in load_dataset(path, config, split=split)]
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"Expected a data set of the Hub, got {source!r}: {error}") from error
    return f"{Path(path).name}:{split}", field, rows


def choose_rows(rows: Sequence[Any], limit: int | None, seed: int) -> list[int]:
    """Draw the indices of at most `limit` rows by `seed`, in the order of the set."""
    indices = list(range(len(rows)))
    random.Random(seed).shuffle(indices)
    return sorted(indices[:limit])


def encode_answer(tokenizer: Any, row: dict[str, Any], num_tokens: int) -> list[int] | None:
    """Return at most `num_tokens` token ids of a row's reference answer; `None` where the row has none."""
    text = next((row[field] for field in ANSWER_FIELDS if isinstance(row.get(field), str)), None)
    if text is None:
        return None
    text = re.sub(r"<<[^<>]*>>", "", text)  # Calculator annotations of GSM8K, which are no text.
    return tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]


def lengthen(ids: list[int], others: Sequence[list[int]], context: int, start: int | None) -> list[int]:
    """Fill a prompt up to `context` tokens with `others` in turn, after the `start` token if it has one."""
    missing = max(context - len(ids), 0)
    if missing and not any(others):
        raise ValueError("Expected text to put before a short prompt, got none. Choose a set that has some.")
    filler = islice(chain.from_iterable(cycle(others)), missing)
    num_start = int(ids[:1] == [start])
    return [*ids[:num_start], *filler, *ids[num_start:]]


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts of a list: their indices, and left-padded `input_ids` and `attention_mask` `[B, T]`."""

    indices: tuple[int, ...]
    inputs: dict[str, torch.Tensor]

    @property
    def num_columns(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def new_texts(self, sequences: torch.Tensor, end_token_ids: Sequence[int]) -> dict[int, list[int]]:
        """Cut the new tokens of each batch row of `sequences` `[B, T + new]` after the first end token, by index."""
        rows = sequences[:, self.num_columns :].tolist()
        return {index: until_end(row, end_token_ids) for index, row in zip(self.indices, rows, strict=True)}


def make_batches(
    encoded: Sequence[list[int]], batch_size: int, pad_token_id: int | None, device: torch.device | str
) -> list[PromptBatch]:
    """Batch prompts of like length, longest first: the first batch shows whether memory and positions suffice."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    batches = []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = pad_left([encoded[index] for index in indices], pad_token_id)
        batches.append(PromptBatch(tuple(indices), {name: tensor.to(device) for name, tensor in inputs.items()}))
    return batches


def regroup(encoded: Sequence[list[int]], batches: list[PromptBatch], pad_token_id: int | None) -> list[PromptBatch]:
    """Batch the prompts of `batches` one at a time, or four at a time where each came alone.

    Prompts that come alone both times are left out; some come again to fill a batch.
    """
    device = batches[0].inputs["input_ids"].device
    together = [index for batch in batches if len(batch.indices) > 1 for index in batch.indices]
    size = 1 if together else REGROUPED_SIZE
    indices = together or [index % len(encoded) for index in range(len(encoded) + -len(encoded) % size)]
    made = make_batches([encoded[index] for index in indices], size, pad_token_id, device)
    return [PromptBatch(tuple(indices[index] for index in batch.indices), batch.inputs) for batch in made]
