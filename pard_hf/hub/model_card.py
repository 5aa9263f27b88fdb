"""Model cards, rendered from what files say: config, provenance, results. No figure in them is typed by hand.

What nobody measured or said is said to be missing. Metadata goes through `huggingface_hub`'s own classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .card_sections import body_of_draft, body_of_target
from .measurements import evaluation_results

if TYPE_CHECKING:
    from .known_drafts import KnownDraft

TAGS = ("pard", "speculative-decoding", "parallel-drafting")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardSource:
    """What a card is rendered from.

    Args:
        name (`str`):
            Hub id, or the name of a folder.
        config (`dict`):
            Content of config.json; empty where the checkpoint was not read.
        num_assistant_tokens (`int`, *optional*):
            K of its generation_config.json.
        correction_head (`dict`, *optional*):
            The settings of the head beside it, where there is one.
        num_parameters (`int`, *optional*):
            Counted in the headers of its weights.
        provenance (`dict`):
            Content of provenance.json, which training writes.
        results (`tuple` of `dict`):
            Contents of result files, each with its name under `file`.
        known ([`KnownDraft`], *optional*):
            Row of a draft that others have published.
        metadata (`dict`):
            `license`, `license_name`, `license_link`, `language`, `datasets`, `base_model`, as a person said them;
            they win over what files say.
        tags (`tuple[str, ...]`):
            Beside those that every card has.
        target (`str`, *optional*):
            A target it serves; by default the one it was trained for.
        is_target (`bool`):
            Whether this is the card of a target.
        is_bundled (`bool`):
            Whether it ships inside the package.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    num_assistant_tokens: int | None = None
    num_parameters: int | None = None
    correction_head: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    results: tuple[dict[str, Any], ...] = ()
    known: KnownDraft | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    target: str | None = None
    is_target: bool = False
    is_bundled: bool = False


def model_card(source: CardSource) -> ModelCard:
    """Render a card.

    Raises:
        ValueError: A result is of no known form, or the metadata is not what the Hub takes.
    """
    body = body_of_target(source) if source.is_target else body_of_draft(source)
    return ModelCard(f"---\n{card_data(source).to_yaml()}\n---\n\n{body.strip()}\n")


def draft_card(provenance: dict[str, Any]) -> str:
    """The card of a training checkpoint from its `provenance.json`, before anybody has given it a name."""
    return str(model_card(CardSource(name="FOLDER-OR-HUB-ID", provenance=provenance)))


def card_data(source: CardSource) -> ModelCardData:
    """The metadata: what the Hub filters and links by."""
    said = source.metadata
    base_model = base_model_of(source)
    license = said.get("license") or (source.known.license if source.known else None) or "unknown"
    kind = "target-model" if source.is_target else "draft-model"
    # What a pair reaches is the draft's figure; a target's own would be of another kind.
    results = None if source.is_target else evaluation_results(source.results) or None
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base_model else {}
    return ModelCardData(
        language=said.get("language"),
        license=license,
        license_name=said.get("license_name"),
        license_link=said.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=said.get("datasets") or sorted(set(datasets_of(source.provenance))) or None,
        tags=[*TAGS, kind, *source.tags],
        eval_results=results,
        model_name=source.name.split("/")[-1] if results else None,
        **relation,
    )


def base_model_of(source: CardSource) -> str | None:
    """Hub id of the model it was made from, where there is one."""
    known = source.known.base_model if source.known else None
    base = source.metadata.get("base_model") or known or source.provenance.get("base")
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) else None


def datasets_of(provenance: dict[str, Any]) -> Iterator[str]:
    """Hub ids of the data sets that manifests name, as `hub:org/name:split:field` or by themselves."""
    for file in provenance.get("data") or ():
        manifest = file.get("manifest") if isinstance(file, dict) else None
        for entry in (manifest or {}).get("sources") or ():
            for value in entry.values() if isinstance(entry, dict) else ():
                if isinstance(value, str) and value.startswith("hub:") and HUB_ID.fullmatch(value[4:].split(":")[0]):
                    yield value[4:].split(":")[0]
