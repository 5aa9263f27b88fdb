"""Count what the code is made of, and what a call runs through: `python benchmarks/structure.py --output FILE`.

Sizes are read from the source; calls are recorded with `sys.setprofile` on the bundled pair. Only functions of
`pard_hf` count. Counts of one round are the difference between a long and a short call, divided by their rounds:
prefill and the end of a call cancel out. Older checkouts can be counted too: no module is imported at the top.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(importlib.util.find_spec("pard_hf").origin).parents[1]  # type: ignore[union-attr, arg-type]
PACKAGE = ROOT / "pard_hf"
BESIDE = ("app.py", "demo", "benchmarks", "recipes")
PROMPT = "def is_even(n):\n"


def sources(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def size_of(paths: list[Path]) -> dict[str, Any]:
    """Count files and lines; a code line is one with a token that is not a comment or docstring."""
    size: dict[str, Any] = dict.fromkeys(("files", "lines", "code_lines", "docstring_lines", "classes"), 0)
    functions: dict[str, int] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        docstrings = docstring_lines(tree)
        filled = {number for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
        size["files"] += 1
        size["lines"] += len(lines)
        size["code_lines"] += len(filled - docstrings)
        size["docstring_lines"] += len(docstrings)
        for node in ast.walk(tree):
            size["classes"] += isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                functions[name] = (node.end_lineno or node.lineno) - node.lineno + 1
    longest = max(functions, key=lambda name: functions[name])
    return size | {
        "functions": len(functions),
        "median_function_lines": statistics.median(functions.values()),
        "longest_function_lines": functions[longest],
        "longest_function": longest,
    }


def docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def imports() -> dict[str, set[str]]:
    """Find the modules of the package that each module imports, inside functions too; not for annotations alone."""
    named = [(path.relative_to(ROOT).with_suffix("").parts, path) for path in sources(PACKAGE)]
    paths = {".".join(parts).removesuffix(".__init__"): path for parts, path in named}
    return {name: set(imported_by(name, path, paths)) for name, path in paths.items()}


def imported_by(name: str, path: Path, paths: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield from [one for one in (f"{base}.{alias.name}", base) if one in paths and one != "pard_hf"][:1]


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from runtime_nodes(node)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Find groups of modules that import each other (strongly connected components of more than one)."""
    reached = {name: reachable(name, graph) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(name: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def trace(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """Call a function; return its value and counts of the functions of the package that ran, in order."""
    calls: list[tuple[str, str]] = []

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            calls.append((code.co_filename, getattr(code, "co_qualname", code.co_name)))

    sys.setprofile(record)
    try:
        value = function()
    finally:
        sys.setprofile(None)
    files = [file for file, _ in calls]
    moves = sum(one != other for one, other in zip(files, files[1:], strict=False))
    return value, {"calls": len(files), "functions": len(set(calls)), "files": len(set(files)), "moves": moves}


def trace_generate(**kwargs: Any) -> dict[str, Any]:
    """Trace a greedy call of the bundled pair, and one of its rounds; not its first call, which prepares."""
    from pard_hf import load_pair

    target, draft, tokenizer = load_pair(dtype="float32")
    kwargs |= {"do_sample": False, "eos_token_id": None, "assistant_model": draft, "return_dict_in_generate": True}
    if "stop_strings" in kwargs:
        kwargs["tokenizer"] = tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def call(num_tokens: int) -> Any:
        return target.generate(**inputs, **kwargs, max_new_tokens=num_tokens, min_new_tokens=0)

    call(8)
    (few, short), (many, long) = trace(lambda: call(16)), trace(lambda: call(96))
    rounds = many.stats.num_rounds - few.stats.num_rounds
    return long | {f"{name}_a_round": round((long[name] - short[name]) / rounds, 1) for name in ("calls", "moves")}


def trace_train() -> dict[str, int]:
    """Trace two steps of `pard train` with one evaluation, on the bundled draft."""
    from pard_hf.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": PROMPT, "response": "    return n % 2 == 0\n" * (1 + n)}) for n in range(4)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        words = ["train", "--base", str(PACKAGE / "bundled" / "draft"), "--data", str(folder / "rows.jsonl")]
        words += ["--output", str(folder / "draft"), "--max-steps", "2", "--eval-prompts", str(folder / "rows.jsonl")]
        words += ["--target", str(PACKAGE / "bundled" / "target"), "--eval-steps", "2", "--device", "cpu"]
        code, counts = trace(lambda: main(words))
    if code:
        raise SystemExit(f"Expected `pard train` to end with 0, got {code}.")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write (default: print it)")
    args = parser.parse_args()
    package = sources(PACKAGE)
    others = [path for name in BESIDE if (ROOT / name).exists() for path in sources(ROOT / name)]
    found = {
        "package": size_of(package),
        "package, app, demo, benchmarks, recipes": size_of(package + others),
        "cycles": cycles(imports()),
        "generate": trace_generate(),
        "generate, tree of 16 nodes": trace_generate(assistant_tree_size=16),
        "generate, stop string": trace_generate(stop_strings=["never"]),
        "pard train, 2 steps": trace_train(),
    }
    text = json.dumps(found, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
