"""A Space of the web demo: its front matter, its requirements, and an app that starts from its folder alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pard_hf

ROOT = Path(pard_hf.__file__).parent.parent


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "space"
    subprocess.run([sys.executable, str(ROOT / "spaces" / "build.py"), str(folder)], check=True)
    return folder


def test_front_matter_is_what_a_space_reads(space):
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]

    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == pinned
    assert (space / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60


def test_requirements_are_those_of_the_package(space):
    names = re.findall(r"^[\w-]+", (space / "requirements.txt").read_text(), flags=re.MULTILINE)

    assert names == [
        "torch",
        "transformers",
        "packaging",
        "safetensors",
        "huggingface-hub",
        "typer",
        "jinja2",
    ]


def test_the_app_starts_from_the_folder_alone(space, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    program = (
        "import app, pard_hf, threading; app.build_demo(device='cpu'); print(pard_hf.__file__)\n"
        "for thread in threading.enumerate():\n"
        "    if thread.name == 'bundled pair': thread.join()"
    )

    run = subprocess.run([sys.executable, "-c", program], cwd=space, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.split()[-1]).is_relative_to(space.resolve())
