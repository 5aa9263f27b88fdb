"""A file of answers that only grows by whole rows, and the manifest beside it that says how they were made.

Knows files, rows and counts; knows nothing of models. What is on disk is always a whole number of rows, but for a last
one that a killed process tore, and that is cut off before the file grows again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..files import sha256_of, whole_file
from ..generation.stats import DecodingStats
from .conversations import digest_of
from .data import answer_ids, read_rows

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What a file of answers holds, and what a run did about it.

    Args:
        prompts: Different prompts that were asked for.
        duplicates: Rows left out because they ask the same as an earlier one.
        bad_rows: Broken rows that were skipped.
        left_out: Rows not written, for want of room before the last position.
        shortened: Rows whose later turns were left out for want of room.
        waiting: Rows that are still to be written.
        new_rows: Rows that this run wrote.
        new_tokens: Tokens of the answers in these.
        rows: Rows of the file, those of earlier runs included.
        answers: Answers in these rows, one for each turn.
        tokens: Tokens of these answers, end tokens included.
        ended: Answers that end in an end token.
        cut: Answers that `max_new_tokens` cut short.
    """

    prompts: int = 0
    duplicates: int = 0
    bad_rows: int = 0
    left_out: int = 0
    shortened: int = 0
    waiting: int = 0
    new_rows: int = 0
    new_tokens: int = 0
    rows: int = 0
    answers: int = 0
    tokens: int = 0
    ended: int = 0
    cut: int = 0

    def add_row(self, row: dict[str, Any], end_token_ids: Sequence[int]) -> None:
        self.rows += 1
        for answer in answer_ids(row):
            ended = answer[-1:] != [] and answer[-1] in end_token_ids
            self.answers += 1
            self.tokens += len(answer)
            self.ended += ended
            self.cut += not ended

    def to_dict(self) -> dict[str, Any]:
        """The counts, and the mean number of tokens of an answer, under their names in JSON."""
        return {**asdict(self), "mean_tokens": round(self.tokens / max(self.answers, 1), 2)}


class AnswerFile:
    """The rows written so far, and room for more; a context, for one process at a time writes to a file.

    Args:
        path (`Path`):
            A `.jsonl` file; `path` with `.manifest.json` behind it is its manifest, and with `.counts.json` behind it
            says how often each token is in the answers, for `trim_vocabulary`.
        identity (`dict[str, Any]`):
            The target and the settings that the answers come from; a file holds answers of one identity.
        end_token_ids (`Sequence[int]`):
            Tokens that end an answer.
        restart (`bool`, *optional*, defaults to `False`):
            Move what is there aside, as `name.1.jsonl`, and begin anew.

    Raises:
        ValueError: On entering: the file holds answers of another identity, nothing says of which, or another process
            is writing to it.
    """

    def __init__(self, path: Path, identity: dict[str, Any], end_token_ids: Sequence[int], restart: bool = False):
        if path.suffix != ".jsonl":
            raise ValueError(f"Expected an output file that ends in `.jsonl`, got `{path.name}`. Choose another name.")
        self.path, self.identity, self.end_token_ids, self.restart = path, identity, end_token_ids, restart
        self.runs: list[dict[str, Any]] = []
        self.counts, self.done = Counts(), set[tuple[str, int]]()
        self.token_counts = Counter[int]()
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open_alone(self.path)
        try:
            if self.restart and move_aside(self.path):
                self.file.close()
                self.file = open_alone(self.path)
            if self.path.stat().st_size:
                self.go_on()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def go_on(self) -> None:
        """Take over the rows that are there."""
        manifest = read_manifest(self.path)
        check_identity(self.path, manifest, self.identity)
        self.runs = manifest["runs"]
        mend(self.path)
        self.sha256 = sha256_of(self.path)
        for row in read_rows(self.path):
            self.take(row)

    def take(self, row: dict[str, Any]) -> None:
        """Count a row that is on the disk."""
        self.done.add((digest_of(row["id"]), row["sample"]))
        self.counts.add_row(row, self.end_token_ids)
        for answer in answer_ids(row):
            self.token_counts.update(answer)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows; they are on the disk when this returns."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self.file.write(data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.sha256.update(data)
        tokens_before = self.counts.tokens
        for row in rows:
            self.take(row)
        self.counts.new_rows += len(rows)
        self.counts.waiting -= len(rows)
        self.counts.new_tokens += self.counts.tokens - tokens_before

    def write_manifest(self, run: dict[str, Any], sources: Sequence[dict[str, Any]]) -> None:
        """Write the manifest as it stands after `run`, the last of the runs; a reader sees the old one or the new."""
        runs = [*self.runs, *([run] if self.counts.new_rows else [])]
        stats = sum((DecodingStats(tuple(r["histogram"])) for r in runs if "histogram" in r), DecodingStats())
        manifest = {
            "output": {"name": self.path.name, "sha256": self.sha256.hexdigest()},
            "is_complete": self.counts.waiting == 0,
            **self.identity,
            "counts": self.counts.to_dict(),
            "sources": list(sources),
            "acceptance_length": round(stats.acceptance_length, 4) if stats.num_rounds else None,
            "runs": runs,
        }
        write_on_disk(counts_path(self.path), {"token_counts": dict(self.token_counts.most_common())}, indent=None)
        write_on_disk(manifest_path(self.path), manifest, indent=2)


def write_on_disk(path: Path, content: dict[str, Any], indent: int | None) -> None:
    """Write a JSON file whole or not at all; it is on the disk when this returns."""
    with whole_file(path) as written, written.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def counts_path(path: Path) -> Path:
    return path.with_name(path.name + ".counts.json")


def files_of(path: Path) -> tuple[Path, Path, Path]:
    return path, manifest_path(path), counts_path(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside a file of answers.

    Raises:
        ValueError: There is none, or it is no manifest.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        return {**manifest, "runs": list(manifest["runs"]), "settings": dict(manifest["settings"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the manifest `{manifest_path(path).name}` beside `{path}`, which holds rows already, got none "
            f"that can be read ({type(error).__name__}). Pass `--restart` to move the rows aside, or choose another "
            "output."
        ) from error


def check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise a `ValueError` that names what differs between a manifest and the answers now asked for."""
    before, now = flat(manifest), flat(identity)
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"Expected the settings that the answers in `{path}` were written with, but `{name}` was "
                f"{before.get(name)!r} and is {now[name]!r}. Go on with the same, pass `--restart` to move the old "
                "answers aside, or choose another output."
            )


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """The entries of an identity and of its settings, side by side."""
    return {**{name: value for name, value in identity.items() if name != "settings"}, **identity["settings"]}


def open_alone(path: Path) -> BinaryIO:
    """Open a file to append to it, or raise a `ValueError` where another process has done so."""
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"Expected to write to `{path}` alone, but another process does so too. Wait for it, or choose another "
            "output."
        ) from None
    except OSError as error:  # A file system without locks.
        logger.info("%s cannot be locked: %s", path.name, error)
    return file


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end."""
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        if whole < path.stat().st_size:
            logger.warning("%s: the last row was torn and is cut off; it is written again.", path.name)
            file.truncate(whole)


def move_aside(path: Path) -> bool:
    """Rename a file of answers that holds any, and what lies beside it, to a free one of `name.1.jsonl`, ….

    Returns:
        Whether there was something to move.
    """
    if not path.stat().st_size:
        return False
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    free = next(name for name in names if not name.exists() and not manifest_path(name).exists())
    for old, new in zip(files_of(path), files_of(free), strict=True):
        if old.exists():
            old.rename(new)
    return True
