"""The web demo as a process of its own, and pages of a headless Chromium on it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

import pard_hf

APP = Path(pard_hf.__file__).parent.parent / "app.py"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# A loaded machine takes its time; nothing here is a claim about speed.
PATIENCE_MS = 60_000


@contextmanager
def running_app(tmp_path, *arguments, **environment):
    """Serve the demo on a free port; yields its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    paths = (str(APP.parent), os.environ.get("PYTHONPATH"))
    log = tmp_path / "app.log"
    with log.open("w") as out:
        app = subprocess.Popen(
            [sys.executable, str(APP), "--port", str(port), "--device", "cpu", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={
                **inherited,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                **environment,
            },
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, app, log)
            yield address, app
        finally:
            app.terminate()
            app.wait(30)


def wait_for(address, app, log):
    for _ in range(600):
        assert app.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@contextmanager
def running_browser():
    """A headless Chromium: the one that CHROMIUM names, or that is on the path."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Expected a Chromium, got none. Do `apt-get install chromium`, or name one with CHROMIUM=."
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


def open_page(browser, address, width=1280, height=800, scheme="light"):
    """A page of a visitor of its own; `page.asked` are the addresses it asked, `page.faults` what it complained of."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda line: page.faults.append(line.text) if line.type == "error" else None)
    page.goto(f"{address}/?__theme={scheme}")
    return page


def open_tab(page, name):
    """Choose a tab, by the menu where the screen is too narrow for all of them."""
    tab = page.get_by_role("tab", name=name)
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()


def open_settings(page):
    """Open the side bar of settings and models."""
    bar = page.locator(".sidebar")
    if "open" not in bar.get_attribute("class").split():
        bar.locator(".toggle-button").click()
    page.wait_for_timeout(500)  # It slides in.


def fill(page, label, value):
    """Type into a field, and leave it."""
    field = page.get_by_label(re.compile(rf"^\s*{label}\b")).first  # Help may follow in the label.
    field.fill(str(value))
    field.blur()
    page.wait_for_timeout(100)
    expect(field).to_have_value(str(value))
