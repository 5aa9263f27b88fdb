"""Render model cards from config, provenance, results and the table of known drafts.

The text is `templates/draft_card.md`. No number is typed by hand, and what was not measured or stated is shown as
missing. `templates/published.json` quotes what others published about their drafts, not measured here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..draft.addons import CORRECTION_HEAD, SETTINGS_FILE
from ..draft.known_drafts import KNOWN_DRAFTS, KnownDraft
from ..draft.model import DEFAULT_NUM_ASSISTANT_TOKENS, TAGS, UNNAMED_DRAFT
from ..draft.packaged import SCALE
from ..loading import BUNDLED as BUNDLED_FOLDER
from ..loading import SMOLLM2, bundled_pair
from ..smollm2 import HUB_ID as HUB_TARGET
from .checkpoint import local_folder, read_json, tensor_shapes, text_config

TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED: dict[str, list[dict[str, str]]] = json.loads((TEMPLATES / "published.json").read_text(encoding="utf-8"))
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PLACEHOLDER = "YOUR-TARGET"
HEAD_FILE = f"{CORRECTION_HEAD}/{SETTINGS_FILE}"
BUNDLED = ("bundled-draft", "bundled-target")
SMOLLM2_DRAFT = "smollm2-draft"
CARD_FILES = ("config.json", "generation_config.json", "provenance.json", "README.md", HEAD_FILE)
# Metadata that no other file holds, kept when a card is rendered again.
STATED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
ROUTES = {
    "ar_plus": "plain, compiled",
    "pld": "prompt lookup",
    "ad": "same draft, token by token",
    "tier1": "untouched target",
    "tier2": "our loop",
    "tier2_compiled": "our loop, compiled",
    "adaptive": "our loop, adaptive K",
    "adaptive_compiled": "our loop, adaptive K, compiled",
}
# Of results that compare what proposes: chains of the draft, trees, and with the text.
SOURCE_ROUTES = {
    "tier2": "chain",
    "head": "chain, correction head",
    "tree_head 32": "tree of 32, correction head",
    "every_source 32": "tree of 32, draft, head and text",
}
PARD_ROUTES = ("tier2", "tier2_compiled", "tier1", "adaptive", "adaptive_compiled")


@dataclass(frozen=True)
class CardSource:
    """What a card is rendered from.

    `config`, `provenance` and `correction_head` are JSON files of the checkpoint, `results` result files with their
    names under `file`, `known` the entry of a draft published by others. `metadata` has the keys of `STATED`, which
    win over files; `tags` are added to those of every card.
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
    is_packaged: bool = False

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """Return the results of our loop."""
        return [result for result in self.results if "engine" not in result]

    @property
    def engine_runs(self) -> list[dict[str, Any]]:
        """Return the results of `benchmarks/engines.py`."""
        return [result for result in self.results if "engine" in result]


def all_names() -> list[str]:
    """Name every model that has a card in this repository."""
    return [*(draft.name for draft in KNOWN_DRAFTS), *BUNDLED, SMOLLM2_DRAFT]


def card_source(name: str, results: Sequence[str | Path] = (), **stated: Any) -> CardSource:
    """Collect what a checkpoint's card is rendered from.

    Args:
        name (`str`):
            `bundled-draft`, `bundled-target`, `smollm2-draft`, a known draft (which is not downloaded), a folder, or a
            Hub id.
        results (`Sequence[str]`, *optional*):
            Result files, and folders, of which the files about the checkpoint are read.
        stated:
            Fields of [`CardSource`] or of its `metadata`, which win over files.

    Raises:
        OSError: There is no such folder, file or repository, or the Hub cannot be reached.
        ValueError: A file is damaged or of another kind.
    """
    fields: dict[str, Any] = {key: stated.pop(key) for key in ("target", "tags") if stated.get(key)}
    metadata = {key: value for key, value in stated.items() if value}
    known = next((draft for draft in KNOWN_DRAFTS if draft.name == name), None)
    if known is not None:
        return CardSource(name, known=known, results=load_results(results, name), metadata=metadata, **fields)
    if name in BUNDLED:
        folder, drafting = (Path(path) for path in bundled_pair())
        folder = folder if name == "bundled-target" else drafting
        about, shown, measured = folder.parent, name, "bundled"  # The pair has one README and one set of results.
        fields |= {"is_bundled": True, "is_target": folder != drafting, "target": "the bundled target"}
    elif name == SMOLLM2_DRAFT:
        folder = drafting = about = BUNDLED_FOLDER / SMOLLM2
        shown, measured = name, SMOLLM2
        fields |= {"is_packaged": True, "target": HUB_TARGET}
    else:
        folder = drafting = about = local_folder(name, CARD_FILES)
        shown = measured = Path(name).resolve().name if Path(name).is_dir() else name
    shapes = tensor_shapes(folder)
    return CardSource(
        name=shown,
        config=read_json(folder, "config.json"),
        num_assistant_tokens=read_json(drafting, "generation_config.json", {}).get("num_assistant_tokens"),
        num_parameters=sum(prod(shape) for key, shape in shapes.items() if not key.endswith(SCALE)) or None,
        correction_head=read_json(folder, HEAD_FILE, {}) or packaged_head(shapes),
        provenance=read_json(folder, "provenance.json", {}),
        results=load_results(results, measured),
        metadata={**stated_in(about / "README.md"), **metadata},
        **fields,
    )


def packaged_head(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Describe the correction head among the weights of a draft in the small form; empty without one."""
    gate = shapes.get(f"{CORRECTION_HEAD}.gate.weight")
    return {} if gate is None else {"rank": gate[0]}


def stated_in(card: Path) -> dict[str, Any]:
    """Read the `STATED` metadata of an existing card."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in STATED if data.get(key) and data[key] != "unknown"}


def load_results(paths: Sequence[str | Path], name: str) -> tuple[dict[str, Any], ...]:
    """Read result files, and of folders those about `name`."""
    files = [(path, [path] if not path.is_dir() else sorted(path.glob("*.json"))) for path in map(Path, paths)]
    results = [(path, load_result(file)) for path, found in files for file in found]
    return tuple(result for path, result in results if not path.is_dir() or is_about(result, name))


def load_result(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected a result of `pard bench` in {path.name}, got no JSON: measure again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path.name}, got a {type(content).__name__}.")
    return {**content, "file": path.name}


def is_about(result: dict[str, Any], name: str) -> bool:
    """Return whether a result is about a checkpoint: by its `draft`, else by its file name.

    `bundled_pair.json` is about the bundled pair, `draft_smollm2.json` and `engines_smollm2_gsm8k.json` about the
    draft of SmolLM2; results with random layers added (`scale`) are about neither.
    """
    is_measurement = not result.get("scale") and ("cells" in result or "sets" in result)
    kind, _, rest = result["file"].removesuffix(".json").partition("_")
    about = rest.partition("_")[0] if kind in ("draft", "engines") else None
    return is_measurement and name in (result.get("draft", kind), about)


def hub_id(name: Any) -> str | None:
    """Return the Hub id that a name is, `None` where it is that of a folder."""
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def draft_card(provenance: dict[str, Any]) -> str:
    """Render the card of a training checkpoint, which has no name yet, from its provenance."""
    return str(model_card(CardSource(name=UNNAMED_DRAFT, provenance=provenance)))


def model_card(source: CardSource) -> ModelCard:
    """Render a card; raise a `ValueError` for a result of unknown form or metadata that the Hub refuses."""
    known, provenance = source.known, source.provenance
    base = known.base_model if known else provenance.get("base")
    return ModelCard.from_template(
        card_data(source),
        template_path=str(TEMPLATES / "draft_card.md"),
        source=source,
        known=known,
        title=f"PARD draft of {base}" if base and not known else source.name,
        base=base,
        target=source.target or (known.example if known else None) or hub_id(provenance.get("target")) or PLACEHOLDER,
        num_drafts=source.num_assistant_tokens or DEFAULT_NUM_ASSISTANT_TOKENS,
        text=text_config(source.config),
        trained=training_table(provenance.get("metrics") or {}),
        results=[(result, result_table(result)) for result in source.measurements],
        engine_runs=[(result, engine_table(result)) for result in source.engine_runs],
        published=PUBLISHED.get(source.name, ()),
    )


def card_data(source: CardSource) -> ModelCardData:
    """Make the metadata that the Hub filters and links by."""
    stated, known = source.metadata, source.known
    base = stated.get("base_model") or (known.base_model if known else None) or source.provenance.get("base")
    base_model = hub_id(base)
    # Measurements of a pair belong on the draft's card only.
    results = [] if source.is_target else [one for ours in source.measurements for one in evaluation_results(ours)]
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base_model else {}
    return ModelCardData(
        language=stated.get("language"),
        license=stated.get("license") or (known.license if known else None) or "unknown",
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=stated.get("datasets") or sorted(set(datasets_of(source.provenance))) or None,
        tags=[*TAGS, "target-model" if source.is_target else "draft-model", *source.tags],
        eval_results=results or None,
        model_name=source.name.split("/")[-1] if results else None,
        **relation,
    )


def datasets_of(provenance: dict[str, Any]) -> Iterator[str]:
    """Find the Hub ids of the data sets (`hub:org/name:split:field`) that manifests name."""
    for file in provenance.get("data") or ():
        manifest = file.get("manifest") if isinstance(file, dict) else None
        for entry in (manifest or {}).get("sources") or ():
            for value in entry.values() if isinstance(entry, dict) else ():
                if isinstance(value, str) and value.startswith("hub:") and HUB_ID.fullmatch(value[4:].split(":")[0]):
                    yield value[4:].split(":")[0]


def training_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Tabulate the last evaluation of training, one row a prompt set."""
    rows = []
    for name in re.findall(r"^eval_(.+)_acceptance_length$", "\n".join(metrics), flags=re.MULTILINE):
        shares: list[str] = []
        while (key := f"eval_{name}_position_acceptance_{len(shares) + 1}") in metrics:
            shares.append(f"{metrics[key]:.2f}")
        if shares:
            rows.append([f"`{name}`", f"{metrics[f'eval_{name}_acceptance_length']:.2f}", " ".join(shares)])
    return [["prompts", "acceptance length τ", "acceptance of positions 1, 2, …"], *rows] if rows else []


def result_table(result: dict[str, Any]) -> list[list[str]]:
    """Tabulate a result of `pard bench` (`cells`) or of acceptance over whole prompt sets (`sets`)."""
    if "cells" in result:
        return speed_table(result["cells"])
    if "sets" in result:
        return acceptance_table(result["sets"], result.get("num_assistant_tokens"))
    raise ValueError(
        f"Expected a result of `pard bench`, with `cells` or `sets`, got {result.get('file', 'one')!r} with "
        f"{sorted(result)}."
    )


def speed_table(cells: list[dict[str, Any]]) -> list[list[str]]:
    """Tabulate the speedup of each route over plain `generate`, one row a cell."""
    by_name = [{route["route"]: route for route in cell["routes"]} for cell in cells]
    names = [name for name in ROUTES if any(name in routes for routes in by_name)]
    rows = [["prompts", "number", "batch", "K", "τ", "plain, tokens/s", *(ROUTES[n] for n in names), "identical"]]
    for cell, routes in zip(cells, by_name, strict=True):
        settings = [str(cell[key]) for key in ("num_prompts", "batch_size", "num_assistant_tokens")]
        identical = min(routes[name]["identical_share"] for name in names if name in routes)
        plain = formatted(routes.get("ar", {}).get("tokens_per_second"), ".0f")
        speedups = [formatted(routes.get(name, {}).get("speedup"), ".2f") for name in names]
        length = formatted(acceptance_length(routes), ".2f")
        rows.append([f"`{cell['prompts']}`", *settings, length, plain, *speedups, f"{identical:.0%}"])
    return rows


def acceptance_length(routes: dict[str, dict[str, Any]]) -> float | None:
    """Return τ of the first parallel route; all but adaptive K propose the same."""
    return next((routes[name].get("acceptance_length") for name in PARD_ROUTES if name in routes), None)


def acceptance_table(sets: dict[str, Any], num_drafts: int | None) -> list[list[str]]:
    """Tabulate acceptance over prompt sets, one row a set."""
    if any("routes" in measured for measured in sets.values()):
        return source_table(sets, num_drafts)
    rows = [["prompts", "number", "K", "τ", "α", "acceptance of positions 1, 2, …", "identical"]]
    for name, measured in sets.items():
        found = measured["acceptance"]
        shares = " ".join(f"{share:.2f}" for share in found.get("position_acceptance", ())) or "not measured"
        length, rate = f"{found['acceptance_length']:.2f}", formatted(found.get("acceptance_rate"), ".2f")
        number, identical = str(found["num_prompts"]), formatted(found.get("identical_share"), ".0%")
        rows.append([f"`{name}`", number, formatted(num_drafts, "d"), length, rate, shares, identical])
    return rows


def source_table(sets: dict[str, Any], num_drafts: int | None) -> list[list[str]]:
    """Tabulate τ of what proposes, one row a prompt set."""
    names = [name for name in SOURCE_ROUTES if any(name in measured["routes"] for measured in sets.values())]
    titles = [f"τ, {SOURCE_ROUTES[name]}" for name in names]
    rows = [["prompts", "number", "K", *titles, "repeated 4-grams", "identical"]]
    for prompts, measured in sets.items():
        routes = measured["routes"]
        lengths = [formatted(routes.get(name, {}).get("acceptance_length"), ".2f") for name in names]
        identical = min(routes[name]["identical_share"] for name in names if name in routes)
        repeated = formatted(measured.get("repeated_4gram_share"), ".2f")
        number = [str(measured["num_prompts"]), formatted(num_drafts, "d")]
        rows.append([f"`{prompts}`", *number, *lengths, repeated, f"{identical:.0%}"])
    return rows


def engine_table(result: dict[str, Any]) -> list[list[str]]:
    """Tabulate texts and rounds of a draft in a serving engine beside our loop's (`benchmarks/engines.py`)."""
    heading = "prompts", "number", "same text as without a draft", "same as ours", "rounds", "rounds, ours"
    rows = [list(heading)]
    for name, found in result["sets"].items():
        shares = (f"{found[key]:.0%}" for key in ("same_as_vllm_without_draft", "same_as_ours"))
        rounds = (str(found[key]["num_rounds"]) for key in ("vllm", "ours"))
        rows.append([f"`{name}`", str(found["num_prompts"]), *shares, *rounds])
    return rows


def formatted(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def evaluation_results(result: dict[str, Any]) -> Iterator[EvalResult]:
    """Make metadata of measurements at batch size 1 and over whole prompt sets."""
    conditions = {key: result.get(key) for key in ("device", "dtype", "decoding", "file")}
    for cell in result.get("cells", ()):
        if cell["batch_size"] != 1:
            continue
        routes = {route["route"]: route for route in cell["routes"]}
        settings = {"batch_size": 1, "num_assistant_tokens": cell["num_assistant_tokens"], **conditions}
        length = acceptance_length(routes)
        if length is not None:
            yield evaluation_result(cell["prompts"], "acceptance_length", "Acceptance length", length, settings)
        for name in ("tier1", "tier2", "tier2_compiled"):
            if name in routes:
                title = f"Speedup over plain generate, {ROUTES[name]}"
                yield evaluation_result(cell["prompts"], "speedup", title, routes[name]["speedup"], settings)
    settings = {"num_assistant_tokens": result.get("num_assistant_tokens"), **conditions}
    for name, measured in result.get("sets", {}).items():
        for route, title in SOURCE_ROUTES.items():
            if (found := measured.get("routes", {}).get(route)) is not None:
                length = found["acceptance_length"]
                yield evaluation_result(name, "acceptance_length", f"Acceptance length, {title}", length, settings)
        if "acceptance" not in measured:
            continue
        for metric, title in (("acceptance_length", "Acceptance length"), ("acceptance_rate", "Acceptance rate")):
            if metric in measured["acceptance"]:
                value = measured["acceptance"][metric]
                yield evaluation_result(name, metric, f"{title}, whole set", value, settings)


def evaluation_result(prompts: str, metric: str, title: str, value: float, settings: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=prompts,
        dataset_name=prompts,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 3),
        metric_args={key: setting for key, setting in settings.items() if setting},
    )
