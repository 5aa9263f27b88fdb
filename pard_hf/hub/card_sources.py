"""Finding what a card is rendered from: checkpoint folders, the table of known drafts, folders of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..pair import bundled_pair
from ..parts import CORRECTION_HEAD, SETTINGS_FILE
from .checkpoint import local_folder, read_json, tensor_shapes, weight_files
from .known_drafts import KNOWN_DRAFTS, KnownDraft, find_known_draft
from .model_card import CardSource

BUNDLED = ("bundled-draft", "bundled-target")
CARD_FILES = (
    *("config.json", "generation_config.json", "provenance.json", "README.md"),
    f"{CORRECTION_HEAD}/{SETTINGS_FILE}",
)
SAID = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def card_source(name: str, results: Sequence[str | Path] = (), **said: Any) -> CardSource:
    """What is known of a checkpoint.

    Args:
        name (`str`):
            `bundled-draft`, `bundled-target`, a draft of the table of known ones, a folder, or a Hub id.
        results (`Sequence[str]`, *optional*):
            Result files, taken as they are, and folders of them, of which those that name the checkpoint are taken.
        said:
            Fields of [`CardSource`] or of its `metadata`, over what files say.

    Raises:
        OSError: There is no such folder, file or repository.
        ValueError: A file is not what it should be.
    """
    fields = {key: said.pop(key) for key in ("target", "tags") if said.get(key)}
    metadata = {key: value for key, value in said.items() if value}
    known = find_known_draft(name)
    if known is not None:
        return known_source(known, results, metadata, fields)
    is_bundled = name in BUNDLED
    if is_bundled:
        is_target = name == "bundled-target"
        folder = Path(bundled_pair().target if is_target else bundled_pair().draft)
        fields |= {"is_bundled": True, "is_target": is_target, "target": "the bundled target"}
    else:
        folder = local_folder(name, CARD_FILES)
    # K is the draft's, on the card of the bundled target as well; the pair has one README for both.
    drafting, about = (Path(bundled_pair().draft), folder.parent) if is_bundled else (folder, folder)
    shown = name if not Path(name).is_dir() else Path(name).resolve().name
    return CardSource(
        name=shown,
        config=read_json(folder, "config.json"),
        num_assistant_tokens=optional_json(drafting, "generation_config.json").get("num_assistant_tokens"),
        num_parameters=num_parameters(folder),
        correction_head=optional_json(folder / CORRECTION_HEAD, SETTINGS_FILE),
        provenance=optional_json(folder, "provenance.json"),
        results=load_results(results, "bundled" if is_bundled else shown),
        metadata={**said_in(about / "README.md"), **metadata},
        **fields,
    )


def known_source(
    known: KnownDraft, results: Sequence[str | Path], metadata: dict[str, Any], fields: dict[str, Any]
) -> CardSource:
    return CardSource(
        name=known.name, known=known, results=load_results(results, known.name), metadata=metadata, **fields
    )


def all_names() -> list[str]:
    """Every model that has a card in this repository."""
    return [*(draft.name for draft in KNOWN_DRAFTS), *BUNDLED]


def optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if (folder / name).is_file() else {}


def num_parameters(folder: Path) -> int | None:
    """Parameters in the headers of the weights, tied ones once; `None` where there are no weights."""
    return sum(map(prod, tensor_shapes(folder).values())) if weight_files(folder) else None


def said_in(card: Path) -> dict[str, Any]:
    """What the metadata of a card that is there already says, so that it outlives the next rendering."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in SAID if data.get(key) and data[key] != "unknown"}


def load_results(paths: Sequence[str | Path], name: str) -> tuple[dict[str, Any], ...]:
    """The contents of result files, each with its name under `file`."""
    results: list[dict[str, Any]] = []
    for path in map(Path, paths):
        if path.is_dir():
            results += [result for result in map(load_result, sorted(path.glob("*.json"))) if is_about(result, name)]
        else:
            results.append(load_result(path))
    return tuple(results)


def load_result(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected a result of `pard bench` in {path.name}, got no JSON: measure again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path.name}, got a {type(content).__name__}.")
    return {**content, "file": path.name}


def is_about(result: dict[str, Any], name: str) -> bool:
    """Whether a result in a folder was measured with the checkpoint, as it stands and not enlarged.

    Files that name no draft are about the one that their own name begins with, such as `bundled_pair.json`.
    """
    if result.get("scale") or not ("cells" in result or "sets" in result):
        return False
    return bool(result.get("draft", result["file"].split("_")[0]) == name)
