"""What README and docs say beside figures and commands: links lead somewhere, messages are the package's own."""

import ast
import re

import pytest
import yaml
from documents import DOCUMENTS, ROOT, blocks_of, prose_of

import pard_hf

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it.
    import tomli as tomllib

TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_snippet_comes_early():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert readme[: readme.index("```python")].count("\n") < 25


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name if path.parent == ROOT else f"docs/{path.name}")
def document(request):
    return request.param


def anchors(path):
    """The anchors that a Markdown file's headings get on GitHub."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(document):
    text = prose_of(document.read_text(encoding="utf-8"))

    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", [path for path in DOCUMENTS if path.parent != ROOT], ids=lambda path: path.name)
def test_lines_are_short(page):
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 119, line


def test_fences_are_closed_and_named(document):
    text = document.read_text(encoding="utf-8")

    assert text.count("```") == 2 * len(blocks_of(text))
    if document.name != "README.md":
        assert {block.language for block in blocks_of(text)} <= {"bash", "python"}


def written_words(node):
    """A string as a reader sees it in the source: `…` where a value will stand."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]|\{\S*?\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(written_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def messages_of_the_package():
    for path in [*(ROOT / "pard_hf").rglob("*.py"), *(ROOT / "demo").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield written_words(node)


def test_messages_are_those_of_the_package():
    """Each heading of the third level is the beginning of a message, or all of it."""
    known = {re.sub("…+", "…", words) for words in messages_of_the_package()}
    headings = re.findall(r"^### (.*)$", TROUBLESHOOTING, flags=re.MULTILINE)

    assert len(headings) == len(set(headings)) >= 15
    for heading in headings:
        assert any(message.startswith(heading) for message in known), heading


def test_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: pard_hf\.([\w.]+)\.(\w+)$", text, flags=re.MULTILINE)

    assert {name: module for module, name in names} == pard_hf.MODULES


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    [paper] = citation["references"]

    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == pard_hf.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert paper == citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert {"type": "other", "value": "arXiv:2504.18583"}.items() <= paper["identifiers"][0].items()
    assert all(author["family-names"] and author["given-names"] for author in paper["authors"])


def test_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.*?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changelog, flags=re.MULTILINE)

    assert versions[0][0] == pard_hf.__version__
