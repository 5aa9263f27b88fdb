"""What the scripts of this folder share: a parser, the metadata of a run, a result of one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pard_hf.io import conditions_of, shown_command, write_whole
from pard_hf.loading import Pair, load_models, load_pair


def parser_of(docstring: str) -> argparse.ArgumentParser:
    """Make a parser described by the first line of a script's docstring, with `--output`."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser


def add_pair(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Add the flags of `load_pair`."""
    parser.add_argument("--target", help="default: the bundled target")
    parser.add_argument("--draft", help="default: the bundled draft")
    parser.add_argument("--dtype", default=dtype)


def load_pair_of(args: argparse.Namespace) -> Pair:
    """Load the pair that the flags of `add_pair` name, or a target alone."""
    if args.target is None:
        return load_pair(None, args.draft, args.dtype)
    return load_models(args.target, args.draft, args.dtype)


def run_metadata(model: Any) -> dict[str, Any]:
    """Command, date, commit, versions, device and dtype of a run with `model`."""
    return {"command": command(), **conditions_of(model)}


def command() -> str:
    """The command line of the script that runs, without folders."""
    return shown_command(sys.argv[1:], f"python benchmarks/{Path(sys.argv[0]).name}")


def in_own_process(*words: str, **environment: str) -> Any:
    """Run the script once more with other words; return what the last line of its standard output holds."""
    environment = {**os.environ, **environment}
    words = (sys.executable, sys.argv[0], *words)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def write(result: dict[str, Any], output: Path | None) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(result, indent=1) + "\n")


def finish(result: dict[str, Any], output: Path | None, summary: dict[str, Any] | None = None) -> None:
    """Write the result to `output`; the last line of standard output is the result, or a summary of it."""
    write(result, output)
    print(json.dumps(result if summary is None else summary))
