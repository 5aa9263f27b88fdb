"""`pard chat` as a person uses it, with a small model that has a chat template."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT
from families import character_tokenizer, make_draft, make_model

from pard_hf.cli import main
from pard_hf.loading import load_models
from pard_hf.tokens import next_prompt

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% else %};"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def folders(tmp_path):
    make_model("llama", max_position_embeddings=256).save_pretrained(tmp_path / "target")
    make_draft(make_model("llama", max_position_embeddings=256), 4).save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        character_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / name)
    return ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]


SHORT = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12"]


def chat(monkeypatch, capsys, said, *words, out=None):
    """Say lines to `pard chat`; its output and its errors."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in said)))
    if out is not None:
        monkeypatch.setattr("sys.stdout", out)
    assert main(["chat", *SHORT, *words]) == 0
    return capsys.readouterr()


def plain_answers(folder, said, cut=None):
    """What plain `generate` answers, reading the whole conversation anew each turn; the first answer may be cut."""
    target, _, tokenizer = load_models(folder, device="cpu")
    messages, past, answer, answers = [], [], [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        ids = next_prompt(tokenizer, messages, past, answer)
        output = target.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        past, answer = ids, output[0, len(ids) :].tolist()[:cut]
        cut = None
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


SAID = ["hello", "and_more", "abcabcabc"]


@pytest.mark.parametrize("sources", [("--draft",), ("--lookup",), ("--draft", "--lookup")], ids="+".join)
def test_answers_are_those_of_plain_generate_and_caches_are_kept(folders, monkeypatch, capsys, sources):
    words = folders[:2] + (folders[2:] if "--draft" in sources else []) + ["--lookup"] * ("--lookup" in sources)

    out, err = chat(monkeypatch, capsys, SAID, *words)

    assert out.split("\n\n")[:-1] == plain_answers(folders[1], SAID)
    reused = [int(number) for number in re.findall(r"(\d+) tokens in the cache", err)]
    assert reused[0] == 0 < reused[1] < reused[2]
    assert len(re.findall(r"^τ \d\.\d\d · \d+\.\d tokens/s · ", err, flags=re.MULTILINE)) == 3


def test_tints_tell_sources_apart(folders, monkeypatch, capsys):
    tinted, status = chat(monkeypatch, capsys, SAID, *folders, "--color", "always")
    plain, _ = chat(monkeypatch, capsys, SAID, *folders, "--color", "never")

    assert "\033[32m" in tinted
    assert re.sub(r"\033\[\d+m", "", tinted) == plain
    assert "\033[32mdraft" in status or "accepted from" not in status


def test_clear_begins_anew_and_quit_ends(folders, monkeypatch, capsys):
    said = ["hello", "/clear", "", "hello", "/help", "/quit", "hello"]

    out, err = chat(monkeypatch, capsys, said, *folders)

    [answer] = plain_answers(folders[1], ["hello"])
    assert out.split("\n\n")[:-1] == [answer, answer]
    assert err.count("/clear forgets") == 1


class InterruptedOut(io.StringIO):
    """A terminal at which Ctrl-C is pressed when it has shown so many pieces of text."""

    num_pieces = 3

    def write(self, text):
        written = super().write(text)
        if text.strip():
            self.num_pieces -= 1
            if self.num_pieces == 0:
                raise KeyboardInterrupt
        return written


def test_an_answer_that_is_stopped_is_part_of_the_conversation(folders, monkeypatch, capsys):
    out = InterruptedOut()
    err = chat(monkeypatch, capsys, SAID, *folders, out=out).err
    stopped, *others = out.getvalue().split("\n\n")[:-1]

    expected = plain_answers(folders[1], SAID, cut=len(stopped))
    assert 0 < len(stopped) < 12
    assert [stopped, *others] == expected
    assert err.count("stopped") == 1


def test_a_conversation_that_is_full_says_so(folders, monkeypatch, capsys):
    out, err = chat(monkeypatch, capsys, ["h" * 250, "/clear", "h" * 300, "hello"], *folders)

    assert "Expected a conversation of fewer than 256 tokens, got 305" in err
    assert "/clear" in err
    assert len(out.split("\n\n")) == 3
    assert out.split("\n\n")[1] == plain_answers(folders[1], ["hello"])[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair", "bundled"], "Expected a pair that can chat, got the bundled one"),
        (["--target", "FOLDER", "--lookup"], "Expected a target with a chat template, got none"),
        (["--target", "smollm2"], "Expected a draft for the target `smollm2`"),
    ],
)
def test_who_cannot_chat_is_refused(folders, capsys, words, message):
    character_tokenizer().save_pretrained(folders[1])
    Path(folders[1], "chat_template.jinja").unlink()
    assert main(["chat", *SHORT, *(word.replace("FOLDER", folders[1]) for word in words)]) == 2

    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
def test_on_a_terminal(folders):
    """Ctrl-C at the prompt is a hint, Ctrl-D the end."""
    ours, theirs = pty.openpty()
    # A shell starts what runs in its background without SIGINT, and that is inherited.
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import signal, sys; {heeding}; from pard_hf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "chat", *folders, *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    files = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, **files, env=environment, start_new_session=True) as process:
        os.close(theirs)
        try:
            shown = wait_for(ours, "› ")
            os.write(ours, b"hello\r")
            shown += wait_for(ours, "› ", after="tokens/s")
            # A signal between the prompt and the wait for a key is heeded with the next one only.
            while not select.select([ours], [], [], 1)[0]:
                process.send_signal(signal.SIGINT)
            shown += wait_for(ours, "› ", after="/quit")
            os.write(ours, b"\x04")
            shown += wait_for(ours)
            process.wait(60)
        finally:
            process.kill()  # Else a test that fails waits for it.
    assert process.returncode == 0
    assert plain_answers(folders[1], ["hello"])[0] in re.sub(r"\033\[\d+m", "", shown)
    assert "\033[32m" in shown


def wait_for(terminal, text=None, after=""):
    """Read a terminal until it shows `text`, behind `after`; or until its end, or two silent minutes."""
    shown = b""
    while text is None or text.encode() not in shown[shown.find(after.encode()) :] or after.encode() not in shown:
        if not select.select([terminal], [], [], 120)[0]:
            break
        try:
            shown += os.read(terminal, 1 << 12)
        except OSError:
            break
    return shown.decode(errors="replace")
