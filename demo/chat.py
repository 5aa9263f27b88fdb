"""A conversation: several turns in the target's chat template, the cache of earlier turns kept."""

from __future__ import annotations

import weakref
from html import escape
from typing import Any

from pard_hf.conversation import Conversation
from pard_hf.host import cache_of
from pard_hf.loading import Pair

from .html import shares, tinted
from .job import Job, Ticket
from .race import Lane
from .settings import Settings, check_length, checked_prompt
from .visitor import Shelf, Visitor

MOST_CACHES = 4
CACHES = Shelf("cache", MOST_CACHES)


class Chat:
    """What one visitor and the target said to each other, and how the page shows it."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str]] = []
        self.said = Conversation()
        self.target: weakref.ref[Any] | None = None
        self.is_left = False  # For a new one; not shown any more.

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.said.messages

    def with_target(self, target: Any) -> Conversation:
        """The conversation so far; to another target than the last one's, its token ids and cache mean nothing."""
        if self.target is not None and self.target() is target:
            return self.said
        other = Conversation()
        other.messages = self.messages
        return other

    def keep(self, turn: ChatTurn, said: Conversation) -> None:
        """Show a turn from now on, and go on from a conversation that holds it."""
        self.shown = turn.conversation(tinted(turn.pair.tokenizer, turn.lane.rounds))
        self.said, self.target = said, weakref.ref(turn.pair.target)
        CACHES.keep(said)


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
        said, output = self.chat.with_target(self.pair.target), None
        with self.traced():
            self.ids = said.prompt(self.pair.tokenizer, self.text)
        check_length(self.pair, self.ids, self.settings, "conversation")
        cache = said.take_cache(self.ids)
        self.num_reused = 0 if cache is None else cache.get_seq_length()
        proposing = self.settings.proposing(self.pair, self.visitor)
        try:
            output = self.lane.run(self.pair, self.ids, self.settings, proposing, past_key_values=cache)
        finally:
            if output is not None or (self.is_ended_early and self.lane.rounds):
                cache = None if output is None else cache_of(output)
                said.keep(self.pair.tokenizer, self.text, self.ids, self.lane.tokens, cache)
                self.chat.keep(self, said)

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
