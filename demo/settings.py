"""What a visitor chose, checked: every refusal is a sentence that says what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pard_hf.generation.config import DEFAULT_DEPTH, MIN_TREE_SIZE
from pard_hf.host import num_positions
from pard_hf.io import text_problem
from pard_hf.loading import Pair
from pard_hf.tokens import encode_prompt

from .visitor import Visitor

# What proposes: the draft, the text and the target's own habits, or both.
DRAFT, LOOKUP, BOTH = "the draft", "the text, no draft", "the draft and the text"
PROPOSERS = (DRAFT, LOOKUP, BOTH)
MOST_DRAFT_TOKENS = 16
LARGEST_TREE = 64
MOST_NEW_TOKENS = 1024
MOST_CHARACTERS = 20_000
LEAST_TEMPERATURE = 0.01  # Logits over less are infinite; 0 itself is greedy.


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Args:
        num_assistant_tokens (`int`):
            K, proposals a round.
        temperature (`float`):
            0 is greedy.
        top_p (`float`):
            Share of the probability that may be drawn from.
        seed (`int`):
            For sampling.
        tree_size (`int`):
            N, nodes of a round's tree.
        proposer (`str`):
            One of `PROPOSERS`.
    """

    num_assistant_tokens: int = 4
    max_new_tokens: int = 192
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    tree_size: int = 8
    proposer: str = BOTH

    @classmethod
    def checked(
        cls,
        num_assistant_tokens: Any,
        max_new_tokens: Any,
        temperature: Any,
        top_p: Any,
        seed: Any,
        tree_size: Any = 8,
        proposer: Any = BOTH,
    ) -> Settings:
        """Make settings from what a page sent.

        Raises:
            ValueError: A field is empty, no number, out of its range, or not among its choices.
        """
        if proposer not in PROPOSERS:
            raise ValueError(
                f"Expected proposals from one of {'; '.join(PROPOSERS)}, got {shown(proposer)}. Choose one."
            )
        return cls(
            num_assistant_tokens=whole("K", num_assistant_tokens, 1, MOST_DRAFT_TOKENS),
            max_new_tokens=whole("Max new tokens", max_new_tokens, 1, MOST_NEW_TOKENS),
            temperature=number("Temperature", temperature, 0, 2),
            top_p=number("Top-p", top_p, 0.01, 1),
            seed=whole("Seed", seed, 0, 2**32 - 1),
            tree_size=whole("Tree", tree_size, MIN_TREE_SIZE, LARGEST_TREE),
            proposer=proposer,
        )

    def proposing(self, pair: Pair, visitor: Visitor | None = None) -> dict[str, Any]:
        """Arguments of `generate()` that say what proposes; the text's sources remember a visitor's own texts."""
        arguments: dict[str, Any] = {"assistant_tree_size": self.tree_size}
        if self.proposer != LOOKUP:
            arguments |= {"assistant_model": pair.draft, "num_assistant_tokens": self.num_assistant_tokens}
        if self.proposer != DRAFT:
            memory = None if visitor is None else visitor.memory_of(pair.target)
            arguments |= {"prompt_lookup_num_tokens": DEFAULT_DEPTH, "assistant_memory": memory}
        return arguments

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate()`, what proposes aside."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": max(self.temperature, LEAST_TEMPERATURE),
                "top_p": self.top_p,
                "top_k": 0,
            }
        return {**sampling, "max_new_tokens": self.max_new_tokens}


def number(name: str, value: Any, least: float, most: float) -> float:
    """A finite number in a range, or a `ValueError` that names the field."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(
            f"Expected a number in the field {name}, got {shown(value)}. Type one from {least} to {most}."
        )
    if not least <= value <= most:
        got = f"{value:g}" if abs(value) < 1e300 else "one of hundreds of digits"
        raise ValueError(f"Expected {name} from {least} to {most}, got {got}. Choose one in this range.")
    return float(value)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in a range, or a `ValueError` that names the field."""
    checked = number(name, value, least, most)
    if checked != int(checked):
        raise ValueError(f"Expected a whole number in the field {name}, got {value:g}. Drop the fraction.")
    return int(checked)


def shown(value: Any) -> str:
    return "nothing" if value is None or value == "" else repr(value)[:100]


def checked_prompt(prompt: Any) -> str:
    """A prompt with words in it, or a `ValueError`."""
    if not isinstance(prompt, str):
        raise ValueError(f"Expected text as a prompt, got {shown(prompt)}. Type some, or take an example.")
    if not prompt.strip():
        raise ValueError("Expected a prompt, got nothing but white space. Type one, or take an example.")
    if (why := text_problem(prompt)) is not None:
        raise ValueError(f"Expected text as a prompt, but {why}. Type it again.")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"Expected at most {MOST_CHARACTERS} characters, got {len(prompt)}. Shorten the text.")
    return prompt


def encoded_prompt(pair: Pair, prompt: Any, settings: Settings) -> list[int]:
    """Token ids of a prompt that leaves both models room for the answer.

    Raises:
        ValueError: It is empty or too long.
    """
    ids = encode_prompt(pair.tokenizer, checked_prompt(prompt))
    check_length(pair, ids, settings)
    return ids


def check_length(pair: Pair, ids: list[int], settings: Settings, what: str = "prompt") -> None:
    """Raise a `ValueError` where ids and the answer need more positions than either model has."""
    positions = min(num_positions(model.config) for model in pair.models)
    longest = positions - settings.max_new_tokens
    if len(ids) > longest:
        raise ValueError(
            f"Expected a {what} of at most {max(longest, 0)} tokens, {positions} positions less "
            f"{settings.max_new_tokens} new tokens, got {len(ids)}. Shorten it, or lower Max new tokens."
        )
