"""A conversation: several turns in the target's chat template, the cache of earlier turns kept."""

from __future__ import annotations

import weakref
from html import escape
from typing import Any

from pard_hf.host import cache_of
from pard_hf.loading import Pair
from pard_hf.tokens import next_prompt

from .html import shares, tinted
from .job import Job, Ticket
from .race import Lane
from .settings import Settings, check_length, checked_prompt
from .visitor import Shelf, Visitor

MOST_CACHES = 4
CACHES = Shelf("cache", MOST_CACHES)


class Chat:
    """What has been said between one visitor and the target."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.shown: list[tuple[str, str]] = []
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

    def keep(self, turn: ChatTurn, cache: Any) -> None:
        """Add a turn."""
        answer = turn.lane.tokens
        content = turn.pair.tokenizer.decode(answer, skip_special_tokens=True)
        user, assistant = {"role": "user", "content": turn.text}, {"role": "assistant", "content": content}
        self.messages = [*self.messages, user, assistant]
        self.shown = turn.conversation(tinted(turn.pair.tokenizer, turn.lane.rounds))
        self.past, self.answer, self.target, self.cache = turn.ids, answer, weakref.ref(turn.pair.target), cache
        CACHES.keep(self)


class ChatTurn(Job):
    """One question and its answer. A turn that is ended early keeps what was said; one that fails changes nothing."""

    def __init__(
        self,
        pair: Pair,
        chat: Chat,
        text: str,
        settings: Settings,
        visitor: Visitor | None = None,
        ticket: Ticket | None = None,
    ):
        super().__init__(ticket)
        self.pair, self.chat, self.text, self.settings = pair, chat, checked_prompt(text), settings
        self.visitor, self.lane, self.doing = visitor or Visitor(), Lane(self.check), "Answering …"
        self.ids: list[int] = []
        self.num_reused = 0

    def work(self) -> None:
        chat, output = self.chat, None
        with self.traced():
            self.ids = chat.prompt(self.pair, self.text)
        check_length(self.pair, self.ids, self.settings, "conversation")
        cache, chat.cache = chat.usable_cache(self.pair, self.ids), None
        self.num_reused = 0 if cache is None else cache.get_seq_length()
        proposing = self.settings.proposing(self.pair, self.visitor)
        try:
            output = self.lane.run(self.pair, self.ids, self.settings, proposing, past_key_values=cache)
        finally:
            if output is not None or (self.is_ended_early and self.lane.rounds):
                chat.keep(self, None if output is None else cache_of(output))

    def conversation(self, answer: str | None = None) -> list[tuple[str, str]]:
        """What was said so far and this turn, untinted as long as it grows: by whom, and the HTML of it."""
        if answer is None:
            answer = escape(self.pair.tokenizer.decode(self.lane.tokens, skip_special_tokens=True))
        return [*self.chat.shown, ("user", escape(self.text)), ("assistant", answer)]

    def figures(self) -> str:
        """What the answer took, in words."""
        by = f" (accepted: {listed})" if (listed := shares(self.lane)) else ""
        return (
            f"{len(self.lane.tokens)} tokens in {self.lane.seconds:.2f} s, τ {self.lane.acceptance_length:.2f}{by}; "
            f"{self.num_reused} of {len(self.ids)} tokens of the conversation were in the cache."
        )
