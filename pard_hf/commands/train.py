"""`pard train`: adapt a small causal LM into a parallel draft."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..training.settings import TrainingSettings, choices_of


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adapt a small causal LM into a parallel draft",
        description="Adapt a small causal LM into a parallel draft. Rows: {text}, {prompt, response} or {messages}.",
    )
    groups: dict[Any, Any] = {
        None: parser,
        **{name: parser.add_argument_group(name) for name in ("rows", "method", "evaluation", "run")},
    }
    kinds = get_type_hints(TrainingSettings)
    for one in fields(TrainingSettings):
        if "help" in one.metadata:
            default = "method" if one.default is not MISSING else None
            add_flag(groups[one.metadata.get("group", default)], one, kinds[one.name])
    parser.set_defaults(run=run)


def add_flag(group: Any, one: Any, kind: Any) -> None:
    """Add the flag of one setting to a group of the parser."""
    metadata, name = one.metadata, f"--{one.name.replace('_', '-')}"
    if kind is bool:
        group.add_argument(name, action="store_true", help=metadata["help"])
        return
    plain = next(
        (arg for arg in get_args(kind) if arg in (int, float, Path)), kind if kind in (int, float, Path) else str
    )
    none = metadata.get("none")
    parse = (lambda word: None if word == none else plain(word)) if none else metadata.get("parse", plain)
    is_list = get_origin(kind) in (list, dict)
    is_required = one.default is MISSING and one.default_factory is MISSING
    group.add_argument(
        name,
        type=parse,
        required=is_required,
        choices=choices_of(kind) or None,
        nargs="+" if is_list else metadata.get("nargs"),
        const=metadata.get("const"),
        default=argparse.SUPPRESS,
        help=metadata["help"] + ("" if one.default in (None, MISSING) else f" (default: {one.default})"),
    )


def run(args: argparse.Namespace) -> int:
    from ..evaluation.acceptance import prepare_evaluator
    from ..hub.model_card import draft_card
    from ..io import shown_command
    from ..training.train import train_draft

    flags = [one.name for one in fields(TrainingSettings) if "help" in one.metadata]
    given = {name: getattr(args, name) for name in flags if hasattr(args, name)}
    if "training_arguments" in given:
        given["training_arguments"] = dict(given["training_arguments"])
    settings = TrainingSettings(**given, command=shown_command(args.words))
    print(json.dumps({"draft": str(train_draft(settings, prepare_evaluator, draft_card))}))
    return 0
