"""README and docs as a test sees them: their blocks of code, the commands in these, and their prose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pard_hf
from pard_hf import smollm2

ROOT = Path(pard_hf.__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs that a document may call; a block whose first word is another is a drawing or an output.
PROGRAMS = {"pard", "make", "pip", "python", "vllm", "accelerate", "hf"}


class Block(NamedTuple):
    """A fenced block: the language behind its fence (or nothing) and its lines."""

    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language == "bash" or (self.language == "" and self.text.split(maxsplit=1)[0] in PROGRAMS)


def blocks_of(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)]


def prose_of(text: str) -> str:
    """A document without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose_of(text))]


def command_lines(text: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments; a quotation or a backslash joins lines."""
    commands, pending = [], ""
    for line in text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            commands.append(shlex.split(pending, comments=True))
        except ValueError:  # A quotation goes on.
            pending += "\n"
            continue
        pending = ""
    assert not pending, f"a command without an end: {pending}"
    return [command for command in commands if command]


def has_smollm2():
    """Whether SmolLM2 can be had without a network."""
    folder = Path(smollm2.HF_HOME, "pard_hf", smollm2.NAME)
    return smollm2.installed_file() is not None or smollm2.damage_of(folder) is None
