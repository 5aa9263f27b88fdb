"""Put together what a Hugging Face Space of the web demo holds: `python spaces/build.py build/space`."""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def requirements() -> list[str]:
    """The requirements of the package and of its extra `app`; gradio a Space installs by its `sdk_version`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [
        re.search(rf"^{name} = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE) for name in ("dependencies", "app")
    ]
    needed = [name for found in lists if found for name in re.findall(r'"([^"]+)"', found[1])]
    return [name for name in needed if not name.startswith("gradio")]


def build(folder: Path) -> None:
    """Write the Space into `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (ROOT / "app.py", ROOT / "LICENSE", ROOT / "spaces" / "README.md"):
        shutil.copy(file, folder)
    for package in ("pard_hf", "demo"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
