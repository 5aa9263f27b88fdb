"""What happens when a visitor presses a button: generators of what the page shows next.

The only module here that knows Gradio. Nothing of one visitor is kept where another could see it: races,
conversations and memories live in the session's own state, and running jobs under the session's name.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from pard_hf.evaluation.benchmark import result_text
from pard_hf.loading import Pair

from . import html
from .bench import BenchJob, progress, prompt_file, report
from .chat import Chat, ChatTurn
from .inside import look_at_tree, look_inside, round_of
from .job import Job, Stopped
from .pairs import PairName, PairShelf
from .race import Race
from .running import RunningJobs
from .sentences import in_words
from .settings import MOST_DRAFT_TOKENS, Settings, encoded_prompt, whole
from .transcript import Round
from .visitor import Visitor

NO_ROUNDS = "<p>Run a race first: its rounds are shown here.</p>"


@dataclass(frozen=True)
class FinishedRace:
    """What it takes to look into a race's rounds."""

    pair: PairName
    ids: list[int]
    rounds: tuple[Round, ...]
    settings: Settings


class LoadJob(Job):
    """Loading a pair."""

    needs_device = False

    def __init__(self, shelf: PairShelf, name: PairName):
        super().__init__(self.load)
        self.shelf, self.name, self.doing = shelf, name, "Loading …"
        self.pair: Pair | None = None

    def load(self) -> None:
        self.pair = self.shelf.load(self.name, self.report)

    def report(self, text: str) -> None:
        self.check()
        self.doing = text


class LookJob(Job):
    """Drafting and verifying a round again."""

    def __init__(self, pair: Pair, race: FinishedRace, number: int):
        super().__init__(self.look)
        self.pair, self.race, self.number = pair, race, number
        self.shown = ""

    def look(self) -> None:
        race, tokenizer = self.race, self.pair.tokenizer
        if race.settings.looks_up:
            self.shown = html.accepted_table(
                tokenizer, round_of(race.rounds, self.number), self.number, len(race.rounds)
            )
            return
        looked = self.pair, race.ids, race.rounds, self.number, race.settings
        if race.settings.tree_size:
            self.shown = html.tree_list(tokenizer, look_at_tree(*looked), self.number, len(race.rounds))
        else:
            self.shown = html.proposals_table(tokenizer, look_inside(*looked), self.number, len(race.rounds))


def spoken(num_outputs: int) -> Callable[..., Any]:
    """For handlers that yield `num_outputs` values, the first a message: errors become one, all else stays."""

    def decorate(handler: Callable[..., Iterator[tuple[Any, ...]]]) -> Callable[..., Iterator[tuple[Any, ...]]]:
        @wraps(handler)
        def speaking(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
            try:
                yield from handler(*args, **kwargs)
            except Stopped:
                pass  # The stop button says so.
            except (Exception, SystemExit) as error:
                yield html.message(in_words(error), is_error=True), *skips(num_outputs - 1)

        return speaking

    return decorate


def skips(count: int) -> tuple[Any, ...]:
    """Leave that many components as they are."""
    return tuple(gr.skip() for _ in range(count))


class Visits:
    """The handlers of every button, for all visitors."""

    def __init__(self, shelf: PairShelf):
        self.shelf = shelf
        self.running = RunningJobs()

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        self.running.leave(str(request.session_hash))

    def loaded(self, name: PairName, kind: str, request: gr.Request) -> Generator[str, None, Pair]:
        """Load a pair unless it is there; yields messages, returns the pair."""
        pair = self.shelf.get(name)
        if pair is None:
            job = LoadJob(self.shelf, name)
            with self.running.keep(job, kind, request.session_hash):
                for _ in job.watch():
                    yield html.message(job.doing)
            pair = job.pair
        assert pair is not None
        return pair

    @spoken(3)
    def load(self, kind: Any, target: Any, draft: Any, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Load the models a visitor named; yields status, pair, K."""
        name = self.shelf.settled(PairName.checked(kind, target, draft))
        for text in (steps := Returning(self.loaded(name, "load", request))):
            yield text, *skips(2)
        pair = steps.value
        size = sum(p.numel() for p in pair.target.parameters()) / 1e6
        dtype = str(pair.target.dtype).removeprefix("torch.")
        text = f"Ready: {name}; target of {size:,.1f} M parameters in {dtype} on {pair.target.device}."
        yield html.message(text), name, min(pair.draft.num_assistant_tokens, MOST_DRAFT_TOKENS)

    @spoken(8)
    def race(
        self, name: PairName | None, visitor: Visitor, prompt: str, request: gr.Request, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Race plain `generate` and ours; yields status, banner, plain, ours, race, round, inside, bars."""
        name = name or PairName()
        chosen = Settings.checked(*settings)
        for text in (steps := Returning(self.loaded(name, "race", request))):
            yield text, *skips(7)
        pair = steps.value
        job = Race(pair, encoded_prompt(pair, prompt, chosen), chosen, visitor)
        with self.running.keep(job, "race", request.session_hash):
            yield html.message(""), *self.show(job), *skips(4)
            for _ in job.watch():
                yield gr.skip(), *self.show(job), *skips(4)
        yield gr.skip(), *self.show(job), *self.after_race(name, job)

    def show(self, job: Race) -> tuple[str, str, str]:
        """Banner and both lanes of a race as they are now."""
        view, tokenizer = job.view(), job.pair.tokenizer
        plain = html.lane_figures(view.plain) + html.plain_text(tokenizer, view.plain)
        ours = html.pard_figures(view) + html.tinted_text(tokenizer, view.pard, job.settings.proposals)
        return html.banner(view, job.pair.target.dtype == torch.float32), plain, ours

    def after_race(self, name: PairName, job: Race) -> tuple[Any, ...]:
        """State, round slider, first round and bars of a race that has ended."""
        view = job.view()
        finished = FinishedRace(name, job.ids, view.pard.rounds, job.settings)
        return finished, 1, self.inside(job.pair, finished, 1), html.stats_bars(view.stats)

    def inside(self, pair: Pair, race: FinishedRace, number: int) -> str:
        """A round's proposals, computed when the device is free."""
        job = LookJob(pair, race, number)
        for _ in job.watch():
            pass
        return job.shown

    @spoken(2)
    def look(self, race: FinishedRace | None, number: Any, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Show another round of the last race; yields status, inside."""
        if race is None:
            yield html.message(""), NO_ROUNDS
            return
        number = whole("Round", number, 1, len(race.rounds))
        for text in (steps := Returning(self.loaded(race.pair, "look", request))):
            yield text, gr.skip()
        yield html.message(""), self.inside(steps.value, race, number)

    def stopped_race(self, request: gr.Request) -> tuple[Any, ...]:
        """End a race, or take it out of the queue; returns what [`race`] yields."""
        job = self.running.stop("race", request.session_hash)
        if not isinstance(job, Race):
            return html.message("Stopped."), *skips(7)
        return html.message(""), *self.show(job), *skips(4)

    def stopped_load(self, request: gr.Request) -> str:
        """End loading; returns the status."""
        self.running.stop("load", request.session_hash)
        return html.message("Stopped. Everything else is as it was.")

    def stopped_bench(self, request: gr.Request) -> str:
        """End a benchmark behind the run that is being timed; returns the status."""
        self.running.stop("bench", request.session_hash)
        return html.message("Stopped. Everything else is as it was.")

    @spoken(4)
    def chat(
        self,
        name: PairName | None,
        visitor: Visitor,
        chat: Chat | None,
        text: str,
        request: gr.Request,
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer a message; yields status, conversation, message field, state."""
        chat = chat or Chat()
        chosen = Settings.checked(*settings)
        for message in (steps := Returning(self.loaded(name or PairName(), "chat", request))):
            yield message, *skips(3)
        job = ChatTurn(steps.value, chat, text, chosen, visitor)
        yield html.message("Answering …"), html.conversation(job.messages()), "", chat
        try:
            with self.running.keep(job, "chat", request.session_hash):
                for _ in job.watch():
                    yield html.message("Answering …"), html.conversation(job.messages()), *skips(2)
        except Exception:
            yield gr.skip(), html.conversation(chat.messages), text if job.errors else gr.skip(), gr.skip()
            raise
        yield html.message(html.turn_figures(job)), html.conversation(job.messages()), gr.skip(), chat

    def stopped_chat(self, chat: Chat | None, request: gr.Request) -> tuple[Any, ...]:
        """End an answer; returns status and conversation."""
        self.running.stop("chat", request.session_hash)
        shown = html.conversation(chat.messages) if chat is not None else gr.skip()
        return html.message("Stopped. What was said stays."), shown

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        """Begin a new conversation; returns status, conversation, state."""
        self.running.stop("chat", request.session_hash)
        return html.message("A new conversation."), html.conversation([]), None

    @spoken(3)
    def bench(
        self,
        name: PairName | None,
        prompts: Any,
        upload: str | None,
        routes: list[str],
        limit: Any,
        repeats: Any,
        request: gr.Request,
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Run `pard bench`; yields status, report, download."""
        name = name or PairName()
        chosen = Settings.checked(*settings)
        file = prompt_file(self.shelf, prompts, upload)
        for text in (steps := Returning(self.loaded(name, "bench", request))):
            yield text, *skips(2)
        job = BenchJob(steps.value, name, file, routes, limit, repeats, chosen)
        with self.running.keep(job, "bench", request.session_hash):
            yield html.message(""), progress(job), gr.skip()
            for _ in job.watch():
                yield gr.skip(), progress(job), gr.skip()
        folder = tempfile.mkdtemp()
        try:
            path = Path(folder) / "bench.json"
            path.write_text(result_text(job.result), encoding="utf-8")
            yield html.message("Measured."), report(job), gr.DownloadButton(value=path, interactive=True)
        finally:
            shutil.rmtree(folder)  # Gradio has its own copy by now.


class Returning:
    """An iterator over a generator that keeps what it returns in `value`."""

    def __init__(self, steps: Any):
        self.steps = steps
        self.value: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.value = yield from self.steps
