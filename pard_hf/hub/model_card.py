"""Figures that others published about their drafts, quoted with source and hardware. None was measured here.

How a draft is used: in transformers on both tiers, in vLLM, in TensorRT-LLM.

Finding what a card is rendered from: checkpoint folders, the table of known drafts, folders of results.

What result files say of a draft: tables for people, evaluation results for the Hub's metadata.

Reads the JSON of `pard bench` (`cells`) and of whole-set acceptance (`sets`). Copies figures; computes none.

The text of a model card, section by section, in Markdown.

Model cards, rendered from what files say: config, provenance, results. No figure in them is typed by hand.

What nobody measured or said is said to be missing. Metadata goes through `huggingface_hub`'s own classes.
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
from ..loading import bundled_pair
from .checkpoint import local_folder, read_json, tensor_shapes, weight_files

REPOSITORY = "[AMD-AGI/PARD, README](https://github.com/AMD-AGI/PARD)"
PAPER = "[paper](https://huggingface.co/papers/2504.18583) v4, through notes of third parties"
CARD = "[the authors' own card](https://huggingface.co/amd/PARD-Llama-3.2-1B)"
BLOG = "AMD's blog, April 2025"
V1 = "vLLM 0.16.0 (V1 engine), best K of each task"
V0 = "vLLM, V0 engine"
HIGHEST = "the highest figure"


@dataclass(frozen=True)
class PublishedFigure:
    """One figure: speedup over plain decoding in the same engine, batch 1 and greedy unless `prompts` says otherwise.

    Args:
        target (`str`):
            As the source names it.
        hardware (`str`):
            As the source names it.
        engine (`str`):
            Engine and setting.
        prompts (`str`):
            Prompt set, or what was averaged.
        speedup (`str`):
            Over plain decoding, digit by digit as published.
        tokens_per_second (`str`, *optional*):
            Where published.
        source (`str`):
            Markdown link.
    """

    target: str
    hardware: str
    engine: str
    prompts: str
    speedup: str
    tokens_per_second: str | None
    source: str


PUBLISHED: dict[str, tuple[PublishedFigure, ...]] = {
    "amd/PARD-Llama-3.2-1B": (
        PublishedFigure("Llama 3.1 8B", "A100", V1, "HumanEval", "4.76", "373.13", REPOSITORY),
        PublishedFigure("Llama 3.1 8B", "A100", V1, "GSM8K", "4.00", "313.48", REPOSITORY),
        PublishedFigure("Llama 3.1 8B", "A100", V1, "MT-Bench", "2.72", "213.22", REPOSITORY),
        PublishedFigure("Llama 3.3 70B", "H20", V1, "HumanEval", "5.38", "377.36", REPOSITORY),
        PublishedFigure("Llama 3.3 70B", "H20", V1, "GSM8K", "4.52", "320.51", REPOSITORY),
        PublishedFigure("Llama 3.3 70B", "H20", V1, "MT-Bench", "2.70", "191.57", REPOSITORY),
        PublishedFigure("Llama 3.1 8B", "A100 40 GB", V0, "HumanEval", "3.63", "264.88", PAPER),
        PublishedFigure("Llama 3.1 8B", "A100 40 GB", V0, "average of tasks", "3.00", None, PAPER),
        PublishedFigure("Llama 3.1 8B", "A100 40 GB", V0, "HumanEval, batch 16", "1.33", None, PAPER),
        PublishedFigure("Llama 3.1 8B", "not said", "Transformers+", HIGHEST, "4.08", "311.5", CARD),
        PublishedFigure("Llama 3", "MI250", "Transformers+", HIGHEST, "3.3", None, BLOG),
    ),
    "amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B": (
        PublishedFigure("DeepSeek-R1-Distill-Qwen", "MI250", "Transformers+", HIGHEST, "2.3", None, BLOG),
    ),
    "amd/PARD-Qwen2.5-0.5B": (
        PublishedFigure("Qwen2.5 7B", "A100 40 GB", V0, "HumanEval", "3.76", "285.82", PAPER),
        PublishedFigure("Qwen2.5 7B", "A100 40 GB", V0, "average of tasks", "3.18", None, PAPER),
        PublishedFigure("Qwen2.5 14B", "A100 40 GB", V0, "HumanEval", "4.44", "181.19", PAPER),
        PublishedFigure("Qwen2.5 14B", "A100 40 GB", V0, "average of tasks", "3.71", None, PAPER),
        PublishedFigure("Qwen", "MI250", "Transformers+", HIGHEST, "4.87", None, BLOG),
    ),
    "amd/PARD-Qwen3-0.6B": (
        PublishedFigure("Qwen3 8B", "A100", V1, "HumanEval", "5.05", "386.10", REPOSITORY),
        PublishedFigure("Qwen3 8B", "A100", V1, "GSM8K", "4.40", "336.70", REPOSITORY),
        PublishedFigure("Qwen3 8B", "A100", V1, "MT-Bench", "2.52", "192.31", REPOSITORY),
    ),
}


def published_table(name: str) -> str:
    """The figures of a draft as a Markdown table."""
    figures = PUBLISHED.get(name, ())
    if not figures:
        return "None that we have read."
    lines = ["| target | hardware | engine | prompts | speedup | tokens/s | source |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        speed = figure.tokens_per_second or "not said"
        lines.append(
            f"| {figure.target} | {figure.hardware} | {figure.engine} | {figure.prompts} | {figure.speedup} | "
            f"{speed} | {figure.source} |"
        )
    return "\n".join(lines)


TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from pard_hf import {names}

tokenizer = AutoTokenizer.from_pretrained({target})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")
draft = PardDraftModel.from_pretrained({draft}, dtype="auto", device_map="auto")
inputs = tokenizer("def fibonacci(n):", return_tensors="pt", return_token_type_ids=False).to(target.device)

# The stock loop of transformers, on an untouched target
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)

# Our loop: batches, static cache, torch.compile
output = with_pard(target).generate(**inputs, assistant_model=draft, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""

VLLM = """```bash
{export}vllm serve {target} --speculative-config \\
  '{{"method": "draft_model", "model": "{draft}", "num_speculative_tokens": {num_drafts}, "parallel_drafting": true}}'
```"""

TENSORRT_LLM = """```python
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import PARDDecodingConfig

llm = LLM(
    "{target}",
    speculative_config=PARDDecodingConfig(max_draft_len={num_drafts}, speculative_model="{draft}"),
)
```"""

EXPORTED = "served-draft"


def transformers_snippet(draft: str, target: str) -> str:
    """Both tiers. Names are Python expressions: quoted Hub ids, or attributes of `bundled_pair()`."""
    is_bundled = "bundled_pair()" in draft
    names = ", ".join(["PardDraftModel", *(["bundled_pair"] if is_bundled else []), "with_pard"])
    return TRANSFORMERS.format(names=names, draft=draft, target=target)


def engine_snippets(draft: str, target: str, num_drafts: int, is_exported: bool) -> str:
    """vLLM and TensorRT-LLM, on the checkpoint itself or on an exported one.

    Args:
        draft (`str`) and target (`str`):
            Hub ids or folders.
        num_drafts (`int`):
            K.
        is_exported (`bool`):
            Whether the checkpoint needs the target's vocabulary size first.
    """
    export = f"pard export {draft} --target {target} --output {EXPORTED}\n" if is_exported else ""
    served = EXPORTED if is_exported else draft
    vllm = VLLM.format(export=export, target=target, draft=served, num_drafts=num_drafts)
    tensorrt = TENSORRT_LLM.format(target=target, draft=served, num_drafts=num_drafts)
    reason = " It wants the target's vocabulary size, which `pard export` gives the draft." if is_exported else ""
    return f"vLLM, 0.16 and later.{reason}\n\n{vllm}\n\nTensorRT-LLM, PyTorch backend:\n\n{tensorrt}"


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
    known = next((draft for draft in KNOWN_DRAFTS if draft.name == name), None)
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
PARD_ROUTES = ("tier2", "tier2_compiled", "tier1", "adaptive", "adaptive_compiled")
NOT_MEASURED = "not measured"


def measurements(results: tuple[dict[str, Any], ...]) -> str:
    """The tables of all results, each over the conditions it was measured under."""
    parts = [part for result in results for part in (table_of(result), conditions_line(result)) if part]
    return "\n\n".join(parts) or "Not measured."


def table_of(result: dict[str, Any]) -> str:
    if "cells" in result:
        return speed_table(result["cells"])
    if "sets" in result:
        return acceptance_table(result["sets"], result.get("num_assistant_tokens"))
    raise ValueError(
        f"Expected a result of `pard bench`, with `cells` or `sets`, got {result.get('file', 'one')!r} with "
        f"{sorted(result)}."
    )


def speed_table(cells: list[dict[str, Any]]) -> str:
    """One row a cell: prompts, batch size and K, then the speedup of each route over plain `generate`."""
    names = [name for name in ROUTES if any(name == route["route"] for cell in cells for route in cell["routes"])]
    heading = [
        "prompts",
        "number",
        "batch",
        "K",
        "τ",
        "plain, tokens/s",
        *(ROUTES[name] for name in names),
        "identical",
    ]
    rows = [heading]
    for cell in cells:
        routes = {route["route"]: route for route in cell["routes"]}
        identical = min(routes[name]["identical_share"] for name in names if name in routes)
        rows.append(
            [
                f"`{cell['prompts']}`",
                str(cell["num_prompts"]),
                str(cell["batch_size"]),
                str(cell["num_assistant_tokens"]),
                shown(acceptance_length(routes), ".2f"),
                shown(routes.get("ar", {}).get("tokens_per_second"), ".0f"),
                *(shown(routes.get(name, {}).get("speedup"), ".2f") for name in names),
                f"{identical:.0%}",
            ]
        )
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|---" * len(heading) + "|", *others])


def acceptance_length(routes: dict[str, dict[str, Any]]) -> float | None:
    """τ of the first parallel route there is; all propose the same, but for adaptive K."""
    return next((routes[name].get("acceptance_length") for name in PARD_ROUTES if name in routes), None)


def acceptance_table(sets: dict[str, Any], num_drafts: int | None) -> str:
    """One row a prompt set, of acceptance over all of it."""
    lines = [
        "| prompts | number | K | τ | α | acceptance of positions 1, 2, … | identical |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in sets.items():
        of = part["acceptance"]
        positions = " ".join(f"{share:.2f}" for share in of.get("position_acceptance", ())) or NOT_MEASURED
        lines.append(
            f"| `{name}` | {of['num_prompts']} | {shown(num_drafts, 'd')} | {of['acceptance_length']:.2f} | "
            f"{shown(of.get('acceptance_rate'), '.2f')} | {positions} | {shown(of.get('identical_share'), '.0%')} |"
        )
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    """A figure, or the words for one that nobody measured."""
    return NOT_MEASURED if value is None else format(value, form)


def conditions_line(result: dict[str, Any]) -> str:
    """Where, when and with what it was measured, the command, and the file that holds every figure."""
    versions = (f"{name} {version}" for name, version in result.get("versions", {}).items())
    known = [result.get("device"), result.get("dtype"), result.get("decoding")]
    if result.get("max_new_tokens"):
        known.append(f"at most {result['max_new_tokens']} new tokens")
    known += [*versions, f"commit {result['commit']}" if result.get("commit") else None, result.get("date")]
    line = " · ".join(str(part) for part in known if part) or "Conditions not said"
    command = f"\n\n    {result['command']}" if result.get("command") else ""
    return f"{line}: `{result['file']}`{command}" if result.get("file") else line + command


def evaluation_results(results: tuple[dict[str, Any], ...]) -> list[EvalResult]:
    """Metadata of the measurements at batch size 1, in the order of the files."""
    return [figure for result in results for figure in (*cell_figures(result), *set_figures(result))]


def cell_figures(result: dict[str, Any]) -> Iterator[EvalResult]:
    for cell in result.get("cells", ()):
        if cell["batch_size"] != 1:
            continue
        routes = {route["route"]: route for route in cell["routes"]}
        arguments = {"batch_size": 1, "num_assistant_tokens": cell["num_assistant_tokens"], **conditions(result)}
        length = acceptance_length(routes)
        if length is not None:
            yield figure(cell["prompts"], "acceptance_length", "Acceptance length", length, arguments)
        for name in ("tier1", "tier2", "tier2_compiled"):
            if name in routes:
                title = f"Speedup over plain generate, {ROUTES[name]}"
                yield figure(cell["prompts"], "speedup", title, routes[name]["speedup"], arguments)


def set_figures(result: dict[str, Any]) -> Iterator[EvalResult]:
    arguments = {"num_assistant_tokens": result.get("num_assistant_tokens"), **conditions(result)}
    for name, part in result.get("sets", {}).items():
        for key, title in (("acceptance_length", "Acceptance length"), ("acceptance_rate", "Acceptance rate")):
            if key in part["acceptance"]:
                yield figure(name, key, f"{title}, whole set", part["acceptance"][key], arguments)


def figure(prompts: str, metric: str, title: str, value: float, arguments: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=prompts,
        dataset_name=prompts,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 3),
        metric_args={key: argument for key, argument in arguments.items() if argument is not None},
    )


def conditions(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("device", "dtype", "decoding", "file") if result.get(key)}


PAPER = "[PARD](https://huggingface.co/papers/2504.18583)"
DEFAULT_NUM_DRAFTS = 12
PLACEHOLDER = "YOUR-TARGET"
BUNDLED_TARGET, BUNDLED_DRAFT = "bundled_pair().target", "bundled_pair().draft"
BUNDLED_ABOUT = (
    "**A stand-in to see the mechanism, not a useful assistant**: small enough to ship inside the package `pard-hf`. "
    "What it learned from and how it was made: [pard_hf/bundled/README.md](../pard_hf/bundled/README.md)."
)
BUNDLED_FOLDERS = """```bash
TARGET=$(python -c "from pard_hf import bundled_pair; print(bundled_pair().target)")
DRAFT=$(python -c "from pard_hf import bundled_pair; print(bundled_pair().draft)")
```

"""
READING = (
    "τ: tokens a round, the bonus token included. α: accepted of the drafted. Speedups are over plain `generate` on "
    "the same prompts in the same run. Identical: outputs that are plain `generate`'s token by token."
)
LIMITS = """\
- A draft model accompanies a target and is not meant to answer alone.
- Every emitted token is the target's own choice, so a bad draft costs time and never a word. In 16 bit a near tie can
  fall the other way, because a block and a single token are multiplied in different shapes.
- It proposes well where text is like its training text: gains are larger on code and mathematics than on chat, and
  shrink with the batch size and on contexts longer than those it was trained on.
- What the target must not say, it says no less with a draft: its own card holds for intended use and risks."""
CITATION = """\
```
@article{an2025pard,
  title={PARD: Accelerating LLM Inference with Low-Cost PARallel Draft Model Adaptation},
  author={An, Zihao and Bai, Huajun and Liu, Ziqiong and Li, Dong and Barsoum, Emad},
  journal={arXiv preprint arXiv:2504.18583},
  year={2025}
}
```"""


def body_of_draft(source: CardSource) -> str:
    """All sections of a draft's card."""
    parts = [f"# {title(source)}", about_draft(source), "## Use", usage(source), "## The checkpoint"]
    parts += [table(checkpoint_rows(source)), "## Measured with pard-hf", measured(source)]
    if source.known is not None:
        parts += [
            "## Published by its authors",
            "Theirs, not measured here. Speedup over plain decoding in the same engine, batch 1 and greedy unless "
            "said otherwise.",
            published_table(source.known.name),
        ]
    parts += ["## How it was made", how_made(source), "## Limits", LIMITS, "## Citation", CITATION]
    return "\n\n".join([*parts, "*Rendered by `pard card`.*"])


def body_of_target(source: CardSource) -> str:
    """All sections of the bundled target's card; other targets have cards of their own."""
    parts = [f"# {title(source)}", f"A causal LM that serves as target to the bundled draft. {BUNDLED_ABOUT}"]
    parts += ["## Use", transformers_snippet(BUNDLED_DRAFT, BUNDLED_TARGET), bundled_engines(source)]
    parts += ["## The checkpoint", table(checkpoint_rows(source))]
    parts += ["## Measured with pard-hf", "As a language model: not measured. With its draft:", measured(source)]
    return "\n\n".join([*parts, "## How it was made", how_made(source), "*Rendered by `pard card`.*"])


def title(source: CardSource) -> str:
    if source.provenance.get("base") and not source.known:
        return f"PARD draft of {source.provenance['base']}"
    return source.name


def about_draft(source: CardSource) -> str:
    base = source.provenance.get("base") or (source.known.base_model if source.known else None)
    of = f"`{base}`, adapted" if base else "a small causal LM, adapted"
    sentence = (
        f"A parallel draft model: {of} to propose several tokens in one forward pass ({PAPER}). Beside a target of "
        "its family it makes `generate()` finish sooner and changes nothing of what is said."
    )
    if source.is_bundled:
        return f"{sentence} {BUNDLED_ABOUT}"
    if source.known is not None:
        return (
            f"{sentence}\n\nMade and published by others as [`{source.name}`](https://huggingface.co/{source.name}); "
            "this card says how it is used with `pard-hf` and what is known of it. Its files were not read for that."
        )
    return sentence


def usage(source: CardSource) -> str:
    if source.is_bundled:
        return f"{transformers_snippet(BUNDLED_DRAFT, BUNDLED_TARGET)}\n\n{bundled_engines(source)}"
    target = target_of(source)
    snippet = transformers_snippet(f'"{source.name}"', f'"{target}"')
    if target == PLACEHOLDER:
        snippet = f"`{PLACEHOLDER}`: any model that shares the draft's tokenizer.\n\n{snippet}"
    is_exported = source.known is not None and source.known.needs_export
    engines = engine_snippets(source.name, target, num_drafts(source), is_exported)
    return f"{snippet}\n\n{engines}\n\n{engine_note(source)}"


def bundled_engines(source: CardSource) -> str:
    engines = engine_snippets("$DRAFT", "$TARGET", num_drafts(source), is_exported=True)
    engines = engines.replace('"$TARGET"', BUNDLED_TARGET).replace(
        "```python\n", "```python\nfrom pard_hf import bundled_pair\n"
    )
    return f"{BUNDLED_FOLDERS}{engines}\n\n{engine_note(source)}"


def engine_note(source: CardSource) -> str:
    note = "Neither engine was run for this card: the rules come from their source."
    if source.known is None and not source.is_bundled:
        note += " Where its vocabulary size is not the target's, `pard export` writes a draft that has it."
    return note


def target_of(source: CardSource) -> str:
    known = source.known.example if source.known else None
    return source.target or known or source.provenance.get("target") or PLACEHOLDER


def num_drafts(source: CardSource) -> int:
    return source.num_assistant_tokens or DEFAULT_NUM_DRAFTS


def checkpoint_rows(source: CardSource) -> dict[str, Any]:
    """What config, table or provenance say of the checkpoint."""
    config, known = source.config, source.known
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    settings = source.provenance.get("settings") or {}
    rows: dict[str, Any] = {}
    if not source.is_target:
        family = known.family if known else None
        rows["targets"] = family or source.target or source.provenance.get("target") or "any of its tokenizer"
        mask = config.get("pard_token", settings.get("mask_token_id"))
        rows["mask token (`pard_token`)"] = mask if mask is not None else known.mask_token_id if known else None
        rows["K, proposals a round"] = source.num_assistant_tokens or f"not said, {DEFAULT_NUM_DRAFTS} here"
    if known:
        rows["vocabulary of its targets"] = ", ".join(f"{size:,}" for size in known.vocab_sizes)
        return rows
    rows["architecture"] = ", ".join(config.get("architectures") or ()) or None
    if "hidden_size" in text:
        rows["layers × width"] = f"{text.get('num_hidden_layers')} × {text['hidden_size']}"
    rows["parameters"] = f"{source.num_parameters:,}" if source.num_parameters else None
    if source.correction_head:
        rank = source.correction_head.get("rank")
        rows["correction head"] = f"rank {rank}, in the folder `correction_head`; serving engines draft without it"
    rows["vocabulary"] = f"{text['vocab_size']:,}" if "vocab_size" in text else None
    rows["positions"] = text.get("max_position_embeddings")
    rows["weights"] = config.get("dtype") or config.get("torch_dtype")
    return rows


def measured(source: CardSource) -> str:
    tables = measurements(source.results)
    trained = training_acceptance(source.provenance.get("metrics") or {})
    if trained:
        tables = f"During training, by the real decoding loop:\n\n{trained}" + (
            f"\n\n{tables}" if source.results else ""
        )
    return f"{READING}\n\n{tables}" if source.results or trained else tables


def training_acceptance(metrics: dict[str, Any]) -> str:
    """Acceptance length and position acceptance of each prompt set, of the last evaluation; empty where none ran."""
    ending = "_acceptance_length"
    names = [name.removeprefix("eval_").removesuffix(ending) for name in metrics if name.endswith(ending)]
    names = [name for name in names if name and f"eval_{name}_position_acceptance_1" in metrics]
    lines = ["| prompts | acceptance length τ | acceptance of positions 1, 2, … |", "|---|---|---|"]
    for name in names:
        positions: list[str] = []
        while (key := f"eval_{name}_position_acceptance_{len(positions) + 1}") in metrics:
            positions.append(f"{metrics[key]:.2f}")
        lines.append(f"| `{name}` | {metrics[f'eval_{name}{ending}']:.2f} | {' '.join(positions)} |")
    return "\n".join(lines) if names else ""


def how_made(source: CardSource) -> str:
    """Rows of the provenance; what a table or a person knows where there is none."""
    if source.is_bundled:
        return "See [pard_hf/bundled/README.md](../pard_hf/bundled/README.md)."
    if source.known is not None:
        data = source.known.training_data
        base = source.known.base_model
        return table(
            {
                "base model": f"`{base}`, by the checkpoint's name or the authors' example" if base else None,
                "data": f"{data}, through notes of third parties" if data else None,
                "code": "[AMD-AGI/PARD](https://github.com/AMD-AGI/PARD)",
            }
        )
    return table(provenance_rows(source.provenance)) if source.provenance else "Not said."


def provenance_rows(provenance: dict[str, Any]) -> dict[str, Any]:
    settings, counts = provenance.get("settings") or {}, provenance.get("counts") or {}
    names = ("num_draft_tokens", "retention_rate", "min_retention_rate")
    files = [file.get("file") for file in provenance.get("data") or () if isinstance(file, dict)]
    return {
        "base model": provenance.get("base"),
        "target": provenance.get("target"),
        "K_train, r, r_min": ", ".join(str(settings.get(name)) for name in names) if settings else None,
        "objective": settings.get("objective"),
        "step": provenance.get("step"),
        "rows, tokens": ", ".join(f"{counts[name]:,}" for name in ("num_rows", "num_tokens") if name in counts),
        "data": ", ".join(str(file) for file in files if file),
        "command": f"`{provenance['command']}`" if provenance.get("command") else None,
        "commit": provenance.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
        "device": provenance.get("device"),
        "date": provenance.get("date"),
    }


def table(rows: dict[str, Any]) -> str:
    """Names and values; a value nobody gave is said to be missing."""
    lines = [f"| {name} | {'not said' if value in (None, '') else value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


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
