"""Where, when and with what something was measured. Never says in which folder: that is nobody's business."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

# Flags whose values are files or folders, also where those do not exist yet.
PATH_FLAGS = ("--prompts", "--eval-prompts", "--data", "--output", "--file", "--chat-template")
# Settings of a checkpoint that change greedy texts.
DECODING_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens")


def shown_command(words: list[str], program: str = "pard") -> str:
    """A command line with file names instead of paths; Hub ids stay as they are."""
    shown, flag = [program], ""
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            shown.append(f"{flag}={shown_value(flag, value)}" if equals else flag)
        else:
            shown.append(shown_value(flag, word))
    return " ".join(shown)


def shown_value(flag: str, value: str) -> str:
    prefix, value = ("hub:", value[4:]) if value.startswith("hub:") else ("", value)
    is_path = (flag in PATH_FLAGS and not prefix) or value.startswith(("/", ".", "~")) or Path(value).exists()
    return prefix + (Path(value).name if is_path else value)


def shown_model(name: str | None) -> str:
    """A model as a result names it: a Hub id, or the last part of a folder."""
    return "bundled" if name is None else shown_value("", name)


def commit() -> str | None:
    """The commit of the checkout that runs, with a `+` where files differ from it; `None` outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "pard_hf").is_dir() or not (folder / ".git").exists():
        return None  # Installed; a repository further up is somebody else's.
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)


def device_name(device: torch.device) -> str:
    """A device in words, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        return f"CPU, {num_threads} thread{'s' * (num_threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def decoding_name(config: GenerationConfig) -> str:
    """Greedy, with the settings of the checkpoint that change its texts."""
    changed = {name: value for name, value in config.to_diff_dict().items() if name in DECODING_SETTINGS and value}
    return ", ".join(["greedy", *(f"{name} {value}" for name, value in changed.items())])


def own_version() -> str:
    """The version of the installed package; a copy of its folder, as in a Space, has none."""
    try:
        return version("pard-hf")
    except PackageNotFoundError:
        return "not installed"


def conditions_of(target: Any) -> dict[str, Any]:
    """Date, commit, versions and device of a run with `target`."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pard_hf": own_version(),
        },
        "device": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "decoding": decoding_name(target.generation_config),
    }
