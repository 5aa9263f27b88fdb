"""The README's first screen is code that runs."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pard_hf
from pard_hf import PardDraftModel, bundled_pair

README = (Path(pard_hf.__file__).parent.parent / "README.md").read_text()


def test_snippet_comes_early():
    assert README[: README.index("```python")].count("\n") < 25


def test_snippets_run_on_stand_ins(monkeypatch, capsys):
    """Hub ids are answered with the bundled pair; everything else is the README's own code."""
    load = {AutoModelForCausalLM: bundled_pair().target, AutoTokenizer: bundled_pair().target}
    for auto, path in load.items():
        original = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda name, original=original, path=path, **kwargs: original(
                name if Path(name).exists() else path, **{k: v for k, v in kwargs.items() if k != "device_map"}
            ),
        )
    original_draft = PardDraftModel.from_pretrained
    monkeypatch.setattr(PardDraftModel, "from_pretrained", lambda name, **kwargs: original_draft(bundled_pair().draft))
    names = {"prompts": ["def add(a, b):\n", "What is 2 + 2?\n"], "torch": torch}

    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)

    assert "def fibonacci(n):" in capsys.readouterr().out
