"""What the web demo refuses: hosts, frames, models too large, more than one's share of the queue, endless work."""

import pytest

pytest.importorskip("gradio")

import app as web_app
from gradio.routes import App
from starlette.testclient import TestClient

from demo import web

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
