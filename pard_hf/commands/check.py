"""`pard check`: would vLLM and TensorRT-LLM load this draft?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.engines import Finding


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="say whether vLLM and TensorRT-LLM would load a draft",
        description="Say whether vLLM and TensorRT-LLM would load a draft, and what is wrong if not. Weights are not "
        "loaded. Exit code 0 where both would load it, 1 where one would not.",
    )
    parser.add_argument("draft", metavar="DRAFT", help="folder or Hub id of the draft")
    parser.add_argument("--target", help="folder or Hub id of the target; only config and tokenizer are read")
    parser.add_argument("--json", action="store_true", help="print the findings once more, as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..hub.engines import ENGINES, check_draft, would_load

    findings = check_draft(args.draft, args.target)
    print_findings(findings)
    engines = {engine: would_load(findings, engine) for engine in ENGINES}
    if args.json:
        print(json.dumps({"engines": engines, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    return 0 if all(engines.values()) else 1


def print_findings(findings: list[Finding]) -> None:
    """One line an engine, then one a finding."""
    from ..hub.engines import ENGINES, would_load

    for engine, words in ENGINES.items():
        print(f"{words}: would {'' if would_load(findings, engine) else 'not '}load it")
    for finding in findings:
        kind = "must be mended" if finding.is_blocking else "note"
        print(f"{kind} ({finding.engine.replace('both', 'both engines')}): {finding.message}")
