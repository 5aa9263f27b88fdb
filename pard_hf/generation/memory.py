"""What is remembered of a target from call to call: an object that its caller owns, saves and passes again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from ..host import input_device
from ..io import whole_file
from .batch import cache_size
from .compilation import CompiledSteps
from .config import text_sources
from .recurrent import is_hybrid
from .sources import MAX_MATCH_LENGTH, Sources, Tables

# Rows of the input embedding that tell one target from another.
NUM_SIGNATURE_ROWS = 16
FORMAT = "pard_hf.AssistantMemory.1"


class AssistantMemory:
    """What the target found likeliest after each token, and how far each proposal source was right.

    A call without a memory begins with nothing. Pass the same one to every call for a user, or for texts of one kind:
    proposals get better, the output does not change. It holds token ids of what was read and generated, so do not
    share it between users who may not see each other's texts. One call at a time may use it.

    >>> memory = AssistantMemory(target)
    >>> target.generate(**inputs, prompt_lookup_num_tokens=10, assistant_memory=memory)
    >>> memory.save("memory.safetensors")
    >>> memory = AssistantMemory.load("memory.safetensors", target)

    Args:
        target ([`PreTrainedModel`]):
            The model whose habits are remembered.
    """

    def __init__(self, target: PreTrainedModel):
        self.signature = signature_of(target)
        self.tables = Tables.empty(target.config.get_text_config().vocab_size, input_device(target))
        self.lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self.tables).values())

    @property
    def num_tokens(self) -> int:
        """Count the tokens whose successors are known."""
        return int((self.tables.after_one[:, 0] >= 0).sum())

    def clear(self) -> None:
        """Forget everything."""
        with self.in_use():
            self.tables.clear()

    def save(self, path: str | Path) -> None:
        """Write the memory as one safetensors file, whole or not at all."""
        with self.in_use():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(self.tables).items()}
            with whole_file(Path(path)) as written:
                written.write_bytes(save(tensors, {"format": FORMAT, **self.signature}))

    @classmethod
    def load(cls, path: str | Path, target: PreTrainedModel) -> AssistantMemory:
        """Load the memory of a target.

        Raises:
            OSError: There is no such file.
            ValueError: The file is no memory, or that of another target.
        """
        memory = cls(target)
        expected = f"Expected a memory that `AssistantMemory.save` wrote, got `{path}`"
        advice = "Begin a new one with `AssistantMemory(target)`."
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{expected}, which cannot be read ({error}). {advice}") from error
        if metadata.pop("format", None) != FORMAT:
            raise ValueError(f"{expected}, which is none, or of another version of pard-hf. {advice}")
        check_signature(memory.signature, metadata)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in vars(memory.tables).items()}
        if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
            raise ValueError(f"{expected}, whose tensors are others. {advice}")
        tables = Tables(**tensors)
        if not tables.is_valid():
            raise ValueError(f"{expected}, which is damaged. {advice}")
        memory.tables.copy_(tables)
        return memory

    def check(self, target: PreTrainedModel) -> None:
        """Raise a `ValueError` if this is the memory of another target."""
        check_signature(signature_of(target), self.signature)

    @contextmanager
    def in_use(self) -> Iterator[Tables]:
        """Yield the tables, which no other call may use meanwhile."""
        if not self.lock.acquire(blocking=False):
            raise ValueError(
                "Expected an `assistant_memory` that no other call is using. Give each thread a memory of its own, or "
                "wait until the other call has ended."
            )
        try:
            yield self.tables
        finally:
            self.lock.release()


def signature_of(target: PreTrainedModel) -> dict[str, str]:
    """Describe a target: class, vocabulary and a digest of a few embeddings, in bfloat16 whatever it is loaded in."""
    config = target.config.get_text_config()
    signature = {"class": type(target).__name__, "vocab_size": str(config.vocab_size)}
    weight: Any = target.get_input_embeddings().weight
    if weight.device.type != "meta" and weight.is_floating_point():  # Offloaded or packed: nothing to compare with.
        rows = torch.linspace(0, len(weight) - 1, NUM_SIGNATURE_ROWS).long().to(weight.device)
        sample = weight.detach()[rows].to(torch.bfloat16).view(torch.int16).cpu()
        signature["embeddings"] = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    return signature


def check_signature(expected: dict[str, str], got: dict[str, str]) -> None:
    """Raise a `ValueError` where two targets differ in what both tell."""
    for name in expected:
        if name in got and expected[name] != got[name]:
            raise ValueError(
                f"Expected an `assistant_memory` of this target ({name} {expected[name]}), got one of another ({name} "
                f"{got[name]}). Keep a memory for each target."
            )


@contextmanager
def sources_of(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    config: Any,
    compiled: CompiledSteps | None,
    device: torch.device,
) -> Iterator[Sources | None]:
    """Yield the sources of a call besides the draft, over the caller's memory or a new one; `None` without any."""
    names = text_sources(config)
    if not names:
        yield None
        return
    memory = config._assistant_memory
    if memory is None:
        held: Any = nullcontext(Tables.empty(target.config.get_text_config().vocab_size, device))
    else:
        held = memory.in_use()
    with held as kept:
        tables = kept.to(device) if compiled is None else compiled.tables(kept, device)
        references = config._assistant_reference_texts
        if references is None:
            references = torch.full((1, 1), -1)
        elif compiled is not None:  # Texts of other lengths need not be compiled for.
            size = cache_size(references.shape[1])
            references = torch.nn.functional.pad(references, (0, size - references.shape[1]), value=-1)
        longest = config.max_matching_ngram_size or MAX_MATCH_LENGTH
        try:
            yield Sources(
                tables,
                references.to(device),
                longest_match=longest if "copy" in names else 0,
                learns_successors="successors" in names,
                has_draft=draft is not None,
                branches=not is_hybrid(target.config),
            )
        finally:
            if tables is not kept:
                kept.copy_(tables)
