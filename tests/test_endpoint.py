"""A target that a server runs writes the answers that it writes itself; what a server does wrong is said."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from families import make_model

from pard_hf.cli import main
from pard_hf.loading import describe_target
from pard_hf.training.data import read_rows
from pard_hf.training.endpoint import Endpoint, tokens_of
from pard_hf.training.responses import write_answers

PROMPTS = ("ab", "cdef", "g", "hi jk")


@contextmanager
def serving(target, name="served", says=None, keys=()):
    """Run a target as `vllm serve` does, as far as `pard data` asks; `says` is a status and a body instead."""
    keys = list(keys) if isinstance(keys, tuple) else keys

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def do_GET(self):
            keys.append(self.headers["Authorization"])
            self.reply({"data": [{"id": name}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if says is not None:
                self.reply(*reversed(says))
                return
            assert asked["model"] == name
            assert asked["temperature"] == 0
            choices = [choice(ids, asked) for ids in asked["prompt"]]
            # In any order.
            self.reply({"choices": [{**found, "index": n} for n, found in enumerate(choices)][::-1]})

        def log_message(self, *args):
            pass

    def choice(ids, asked):
        ends = asked["stop_token_ids"]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        output = target.generate(**inputs, max_new_tokens=asked["max_tokens"], eos_token_id=ends)
        new = output[0, len(ids) :].tolist()
        is_ended = new[-1] in ends
        return {"text": "", "token_ids": new, "finish_reason": "stop" if is_ended else "length"}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path, tokenizer):
    target = make_model("llama")
    target.generation_config.eos_token_id = list(range(3, 30))
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return tmp_path, target


def command(folder, url, *more):
    words = ["data", "--target", folder / "target", "--prompts", folder / "prompts.jsonl", "--batch-size", 3]
    words += ["--max-new-tokens", 9, "--output", folder / "served.jsonl", "--endpoint", url]
    return main([*map(str, words), *more])


def test_served_target_writes_what_it_writes_itself(folder, tokenizer):
    folder, target = folder
    write_answers(
        target, tokenizer, [{"prompt": text} for text in PROMPTS], folder / "own.jsonl", max_new_tokens=9, batch_size=3
    )

    with serving(target) as url:
        assert command(folder, url + "/") == 0
        counts = json.loads((folder / "served.jsonl.manifest.json").read_text())["counts"]
        assert command(folder, url) == 0  # Nothing is left to ask for.

    own, served = (list(read_rows(folder / f"{name}.jsonl")) for name in ("own", "served"))
    assert [row["response_ids"] for row in served] == [row["response_ids"] for row in own]
    assert counts["rows"] == 4 > counts["cut"]
    manifest = json.loads((folder / "served.jsonl.manifest.json").read_text())
    assert manifest["settings"]["served_model"] == "served"
    assert manifest["runs"][0]["device"] == "a server"


def test_answers_of_another_served_model_are_not_mixed_in(folder, capsys):
    folder, target = folder
    with serving(target) as url:
        assert command(folder, url) == 0
    with serving(target, name="other") as url:
        assert command(folder, url) == 2
    assert "`served_model` was 'served' and is 'other'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ((500, b"out of memory"), "got 500 Internal Server Error: out of memory"),
        ((200, b"<html>"), "Expected an OpenAI-compatible server at"),
        ((200, {"choices": []}), "Expected `choices` in the answer of"),
        ((200, {"choices": [{"text": "a"}]}), "Expected 3 answers of"),
    ],
)
def test_what_a_server_does_wrong_is_said(says, expected, folder, capsys):
    folder, target = folder
    with serving(target, says=says) as url:
        assert command(folder, url) == 2

    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (folder / "served.jsonl").exists()


def test_no_server_and_no_address(folder, capsys):
    folder, _ = folder
    for url, expected in (
        ("http://127.0.0.1:9/v1", "Expected an OpenAI-compatible server"),
        ("x:1", "such as `http:"),
    ):
        assert command(folder, url) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert command(folder, "http://127.0.0.1:9/v1", "--draft", "bundled") == 2
    assert "no --draft with --endpoint" in " ".join(capsys.readouterr().err.split())


def test_text_is_encoded_where_no_tokens_come(tokenizer):
    ids = tokenizer.encode("ab", add_special_tokens=False)

    assert tokens_of({"text": "ab", "finish_reason": "stop"}, [2], tokenizer) == [*ids, 2]
    assert tokens_of({"text": "ab", "finish_reason": "length"}, [2], tokenizer) == ids
    assert tokens_of({"text": "", "token_ids": [5, 2, 7], "finish_reason": "stop"}, [2], tokenizer) == [5, 2]


def test_described_target_has_no_weights(folder):
    folder, target = folder
    model, _ = describe_target(str(folder / "target"))

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.generation_config.eos_token_id == target.generation_config.eos_token_id


def test_key_goes_with_the_request(folder, monkeypatch):
    _, target = folder
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    keys = []
    with serving(target, keys=keys) as url:
        assert Endpoint(url).model == "served"

    assert keys == ["Bearer secret"]
