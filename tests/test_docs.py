"""The README's first screen is code that runs."""

import re
from pathlib import Path

import torch

import pard_hf

README = (Path(pard_hf.__file__).parent.parent / "README.md").read_text()


def test_snippet_comes_early():
    assert README[: README.index("```python")].count("\n") < 25


def test_snippets_run(stand_ins, capsys):
    names = {"prompts": ["def add(a, b):\n", "What is 2 + 2?\n"], "torch": torch}

    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)

    assert "def fibonacci(n):" in capsys.readouterr().out
