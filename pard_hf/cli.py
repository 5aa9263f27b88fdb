"""`pard …`: which command runs, and how bad input ends."""

from __future__ import annotations

import argparse
import sys

from .commands import bench, card, check, data, demo, export, generate, train
from .commands.streamer import TintedStreamer

__all__ = ["TintedStreamer", "build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pard", description="Parallel draft models for transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, demo, bench, data, train, card, check, export):
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input ends with a sentence and exit code 2, never a stack trace."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    args.words = words
    try:
        return args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"pard {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pard {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
