"""What is kept for a visitor from call to call, and never meets another visitor's."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

from pard_hf.generation.memory import AssistantMemory, signature_of

MOST_MEMORIES = 32


class Shelf:
    """The last few owners of something that takes memory: `name` of the oldest becomes `None`."""

    def __init__(self, name: str, most: int):
        self.name, self.most = name, most
        self.owners: OrderedDict[int, weakref.ref[Any]] = OrderedDict()
        self.lock = threading.Lock()

    def keep(self, owner: Any) -> None:
        with self.lock:
            self.owners[id(owner)] = weakref.ref(owner)
            self.owners.move_to_end(id(owner))
            while len(self.owners) > self.most:
                forgotten = self.owners.popitem(last=False)[1]()
                if forgotten is not None:
                    setattr(forgotten, self.name, None)


MEMORIES = Shelf("memory", MOST_MEMORIES)


class Visitor:
    """One visitor's memory of the target used last."""

    def __init__(self) -> None:
        self.memory: AssistantMemory | None = None

    def memory_of(self, target: Any) -> AssistantMemory:
        """Return the memory of a target, empty where the last one was of another target."""
        memory = self.memory
        if memory is None or memory.signature != signature_of(target):
            memory = self.memory = AssistantMemory(target)
        MEMORIES.keep(self)
        return memory
