"""Model cards, rendered from what a run wrote down; no figure in them is typed by hand."""

from __future__ import annotations

from typing import Any

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pard
- speculative-decoding
- parallel-draft
{base_model}---

# {title}

A parallel draft model: `{base}` adapted by conditional drop-token training to propose several tokens in one forward
pass ([PARD](https://huggingface.co/papers/2504.18583)). It changes how soon a target of its family says something,
never what it says.

```python
from pard_hf import PardDraftModel, with_pard

draft = PardDraftModel.from_pretrained("FOLDER-OR-HUB-ID", dtype="auto")
with_pard(target).generate(**inputs, assistant_model=draft)
```

## How it was made

| | |
|---|---|
{rows}

## Acceptance

{acceptance}

*A draft of a card, written beside the checkpoint. Licence, intended use and limits: whoever publishes it.*
"""


def draft_card(provenance: dict[str, Any]) -> str:
    """The card of a checkpoint from its `provenance.json`."""
    base = provenance.get("base", "a small causal LM")
    settings, counts = provenance.get("settings", {}), provenance.get("counts", {})
    facts = {
        "base model": base,
        "target": provenance.get("target"),
        "mask token id": settings.get("mask_token_id"),
        "K_train, r, r_min": ", ".join(
            str(settings.get(name)) for name in ("num_draft_tokens", "retention_rate", "min_retention_rate")
        ),
        "objective": settings.get("objective"),
        "step": provenance.get("step"),
        "rows, tokens": ", ".join(f"{counts[name]:,}" for name in ("num_rows", "num_tokens") if name in counts),
        "data": ", ".join(file["file"] for file in provenance.get("data", [])),
        "command": f"`{provenance['command']}`" if provenance.get("command") else None,
        "commit": provenance.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
        "device": provenance.get("device"),
        "date": provenance.get("date"),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in (None, ""))
    return CARD.format(
        base=base,
        base_model=f"base_model: {base}\n" if "/" in base else "",
        title=f"PARD draft of {base}",
        rows=rows,
        acceptance=acceptance_table(provenance.get("metrics", {})),
    )


def acceptance_table(metrics: dict[str, float]) -> str:
    """Acceptance length and position acceptance of each prompt set, of the last evaluation."""
    ending = "_acceptance_length"
    names = [name.removeprefix("eval_").removesuffix(ending) for name in metrics if name.endswith(ending)]
    names = [name for name in names if name]
    names = [name for name in names if f"eval_{name}_position_acceptance_1" in metrics]
    if not names:
        return "Not measured during training."
    lines = ["| prompts | acceptance length τ | acceptance of positions 1, 2, … |", "|---|---|---|"]
    for name in names:
        positions: list[str] = []
        while (key := f"eval_{name}_position_acceptance_{len(positions) + 1}") in metrics:
            positions.append(f"{metrics[key]:.2f}")
        lines.append(f"| `{name}` | {metrics[f'eval_{name}{ending}']:.2f} | {' '.join(positions)} |")
    return "\n".join(lines)
