"""Find checkpoints by name before anything heavy is imported: a folder that is there, the Hub's cache, or the Hub.

The libraries that load checkpoints try an unreachable Hub for most of a minute, whatever the name is.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from typing import Literal

# How long an answer of the Hub is waited for.
SECONDS = 4.0
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SMOLLM2: Literal["smollm2"] = "smollm2"  # Neither a folder nor a Hub id: it is looked for in several ways.


def find_checkpoints(*names: str | None) -> str | None:
    """Check that models can be had by these names; `None` among them stands for what ships with the package.

    Where the Hub does not answer and its cache has all of them, turn this process's Hub offline and return a sentence
    that says so.

    Raises:
        OSError: A name leads nowhere, or the cache lacks it and the Hub does not answer or is offline.
    """
    elsewhere = [name for name in names if name is not None and name != SMOLLM2 and not Path(name).is_dir()]
    for name in elsewhere:
        check_is_hub_id(name)
    return check_hub([name for name in elsewhere if not is_cached(name)]) if elsewhere else None


def check_is_hub_id(name: str) -> None:
    """Raise a `FileNotFoundError` for a name that is no folder and looks like one."""
    near = near_folder(name)
    first, _, rest = name.partition("/")
    is_in_folder = bool(rest) and Path(first).is_dir()
    if HUB_ID.fullmatch(name) and near is None and (not is_in_folder or is_cached(name)):
        return
    remedy = f"Did you mean `{near}`?" if near else "Correct the name."
    if HUB_ID.fullmatch(name):
        remedy += f" If it is a Hub id, do `hf download {name}` first."
    raise FileNotFoundError(
        f"Expected a folder or a Hub id such as `amd/PARD-Qwen2.5-0.5B`, got `{name}`, which is not there. {remedy}"
    )


def near_folder(name: str) -> str | None:
    """Return the checkpoint beside `name` whose name is most like it, or `None`."""
    try:
        beside = {folder.name: folder for folder in Path(name).parent.iterdir() if (folder / "config.json").is_file()}
    except OSError:
        return None
    near = get_close_matches(Path(name).name, beside, n=1)
    return str(beside[near[0]]) if near else None


def is_cached(name: str) -> bool:
    """Return whether the Hub's cache has the config of a model."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE)
    return isinstance(found, str)


def check_hub(missing: list[str]) -> str | None:
    """Ask the Hub whether it is there; without it, raise an `OSError` for `missing` models, or use the cache alone."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        if missing:
            raise OSError(
                f"Expected `{missing[0]}` in the Hub's cache, as HF_HUB_OFFLINE is set, got nothing. Unset it, or "
                "name a folder."
            )
        return None
    if (problem := hub_problem()) is None:
        return None
    if missing:
        raise OSError(
            f"Expected the Hub to answer for `{missing[0]}`, which is not in its cache, but {constants.ENDPOINT} does "
            f"not: {problem}. Look to the network, or name a folder."
        )
    # Both: the constant was read from the environment, and `datasets` will read that.
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    return f"The Hub ({constants.ENDPOINT}) does not answer ({problem}): the cache is used."


def hub_problem() -> str | None:
    """Ask the Hub for an answer, whatever it is; return why there was none, or `None`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.append(None)
        except Exception as error:  # Of httpx or httpx2, by version; of a proxy or a certificate.
            answers.append(" ".join(str(error).split()) or type(error).__name__)

    # In a thread, as looking a host up and trying its addresses in turn have no common limit.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else f"no answer in {SECONDS:.0f} s"
