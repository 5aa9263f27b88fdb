"""JSON Lines, plain or gzipped: one reader for all files of rows and prompts.

Knows bytes and lines; knows nothing of what rows are for. A line ends at a line feed only: `str.splitlines`
would also cut at U+2028 and others, which JSON holds as they are.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
