"""What result files say of a draft: tables for people, evaluation results for the Hub's metadata.

Reads the JSON of `pard bench` (`cells`) and of whole-set acceptance (`sets`). Copies figures; computes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult

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
