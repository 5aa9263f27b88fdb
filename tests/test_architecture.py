"""Imports go one way, and importing the package costs next to nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pard_hf

PACKAGE = Path(pard_hf.__file__).parent
# What each module of ours may import of ours; a folder stands for all its modules.
ALLOWED = {
    "files": set(),
    "host": set(),
    "json_lines": set(),
    "generation/verification": set(),
    "generation/stats": set(),
    "training/cod": set(),
    "subclass": set(),
    "incremental_text": set(),
    "positions": set(),
    "sharing": set(),
    "correction_head": set(),
    "language_model_head": {"host"},
    "loadable": set(),
    "trimmed_vocabulary": {"language_model_head"},
    "parts": {"correction_head", "trimmed_vocabulary"},
    "drafting": {"correction_head", "host", "language_model_head", "parts", "positions", "trimmed_vocabulary"},
    "draft_model": {
        "drafting",
        "host",
        "hub/errors",
        "hub/known_drafts",
        "hub/upload",
        "language_model_head",
        "loadable",
        "parts",
        "positions",
        "subclass",
        "trimmed_vocabulary",
    },
    "generation/cache": {"host"},
    "generation/processors": set(),
    "generation/tree": {"generation/verification"},
    "generation/candidate_generator": {
        "draft_model",
        "drafting",
        "generation/noise",
        "generation/stats",
        "generation/verification",
        "host",
        "positions",
    },
    "generation/attention": set(),
    "generation/linear": set(),
    "generation/checks": {
        "draft_model",
        "generation/cache",
        "generation/probe",
        "generation/schedule",
        "host",
        "positions",
    },
    "generation/call": {"draft_model", "generation/compilation"},
    "generation/noise": set(),
    "generation/probe": {"generation/cache", "generation/role", "host"},
    "generation/rows": set(),
    "generation/request": set(),
    "generation/clock": set(),
    "generation/transfer": set(),
    "generation/schedule": set(),
    "generation/steps": {
        "correction_head",
        "drafting",
        "generation/role",
        "generation/rows",
        "generation/schedule",
        "generation/tree",
        "generation/verification",
    },
    "generation/forwards": {
        "generation/batch",
        "generation/compilation",
        "generation/processors",
        "generation/request",
        "generation/schedule",
        "generation/steps",
    },
    "generation/results": {"generation/request", "generation/role", "generation/rows"},
    "generation/batch": {
        "generation/cache",
        "generation/compilation",
        "generation/role",
        "generation/rows",
        "generation/schedule",
        "generation/transfer",
    },
    "generation/compilation": {
        "generation/cache",
        "generation/linear",
        "generation/rows",
        "generation/schedule",
        "host",
    },
    "generation/role": {"generation/cache", "host", "positions"},
    "generation/decoding": {
        "draft_model",
        "generation/attention",
        "generation/batch",
        "generation/clock",
        "generation/compilation",
        "generation/forwards",
        "generation/noise",
        "generation/processors",
        "generation/request",
        "generation/results",
        "generation/rows",
        "generation/schedule",
        "generation/stats",
        "generation/steps",
        "generation/transfer",
        "generation/verification",
    },
    "training/data_collator": {"training/cod"},
    "training/losses": set(),
    "training/packing": set(),
    "training/mask_token": set(),
    "training/row_attention": {"generation/cache", "training/cod"},
    "training/objective": {"host", "language_model_head", "training/losses", "training/row_attention"},
    "training/head": {"correction_head", "draft_model"},
    "hub/errors": set(),
    "hub/published": set(),
    "hub/measurements": set(),
    "hub/snippets": set(),
    "hub/card_sections": {"hub/measurements", "hub/model_card", "hub/published", "hub/snippets"},
    "hub/model_card": {"hub/card_sections", "hub/known_drafts", "hub/measurements"},
    "hub/checkpoint": {"draft_model", "hub/errors", "parts"},
    "hub/known_drafts": {"hub/checkpoint"},
    "hub/card_sources": {"hub/checkpoint", "hub/known_drafts", "hub/model_card", "pair", "parts"},
    "hub/upload": {
        "draft_model",
        "hub/checkpoint",
        "hub/engines",
        "hub/errors",
        "hub/export",
        "hub/model_card",
        "parts",
    },
    "hub/vllm": {"hub/checkpoint"},
    "hub/engines": {"draft_model", "hub/checkpoint", "hub/vllm", "training/mask_token"},
    "hub/export": {"draft_model", "hub/checkpoint", "hub/engines"},
}


def imports_of(path):
    """Modules of ours that a file imports at its top level or inside functions."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield "/".join([*base, *(node.module or "").split(".")]).strip("/")


def test_imports_go_one_way():
    for name, allowed in ALLOWED.items():
        assert set(imports_of(PACKAGE / f"{name}.py")) <= allowed, name
    for path in (PACKAGE / "training").glob("*.py"):
        assert not any(name.startswith("evaluation") for name in imports_of(path)), path
    for path in (PACKAGE / "evaluation").glob("*.py"):
        assert not any(name.startswith("training") for name in imports_of(path)), path
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "web":
            assert not any(name.startswith("web") for name in imports_of(path)), path


def test_one_module_knows_gradio():
    knowing = {path.name for path in PACKAGE.rglob("*.py") if "import gradio" in path.read_text()}

    assert knowing == {"visits.py"}


def test_pure_functions_know_only_torch():
    for name in ("generation/verification", "generation/noise", "generation/rows", "training/cod", "training/losses"):
        text = (PACKAGE / f"{name}.py").read_text()
        assert "transformers" not in text, name


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
