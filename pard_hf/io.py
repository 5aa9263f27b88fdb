"""Files: atomic writes, checksums, JSON Lines; and run metadata."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:  # The command line reads its words with this module, and imports neither for that.
    import torch

# Beside a converted checkpoint: what it was converted from.
SOURCE_FILE = "source.json"
# Flags whose values are files or folders, existing or not.
PATH_FLAGS = ("--prompts", "--eval-prompts", "--data", "--output", "--file", "--chat-template")
# Settings of a checkpoint that change greedy texts.
DECODING_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which is then renamed to `path`: readers see the old file or the new one."""
    written = path.with_name(f"{path.name}.{os.getpid()}.partial")  # Two processes may write one file.
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as written:
        written.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text file; raise a `ValueError` unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected UTF-8 text in `{path}`, got byte {error.start} of another encoding. Save the file as UTF-8."
        ) from error


def sha256_of(path: Path) -> Any:
    """Return the hash object of a file's SHA-256, which can be updated further."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the nonblank lines of a plain or gzipped file, numbered from 1; a `ValueError` names a truncated file.

    Lines end at line feeds only: `str.splitlines` would also cut at U+2028 and others, which JSON may contain.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"Expected `{path}` to be a whole gzip file, but: {error}. Fetch it again.") from error


def parse_line(line: bytes) -> tuple[Any, str | None]:
    """Parse one line of JSON; return the value and what is wrong with it, or `None`."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"byte {error.start} is no UTF-8"
    except json.JSONDecodeError as error:
        return None, f"it is no JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, or deeply nested lists.
        return None, f"it is no JSON that can be read ({error})"
    return value, text_problem(value)


def text_problem(value: Any) -> str | None:
    """Describe a lone surrogate in a parsed value, which cannot be encoded; `None` without one.

    JSON escapes (`"\\ud83d"`, of a cut emoji) and command-line arguments that are no UTF-8 may hold one.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"it has half of a character, the surrogate {ascii(value[error.start])}"
    inner = value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for item in inner if (found := text_problem(item)) is not None), None)


def conditions_of(target: Any) -> dict[str, Any]:
    """Describe a run with `target`: date, commit, versions, device, dtype and decoding; paths are never recorded."""
    import torch
    import transformers

    config: transformers.GenerationConfig = target.generation_config
    changed = {name: value for name, value in config.to_diff_dict().items() if name in DECODING_SETTINGS and value}
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pard_hf": __version__,
        },
        "device": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        **({} if (source := source_of(target.name_or_path)) is None else {"target_source": source}),
        "decoding": ", ".join(["greedy", *(f"{name} {value}" for name, value in changed.items())]),
    }


def source_of(folder: str) -> str | None:
    """Say which file a converted target was converted from, or which commit of the Hub a folder of its cache is."""
    record = Path(folder) / SOURCE_FILE
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))["source"]
    if (cached := re.search(r"models--([^/\\]+).snapshots.(\w+)$", folder)) is None:
        return None
    return f"{cached[1].replace('--', '/')} of the Hub, commit {cached[2][:7]}"


def commit() -> str | None:
    """Return the commit of the checkout that runs, with a `+` where files differ from it; `None` where installed."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "pard_hf").is_dir() or not (folder / ".git").exists():
        return None  # A repository of a parent folder is another project's.
    git = ["git", "-C", str(folder)]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)


def device_name(device: torch.device) -> str:
    """Name a device, with the number of threads on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        return f"CPU, {num_threads} thread{'s' * (num_threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def shown_command(words: list[str], program: str = "pard") -> str:
    """Join a command line with file names instead of paths; Hub ids stay as they are."""
    shown, flag = [program], ""
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            shown.append(f"{flag}={shown_value(flag, value)}" if equals else flag)
        else:
            shown.append(shown_value(flag, word))
    return " ".join(shown)


def is_path_there(text: str) -> bool:
    """Whether a word names an existing file or folder; a long list of names is none."""
    try:
        return Path(text).exists()
    except OSError:  # File name too long.
        return False


def shown_value(flag: str, value: str) -> str:
    if "," in value and not is_path_there(value):
        return ",".join(shown_value(flag, part) for part in value.split(","))
    prefix, value = ("hub:", value[4:]) if value.startswith("hub:") else ("", value)
    is_path = (flag in PATH_FLAGS and not prefix) or value.startswith(("/", ".", "~")) or is_path_there(value)
    return prefix + (Path(value).name if is_path else value)


def shown_model(name: str | None) -> str:
    """Name a model in a result: its Hub id, or the last part of its folder."""
    return "bundled" if name is None else shown_value("", name)
