"""The files around the package: workflows, hooks and templates agree with the Makefile and pyproject.toml."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from documents import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_of_the_makefile_with_few_rights(path):
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", MAKEFILE, flags=re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    workflow = load(path)

    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        versions = job.get("strategy", {}).get("matrix", {}).get("version", [""])
        for step in job["steps"]:
            for name in re.findall(r"make ([\w${}. -]+?)(?: \w+=|$)", step.get("run", "")):
                for version in versions:
                    assert name.replace("${{ matrix.version }}", version) in targets


def test_every_python_that_is_admitted_is_tested():
    [oldest] = re.findall(r'requires-python = ">=3\.(\d+)"', PYPROJECT)
    tested = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["python"]["strategy"]["matrix"]["python"]

    assert tested == [f"3.{minor}" for minor in range(int(oldest), 14)]


def test_hooks_format_with_the_version_of_make_quality():
    [version] = re.findall(r"ruff==([\d.]+)", PYPROJECT)
    hooks = {repo["repo"]: repo for repo in load(ROOT / ".pre-commit-config.yaml")["repos"]}

    assert hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == f"v{version}"


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_asks_something(name):
    form = load(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")

    assert {"name", "description", "body"} <= form.keys()
    assert all(field["attributes"]["label"] for field in form["body"])


def test_benchmarks_run_by_file_from_any_folder(tmp_path):
    """As `python benchmarks/NAME.py` runs them: their own folder is on the path, the checkout is not."""
    pytest.importorskip("matplotlib")
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = f"import sys; sys.path[0] = {str(ROOT / 'benchmarks')!r}; import {', '.join(names)}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )

    assert done.returncode == 0, done.stderr
