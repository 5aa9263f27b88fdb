"""Imports go one way, and importing the package costs next to nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pard_hf

PACKAGE = Path(pard_hf.__file__).parent


def test_the_package_does_not_know_gradio():
    assert not [path for path in PACKAGE.rglob("*.py") if "import gradio" in path.read_text()]


def test_import_is_light_and_changes_no_setting():
    heavy = ("gradio", "datasets", "trl", "matplotlib", "rich")
    program = (
        "import os, sys, torch; import torch._inductor.config as inductor\n"
        "environment, settings = dict(os.environ), inductor.save_config_portable()\n"
        "import pard_hf\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "print(dict(os.environ) == environment, inductor.save_config_portable() == settings)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "CI": "true"}
    )
    assert run.stdout.split("\n")[:2] == ["[]", "True True"]


def test_public_names_are_sorted_and_documented():
    assert list(pard_hf.__all__) == sorted(pard_hf.__all__)
    for name in pard_hf.__all__:
        assert getattr(pard_hf, name).__doc__, name
