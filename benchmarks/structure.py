"""Count what the code is made of, and what a call runs through: `python benchmarks/structure.py --output FILE`.

Sizes are read from the source; calls are recorded with `sys.setprofile` on the bundled pair. Only functions of
`pard_hf` count. The figures of one round are the difference between a long and a short call, divided by their rounds:
prefill and the end of a call cancel out.
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
    """Files, lines, and what stands on them; a code line is one with a token that is not a comment or docstring."""
    size: dict[str, Any] = dict.fromkeys(("files", "lines", "code_lines", "docstring_lines", "classes"), 0)
    functions: dict[str, int] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        docstrings = docstring_lines(tree)
        lines = {number for number, line in enumerate(text.splitlines(), 1) if not is_blank(line)}
        size["files"] += 1
        size["lines"] += len(text.splitlines())
        size["code_lines"] += len(lines - docstrings)
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


def is_blank(line: str) -> bool:
    return not line.strip() or line.strip().startswith("#")


def docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, inside functions too; not for annotations alone."""
    paths = {module_name(path): path for path in sources(PACKAGE)}
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
    """Groups of modules that import each other (strongly connected components of more than one)."""
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


class Trace:
    """Record each function of the package that runs inside `with`, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __enter__(self) -> Trace:
        sys.setprofile(self.record)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def record(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            self.calls.append((code.co_filename, getattr(code, "co_qualname", code.co_name)))

    def figures(self) -> dict[str, int]:
        files = [file for file, _ in self.calls]
        return {
            "calls": len(files),
            "functions": len(set(self.calls)),
            "files": len(set(files)),
            "moves": sum(one != other for one, other in zip(files, files[1:], strict=False)),
        }


def trace_generate(**kwargs: Any) -> dict[str, Any]:
    """A greedy call of the bundled pair, and one of its rounds; the second call of a pair, as the first prepares."""
    from pard_hf import load_pair

    target, draft, tokenizer = load_pair(dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def call(num_tokens: int) -> tuple[dict[str, int], int]:
        settings = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": 0, "eos_token_id": None}
        with Trace() as trace:
            output = target.generate(
                **inputs, assistant_model=draft, **settings, **kwargs, return_dict_in_generate=True
            )
        return trace.figures(), output.stats.num_rounds

    call(8)
    (short, few), (long, many) = call(16), call(96)
    rounds = many - few
    return long | {
        "calls_a_round": round((long["calls"] - short["calls"]) / rounds, 1),
        "moves_a_round": round((long["moves"] - short["moves"]) / rounds, 1),
    }


def trace_train() -> dict[str, int]:
    """Two steps of `pard train` with one evaluation, on the bundled draft."""
    from pard_hf.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": PROMPT, "response": "    return n % 2 == 0\n" * (1 + n)}) for n in range(4)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        words = ["train", "--base", str(PACKAGE / "bundled" / "draft"), "--data", str(folder / "rows.jsonl")]
        words += ["--output", str(folder / "draft"), "--max-steps", "2", "--eval-prompts", str(folder / "rows.jsonl")]
        words += ["--target", str(PACKAGE / "bundled" / "target"), "--eval-steps", "2", "--device", "cpu"]
        with Trace() as trace:
            code = main(words)
    if code:
        raise SystemExit(f"Expected `pard train` to end with 0, got {code}.")
    return trace.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: print it)")
    args = parser.parse_args()
    package = sources(PACKAGE)
    calls: dict[str, Callable[[], Any]] = {
        "generate": trace_generate,
        "generate, tree of 16 nodes": lambda: trace_generate(assistant_tree_size=16),
        "generate, stop string": lambda: trace_generate(stop_strings=["never"], tokenizer=bundled_tokenizer()),
        "pard train, 2 steps": trace_train,
    }
    found = {
        "package": size_of(package),
        "package, app, demo, benchmarks, recipes": size_of(
            package + [path for name in BESIDE if (ROOT / name).exists() for path in sources(ROOT / name)]
        ),
        "cycles": cycles(imports()),
        **{name: trace() for name, trace in calls.items()},
    }
    text = json.dumps(found, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    sys.stdout.write(text)


def bundled_tokenizer() -> Any:
    from pard_hf import load_pair

    return load_pair().tokenizer


if __name__ == "__main__":
    main()
