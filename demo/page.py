"""The page: its components, and what their buttons do for all visitors.

Handlers are generators of what changes. Nothing of one visitor is kept where another could see it: races,
conversations and memories live in the session's own state, running jobs under the session's name.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from pard_hf.evaluation.benchmark import result_text
from pard_hf.evaluation.routes import ROUTES
from pard_hf.loading import Pair

from . import html
from .bench import FIRST_ROUTES, HEADINGS, MOST_PROMPTS, BenchJob, progress, prompt_file, prompt_sets, remarks, rows
from .chat import Chat, ChatTurn
from .job import Job, Stopped, Ticket, stop_jobs
from .pairs import BUNDLED, KINDS, SMOLLM2, LoadJob, PairName, PairShelf
from .race import Lane, Race
from .sentences import in_words
from .settings import BOTH, LARGEST_TREE, MIN_TREE_SIZE, MOST_DRAFT_TOKENS, MOST_NEW_TOKENS, PROPOSERS, Settings, whole
from .visitor import Visitor
from .web import address_of

# Prompts for the bundled pair, which completes code, and for chat models.
EXAMPLES = {
    BUNDLED: {
        "Code": 'def check_size(width: int, height: int) -> None:\n    """Check that both sizes are valid."""\n',
        "Arithmetic": "A gardener plants 6 rows of 14 tulips. A deer eats 9 of them. How many are left?\n",
        "Story": "A fox walked to the sea. It took 3 days. Then the fox met a crab. Tell what the crab said.\n",
    },
    SMOLLM2: {
        "Code": "Write a Python class for a bank account with deposit, withdraw and balance.",
        "Arithmetic": "Anna buys 5 apples for $2 each and 4 oranges for $3 each. How much does she pay?",
        "Story": "Write a short story about a fox who walks to the sea and meets a crab.",
    },
}
ABOUT = {
    BUNDLED: "The bundled models are a stand-in: they know a little Python and school arithmetic.",
    SMOLLM2: "The models: SmolLM2-135M-Instruct, a small chat model, and a draft made of four of its layers.",
}
INTRODUCTION = """# pard-hf
A small draft model and the text itself propose several tokens, the target model checks them in **one** forward pass:
the text stays what plain `generate` says. """
TINTS = """<p class="pard-legend">Accepted: <span class="pard-accepted pard-draft pard-0">from the draft</span>
<span class="pard-accepted pard-draft pard-1">of the next round</span>
<span class="pard-accepted pard-copy pard-0">copied from the text</span>
<span class="pard-accepted pard-successors pard-0">from the target's own habits</span>;
<span class="pard-bonus">the target's own token</span>. Hover to see the round. τ: tokens a round, on average.
</p>"""
RACE_NOTE = """<p class="pard-legend">Both routes run one after the other, each alone and at full speed, reading the
prompt included; then both are replayed on their clocks.</p>"""
BENCH_NOTE = """What `pard bench` measures: every way to generate, interleaved, on the same prompts, always greedy.
K, the tree and the length count among the settings. Stop takes effect behind the run that is being timed."""
ROUTES_NOTE = (
    "AR is plain generate, AD the same draft token by token, PLD prompt lookup; tier 1 is the loop of transformers, "
    "tier 2 ours; + and compiled ones compile for minutes on a CPU. α: the share of proposals accepted."
)
NO_ROUNDS = "<p>Run a race first: its rounds are shown here.</p>"
FREE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def ticket_of(request: gr.Request) -> Ticket:
    """The session and address of a request."""
    return Ticket(str(request.session_hash), address_of(request))


def spoken(handler: Callable[..., AsyncIterator[dict[Any, Any]]]) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
    """For handlers of [`Page`]: errors become a sentence in the status, all else stays."""

    @wraps(handler)
    async def speaking(self: Page, *args: Any) -> AsyncIterator[dict[Any, Any]]:
        try:
            async for changes in handler(self, *args):
                yield changes
        except Stopped:
            yield {self.status: html.message("Stopped.")}
        except (Exception, SystemExit) as error:
            yield {self.status: html.message(in_words(error), is_error=True)}

    return speaking


class Page:
    """Lays out all parts.

    Args:
        kind (`str`) and why (`str`):
            The pair it opens with, and why it is not another one.
    """

    def __init__(self, shelf: PairShelf, kind: str, why: str):
        self.shelf, self.kind = shelf, kind
        self.pair, self.raced, self.chat = (
            gr.State(value, time_to_live=3600) for value in (PairName(kind), None, None)
        )
        self.visitor = gr.State(Visitor())  # Every session gets a copy, which it changes in place.
        gr.Markdown(INTRODUCTION + ABOUT[kind] + (f" {why}" if why else ""), elem_id="introduction")
        self.status = gr.HTML(elem_id="status")
        # Jobs stand in a queue of their own, so Gradio's lets all pass.
        self.queued: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        with gr.Sidebar(open=False):
            gr.Markdown("## Settings")
            self.settings = self.lay_out_settings()
            gr.Markdown("## Models")
            self.lay_out_models()
        for name, lay_out in (
            ("Race", self.lay_out_race),
            ("Look inside", self.lay_out_inside),
            ("Benchmark", self.lay_out_benchmark),
            ("Chat", self.lay_out_chat),
        ):
            with gr.Tab(name):
                lay_out()

    def on_stop(self, button: gr.Button, kind: type[Job]) -> None:
        """Let a button end a session's jobs of a kind, running or waiting.

        Their own handlers show it: what two handlers show may reach a page in another order than it was sent in.
        """

        def stop(request: gr.Request) -> None:
            stop_jobs(str(request.session_hash), kind)

        button.click(stop, **FREE)

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        stop_jobs(str(request.session_hash))

    def lay_out_settings(self) -> list[Any]:
        """How to generate, in the order of [`Settings`]."""
        k = slider(1, MOST_DRAFT_TOKENS, 4, "K", "How many tokens ahead the draft proposes.")
        length = gr.Number(192, label="Max new tokens", info=f"Where a text ends, 1 to {MOST_NEW_TOKENS}.")
        temperature = gr.Number(
            0, label="Temperature", info="0 always takes the likeliest token, up to 2 draws others too."
        )
        top_p = gr.Number(1, label="Top-p", info="Draw from the likeliest tokens of this share only.")
        seed = gr.Number(0, label="Seed", info="The same seed draws the same text.")
        tree = slider(MIN_TREE_SIZE, LARGEST_TREE, 8, "Tree", "How many proposals are checked a round.")
        proposer = gr.Radio(
            PROPOSERS,
            value=BOTH,
            label="Proposals from",
            info="The text: copies of it, and what the target was likely to say next; a chat remembers that.",
        )
        return [k, length, temperature, top_p, seed, tree, proposer]

    def lay_out_models(self) -> None:
        """Fields that name a pair, and the buttons that load it and stop loading."""
        kind = gr.Radio(KINDS, value=self.kind, label="Where the models are", info="Only safetensors are loaded.")
        target = gr.Textbox(label="Target", info="Folder or Hub id of the large model.", max_length=200)
        draft = gr.Textbox(
            label="Draft", info="Of the small one; empty: the published draft of the target.", max_length=200
        )
        load, stop = gr.Button("Load models"), gr.Button("Stop loading")
        shown = [self.status, self.pair, self.settings[0]]
        load.click(self.load, [kind, target, draft], shown, api_name="load", **self.queued)
        self.on_stop(stop, LoadJob)

    async def loaded(self, name: PairName, ticket: Ticket) -> AsyncIterator[Pair | str]:
        """Load a pair unless it is there; yields what is being done, at last the pair."""
        pair = self.shelf.get(name)
        if pair is None:
            job = LoadJob(self.shelf, name, ticket)
            async for doing in job.watch():
                yield doing
            pair = job.pair
        assert pair is not None
        yield pair

    @spoken
    async def load(self, kind: Any, target: Any, draft: Any, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """Load the models a visitor named."""
        name = self.shelf.settled(PairName.checked(kind, target, draft))
        async for pair in self.loaded(name, ticket_of(request)):
            if isinstance(pair, str):
                yield {self.status: html.message(pair)}
                continue
            size = sum(p.numel() for p in pair.target.parameters()) / 1e6
            dtype = str(pair.target.dtype).removeprefix("torch.")
            text = f"Ready: {name}; target of {size:,.1f} M parameters in {dtype} on {pair.target.device}."
            k = min(pair.draft.num_assistant_tokens, MOST_DRAFT_TOKENS)
            yield {self.status: html.message(text), self.pair: name, self.settings[0]: k}

    async def run(
        self, name: PairName | None, ticket: Ticket, make: Callable[[Pair], Job], show: Callable[[Any], dict[Any, Any]]
    ) -> AsyncIterator[dict[Any, Any]]:
        """Load the pair of a name and watch a job with it; yields the status and what `show` makes of the job."""
        async for pair in self.loaded(name or PairName(), ticket):
            if isinstance(pair, str):
                yield {self.status: html.message(pair)}
        assert not isinstance(pair, str)
        job = make(pair)
        try:
            async for doing in job.watch():
                yield {self.status: html.message("" if job.thread.ident else doing), **show(job)}
        except Exception:
            if changes := show(job):  # Gradio takes an empty dictionary for a value.
                yield changes
            raise
        yield {self.status: html.message(""), **show(job)}

    def lay_out_race(self) -> None:
        """Both routes side by side."""
        examples = EXAMPLES[BUNDLED if self.kind == BUNDLED else SMOLLM2]
        prompt = gr.Textbox(examples["Code"], lines=2, max_lines=4, label="Prompt", elem_id="prompt")
        with gr.Row(elem_id="buttons"):
            start = gr.Button("Race", variant="primary", size="sm", elem_id="start-race")
            stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop-race")
            for name, text in examples.items():
                example = gr.Button(f"Example: {name.lower()}", size="sm")
                example.click(lambda text=text: text, outputs=prompt, **FREE)
        self.lanes = gr.HTML(elem_id="race", js_on_load=(Path(__file__).parent / "replay.js").read_text())
        gr.HTML(TINTS + RACE_NOTE)
        self.race_inputs = [self.pair, prompt, *self.settings]
        self.race_buttons = start, stop

    def lay_out_inside(self) -> None:
        """One round of the last race, and what all its rounds accepted."""
        self.number = gr.Number(1, label="Round", info="Of the last race, from 1.", elem_id="round")
        self.inside = gr.HTML(NO_ROUNDS, elem_id="inside")
        with gr.Row():
            titles = "Rounds that accepted a position", "Rounds by how many proposals they accepted"
            numbers = {"sort": [str(number) for number in range(100)]}  # Else 10 comes before 2.
            self.acceptance = bars("acceptance", "position", "share of rounds", titles[0], **numbers)
            self.counts = bars("counts", "accepted", "rounds", titles[1], **numbers)
        self.number.input(
            self.look, [self.raced, self.number], [self.status, self.inside], trigger_mode="always_last", **FREE
        )
        start, stop = self.race_buttons
        shown = [self.status, self.lanes, self.raced, self.number, self.inside, self.acceptance, self.counts]
        # A race begins with the page, and with its button.
        start.click(self.race, self.race_inputs, shown, api_name="race", **self.queued)
        root = gr.context.Context.root_block
        root.load(self.race, self.race_inputs, shown, api_visibility="private", **self.queued)
        self.on_stop(stop, Race)

    @spoken
    async def race(
        self, name: PairName | None, prompt: str, request: gr.Request, *settings: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        """Race plain `generate` and ours."""
        chosen, ticket, jobs = Settings.checked(*settings), ticket_of(request), []

        def make(pair: Pair) -> Race:
            jobs.append(Race(pair, prompt, chosen, ticket))
            return jobs[0]

        async for changes in self.run(name, ticket, make, self.show_race):
            yield changes
        yield self.after_race(jobs[0])

    def show_race(self, job: Race) -> dict[Any, Any]:
        return {self.lanes: html.race(job)} if job.doing else {}  # A refused prompt leaves the last race.

    def after_race(self, job: Race) -> dict[Any, Any]:
        """What can be looked into: the first round, and the counts of all."""
        stats, lane = job.ours.stats, job.ours
        lane.check = lambda: None  # Kept for a while, without the models.
        acceptance = [(str(i), share) for i, share in enumerate(stats.position_acceptance, start=1)] if stats else []
        counts = [(str(n), rounds) for n, rounds in enumerate(stats.histogram)] if stats else []
        return self.show_race(job) | {
            self.status: html.message(""),
            self.raced: (job.pair.tokenizer, lane),
            self.number: 1,
            self.inside: html.tree(job.pair.tokenizer, lane, 1),
            self.acceptance: pd.DataFrame(acceptance, columns=["position", "share of rounds"]),
            self.counts: pd.DataFrame(counts, columns=["accepted", "rounds"]),
        }

    def look(self, raced: tuple[Any, Lane] | None, number: Any) -> dict[Any, Any]:
        """Show another round of the last race."""
        if raced is None:
            return {self.inside: NO_ROUNDS}
        tokenizer, lane = raced
        try:
            shown = html.tree(tokenizer, lane, whole("Round", number, 1, len(lane.rounds)))
        except ValueError as error:
            return {self.status: html.message(in_words(error), is_error=True)}
        return {self.status: html.message(""), self.inside: shown}

    def lay_out_benchmark(self) -> None:
        """`pard bench` with a choice of prompts and routes."""
        gr.Markdown(BENCH_NOTE)
        with gr.Row():
            prompts = gr.Dropdown(prompt_sets(self.shelf), value="demo", label="Prompt set")
            upload = gr.File(label="Or your own: .jsonl rows with a prompt", file_types=[".jsonl"], height=120)
        with gr.Row():
            limit = slider(1, MOST_PROMPTS, 4, "Prompts", "Of the set, at most.")
            repeats = slider(1, 5, 2, "Repeats", "Timed runs; the median counts.")
        titles = [(route.title, name) for name, route in ROUTES.items()]
        routes = gr.CheckboxGroup(titles, value=list(FIRST_ROUTES), label="Routes", info=ROUTES_NOTE)
        with gr.Row():
            start = gr.Button("Measure", variant="primary", elem_id="start-bench")
            stop = gr.Button("Stop", variant="stop", elem_id="stop-bench")
        self.measured = gr.HTML(elem_id="measured")
        self.table = gr.Dataframe(headers=HEADINGS, interactive=False, visible=False, elem_id="table")
        self.speedups = bars("speedups", "route", "speedup", "Speedup over plain generate", visible=False)
        self.download = gr.DownloadButton("Download the JSON", interactive=False)
        inputs = [self.pair, prompts, upload, routes, limit, repeats, *self.settings]
        shown = [self.status, self.measured, self.table, self.speedups, self.download]
        start.click(self.bench, inputs, shown, api_name="bench", **self.queued)
        self.on_stop(stop, BenchJob)

    @spoken
    async def bench(
        self,
        name: PairName | None,
        prompts: Any,
        upload: str | None,
        routes: list[str],
        limit: Any,
        repeats: Any,
        request: gr.Request,
        *settings: Any,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Run `pard bench`."""
        chosen, ticket, name, jobs = Settings.checked(*settings), ticket_of(request), name or PairName(), []
        file = prompt_file(self.shelf, prompts, upload)

        def make(pair: Pair) -> BenchJob:
            jobs.append(BenchJob(pair, name, file, routes, limit, repeats, chosen, ticket))
            return jobs[0]

        async for changes in self.run(name, ticket, make, lambda job: {self.measured: progress(job)}):
            yield changes
        result = jobs[0].result
        table = pd.DataFrame(rows(result), columns=HEADINGS)
        speedups = pd.DataFrame(
            [(ROUTES[r["route"]].title, r["speedup"]) for r in result["cells"][0]["routes"]],
            columns=["route", "speedup"],
        )
        folder = tempfile.mkdtemp()
        try:
            path = Path(folder) / "bench.json"
            path.write_text(result_text(result), encoding="utf-8")
            yield {
                self.status: html.message("Measured."),
                self.measured: remarks(result),
                self.table: gr.Dataframe(value=table, visible=True),
                self.speedups: gr.BarPlot(value=speedups, visible=True),
                self.download: gr.DownloadButton(value=path, interactive=True),
            }
        finally:
            shutil.rmtree(folder)  # Gradio has its own copy by now.

    def lay_out_chat(self) -> None:
        """A conversation with the target."""
        gr.Markdown("Several turns in the target's chat template. What it has read stays in its cache.")
        self.dialog = gr.HTML(html.conversation([]), autoscroll=True, max_height=420, elem_id="dialog")
        gr.HTML(TINTS)
        self.said = gr.Textbox(label="Your message", lines=2, elem_id="said")
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", variant="stop")
            forget = gr.Button("New conversation")
        inputs = [self.pair, self.visitor, self.chat, self.said, *self.settings]
        shown = [self.status, self.dialog, self.said, self.chat]
        send.click(self.answer, inputs, shown, api_name="chat", **self.queued)
        self.said.submit(self.answer, inputs, shown, api_visibility="private", **self.queued)
        self.on_stop(stop, ChatTurn)
        forget.click(self.forget, None, [self.status, self.dialog, self.chat], **FREE)

    @spoken
    async def answer(
        self,
        name: PairName | None,
        visitor: Visitor,
        chat: Chat | None,
        text: str,
        request: gr.Request,
        *settings: Any,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Answer a message."""
        chat, chosen, ticket, jobs = chat or Chat(), Settings.checked(*settings), ticket_of(request), []

        def make(pair: Pair) -> ChatTurn:
            jobs.append(ChatTurn(pair, chat, text, chosen, visitor, ticket))
            return jobs[0]

        def show(job: ChatTurn) -> dict[Any, Any]:
            said = {self.said: text} if job.error is not None else {}
            turns = chat.shown if job.is_over else job.conversation()
            return {self.dialog: html.conversation([] if chat.is_left else turns), **said}

        yield {self.chat: chat, self.said: ""}
        async for changes in self.run(name, ticket, make, show):
            yield changes
        yield {self.status: html.message(jobs[0].figures())}

    def forget(self, request: gr.Request) -> dict[Any, Any]:
        """Begin a new conversation."""
        for turn in stop_jobs(str(request.session_hash), ChatTurn):
            turn.chat.is_left = True
        return {
            self.status: html.message("A new conversation."),
            self.dialog: html.conversation([]),
            self.chat: None,
        }


def bars(elem_id: str, x: str, y: str, title: str, **kwargs: Any) -> gr.BarPlot:
    return gr.BarPlot(pd.DataFrame({x: [], y: []}), x=x, y=y, title=title, height=220, elem_id=elem_id, **kwargs)


def slider(least: int, most: int, value: int, label: str, info: str) -> gr.Slider:
    """A slider of whole numbers that hands over what it was sent: what is out of range gets a sentence of ours."""
    made = gr.Slider(least, most, value, step=1, label=label, info=info)
    made.preprocess = lambda payload: payload
    return made
