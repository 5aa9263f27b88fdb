"""The text of a model card, section by section, in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .measurements import measurements
from .published import published_table
from .snippets import engine_snippets, transformers_snippet

if TYPE_CHECKING:
    from .model_card import CardSource

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
