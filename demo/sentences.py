"""What went wrong, as a sentence for a visitor: what to do, and nothing of the machine behind the page."""

from __future__ import annotations

import errno
import logging
import re

import torch
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# Absolute paths, of which the last part is what a visitor may know.
FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s'\"`,:/]+/)+([^\s'\"`,:/]*)")


def in_words(error: BaseException) -> str:
    """A sentence for whatever went wrong; the unexpected goes to the log in full."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk of the machine is full. Make room, or take a model that is already there."
    if isinstance(error, OSError) and error.errno is not None:  # Its own text names folders of the machine.
        return f"The machine refused: {error.strerror}. Choose another model or file, or ask who runs the demo."
    if "trust_remote_code" in str(error):
        return "This model brings code of its own, which the demo does not run. Choose another model."
    if isinstance(error, SafetensorError):
        return "The weights cannot be read, perhaps they are not all there. Download or save the model again."
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return without_folders(str(error))
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "The device has no memory left for this. Choose a smaller model, or fewer new tokens."
    logger.error("a visitor's request failed", exc_info=error)
    return f"An unexpected error ({type(error).__name__}): the server's log says more. Try other settings."


def without_folders(text: str) -> str:
    """Shorten absolute paths to their last part."""
    return FOLDERS.sub(r"\1", text)
