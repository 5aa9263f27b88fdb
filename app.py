"""The web demo: `make app`. Its look and how it is served; the page is made in `demo/`."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from demo.page import Page
from demo.pairs import BUNDLED, NAMED, PairName, PairShelf
from demo.sentences import without_folders
from demo.web import guards
from pard_hf.loading import default_pair
from pard_hf.smollm2 import to_stderr

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
# Jobs have a queue of their own, with a place for each visitor: this one only bounds what waits to be asked.
MOST_QUEUED = 256
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
        page = Page(shelf, kind, why)
        demo.unload(page.leave)
    return demo.queue(max_size=MOST_QUEUED)


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
