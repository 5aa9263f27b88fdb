"""The web demo as visitors meet it: a real server, a real browser."""

import json
import os
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import pytest
import torch
from families import character_tokenizer, make_model

from demo.settings import DRAFT, LOOKUP
from pard_hf import bundled_pair, load_pair
from pard_hf.tokens import encode_prompt

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from axe_playwright_python.sync_playwright import Axe
from browser import fill, open_page, open_settings, open_tab, running_app, running_browser
from gradio_client import Client
from hub_server import publish, running_hub
from huggingface_hub.constants import HF_HOME
from playwright.sync_api import expect
from safetensors.torch import save

pytestmark = pytest.mark.browser

BANNER = "#race .pard-banner"
TABS = ("Race", "Look inside", "Benchmark", "Chat")
LOOPING = "The fox was hungry. Tell its story.\n"
BAD = "<img src=x onerror=\"document.title='taken over'\">"


@pytest.fixture(scope="module")
def pair():
    return load_pair(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def hub():
    """A Hub with the bundled pair, a target of another family, a private model and one with pickled weights."""
    with running_hub() as running:
        publish(running, "org/target", Path(bundled_pair().target))
        publish(running, "org/slow-target", Path(bundled_pair().target))
        # Downloads come in pieces of ten megabytes, and models of more than one.
        more = save({"unused": torch.zeros(6_000_000)})
        running.repos["org/slow-target"]["more.safetensors"] = more
        publish(running, "org/draft", Path(bundled_pair().draft))
        publish(running, "org/secret", Path(bundled_pair().draft), is_private=True)
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory, pair):
    """Local models: the bundled target without `pard_token`, and one of another family."""
    root = tmp_path_factory.mktemp("models")
    pair.target.save_pretrained(root / "target")
    pair.tokenizer.save_pretrained(root / "target")
    pair.draft.save_pretrained(root / "draft")
    pair.tokenizer.save_pretrained(root / "draft")
    make_model("llama").save_pretrained(root / "stranger")
    character_tokenizer(first="#").save_pretrained(root / "stranger")
    (root / "prompts.jsonl").write_text('{"prompt": "def one():\\n"}\n')
    return root


@pytest.fixture(scope="module")
def served(tmp_path_factory, hub, models):
    with running_app(
        tmp_path_factory.mktemp("app"), "--pair", "bundled", "--folder", str(models), HF_ENDPOINT=hub.url
    ) as (address, app):
        yield address, app


@pytest.fixture(scope="module")
def address(served):
    return served[0]


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


@pytest.fixture
def page(browser, address):
    """A page whose first race, which begins by itself, has ended."""
    opened = open_page(browser, address)
    expect_race(opened)
    yield opened
    assert opened.faults == []
    opened.context.close()


def race(page, prompt):
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#start-race").click()


def race_to_the_end(page, pair, prompt):
    """Race, until both columns show what plain `generate` says."""
    race(page, prompt)
    for lane in ("#plain", "#pard"):
        expect(page.locator(f"{lane} .pard-text")).to_have_text(plain_text(pair, prompt))
    expect_race(page)


def expect_race(page):
    """Wait for the end of a race and of its replay."""
    expect(page.locator(BANNER)).to_contain_text("same text.")


def plain_text(pair, prompt, max_new_tokens=192):
    ids = encode_prompt(pair.tokenizer, prompt)
    output = pair.target.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False)
    return pair.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def begin_long_race(page):
    """A text that takes long, so that it can be stopped: the target says the same for ever."""
    open_settings(page)
    fill(page, "Max new tokens", 1000)
    race(page, LOOPING)
    expect(page.locator(BANNER)).to_contain_text("plain generate runs, alone")


def test_an_opened_page_shows_a_race_above_the_fold(page, address):
    plain, ours = (page.locator(f"{lane} .pard-text") for lane in ("#plain", "#pard"))

    assert plain.text_content().strip()
    assert plain.text_content() == ours.text_content()
    for lane in (plain, ours):
        box = lane.bounding_box()
        assert box["y"] + box["height"] <= 800
    assert page.locator("#pard .pard-figures dt").all_inner_texts() == ["seconds", "tokens", "tokens/s", "τ"]
    assert page.locator("#pard span.pard-accepted").first.get_attribute("title").startswith("round 1: ")
    assert "the target's own token" in page.locator("#pard .pard-bonus").first.get_attribute("title")
    assert {asked.split("/")[2] for asked in page.asked if "//" in asked} == {address.split("/")[2]}


def test_a_race_is_replayed_on_its_clocks(page):
    """The page's own clock decides what is there, so that the route that took less time is complete first."""
    clocks = "all => Math.max(...all.map(piece => piece.dataset.t))"
    seconds = [page.locator(f"#{lane} [data-t]").evaluate_all(clocks) for lane in ("plain", "pard")]
    first = ("plain", "pard")[seconds.index(min(seconds))]
    assert page.locator(".pard-first").get_attribute("id") == first

    page.get_by_role("button", name="Replay").click()
    expect(page.locator(BANNER)).to_contain_text("Replayed side by side")
    watched = page.evaluate(WATCH_REPLAY)

    for there, text, now in watched:
        assert there == sorted(there, reverse=True), "pieces appear in order"
        assert text == sum(there)
        assert now <= max(seconds) + 0.01
    assert len({sum(there) for there, *_ in watched}) > 2
    expect(page.locator(BANNER)).to_contain_text("same text.")


# Of our column, again and again until the replay is over: which pieces are there, how many, and its clock.
WATCH_REPLAY = """() => new Promise((resolve) => {
  const seen = [], pard = document.querySelector("#pard");
  const look = () => {
    const there = [...pard.querySelectorAll("[data-t]")].map((piece) => piece.style.visibility !== "hidden");
    seen.push([there, there.filter(Boolean).length, Number(pard.querySelector("[data-figure=seconds]").textContent)]);
    if (document.querySelector("[data-replaying=now]")) setTimeout(look, 30); else resolve(seen);
  };
  look();
})"""


def test_texts_stream_while_the_race_runs(page):
    begin_long_race(page)
    seen = set()
    for _ in range(5):
        page.wait_for_timeout(400)
        seen.add(len(page.locator("#plain .pard-text").text_content()))
    assert len(seen) > 1

    page.locator("#stop-race").click()
    expect(page.locator(BANNER)).to_contain_text("Stopped")
    kept = page.locator("#plain .pard-text").text_content()
    assert kept
    page.wait_for_timeout(1000)
    assert page.locator("#plain .pard-text").text_content() == kept

    fill(page, "Max new tokens", 20)
    page.locator("#start-race").click()
    expect_race(page)


def test_others_see_their_place_and_may_leave_the_queue(page, browser, address):
    begin_long_race(page)

    other = open_page(browser, address)
    expect(other.locator("#status")).to_contain_text("In the queue: 1 before you.")
    other.locator("#stop-race").click()
    expect(other.locator("#status")).to_contain_text("Stopped")
    page.locator("#stop-race").click()
    expect(page.locator(BANNER)).to_contain_text("Stopped")

    other.locator("#start-race").click()
    expect_race(other)
    other.context.close()


def test_a_closed_page_leaves_the_device_to_others(browser, address):
    gone = open_page(browser, address)
    expect_race(gone)
    begin_long_race(gone)
    gone.context.close()

    following = open_page(browser, address)
    expect_race(following)
    following.context.close()


def test_a_cancelled_request_does_not_hold_up_the_server(address):
    """A cancelled run is not waited for: a page is served while the run in progress ends."""
    client = Client(address, verbose=False)
    job = client.submit("demo", None, ["ar", "tier2"], 6, 5, 8, 1000, 0, 1, 0, 8, DRAFT, api_name="/bench")
    while not job.outputs():
        time.sleep(0.1)

    job.cancel()

    assert urllib.request.urlopen(address, timeout=10).status == 200
    status, *_ = client.predict("def f():\n", 8, 8, 0, 1, 0, 8, DRAFT, api_name="/race")
    assert "alert" not in status


@pytest.mark.parametrize(
    ("label", "value", "sentence"),
    [
        ("Prompt", " ", "Expected a prompt, got nothing but white space"),
        ("Prompt", "word " * 3000, "Expected a prompt of at most 1856 tokens"),
        ("Max new tokens", "", "Expected a number in the field Max new tokens, got nothing"),
        ("Max new tokens", "0", "Expected Max new tokens from 1 to 1024, got 0"),
        ("Temperature", "-1", "Expected Temperature from 0 to 2, got -1"),
        ("Top-p", "7", "Expected Top-p from 0.01 to 1, got 7"),
        ("Seed", "0.5", "Expected a whole number in the field Seed, got 0.5"),
    ],
)
def test_bad_fields_get_a_sentence(page, label, value, sentence):
    before = page.locator("#pard .pard-text").text_content()
    open_settings(page)
    fill(page, label, value)

    page.locator("#start-race").click()

    expect(page.locator("#status [role=alert]")).to_contain_text(sentence)
    assert page.locator("#pard .pard-text").text_content() == before
    expect_race(page)


def propose_from(page, proposer):
    open_settings(page)
    page.get_by_label(proposer, exact=True).check()


def test_without_the_draft_a_text_is_copied_and_coloured(page, pair):
    propose_from(page, LOOKUP)
    race_to_the_end(page, pair, LOOPING)

    expect(page.locator("#pard span.pard-copy").first).to_be_visible()
    assert page.locator("#pard span.pard-draft").count() == 0
    assert "this from the text" in page.locator("#pard span.pard-copy").first.get_attribute("title")
    assert colour_of(page, "#pard span.pard-copy") != colour_of(page, ".pard-legend span.pard-draft")
    assert colour_of(page, "#pard span.pard-copy.pard-0") == colour_of(page, ".pard-legend span.pard-copy")
    number = re.match(r"round (\d+):", page.locator("#pard span.pard-copy").first.get_attribute("title"))[1]
    open_tab(page, "Look inside")
    fill(page, "Round", number)
    expect(page.locator("#inside .pard-tree")).to_contain_text("from the text, accepted")


def colour_of(page, selector):
    return page.locator(selector).first.evaluate("element => getComputedStyle(element).backgroundColor")


def test_what_is_remembered_for_a_visitor_no_other_meets(address):
    visitors = [Client(address, verbose=False) for _ in range(2)]
    settings = (8, 64, 0, 1, 0, 16, LOOKUP)

    def say(visitor):
        """Return the last status and the last conversation that a visitor is shown."""
        said = visitor.submit(LOOPING, *settings, api_name="/chat")
        said.result()
        statuses, dialogs = zip(*(output[:2] for output in said.outputs()), strict=True)
        return statuses[-1], [dialog for dialog in dialogs if isinstance(dialog, str)][-1]

    said = [say(visitor) for visitor in (*visitors, visitors[0])]

    taus = [re.search(r"τ ([\d.]+)", status)[1] for status, _ in said]
    assert taus[0] == taus[1]
    assert said[0][1] == said[1][1]
    assert [dialog.count("pard-user") for _, dialog in said] == [1, 1, 2]


def test_k_out_of_range_gets_a_sentence(address):
    client = Client(address, verbose=False)

    for k in (0, 99, None, 2.5, "many"):
        status, *_ = client.predict("def f():\n", k, 8, 0, 1, 0, 8, DRAFT, api_name="/race")
        assert 'role="alert"' in status, (k, status)
        assert "K" in status


@pytest.mark.parametrize(
    ("kind", "target", "draft", "sentence"),
    [
        ("Hub id", "org/none", "org/draft", "`org/none` cannot be downloaded: 401 Client Error"),
        ("Hub id", "org/target", "org/secret", "`org/secret` cannot be downloaded: 401 Client Error"),
        ("Hub id", "not an id", "org/draft", "Expected a Hub id such as"),
        ("Hub id", "org/target", "", "Expected a target with a known PARD draft, got"),
        ("Hub id", "org/target", "org/target", "has no `pard_token`"),
        ("Hub id", "", "", "Expected the Hub id of a target, got nothing"),
        ("local folder", "../elsewhere", "draft", "Expected a model below the folder the demo was started with"),
        ("local folder", "target", "stranger", "has no `pard_token`"),
        ("local folder", "stranger", "draft", "Expected draft and target to share a tokenizer"),
    ],
)
def test_bad_models_get_a_sentence(page, kind, target, draft, sentence):
    load_models(page, kind, target, draft)

    expect(page.locator("#status [role=alert]")).to_contain_text(sentence)
    page.locator("#start-race").click()
    expect(page.locator("#status [role=alert]")).to_have_count(0)
    expect_race(page)


def load_models(page, kind, target, draft):
    """Name a pair on the page and press the button."""
    open_settings(page)
    page.get_by_role("radio", name=kind).check()
    fill(page, "Target", target)
    fill(page, "Draft", draft)
    page.get_by_role("button", name="Load models").click()


@pytest.mark.parametrize(
    ("kind", "target", "draft"), [("Hub id", "org/target", "org/draft"), ("local folder", "target", "draft")]
)
def test_models_of_the_hub_and_of_folders_are_loaded(page, pair, kind, target, draft):
    load_models(page, kind, target, draft)

    expect(page.locator("#status")).to_contain_text(f"Ready: {target} with {draft}; target of 4.0 M parameters")
    race_to_the_end(page, pair, "What is 2 + 2?\n")


def test_a_download_shows_progress_and_can_be_cancelled(page, pair, hub):
    hub.goes_on.clear()
    open_settings(page)
    page.get_by_role("radio", name="Hub id").check()
    fill(page, "Target", "org/slow-target")
    fill(page, "Draft", "org/draft")

    page.get_by_role("button", name="Load models").click()
    expect(page.locator("#status")).to_contain_text("Downloading org/slow-target")
    page.get_by_role("button", name="Stop loading").click()
    expect(page.locator("#status")).to_contain_text("Stopped.")
    hub.goes_on.set()

    race_to_the_end(page, pair, "What is 1 + 2?\n")
    page.get_by_role("button", name="Load models").click()
    expect(page.locator("#status")).to_contain_text("Ready: org/slow-target with org/draft")


def test_rounds_can_be_looked_into(page, pair):
    race_to_the_end(page, pair, "A shop sells apples for $2 each. Anna buys 5 apples. How much does she pay?\n")
    open_tab(page, "Look inside")

    expect(page.locator("#inside .pard-tree")).to_contain_text("Round 1 of")
    expect(page.locator("#inside .pard-tree li")).to_have_count(8)
    expect(page.locator("#inside .pard-accepted").first).to_contain_text("accepted")
    for plot in ("#acceptance", "#counts"):
        expect(page.locator(f"{plot} canvas, {plot} svg.marks").first).to_be_visible()
    page.locator("#round input").focus()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#inside .pard-tree")).to_contain_text("Round 2 of")
    fill(page, "Round", 999)
    expect(page.locator("#status [role=alert]")).to_contain_text("Expected Round from 1 to")


def say(page):
    page.locator("#said textarea").fill("What is 3 + 4?")
    page.locator("#send").click()
    expect(page.locator("#status")).to_contain_text("0 of")


def test_a_chat_keeps_what_was_read(page):
    open_tab(page, "Chat")
    say(page)
    page.locator("#said textarea").fill(BAD)
    page.locator("#send").click()
    expect(page.locator("#dialog .pard-user").last).to_contain_text(BAD)
    expect(page.locator("#status")).to_contain_text("tokens of the conversation were in the cache")
    expect(page.locator("#status")).not_to_contain_text(" 0 of")

    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#dialog")).not_to_contain_text("What is 3 + 4?")
    assert page.title() == "pard-hf"


def measure(page):
    fill(page, "number input for Prompts", 1)
    fill(page, "number input for Repeats", 1)
    for name in ("AD", "PARD tier 1", "PARD tier 2, adaptive K", "Every source"):
        page.get_by_label(name, exact=True).uncheck()
    page.locator("#start-bench").click()
    expect(page.locator("#measured progress")).to_be_visible()
    expect(page.locator("#table table").first).to_contain_text("PARD tier 2")
    expect(page.locator("#speedups canvas, #speedups svg.marks").first).to_be_visible()


def test_a_benchmark_is_measured_and_can_be_taken_home(page, tmp_path):
    open_tab(page, "Benchmark")
    measure(page)

    with page.expect_download() as download:
        page.get_by_role("button", name="Download the JSON").click()
    download.value.save_as(tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["command"].startswith("pard bench --prompts demo --limit 1 --repeats 1")
    assert [route["route"] for route in result["cells"][0]["routes"]] == ["ar", "pld", "tier2", "lookup"]


def test_a_benchmark_can_be_stopped(page):
    open_tab(page, "Benchmark")
    page.locator("#start-bench").click()
    expect(page.locator("#measured progress")).to_be_visible(timeout=30_000)
    page.locator("#stop-bench").click()
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=30_000)


def test_what_visitors_type_stays_text(page, pair):
    race_to_the_end(page, pair, BAD)

    assert page.title() == "pard-hf"
    assert page.locator("#race img").count() == 0


def test_a_narrow_screen_is_wide_enough(browser, address):
    page = open_page(browser, address, width=375, height=700, scheme="dark")
    expect_race(page)
    open_settings(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_role("button", name="Toggle Sidebar").click()
    page.wait_for_timeout(500)
    for tab in TABS:
        open_tab(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, tab
    page.context.close()


def test_the_keyboard_suffices(page, pair):
    prompt = "What is 4 + 5?\n"
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start-race":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#plain .pard-text")).to_have_text(plain_text(pair, prompt))

    page.get_by_role("tab", name="Race").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Look inside")).to_have_attribute("aria-selected", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, address, scheme):
    """With the settings open, and every tab full of what it is for."""
    page = open_page(browser, address, scheme=scheme)
    expect_race(page)
    open_settings(page)
    for tab in TABS:
        open_tab(page, tab)
        if tab == "Benchmark":
            measure(page)
        if tab == "Chat":
            say(page)
        page.wait_for_timeout(500)
        found = Axe().run(page).response["violations"]
        serious = {rule["id"]: rule["nodes"][0]["html"] for rule in found if rule["impact"] in ("serious", "critical")}
        assert serious == {}, tab
    page.context.close()


def test_fifty_requests_of_ten_visitors_are_answered_and_not_mixed(served, pair):
    """Sums nobody else asks for: each text must be the one its own prompt has."""
    address, app = served
    prompts = [[f"Tom has {user} boxes of {turn + 2} pencils. How many?\n" for turn in range(5)] for user in range(10)]

    def texts_of(user):
        client = Client(address, verbose=False)
        return [client.predict(prompt, *settings, api_name="/race")[1] for prompt in prompts[user]]

    settings = (4, 24, 0, 1, 0, 8, DRAFT)
    texts_of(0)
    before = resident_bytes(app.pid)
    with ThreadPoolExecutor(10) as visitors:
        answers = list(visitors.map(texts_of, range(10)))
    after = resident_bytes(app.pid)

    for user, turns in enumerate(answers):
        for prompt, shown in zip(prompts[user], turns, strict=True):
            assert "same text." in shown
            assert texts_in(shown) == [plain_text(pair, prompt, 24)] * 2
    assert after - before < 100e6, f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after"


def texts_in(shown):
    return [unescape(re.sub("<[^>]*>", "", text)) for text in re.findall("<pre[^>]*>(.*?)</pre>", shown, re.DOTALL)]


def resident_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_the_page_is_there_while_models_load(browser, monkeypatch):
    """The same app, with a shelf whose loading waits for us."""
    import app
    from demo.pairs import PairShelf

    goes_on = threading.Event()

    class SlowShelf(PairShelf):
        def read(self, name, report):
            report("Loading the bundled pair …")
            goes_on.wait(60)
            return super().read(name, report)

    monkeypatch.setattr(app, "PairShelf", SlowShelf)
    demo = app.build_demo(device="cpu")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.LOOK)
    try:
        page = open_page(browser, address.rstrip("/"))
        expect(page.locator("#start-race")).to_be_visible()
        expect(page.locator("#status")).to_contain_text("Loading")
        goes_on.set()
        expect_race(page)
        page.context.close()
    finally:
        goes_on.set()
        demo.close()


@pytest.fixture(scope="module")
def pictured(request, address, tmp_path_factory):
    """The demo as it opens by itself, on all cores, where pictures are kept."""
    if not request.config.getoption("--screenshots"):
        yield address
        return
    threads = str(os.cpu_count())
    with running_app(tmp_path_factory.mktemp("pictured"), HF_HOME=HF_HOME, OMP_NUM_THREADS=threads) as (opened, _):
        yield opened


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_for_the_readme(browser, pictured, width, scheme, request, tmp_path):
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page = open_page(browser, pictured, width=width, scheme=scheme)
    expect(page.locator(BANNER)).to_contain_text("same text.", timeout=300_000)
    suffix = ("" if width == 1280 else f"_{width}") + ("" if scheme == "light" else f"_{scheme}")
    page.screenshot(path=folder / f"race{suffix}.png")
    open_tab(page, "Look inside")
    expect(page.locator("#inside .pard-tree")).to_be_visible()
    page.wait_for_timeout(500)
    page.screenshot(path=folder / f"inside{suffix}.png")

    assert {path.name for path in folder.glob("*.png")} >= {f"race{suffix}.png", f"inside{suffix}.png"}
    page.context.close()
