"""What the scripts of this folder share: a parser, the metadata of a run, a result of one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pard_hf.io import conditions_of, shown_command, write_whole


def parser_of(docstring: str) -> argparse.ArgumentParser:
    """A parser described by the first line of a script's docstring, with `--output`."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser


def run_metadata(model: Any) -> dict[str, Any]:
    """Command, date, commit, versions, device and dtype of a run with `model`."""
    return {"command": command(), **conditions_of(model)}


def command() -> str:
    """The command line of the script that runs, without folders."""
    return shown_command(sys.argv[1:], f"python benchmarks/{Path(sys.argv[0]).name}")


def finish(result: dict[str, Any], output: Path | None, summary: dict[str, Any] | None = None) -> None:
    """Write the result to `output`; the last line of standard output is the result, or a summary of it."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result if summary is None else summary))
