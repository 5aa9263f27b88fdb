"""What the web demo refuses: hosts, frames, models too large, more than one's share of the queue, endless work."""

import asyncio
import json
import subprocess
import sys

import pytest
import torch
from families import make_draft, make_model
from safetensors.torch import save_file

pytest.importorskip("gradio")

import gradio as gr
from gradio.routes import App
from starlette.requests import Request
from starlette.testclient import TestClient

import app as web_app
from demo import pairs, web
from demo.bench import BenchJob
from demo.chat import Chat, ChatTurn
from demo.job import DEVICE, MOST_OF_A_VISITOR, MOST_OF_AN_ADDRESS, MOST_WAITING, Job, Queue, Stopped, Ticket
from demo.page import ticket_of
from demo.pairs import FOLDER, PairName, PairShelf
from demo.race import Race
from demo.room import check_disk, limited, needed_memory
from demo.settings import Settings
from pard_hf import load_pair
from pard_hf.loading import PairPaths

NAMES_OF_A_MACHINE = {"cafe": ["192.0.2.7", "2001:db8::7"]}


@pytest.fixture
def client(monkeypatch):
    """A client of the app as it is served on some host, with some Host names allowed besides."""
    demo = web_app.build_demo(device="cpu")

    def serving(host="127.0.0.1", more=(), space=None):
        if space:
            monkeypatch.setenv("SPACE_HOST", space)
        else:
            monkeypatch.delenv("SPACE_HOST", raising=False)
        served = App.create_app(demo, app_kwargs={"middleware": web.guards(host, more)})
        return lambda name: TestClient(served).get("/config", headers={"host": name})

    return serving


def test_only_own_hosts_are_answered(client):
    local = client()

    assert [local(name).status_code for name in ("127.0.0.1:7860", "localhost", "LOCALHOST:7860", "[::1]:7860")] == [
        200
    ] * 4
    for name in ("evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "x@localhost", ""):
        assert local(name).status_code == 400, name


def test_hosts_may_be_named(client):
    assert client(more=["demo.example"])("demo.example").status_code == 200
    assert client("lab.example")("lab.example:7860").status_code == 200
    assert client(space="org-demo.hf.space")("org-demo.hf.space").status_code == 200
    assert client()("org-demo.hf.space").status_code == 400


def test_a_server_on_all_addresses_answers_to_those_of_its_machine(client, monkeypatch):
    monkeypatch.setattr(web.socket, "gethostname", lambda: "cafe")
    monkeypatch.setattr(
        web.socket, "getaddrinfo", lambda name, port: [(2, 1, 6, "", (ip, 0)) for ip in NAMES_OF_A_MACHINE[name]]
    )
    everywhere = client("0.0.0.0")

    for name in ("cafe:7860", "192.0.2.7:7860", "[2001:db8::7]:7860", "127.0.0.1"):
        assert everywhere(name).status_code == 200, name
    assert everywhere("evil.example").status_code == 400


def test_only_the_hub_may_frame_a_space(client):
    at_home = client()("localhost").headers
    on_a_space = client(space="org-demo.hf.space")("org-demo.hf.space").headers

    assert at_home["x-frame-options"] == "DENY"
    assert "x-frame-options" not in on_a_space
    assert on_a_space["content-security-policy"] == "frame-ancestors https://huggingface.co"


@pytest.fixture
def folder(tmp_path, tokenizer):
    for name, model in (("target", make_model("llama")), ("draft", make_draft(make_model("llama"), 4))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


# Sizes a config may claim beside eight megabytes of weights: wide layers, many of them, and very many small ones.
BOMBS = {
    "wide": {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 4},
    "deep": {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 1000},
    "many": {"num_hidden_layers": 10_000_000},
}
LOADING = """
import sys
from pathlib import Path
from demo.pairs import FOLDER, PairName, PairShelf

try:
    PairShelf(Path(sys.argv[1]), "cpu").load(PairName(FOLDER, *sys.argv[2:]))
except ValueError as error:
    print(error)
# Unlike `ru_maxrss`, which begins with the peak of the process that forked this one.
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.parametrize(("bomb", "role"), [("wide", "target"), ("deep", "draft"), ("many", "target")])
def test_a_config_beyond_the_memory_is_refused_before_weights_are_read(folder, bomb, role):
    config = folder / role / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | BOMBS[bomb]))
    save_file({"x": torch.zeros(2_000_000)}, folder / role / "more.safetensors")

    run = subprocess.run([sys.executable, "-c", LOADING, folder, "target", "draft"], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    sentence, peak = run.stdout.splitlines()
    assert sentence.startswith(("Expected models ", "Expected weights for all layers of the config"))
    assert int(peak) < 1e9


def test_the_memory_of_a_pair_is_that_of_its_models(folder):
    paths = PairPaths(str(folder / "target"), str(folder / "draft"))
    pair = load_pair(*paths, dtype="float32", device="cpu")
    held = sum(t.nbytes for model in pair.models for t in [*model.parameters(), *model.buffers()])

    assert needed_memory(paths, "cpu") == pytest.approx(held, rel=0.01)


def test_only_the_own_thread_is_limited():
    with limited(10, 10), pytest.raises(ValueError, match="Expected models that fit the memory"):
        torch.nn.Linear(3, 4)
    torch.nn.Linear(3, 4)


def test_what_does_not_fit_beside_the_others_takes_the_place_of_the_oldest(folder, monkeypatch):
    shelf = PairShelf(folder, "cpu")
    shelf.load(PairName())
    needed = needed_memory(PairPaths(str(folder / "target"), str(folder / "draft")), "cpu")

    monkeypatch.setattr(pairs, "available_memory", lambda device: needed - 1)
    shelf.load(PairName(FOLDER, "target", "draft"))
    assert list(shelf.pairs) == [PairName(FOLDER, "target", "draft")]

    monkeypatch.setattr(pairs, "available_memory", lambda device: 0)
    with pytest.raises(ValueError, match="Expected models of less than the 0.0 GB of memory that there are, got"):
        shelf.load(PairName())
    assert list(shelf.pairs) == [PairName(FOLDER, "target", "draft")]


@pytest.mark.parametrize("fault", ["mask token", "tokenizer"])
def test_what_cannot_be_a_pair_takes_no_place(fault, folder, monkeypatch):
    shelf = PairShelf(folder, "cpu")
    shelf.load(PairName())
    needed = needed_memory(PairPaths(str(folder / "target"), str(folder / "draft")), "cpu")
    monkeypatch.setattr(pairs, "available_memory", lambda device: needed - 1)
    file = folder / "draft" / ("config.json" if fault == "mask token" else "tokenizer.json")
    text = file.read_text()
    file.write_text(text.replace("pard_token", "no_token").replace('"A": 35', '"A": 36').replace('"B": 36', '"B": 35'))

    with pytest.raises(ValueError, match="no `pard_token`" if fault == "mask token" else "share a tokenizer"):
        shelf.load(PairName(FOLDER, "target", "draft"))

    file.write_text(text)
    assert list(shelf.pairs) == [PairName()]


def test_a_download_beyond_the_disk_is_refused():
    with pytest.raises(OSError, match=r"Expected room for 1000000000.0 GB of `huge`, got"):
        check_disk("huge", 10**18)
    check_disk("small", 0)


def test_nobody_fills_the_queue_for_all():
    queue = Queue()
    own = [Ticket("me", "mine") for _ in range(MOST_OF_A_VISITOR)]
    for ticket in own:
        queue.join(ticket)

    with pytest.raises(ValueError, match="Expected at most 2 requests of a page"):
        queue.join(Ticket("me", "mine"))
    for number in range(MOST_OF_AN_ADDRESS - MOST_OF_A_VISITOR):
        queue.join(Ticket(f"me again {number}", "mine"))
    with pytest.raises(ValueError, match="16 of an address"):
        queue.join(Ticket("and again", "mine"))
    queue.join(another := Ticket("you", "yours"))
    assert queue.num_before(another) == MOST_OF_AN_ADDRESS
    queue.leave(own[0])
    queue.join(Ticket("me", "mine"))
    for number in range(MOST_WAITING - MOST_OF_AN_ADDRESS - 1):
        queue.join(Ticket(f"{number}", f"{number}"))
    with pytest.raises(ValueError, match=f"Expected at most {MOST_WAITING} requests in the queue"):
        queue.join(Ticket("late", "late"))


@pytest.mark.parametrize(
    ("space", "forwarded", "address"),
    [
        ("x.hf.space", "8.8.8.8", "8.8.8.8"),
        ("x.hf.space", "1.1.1.1, 8.8.8.8", "8.8.8.8"),  # Proxies append: what comes first anybody can send.
        ("x.hf.space", "1.1.1.1, 8.8.8.8, 10.0.3.4", "8.8.8.8"),
        ("x.hf.space", "anything, 2a00:1450::1", "2a00:1450::1"),
        ("x.hf.space", "anything", "10.0.9.9"),
        ("x.hf.space", "", "10.0.9.9"),
        (None, "8.8.8.8", "10.0.9.9"),
    ],
)
def test_nobody_chooses_an_address(monkeypatch, space, forwarded, address):
    monkeypatch.setenv("SPACE_HOST", space) if space else monkeypatch.delenv("SPACE_HOST", raising=False)
    headers = [(b"x-forwarded-for", forwarded.encode())]
    asked = Request({"type": "http", "headers": headers, "client": ("10.0.9.9", 1)})

    assert ticket_of(gr.Request(request=asked, session_hash="me")).address == address


class Ordered(Job):
    """Work that writes down when it ran."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def work(self):
        self.order.append(self)


def test_jobs_have_the_device_in_order_and_one_at_a_time():
    order = []
    jobs = [Ordered(order) for _ in range(3)]

    async def exhaust(job):
        return [doing async for doing in job.watch()]

    async def watch():
        DEVICE.join(busy := Ticket())
        watching = [asyncio.ensure_future(exhaust(job)) for job in jobs]
        await asyncio.sleep(0.5)
        assert order == []
        DEVICE.leave(busy)
        return await asyncio.gather(*watching)

    said = asyncio.run(watch())
    assert order == jobs
    assert [line[0] for line in said] == [f"In the queue: {n} before you." for n in (1, 2, 3)]
    assert DEVICE.tickets == []


async def stop_while(job, is_reached):
    async for _ in job.watch():
        if is_reached():
            job.stop()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "make",
    [
        lambda pair: Race(pair, "x", Settings()),
        lambda pair: ChatTurn(pair, Chat(), "x", Settings()),
        lambda pair: BenchJob(pair, PairName(), "demo", ["ar"], 1, 1, Settings()),
    ],
    ids=["race", "chat", "benchmark"],
)
def test_a_chat_template_without_an_end_is_stopped(make):
    pair = load_pair(dtype="float32", device="cpu")
    pair.tokenizer.chat_template = ENDLESS
    job = make(pair)

    with pytest.raises(Stopped):
        asyncio.run(stop_while(job, lambda: job.thread.ident))

    job.thread.join(60)
    assert job.is_over
    assert DEVICE.tickets == []


@pytest.mark.parametrize("expression", ["9**9**9", "'a' * 9999999999", "'a'|center(1e12)"])
def test_a_template_that_nothing_can_stop_is_refused(expression, folder):
    config = folder / "target" / "tokenizer_config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"chat_template": f"{{{{ {expression} }}}}"}))
    (folder / "target" / "chat_template.jinja").unlink(missing_ok=True)
    shelf = PairShelf(folder, "cpu")

    with pytest.raises(ValueError, match="Expected a chat template without powers"):
        shelf.load(PairName(FOLDER, "target", "draft"))

    config.write_text(text)
    assert not shelf.pairs


@pytest.mark.parametrize("template", [ENDLESS, None])
def test_what_takes_too_long_ends(template):
    """Also with nobody watching: the device is free for others."""
    pair = load_pair(dtype="float32", device="cpu")
    if template is not None:
        pair.tokenizer.chat_template = template
    job = Race(pair, "def f():", Settings(4, 1000, temperature=2.0))
    job.most_seconds = 0.5

    with pytest.raises(ValueError, match="Expected an end within 0 seconds"):
        asyncio.run(stop_while(job, lambda: False))
    assert bool(job.plain.rounds) == (template is None)
    assert DEVICE.tickets == []
