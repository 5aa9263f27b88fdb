"""Files that are there in whole or not at all, and what tells one from another.

JSON Lines, plain or gzipped: one reader for all files of rows and prompts.

Knows bytes and lines; knows nothing of what rows are for. A line ends at a line feed only: `str.splitlines`
would also cut at U+2028 and others, which JSON holds as they are.

Where, when and with what something was measured. Never says in which folder: that is nobody's business.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which is given the name `path` when it is written: readers see the old file or the new."""
    written = path.with_name(f"{path.name}.partial")
    yield written
    written.replace(path)


def read_text(path: Path) -> str:
    """The text of a file; a `ValueError` names one that is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected UTF-8 text in `{path}`, got byte {error.start} of another encoding. Save the file as UTF-8."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there in whole or not at all."""
    with whole_file(path) as written:
        written.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> Any:
    """The SHA-256 of a file, ready for more."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain or gzipped file that are not blank, numbered from 1; a file that breaks off is named."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"Expected `{path}` to be a whole gzip file, but: {error}. Fetch it again.") from error


def parse_line(line: bytes) -> tuple[Any, str | None]:
    """Parse one line; returns the value and why there is none, if so."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"byte {error.start} is no UTF-8"
    except json.JSONDecodeError as error:
        return None, f"it is no JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, lists in lists in lists.
        return None, f"it is no JSON that can be read ({error})"
    return value, why_no_text(value)


def why_no_text(value: Any) -> str | None:
    """Say which text of a parsed value no file and no tokenizer can take; `None` when all can be written.

    JSON may hold half of a character as an escape (`"\\ud83d"`, of an emoji that was cut), and so may an argument that
    is no UTF-8.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"it has half of a character, the surrogate {ascii(value[error.start])}"
    elif isinstance(value, dict):
        return next((why for item in value.items() if (why := why_no_text(item)) is not None), None)
    elif isinstance(value, list | tuple):
        return next((why for item in value if (why := why_no_text(item)) is not None), None)
    return None


# Flags whose values are files or folders, also where those do not exist yet.
PATH_FLAGS = ("--prompts", "--eval-prompts", "--data", "--output", "--file", "--chat-template")
# Settings of a checkpoint that change greedy texts.
DECODING_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens")


def shown_command(words: list[str], program: str = "pard") -> str:
    """Write a command line with file names instead of paths; Hub ids stay as they are."""
    shown, flag = [program], ""
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            shown.append(f"{flag}={shown_value(flag, value)}" if equals else flag)
        else:
            shown.append(shown_value(flag, word))
    return " ".join(shown)


def shown_value(flag: str, value: str) -> str:
    if "," in value and not Path(value).exists():
        return ",".join(shown_value(flag, part) for part in value.split(","))
    prefix, value = ("hub:", value[4:]) if value.startswith("hub:") else ("", value)
    is_path = (flag in PATH_FLAGS and not prefix) or value.startswith(("/", ".", "~")) or Path(value).exists()
    return prefix + (Path(value).name if is_path else value)


def shown_model(name: str | None) -> str:
    """A model as a result names it: a Hub id, or the last part of a folder."""
    return "bundled" if name is None else shown_value("", name)


def commit() -> str | None:
    """The commit of the checkout that runs, with a `+` where files differ from it; `None` outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "pard_hf").is_dir() or not (folder / ".git").exists():
        return None  # Installed; a repository further up is somebody else's.
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)


def device_name(device: torch.device) -> str:
    """A device in words, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        return f"CPU, {num_threads} thread{'s' * (num_threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def decoding_name(config: GenerationConfig) -> str:
    """Greedy, with the settings of the checkpoint that change its texts."""
    changed = {name: value for name, value in config.to_diff_dict().items() if name in DECODING_SETTINGS and value}
    return ", ".join(["greedy", *(f"{name} {value}" for name, value in changed.items())])


def own_version() -> str:
    """The version of the installed package; a copy of its folder, as in a Space, has none."""
    try:
        return version("pard-hf")
    except PackageNotFoundError:
        return "not installed"


def conditions_of(target: Any) -> dict[str, Any]:
    """Date, commit, versions and device of a run with `target`."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pard_hf": own_version(),
        },
        "device": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "decoding": decoding_name(target.generation_config),
    }
