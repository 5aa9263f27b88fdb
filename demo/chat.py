"""A conversation: several turns in the target's chat template, the cache of earlier turns kept."""

from __future__ import annotations

import time
import weakref
from typing import Any

from pard_hf.generation.stats import DecodingStats
from pard_hf.host import cache_of
from pard_hf.loading import Pair
from pard_hf.tokens import next_prompt

from .generate import generate
from .job import Job
from .settings import Settings, check_length, checked_prompt
from .transcript import Transcript
from .visitor import Shelf, Visitor

MOST_CACHES = 4
CACHES = Shelf("cache", MOST_CACHES)


class Chat:
    """What has been said between one visitor and the target."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.past: list[int] = []
        self.answer: list[int] = []
        self.target: weakref.ref[Any] | None = None
        self.cache: Any = None

    def prompt(self, pair: Pair, text: str) -> list[int]:
        """Token ids up to where the answer to `text` begins; those of earlier turns stay as they are."""
        messages = [*self.messages, {"role": "user", "content": text}]
        is_ours = self.is_with(pair)
        return next_prompt(pair.tokenizer, messages, self.past if is_ours else [], self.answer if is_ours else [])

    def is_with(self, pair: Pair) -> bool:
        """Whether the last answer was this target's."""
        return self.target is not None and self.target() is pair.target

    def usable_cache(self, pair: Pair, ids: list[int]) -> Any:
        """The cache of earlier turns where it is this target's and of these very ids, else `None`."""
        if self.cache is None or not self.is_with(pair):
            return None
        length = self.cache.get_seq_length()
        return self.cache if 0 < length < len(ids) and ids[:length] == (self.past + self.answer)[:length] else None

    def keep(self, pair: Pair, text: str, ids: list[int], answer: list[int], cache: Any) -> None:
        """Add a turn."""
        content = pair.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages = [*self.messages, {"role": "user", "content": text}, {"role": "assistant", "content": content}]
        self.past, self.answer, self.target, self.cache = ids, answer, weakref.ref(pair.target), cache
        CACHES.keep(self)


class ChatTurn(Job):
    """One question and its answer. A turn that is stopped keeps what was said; one that fails changes nothing.

    Raises:
        ValueError: There is nothing to answer, or the conversation has become too long.
    """

    def __init__(self, pair: Pair, chat: Chat, text: str, settings: Settings, visitor: Visitor | None = None):
        super().__init__(self.generate)
        self.visitor = visitor
        self.pair, self.chat, self.text, self.settings = pair, chat, checked_prompt(text), settings
        self.ids = chat.prompt(pair, self.text)
        check_length(pair, self.ids, settings, "conversation")
        self.cache = chat.usable_cache(pair, self.ids)
        self.num_reused = 0 if self.cache is None else self.cache.get_seq_length()
        self.transcript = Transcript(self.check)
        self.stats: DecodingStats | None = None
        self.seconds = 0.0

    def generate(self) -> None:
        output, start = None, time.perf_counter()
        try:
            call = self.pair, self.ids, self.settings, self.visitor
            output = generate(*call, past_key_values=self.cache, streamer=self.transcript)
            self.stats = output.stats
        finally:
            self.seconds = time.perf_counter() - start
            if output is not None or (self.is_stopped and self.transcript.tokens):
                cache = None if output is None else cache_of(output)
                self.chat.keep(self.pair, self.text, self.ids, self.transcript.tokens, cache)
            self.cache = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation, with as much of the answer as there is."""
        if self.is_over:
            return self.chat.messages
        said = self.pair.tokenizer.decode(self.transcript.tokens, skip_special_tokens=True)
        turn = [{"role": "user", "content": self.text}, {"role": "assistant", "content": said}]
        return [*self.chat.messages, *turn]
