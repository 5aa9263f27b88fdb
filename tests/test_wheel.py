"""The package as it is installed: built from an archive of its source, small, and complete without a checkout."""

import ast
import email
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from documents import ROOT

pytestmark = pytest.mark.slow

NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "bundled-pair")
LARGEST = 60e6
PROGRAM = """
import json, sys
import pard_hf
from pard_hf.cli import main
flags = "--max-new-tokens 8 --device cpu --dtype float32 --json"
code = main(["generate", "def is_even(n):", *flags.split()])
loaded = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "pard_hf"]
print(json.dumps({"code": code, "package": pard_hf.__file__, "loaded": loaded}))
"""


def run(*words, **kwargs):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An archive of a copy of the source, and the wheel that is built from this archive."""
    source, out = tmp_path_factory.mktemp("source") / "pard-hf", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    # Without isolation: the tools are those of this environment, and nothing is downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    [archive], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[1]) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(files.read(name))


@pytest.fixture(scope="module")
def generated(built, tmp_path_factory):
    """What `pard generate` prints in an environment that holds nothing but the wheel, and where it was run from.

    Its dependencies would be gigabytes to install: it reaches this environment's, behind its own packages.
    """
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    # Else a copy of the package that lies elsewhere could be what runs.
    run(python, "-c", "import importlib.util as u; assert u.find_spec('pard_hf') is None", cwd=folder, env={})
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", built[1])
    [own] = (folder / "venv").glob("lib/python*/site-packages")
    shared = {str(Path(importlib.metadata.distribution(name).locate_file(""))) for name in ("torch", "transformers")}
    # Read as lines of a path file, not as site folders: `.pth` files in there, such as an editable install's, are not.
    (own / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    *_, answer, told = run(python, "-c", PROGRAM, cwd=folder, env=environment).splitlines()
    script = run(folder / "venv" / "bin" / "pard", "generate", "--help", cwd=folder, env=environment)
    return json.loads(answer), {**json.loads(told), "venv": str(own), "help": script}


def test_wheel_is_small_and_holds_the_package_only(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()

    assert wheel.stat().st_size < LARGEST
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pard_hf"}
    assert {"pard_hf/py.typed", "pard_hf/bundled/README.md", "pard_hf/hub/templates/draft_card.md"} <= set(names)
    for model in ("target", "draft"):
        assert {f"pard_hf/bundled/{model}/{file}" for file in ("model.safetensors", "tokenizer.json")} <= set(names)


def test_archive_holds_what_the_wheel_is_built_from(built):
    archive, _ = built
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}

    assert archive.stat().st_size < LARGEST
    assert {"pyproject.toml", "README.md", "LICENSE", "pard_hf/bundled/draft/model.safetensors"} <= names


def test_wheel_generates_in_an_empty_environment(generated):
    answer, told = generated

    assert told["code"] == 0
    assert told["package"].startswith(told["venv"])
    assert all(file.startswith(told["venv"]) for file in told["loaded"])
    assert 1 <= answer["num_new_tokens"] <= 8
    assert answer["acceptance_length"] >= 1
    assert "--num-assistant-tokens" in told["help"]


def imported(file):
    """Packages that a module imports when it is loaded, other than the standard library and its own."""
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_generate_imports_is_required(generated, metadata):
    packages = {package for file in generated[1]["loaded"] for package in imported(file)}
    others = packages - set(sys.stdlib_module_names) - {"pard_hf", ""}
    distributions = importlib.metadata.packages_distributions()
    required = {
        normal(re.match(r"[\w.-]+", line).group())
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }

    assert {"torch", "transformers"} <= others
    for package in others:
        assert {normal(name) for name in distributions[package]} & required, package


def test_extras_are_named(metadata):
    assert {"bench", "train", "dev"} <= set(metadata.get_all("Provides-Extra"))
