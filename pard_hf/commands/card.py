"""`pard card`: the model card of a draft, from what its files say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "card",
        help="render the model card of a draft from its config, provenance and results",
        description="Render a model card from config.json, provenance.json, result files and the table of published "
        "drafts. What nobody measured or said is said to be missing.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="folder or Hub id, `bundled-draft` or `bundled-target`; published drafts of the table are not downloaded",
    )
    parser.add_argument("--all", action="store_true", help="render every card of this repository into a folder")
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="JSON",
        help="results of `pard bench`; of a folder, those that name the checkpoint",
    )
    parser.add_argument("--output", type=Path, help="file, or folder with --all (default: standard output)")
    parser.add_argument("--target", help="a target it serves (default: the one it was trained for)")
    parser.add_argument("--license", help="as the Hub names it, such as apache-2.0 (default: unknown)")
    parser.add_argument("--base-model", help="Hub id of the model it was made from (default: what the files say)")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of its training data (default: what the files say)")
    parser.add_argument("--language", nargs="+", help="of its training text, such as en")
    parser.add_argument("--tags", nargs="+", help="beside those that every card has")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..hub.model_card import all_names, card_source, model_card

    said = {name: getattr(args, name) for name in ("target", "license", "base_model", "datasets", "language", "tags")}
    check_flags(args, said)
    if args.all:
        files = []
        for name in all_names():
            files.append(args.output / f"{name.split('/')[-1]}.md")
            model_card(card_source(name, args.results)).save(files[-1])
        print(json.dumps({"cards": [file.name for file in files]}))
        return 0
    card = model_card(card_source(args.checkpoint, args.results, **said))
    if args.output is None:
        print(card)
    else:
        card.save(args.output)
        print(json.dumps({"cards": [args.output.name]}))
    return 0


def check_flags(args: argparse.Namespace, said: dict[str, Any]) -> None:
    """Raise a `ValueError` unless one checkpoint is named, or all of them and a folder."""
    if args.all == (args.checkpoint is not None):
        raise ValueError("Expected a checkpoint or --all, got " + ("both." if args.all else "neither."))
    if not args.all:
        return
    if args.output is None or args.output.is_file():
        raise ValueError("Expected with --all a folder for the cards: pass --output model_cards.")
    flags = [f"--{name.replace('_', '-')}" for name, value in said.items() if value]
    if flags:
        raise ValueError(f"Expected {', '.join(flags)} with one checkpoint only, got --all.")
