"""Figures that others published about their drafts, quoted with source and hardware. None was measured here."""

from __future__ import annotations

from dataclasses import dataclass

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
