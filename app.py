"""The web demo: `make app`. Layout and wiring only; what it shows is made in `demo/`."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from demo.bench import FIRST_ROUTES, MOST_PROMPTS, prompt_sets
from demo.html import conversation
from demo.pairs import BUNDLED, KINDS, NAMED, SMOLLM2, PairName, PairShelf
from demo.sentences import without_folders
from demo.settings import DRAFT, LARGEST_TREE, MOST_DRAFT_TOKENS, MOST_NEW_TOKENS, PROPOSERS
from demo.visitor import Visitor
from demo.visits import NO_ROUNDS, Visits
from demo.web import guards
from pard_hf.evaluation.prompts import CHAT_PROMPTS
from pard_hf.evaluation.routes import ROUTES
from pard_hf.loading import default_pair
from pard_hf.smollm2 import to_stderr

# Prompts for the bundled pair, which completes code, and for chat models.
EXAMPLES = {
    "Code": 'def check_size(width: int, height: int) -> None:\n    """Check that both sizes are valid."""\n',
    "Arithmetic": "A gardener plants 6 rows of 14 tulips. Then 9 of them are eaten by a deer. How many are left?\n",
    "Story": "A fox walked to the sea. It took 3 days. Then the fox met a crab. Tell what the crab said.\n",
}
CHAT_EXAMPLES = {
    "Code": CHAT_PROMPTS[0],
    "Arithmetic": CHAT_PROMPTS[2],
    "Story": "Write a short story about a fox who walks to the sea and meets a crab.",
}
INTRODUCTION = """# pard-hf

A small draft model proposes several tokens in **one** forward pass, the target model checks them in one more. The text
stays what plain `generate` says; it is only there sooner. """
# Of the pair the page opens with.
ABOUT = {
    BUNDLED: "The bundled models are a stand-in to see how it works: they know a little Python and school arithmetic.",
    SMOLLM2: "The models are SmolLM2-135M-Instruct, a small chat model, and a draft made of four of its layers.",
}
RACE_NOTE = """Plain `generate` and ours take turns of a tenth of a second, so neither slows the other. Each has a
clock of its own, which runs only while it is its turn, reading the prompt included."""
BENCH_NOTE = """What `pard bench` measures: every way to generate, interleaved, on the same prompts. Always greedy: of
the settings above, K and Max new tokens count. Stop takes effect behind the run that is being timed."""
ROUTES_NOTE = """AR is plain generate, AD the same draft token by token, PLD prompt lookup; + and compiled ones compile
for minutes on a CPU."""
LEGEND = """<p class="pard-legend">Accepted: <span class="pard-accepted pard-draft pard-0">from the draft</span>
<span class="pard-accepted pard-draft pard-1">of the next round</span>
<span class="pard-accepted pard-copy pard-0">copied from the text</span>
<span class="pard-accepted pard-successors pard-0">from the target's own habits</span>
<span class="pard-bonus">the target's own token</span>
– hover to see the round</p>"""


# Fonts of the visitor's own machine: the page asks no other server. The theme's own greys and buttons are
# too pale for many eyes.
THEME = gr.themes.Default(
    primary_hue="emerald",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    block_info_text_color="#4b5563",
    block_info_text_color_dark="#d1d5db",
    block_label_text_color="#374151",
    block_label_text_color_dark="#d1d5db",
    block_title_text_color="#374151",
    block_title_text_color_dark="#d1d5db",
    body_text_color_subdued="#4b5563",
    body_text_color_subdued_dark="#d1d5db",
    button_primary_background_fill="#0b6b43",
    button_primary_background_fill_hover="#08512f",
    button_primary_background_fill_dark="#0b6b43",
    button_primary_text_color="#ffffff",
    button_cancel_background_fill="#b3261e",
    button_cancel_background_fill_hover="#8c1d18",
    button_cancel_background_fill_dark="#b3261e",
    button_cancel_text_color="#ffffff",
)
LOOK = {"theme": THEME, "css_paths": Path(__file__).parent / "demo" / "page.css", "footer_links": ["settings"]}


def build_demo(
    folder: Path | None = None,
    device: str | None = None,
    token: bool | None = None,
    kind: str = BUNDLED,
    why: str = "",
) -> gr.Blocks:
    """The page; the pair it opens with begins to load in the background.

    Args:
        folder (`Path`, *optional*):
            Local models and prompt sets must lie below it; without one there are none.
        device (`str`, *optional*):
            Defaults to the first CUDA device, or the CPU.
        token (`bool`, *optional*):
            `False` keeps the machine's own Hub token from visitors.
        kind (`str`, *optional*):
            The pair it opens with, `BUNDLED` or `SMOLLM2`.
        why (`str`, *optional*):
            A sentence for visitors, why it is not the other one.
    """
    shelf = PairShelf(folder, device, token)
    threading.Thread(target=shelf.load, args=(PairName(kind),), name=kind, daemon=True).start()
    with gr.Blocks(title="pard-hf", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        page = Page(Visits(shelf), kind, why)
        with gr.Tab("Race"):
            page.lay_out_race()
        with gr.Tab("Look inside"):
            page.lay_out_inside()
        with gr.Tab("Benchmark"):
            page.lay_out_benchmark(prompt_sets(shelf))
        with gr.Tab("Chat"):
            page.lay_out_chat()
        page.wire_race(demo)
        demo.unload(page.visits.leave)
    return demo.queue(max_size=64)


class Page:
    """The components that parts of the page share, and the parts: each lays itself out and says what its buttons do.

    Args:
        visits ([`Visits`]):
            What the buttons do.
        kind (`str`):
            The pair it opens with.
        why (`str`):
            Why it is not another one.
    """

    def __init__(self, visits: Visits, kind: str, why: str):
        self.visits, self.kind = visits, kind
        self.examples = EXAMPLES if kind == BUNDLED else CHAT_EXAMPLES
        self.pair, self.race, self.chat = (
            gr.State(value, time_to_live=3600) for value in (PairName(kind), None, None)
        )
        self.visitor = gr.State(Visitor())  # Every session gets a copy, which it changes in place.
        gr.Markdown(INTRODUCTION + ABOUT[kind])
        gr.Markdown(why, visible=bool(why))
        self.status = gr.HTML(elem_id="status")
        # One generation at a time on the device: these wait in one queue, and the page says at which place.
        self.queued = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress_on": self.status}
        self.free = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        with gr.Accordion("Models", open=False):
            names, load, stop = self.lay_out_models()
        with gr.Accordion("Settings", open=False):
            self.settings = self.lay_out_settings()
        loading = load.click(
            visits.load,
            names,
            [self.status, self.pair, self.settings[0]],
            concurrency_limit=4,  # Downloads leave the device to others.
            show_progress_on=self.status,
            api_name="load",
        )
        stop.click(visits.stopped_load, outputs=self.status, cancels=loading, **self.free)

    def lay_out_models(self) -> tuple[list[Any], gr.Button, gr.Button]:
        """Fields that name a pair, and the buttons that load it and stop loading."""
        kind = gr.Radio(KINDS, value=self.kind, label="Where the models are", info="Only safetensors are loaded.")
        with gr.Row():
            target = gr.Textbox(label="Target", info="Folder or Hub id of the large model.", max_length=200)
            draft = gr.Textbox(
                label="Draft", info="Of the small one; empty: the published draft of the target.", max_length=200
            )
        with gr.Row():
            return [kind, target, draft], gr.Button("Load models"), gr.Button("Stop loading")

    def lay_out_settings(self) -> list[Any]:
        """How to generate: K, length, temperature, top-p, seed, tree size, what proposes."""
        ends = f"Where a text ends at the latest: 1 to {MOST_NEW_TOKENS}."
        with gr.Row():
            k = slider(1, MOST_DRAFT_TOKENS, 8, "K", "Tokens the draft proposes a round.")
            tree = slider(
                0, LARGEST_TREE, 0, "Tree", "Continuations checked a round; 0: one chain of K, or 16 with the text."
            )
            length = gr.Number(128, label="Max new tokens", info=ends)
        with gr.Row():
            temperature = gr.Number(0, label="Temperature", info="0 always takes the likeliest token; to 2.")
            top_p = gr.Number(1, label="Top-p", info="Draw from the likeliest tokens of this share only.")
            seed = gr.Number(0, label="Seed", info="The same seed draws the same text.")
        proposer = gr.Radio(
            PROPOSERS,
            value=DRAFT,
            label="Proposals from",
            info="The text so far, and what the target was likely to say next, which is remembered for your visit.",
        )
        return [k, length, temperature, top_p, seed, tree, proposer]

    def lay_out_race(self) -> None:
        """Both routes side by side."""
        gr.Markdown(RACE_NOTE)
        self.prompt = gr.Textbox(self.examples["Code"], lines=4, label="Prompt", elem_id="prompt")
        with gr.Row():
            for name, text in self.examples.items():
                example = gr.Button(f"Example: {name.lower()}", size="sm")
                example.click(lambda text=text: text, outputs=self.prompt, **self.free)
        with gr.Row():
            self.start_race = gr.Button("Race", variant="primary", elem_id="start-race")
            self.stop_race = gr.Button("Stop", variant="stop", elem_id="stop-race")
        banner = gr.HTML(elem_id="banner")
        with gr.Row():
            with gr.Column():
                gr.Markdown("## Plain generate")
                plain = gr.HTML(elem_id="plain")
            with gr.Column():
                gr.Markdown("## PARD")
                ours = gr.HTML(elem_id="pard")
        gr.HTML(LEGEND)
        self.raced = [self.status, banner, plain, ours, self.race]

    def lay_out_inside(self) -> None:
        """One round of the last race, and what all its rounds accepted."""
        number = gr.Number(1, label="Round", info="Of the last race, from 1.", elem_id="round")
        inside = gr.HTML(NO_ROUNDS, elem_id="inside")
        self.raced += [number, inside, gr.HTML(elem_id="bars")]
        number.input(
            self.visits.look,
            [self.race, number],
            [self.status, inside],
            trigger_mode="always_last",
            api_name="look",
            **self.queued,
        )

    def wire_race(self, demo: gr.Blocks) -> None:
        """A race begins with the page, and with its button."""
        race = {
            "fn": self.visits.race,
            "inputs": [self.pair, self.visitor, self.prompt, *self.settings],
            "outputs": self.raced,
            **self.queued,
        }
        racing = [
            self.start_race.click(**race, api_name="race"),
            demo.load(**race, api_visibility="private"),
        ]
        self.stop_race.click(self.visits.stopped_race, outputs=self.raced, cancels=racing, **self.free)

    def lay_out_benchmark(self, sets: list[str]) -> None:
        """`pard bench` with a choice of prompts and routes."""
        gr.Markdown(BENCH_NOTE)
        with gr.Row():
            prompts = gr.Dropdown(sets, value="demo", label="Prompt set")
            upload = gr.File(label="Or your own: .jsonl rows with a prompt", file_types=[".jsonl"], height=120)
        with gr.Row():
            limit = slider(1, MOST_PROMPTS, 4, "Prompts", "Of the set, at most.")
            repeats = slider(1, 5, 2, "Repeats", "Timed runs; the median counts.")
        titles = [(route.title, name) for name, route in ROUTES.items()]
        routes = gr.CheckboxGroup(titles, value=list(FIRST_ROUTES), label="Routes", info=ROUTES_NOTE)
        with gr.Row():
            start = gr.Button("Measure", variant="primary", elem_id="start-bench")
            stop = gr.Button("Stop", variant="stop")
        measured = gr.HTML(elem_id="measured")
        download = gr.DownloadButton("Download the JSON", interactive=False)
        measuring = start.click(
            self.visits.bench,
            [self.pair, prompts, upload, routes, limit, repeats, *self.settings],
            [self.status, measured, download],
            api_name="bench",
            **self.queued,
        )
        stop.click(self.visits.stopped_bench, outputs=self.status, cancels=measuring, **self.free)

    def lay_out_chat(self) -> None:
        """A conversation with the target."""
        gr.Markdown("Several turns in the target's chat template. What it has read stays in its cache.")
        dialog = gr.HTML(conversation([]), autoscroll=True, max_height=420, elem_id="dialog")
        said = gr.Textbox(label="Your message", lines=2, elem_id="said")
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", variant="stop")
            forget = gr.Button("New conversation")
        turn = {
            "fn": self.visits.chat,
            "inputs": [self.pair, self.visitor, self.chat, said, *self.settings],
            "outputs": [self.status, dialog, said, self.chat],
            **self.queued,
        }
        chatting = [send.click(**turn, api_name="chat"), said.submit(**turn, api_visibility="private")]
        shown = [self.status, dialog]
        stop.click(self.visits.stopped_chat, inputs=self.chat, outputs=shown, cancels=chatting, **self.free)
        forget.click(self.visits.forget, outputs=[*shown, self.chat], **self.free)


def slider(least: int, most: int, value: int, label: str, info: str, **kwargs: Any) -> gr.Slider:
    """A slider of whole numbers that hands over what it was sent: what is out of range gets a sentence of ours."""
    made = gr.Slider(least, most, value, step=1, label=label, info=info, **kwargs)
    made.preprocess = lambda payload: payload
    return made


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The web demo of pard-hf.")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    parser.add_argument("--host", default=host, help="where to listen (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this Host name too, such as that of a proxy; may be given several times",
    )
    parser.add_argument(
        "--folder", type=Path, help="offer local models and .jsonl prompt sets below it (default: none)"
    )
    parser.add_argument(
        "--pair", choices=sorted(NAMED.values()), help="to open with (default: smollm2 where it can be had)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    token = None if args.host in ("127.0.0.1", "localhost", "::1") else False  # Visitors are others then.
    name, why = (args.pair, None) if args.pair else default_pair()
    if why:
        to_stderr(why)
    kind = next(kind for kind, shown in NAMED.items() if shown == name)
    build_demo(args.folder, args.device, token, kind, without_folders(why or "")).launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        max_file_size="5mb",
        state_session_capacity=200,
        ssr_mode=False,
        app_kwargs={"middleware": guards(args.host, args.allowed_host)},
        **LOOK,
    )


if __name__ == "__main__":
    main()
