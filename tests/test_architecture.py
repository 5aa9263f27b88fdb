"""Imports go one way, and importing the package costs next to nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pard_hf

PACKAGE = Path(pard_hf.__file__).parent


def test_the_package_does_not_know_gradio():
    assert not [path for path in PACKAGE.rglob("*.py") if "import gradio" in path.read_text()]


def run_program(program):
    environment = {**os.environ, "CI": "true"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split("\n")


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "huggingface_hub")
    program = f"import sys, pard_hf; print([name for name in {heavy!r} if name in sys.modules], pard_hf.__version__)"

    assert run_program(program)[0] == f"[] {pard_hf.__version__}"


def test_names_import_no_extra_and_change_no_setting():
    extras = ("gradio", "datasets", "trl", "matplotlib", "rich", "gguf")
    program = (
        "import os, sys, torch; import torch._inductor.config as inductor\n"
        "environment, settings = dict(os.environ), inductor.save_config_portable()\n"
        "from pard_hf import PardDraftModel, load_pair, with_pard\n"
        f"print([name for name in {extras!r} if name in sys.modules])\n"
        "print(dict(os.environ) == environment, inductor.save_config_portable() == settings)"
    )

    assert run_program(program)[:2] == ["[]", "True True"]


def test_public_names_are_sorted_and_documented():
    assert list(pard_hf.__all__) == sorted(pard_hf.__all__) == sorted(pard_hf.MODULES)
    assert set(pard_hf.__all__) <= set(dir(pard_hf))
    for name in pard_hf.__all__:
        assert getattr(pard_hf, name).__doc__, name
