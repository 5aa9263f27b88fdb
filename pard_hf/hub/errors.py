"""What the Hub's refusals mean, as sentences that say what to do.

Knows the exceptions of `huggingface_hub`, bare or wrapped by transformers, which hides the cause behind a sentence of
its own. Local problems pass as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in with `hf auth login` or pass `token=`"
Kind = TypeVar("Kind", bound=BaseException)


@contextmanager
def hub_errors(name: str | Path, revision: str | None = None, use_safetensors: bool = False) -> Iterator[None]:
    """Turn what the Hub refuses inside the context into an `OSError` of one sentence or two.

    Args:
        name (`str`):
            Hub id that is read or written. Nothing is turned where it is a folder.
        revision (`str`, *optional*):
            Branch, tag or commit that is asked for.
        use_safetensors (`bool`, *optional*, defaults to `False`):
            Whether pickled weights are refused; then the error for a checkpoint of those says how to allow them.

    Raises:
        OSError: The Hub has no such repository or revision, keeps it closed, or cannot be reached.
    """
    try:
        yield
    except Exception as error:
        sentence = None if Path(name).is_dir() else in_words(error, str(name), revision)
        if sentence is None and use_safetensors and isinstance(error, OSError) and "safetensors" in str(error):
            sentence = f"{error} Pass `use_safetensors=False` to load pickled weights you trust."
        if sentence is None:
            raise
        raise OSError(sentence) from error


def in_words(error: BaseException, name: str, revision: str | None = None) -> str | None:
    """Say what the Hub's part in an error means; `None` where it has none."""
    if find(error, GatedRepoError):
        return (
            f"The owners of `{name}` want their terms accepted first: do so at https://huggingface.co/{name}, then "
            f"{LOG_IN}."
        )
    if find(error, RevisionNotFoundError):
        return (
            f"`{name}` has no revision {revision!r}: https://huggingface.co/{name}/tree/main lists its branches and "
            "tags."
        )
    if find(error, RepositoryNotFoundError):
        return f"The Hub has no `{name}`, or it is private: check the id; for a private one {LOG_IN}."
    refusal = find(error, HfHubHTTPError)
    if refusal is not None and not isinstance(refusal, RemoteEntryNotFoundError):
        return refused(refusal.response.status_code, name)
    if find(error, OfflineModeIsEnabled) or (is_offline_mode() and find(error, LocalEntryNotFoundError)):
        return (
            f"`{name}` is not in the cache, not all of it at least, and HF_HUB_OFFLINE forbids to ask the Hub: unset "
            "it, or name a local folder."
        )
    if find(error, LocalEntryNotFoundError) or is_transport_error(error):
        return (
            f"The Hub cannot be reached for `{name}`: check the network and HF_ENDPOINT, or name a local folder. What "
            "is in the cache also loads offline."
        )
    return None


def refused(status: int, name: str) -> str:
    """Say what an answer of the Hub other than "not found" means."""
    if status == 401:
        return f"The Hub asks who you are before it opens `{name}` (401): {LOG_IN}."
    if status == 403:
        return f"Your token is not allowed to do this with `{name}` (403): take one with access, or ask its owners."
    if status == 429:
        return f"The Hub wants fewer requests than it got, the last for `{name}` (429): wait a few minutes."
    return f"The Hub answered {status} for `{name}`: try again later, or load from the cache with HF_HUB_OFFLINE=1."


def find(error: BaseException, kind: type[Kind]) -> Kind | None:
    """The first exception of a kind among an error and what caused it."""
    return next((cause for cause in causes(error) if isinstance(cause, kind)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def is_transport_error(error: BaseException) -> bool:
    """Whether no answer came at all. Told by name: releases of `huggingface_hub` differ in their HTTP package."""
    return any(base.__name__ == "TransportError" for cause in causes(error) for base in type(cause).__mro__)
