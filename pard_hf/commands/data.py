"""`pard data`: the target answers prompts; its answers are the rows a draft is trained on."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .models import load_perhaps_without_draft

# The fields a Hub data set may ask by, where none is named.
HUB_FIELDS = ("messages", "turns", "prompt")
SECONDS_BETWEEN_REPORTS = 5.0


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="let the target write the answers a draft is trained on",
        description="Let the target answer prompts: rows {prompt}, {turns} or {messages} in, training rows out. The "
        "same command goes on where an interrupted one stopped.",
    )
    parser.add_argument("--target", help="folder or Hub id of the target model (default: the bundled target)")
    parser.add_argument("--draft", help="folder or Hub id of a draft that makes it faster (bundled target: its own)")
    parser.add_argument(
        "--prompts",
        required=True,
        nargs="+",
        help=".jsonl or .jsonl.gz files, or Hub data sets as hub:org/name[:split[:field]] (split: train)",
    )
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file that the rows are appended to")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass sampled from (default: 1)")
    parser.add_argument("--num-samples", type=int, default=1, help="answers to a prompt (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most (default: 512)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: 16)")
    parser.add_argument("--limit", type=int, help="read this many prompts at most")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (default: 0)")
    parser.add_argument("--num-assistant-tokens", type=int, help="K, draft tokens a round (default: the draft's own)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's; float32 on a CPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave broken rows out instead of stopping")
    parser.add_argument("--restart", action="store_true", help="move an old --output aside and begin anew")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..training.responses import write_answers

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"Expected `--limit` of at least 1, got {args.limit}.")
    sources: list[dict[str, Any]] = []
    rows = list(itertools.islice(read_all(args.prompts, args.skip_bad_rows, sources), args.limit))
    if not rows:
        raise ValueError(f"Expected at least one prompt in {', '.join(args.prompts)}, got none. Name another file.")
    pair = load_perhaps_without_draft(args)
    progress = Progress()
    counts = write_answers(
        pair.target,
        pair.tokenizer,
        rows,
        args.output,
        draft=pair.draft,
        batch_size=args.batch_size,
        num_assistant_tokens=args.num_assistant_tokens,
        restart=args.restart,
        sources=sources,
        report=progress,
        skip_bad_rows=args.skip_bad_rows,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        num_samples=args.num_samples,
        seed=args.seed,
    )
    if counts.left_out or counts.shortened:
        print(
            f"{counts.left_out} rows had no room for an answer, {counts.shortened} for every turn: lower "
            "`--max-new-tokens` to have them.",
            file=sys.stderr,
        )
    print(json.dumps({"output": args.output.name, **counts.to_dict(), **progress.ratios()}))
    return 0


def read_all(prompts: list[str], skip_bad_rows: bool, sources: list[dict[str, Any]]) -> Iterator[Any]:
    """The rows of files and data sets in order; `sources` is given an entry for each, with a digest."""
    from ..evaluation.prompts import HUB_PREFIX
    from ..io import sha256_of
    from ..training.data import PROMPTS, read_rows

    for name in prompts:
        skipped: list[int] = []
        if name.startswith(HUB_PREFIX):
            shown, rows, contents = read_hub(name, skip_bad_rows, skipped)
        else:
            shown, rows = Path(name).name, read_rows(name, skip_bad_rows, PROMPTS, skipped)
            contents = sha256_of(Path(name)).hexdigest()
        sources.append({"name": shown, "sha256": contents, "skipped": skipped})
        yield from rows


def read_hub(source: str, skip_bad_rows: bool, skipped: list[int]) -> tuple[str, Iterator[Any], str]:
    """The name of a Hub data set, its rows as prompts, and a digest of these."""
    from ..evaluation.prompts import read_hub_rows
    from ..training.data import PROMPTS, check_rows

    name, field, found = read_hub_rows(source, "train")
    if found and not field:
        field = next((name for name in HUB_FIELDS if name in found[0]), "")
    if found and field not in found[0]:
        raise ValueError(
            f"Expected one of the fields {', '.join(HUB_FIELDS)} in {source!r}, got {sorted(found[0])}. Name one of "
            "these as `hub:org/name:split:field`."
        )
    rows = [as_prompt(row, field) for row in found]
    digest = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    return (
        name,
        check_rows(enumerate(rows, start=1), f"row {{}} of `{source}`", PROMPTS, skip_bad_rows, skipped),
        digest,
    )


def as_prompt(row: dict[str, Any], field: str) -> dict[str, Any]:
    """A row that asks by one of its fields: text is a prompt, texts are turns, anything else has to be messages."""
    value = row[field]
    is_turns = isinstance(value, list) and all(isinstance(turn, str) for turn in value)
    kind = "prompt" if isinstance(value, str) else "turns" if is_turns else "messages"
    return {kind: value, **({"id": row["id"]} if isinstance(row.get("id"), str | int) else {})}


class Progress:
    """Prints a line to standard error every few seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.speed, self.acceptance_length = 0.0, 0.0

    def __call__(self, counts: Any, stats: Any) -> None:
        now = time.perf_counter()
        self.speed, self.acceptance_length = counts.new_tokens / (now - self.start), stats.acceptance_length
        if now - self.last < SECONDS_BETWEEN_REPORTS and counts.waiting:
            return
        self.last = now
        acceptance = f" · τ {self.acceptance_length:.2f}" if stats.num_rounds else ""
        print(
            f"{counts.new_rows}/{counts.new_rows + counts.waiting} rows · {self.speed:.1f} tokens/s{acceptance}",
            file=sys.stderr,
            flush=True,
        )

    def ratios(self) -> dict[str, float]:
        """Tokens a second and, with a draft, the acceptance length of what this run wrote."""
        ratios = {"tokens_per_second": round(self.speed, 2)}
        return ratios | ({"acceptance_length": round(self.acceptance_length, 4)} if self.acceptance_length else {})
