"""`pard export`: write a draft as vLLM and TensorRT-LLM load it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .check import print_findings


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a draft as vLLM and TensorRT-LLM load it",
        description="Write a draft as vLLM and TensorRT-LLM load it: one mask key, the target's vocabulary size. Exit "
        "code 0 where both would load it, 1 where it is written and one of them would not.",
    )
    parser.add_argument("draft", metavar="DRAFT", help="folder or Hub id of the draft")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, not there yet or empty")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target", help="folder or Hub id of the target; its config says the vocabulary size")
    size.add_argument("--pad-vocab-to", type=int, metavar="N", help="vocabulary size, where no target is at hand")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hub.checkpoint import read_json, vocab_size
    from ..hub.engines import ENGINES, check_draft, would_load
    from ..hub.export import export_draft

    logging.disable_progress_bar()
    output = export_draft(args.draft, args.output, args.target, args.pad_vocab_to)
    findings = check_draft(output, args.target, name=str(args.output))
    print_findings(findings)
    print(json.dumps({"draft": str(output), "vocab_size": vocab_size(read_json(output, "config.json"))}))
    return 0 if all(would_load(findings, engine) for engine in ENGINES) else 1
