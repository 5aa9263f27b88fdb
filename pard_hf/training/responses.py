"""A file of answers that only grows by whole rows, and the manifest beside it that says how they were made.

Knows files, rows and counts; knows nothing of models. What is on disk is always a whole number of rows, but for a last
one that a killed process tore, and that is cut off before the file grows again.

A target that answers conversations, turn by turn and in batches.

Knows models and tokens; knows nothing of files.

Prompts in, answers written by the target out: the text a draft learns from, for it is what it is to propose.

With a draft, our own loop writes them: the draft of today makes the training rows of tomorrow's, and greedy answers do
not depend on it, up to floating point. Answers are written a batch at a time; what is on disk is never written again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..draft.model import PardDraftModel
from ..generation.mixin import with_pard
from ..generation.stats import DecodingStats
from ..host import input_device, num_positions
from ..io import conditions_of, sha256_of, shown_model, whole_file
from ..loading import bundled_pair
from ..tokens import encode_prompt, next_prompt
from .data import (
    Conversation,
    Message,
    answer_ids,
    conversation_of,
    digest_of,
    distinct,
    place_of,
    read_rows,
)

logger = logging.getLogger(__name__)


try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]


@dataclass
class Counts:
    """What a file of answers holds, and what a run did about it.

    Args:
        prompts: Different prompts that were asked for.
        duplicates: Rows left out because they ask the same as an earlier one.
        bad_rows: Broken rows that were skipped.
        left_out: Rows not written, for want of room before the last position.
        shortened: Rows whose later turns were left out for want of room.
        waiting: Rows that are still to be written.
        new_rows: Rows that this run wrote.
        new_tokens: Tokens of the answers in these.
        rows: Rows of the file, those of earlier runs included.
        answers: Answers in these rows, one for each turn.
        tokens: Tokens of these answers, end tokens included.
        ended: Answers that end in an end token.
        cut: Answers that `max_new_tokens` cut short.
    """

    prompts: int = 0
    duplicates: int = 0
    bad_rows: int = 0
    left_out: int = 0
    shortened: int = 0
    waiting: int = 0
    new_rows: int = 0
    new_tokens: int = 0
    rows: int = 0
    answers: int = 0
    tokens: int = 0
    ended: int = 0
    cut: int = 0

    def add_row(self, row: dict[str, Any], end_token_ids: Sequence[int]) -> None:
        self.rows += 1
        for answer in answer_ids(row):
            ended = answer[-1:] != [] and answer[-1] in end_token_ids
            self.answers += 1
            self.tokens += len(answer)
            self.ended += ended
            self.cut += not ended

    def to_dict(self) -> dict[str, Any]:
        """The counts, and the mean number of tokens of an answer, under their names in JSON."""
        return {**asdict(self), "mean_tokens": round(self.tokens / max(self.answers, 1), 2)}


class AnswerFile:
    """The rows written so far, and room for more; a context, for one process at a time writes to a file.

    Args:
        path (`Path`):
            A `.jsonl` file; `path` with `.manifest.json` behind it is its manifest, and with `.counts.json` behind it
            says how often each token is in the answers, for `trim_vocabulary`.
        identity (`dict[str, Any]`):
            The target and the settings that the answers come from; a file holds answers of one identity.
        end_token_ids (`Sequence[int]`):
            Tokens that end an answer.
        restart (`bool`, *optional*, defaults to `False`):
            Move what is there aside, as `name.1.jsonl`, and begin anew.

    Raises:
        ValueError: On entering: the file holds answers of another identity, nothing says of which, or another process
            is writing to it.
    """

    def __init__(self, path: Path, identity: dict[str, Any], end_token_ids: Sequence[int], restart: bool = False):
        if path.suffix != ".jsonl":
            raise ValueError(f"Expected an output file that ends in `.jsonl`, got `{path.name}`. Choose another name.")
        self.path, self.identity, self.end_token_ids, self.restart = path, identity, end_token_ids, restart
        self.runs: list[dict[str, Any]] = []
        self.counts, self.done = Counts(), set[tuple[str, int]]()
        self.token_counts = Counter[int]()
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open_alone(self.path)
        try:
            if self.restart and move_aside(self.path):
                self.file.close()
                self.file = open_alone(self.path)
            if self.path.stat().st_size:
                self.go_on()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def go_on(self) -> None:
        """Take over the rows that are there."""
        manifest = read_manifest(self.path)
        check_identity(self.path, manifest, self.identity)
        self.runs = manifest["runs"]
        mend(self.path)
        self.sha256 = sha256_of(self.path)
        for row in read_rows(self.path):
            self.take(row)

    def take(self, row: dict[str, Any]) -> None:
        """Count a row that is on the disk."""
        self.done.add((digest_of(row["id"]), row["sample"]))
        self.counts.add_row(row, self.end_token_ids)
        for answer in answer_ids(row):
            self.token_counts.update(answer)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows; they are on the disk when this returns."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self.file.write(data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.sha256.update(data)
        tokens_before = self.counts.tokens
        for row in rows:
            self.take(row)
        self.counts.new_rows += len(rows)
        self.counts.waiting -= len(rows)
        self.counts.new_tokens += self.counts.tokens - tokens_before

    def write_manifest(self, run: dict[str, Any], sources: Sequence[dict[str, Any]]) -> None:
        """Write the manifest as it stands after `run`, the last of the runs; a reader sees the old one or the new."""
        runs = [*self.runs, *([run] if self.counts.new_rows else [])]
        stats = sum((DecodingStats(tuple(r["histogram"])) for r in runs if "histogram" in r), DecodingStats())
        manifest = {
            "output": {"name": self.path.name, "sha256": self.sha256.hexdigest()},
            "is_complete": self.counts.waiting == 0,
            **self.identity,
            "counts": self.counts.to_dict(),
            "sources": list(sources),
            "acceptance_length": round(stats.acceptance_length, 4) if stats.num_rounds else None,
            "runs": runs,
        }
        write_on_disk(counts_path(self.path), {"token_counts": dict(self.token_counts.most_common())}, indent=None)
        write_on_disk(manifest_path(self.path), manifest, indent=2)


def write_on_disk(path: Path, content: dict[str, Any], indent: int | None) -> None:
    """Write a JSON file whole or not at all; it is on the disk when this returns."""
    with whole_file(path) as written, written.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def counts_path(path: Path) -> Path:
    return path.with_name(path.name + ".counts.json")


def files_of(path: Path) -> tuple[Path, Path, Path]:
    return path, manifest_path(path), counts_path(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside a file of answers.

    Raises:
        ValueError: There is none, or it is no manifest.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        return {**manifest, "runs": list(manifest["runs"]), "settings": dict(manifest["settings"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the manifest `{manifest_path(path).name}` beside `{path}`, which holds rows already, got none "
            f"that can be read ({type(error).__name__}). Pass `--restart` to move the rows aside, or choose another "
            "output."
        ) from error


def check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise a `ValueError` that names what differs between a manifest and the answers now asked for."""
    before, now = flat(manifest), flat(identity)
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"Expected the settings that the answers in `{path}` were written with, but `{name}` was "
                f"{before.get(name)!r} and is {now[name]!r}. Go on with the same, pass `--restart` to move the old "
                "answers aside, or choose another output."
            )


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """The entries of an identity and of its settings, side by side."""
    return {**{name: value for name, value in identity.items() if name != "settings"}, **identity["settings"]}


def open_alone(path: Path) -> BinaryIO:
    """Open a file to append to it, or raise a `ValueError` where another process has done so."""
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"Expected to write to `{path}` alone, but another process does so too. Wait for it, or choose another "
            "output."
        ) from None
    except OSError as error:  # A file system without locks.
        logger.info("%s cannot be locked: %s", path.name, error)
    return file


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end."""
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        if whole < path.stat().st_size:
            logger.warning("%s: the last row was torn and is cut off; it is written again.", path.name)
            file.truncate(whole)


def move_aside(path: Path) -> bool:
    """Rename a file of answers that holds any, and what lies beside it, to a free one of `name.1.jsonl`, ….

    Returns:
        Whether there was something to move.
    """
    if not path.stat().st_size:
        return False
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    free = next(name for name in names if not name.exists() and not manifest_path(name).exists())
    for old, new in zip(files_of(path), files_of(free), strict=True):
        if old.exists():
            old.rename(new)
    return True


# Stands for an answer that is not written yet.
PLACEHOLDER = {"role": "assistant", "content": "…"}
# Settings of a checkpoint that change its answers.
OWN_SETTINGS = (
    "bad_words_ids",
    "eos_token_id",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "suppress_tokens",
    "top_k",
    "typical_p",
)


@dataclass(frozen=True)
class AnswerSettings:
    """How the answers of one file are written.

    Args:
        temperature (`float`, *optional*, defaults to 0):
            0 is greedy. Other settings of sampling (`top_k`, …) are the target's own `generation_config`.
        top_p (`float`, *optional*, defaults to 1):
            Probability mass that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to 512):
            Tokens of an answer at most.
        num_samples (`int`, *optional*, defaults to 1):
            Answers to each prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
        ):
            if not is_right:
                raise ValueError(f"Expected `{name}` {expected}, got {getattr(self, name)}.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"Expected `num_samples` of 1 with greedy decoding, got {self.num_samples}: all would be the same. "
                "Raise `temperature`, or drop `num_samples`."
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("Expected `top_p` with a `temperature` above 0 only: greedy answers do not sample.")

    def generate_kwargs(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **(sampling if self.temperature else {"do_sample": False})}


@dataclass
class Dialogue:
    """One sample of a conversation on its way: `past` is everything before the next answer, as token ids."""

    conversation: Conversation
    sample: int
    tokenizer: PreTrainedTokenizerBase
    past: list[int]
    messages: list[Message]
    answers: list[list[int]] = field(default_factory=list)
    is_finished: bool = False

    def take(self, answer: list[int]) -> None:
        """Add an answer and go on to the next turn."""
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.answers.append(answer)
        self.messages.append({"role": "assistant", "content": text})
        if len(self.answers) == len(self.conversation.turns):
            self.is_finished = True
        else:
            asked = [*self.messages, *self.conversation.turns[len(self.answers)]]
            self.past = next_prompt(self.tokenizer, asked, self.past, answer)

    def go_on(self) -> None:
        """Ask the next turn, which has room."""
        if self.answers:
            self.messages += self.conversation.turns[len(self.answers)]

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.conversation.id, "sample": self.sample}
        if len(self.conversation.turns) == len(self.conversation.turns[0]) == 1:
            prompt, response = (message["content"] for message in self.messages)
            return {**row, "prompt": prompt, "response": response, "response_ids": self.answers[0]}
        return {**row, "messages": self.messages, "response_ids": self.answers}


class Answerer:
    """A target, perhaps with a draft, that answers batches of dialogues."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: AnswerSettings,
        draft: PardDraftModel | None = None,
        num_assistant_tokens: int | None = None,
    ):
        self.target = target if draft is None else with_pard(target)
        self.tokenizer, self.settings, self.draft = tokenizer, settings, draft
        self.num_positions = min(num_positions(model.config) for model in (target, draft) if model is not None)
        self.stats = DecodingStats()
        ends = target.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.end_token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        pads = (target.generation_config.pad_token_id, tokenizer.pad_token_id, *self.end_token_ids, 0)
        self.pad_token_id = next(pad for pad in pads if pad is not None)
        self.generate_kwargs = {
            **settings.generate_kwargs(),
            "eos_token_id": self.end_token_ids or None,
            "pad_token_id": self.pad_token_id,
            "return_dict_in_generate": True,
        }
        if draft is not None:
            self.generate_kwargs |= {"assistant_model": draft, "num_assistant_tokens": num_assistant_tokens}

    def identity(self) -> dict[str, Any]:
        """What the answers depend on; the draft is not among it, for it only makes them sooner."""
        own = self.target.generation_config.to_diff_dict()
        own = {name: own[name] for name in OWN_SETTINGS if name in own}
        return {
            "target": model_name(self.target),
            "settings": {
                **asdict(self.settings),
                "dtype": str(self.target.dtype).removeprefix("torch."),
                "generation_config": own,
                "chat_template_sha256": digest(self.tokenizer.chat_template),
                "weights_sha256": weights_digest(self.target),
            },
        }

    def check(self, conversations: Iterable[Conversation], skip_bad_rows: bool = False) -> Iterator[Conversation]:
        """The conversations that the chat template can write.

        Raises:
            ValueError: It refuses one (turns of a system, say); its place is named. With `skip_bad_rows` such
                conversations are logged and left out.
        """
        for conversation in conversations:
            problem = self.why_not_written(conversation)
            if problem is None:
                yield conversation
            elif skip_bad_rows:
                logger.warning("%s skipped: %s", conversation.place, problem)
            else:
                raise ValueError(
                    f"Expected a conversation that the target's chat template can write in {conversation.place}, but "
                    f"{problem}. Mend it, or pass `--skip-bad-rows` to go on without it."
                )

    def why_not_written(self, conversation: Conversation) -> str | None:
        """Say what keeps the chat template from writing a conversation; `None` when nothing does."""
        messages = [message for turn in conversation.turns for message in (*turn, PLACEHOLDER)]
        if self.tokenizer.chat_template is None and len(messages) > 2:
            return (
                "the target's tokenizer has no chat template, which would say whose words are whose (a row with one "
                "`prompt` needs none)"
            )
        try:
            encode_prompt(self.tokenizer, messages[:-1])
        except Exception as error:  # Templates raise what they like at turns they do not know.
            return f"it fails: {error}"
        return None

    def dialogues(self, conversations: Iterable[Conversation], done: set[tuple[str, int]]) -> list[Dialogue]:
        """What is still to be answered, conversations of as many turns and like length together, longest first."""
        waiting = []
        for conversation in conversations:
            samples = [n for n in range(self.settings.num_samples) if (conversation.digest, n) not in done]
            messages = list(conversation.turns[0])
            past = encode_prompt(self.tokenizer, messages) if samples else []
            waiting += [Dialogue(conversation, n, self.tokenizer, past, list(messages)) for n in samples]
        return sorted(waiting, key=lambda d: (len(d.conversation.turns), len(d.past)), reverse=True)

    def has_room(self, prompt: list[int]) -> bool:
        return len(prompt) + self.settings.max_new_tokens <= self.num_positions

    def answer(self, batch: Sequence[Dialogue]) -> None:
        """Answer every turn of a batch of dialogues that has room, turn by turn."""
        while waiting := list(self.waiting(batch)):
            for dialogue, answer in zip(waiting, self.generate(waiting), strict=True):
                dialogue.take(answer)

    def waiting(self, batch: Sequence[Dialogue]) -> Iterator[Dialogue]:
        for dialogue in batch:
            if not dialogue.is_finished and self.has_room(dialogue.past):
                dialogue.go_on()
                yield dialogue

    def generate(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """The next answer of each dialogue, up to and with its end token."""
        prompts = [torch.tensor(dialogue.past) for dialogue in dialogues]
        device = input_device(self.target)
        ids = pad_sequence(prompts, True, self.pad_token_id, "left").to(device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.seed_of(dialogues))
            output = self.target.generate(input_ids=ids, attention_mask=mask, **self.generate_kwargs)
        self.stats += getattr(output, "stats", None) or DecodingStats()
        return [self.cut(answer) for answer in output.sequences[:, ids.shape[1] :].tolist()]

    def seed_of(self, dialogues: Sequence[Dialogue]) -> int:
        """A seed of its own for every turn of every batch: the order of batches plays no part."""
        who = [(d.conversation.digest, d.sample, len(d.answers)) for d in dialogues]
        return int(digest(json.dumps([self.settings.seed, who])), 16)

    def cut(self, answer: list[int]) -> list[int]:
        end = next((n for n, token in enumerate(answer) if token in self.end_token_ids), len(answer))
        return answer[: end + 1]


def digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def model_name(model: PreTrainedModel) -> str:
    """A Hub id, the last part of a folder, or the class of a model that comes from neither."""
    name = model.config.name_or_path
    if name in bundled_pair():
        return f"bundled {Path(name).name}"
    return shown_model(name) if name else type(model).__name__


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of the first values of every weight: it tells a model from one of the same name trained further.

    Of a weight that is offloaded the shape alone counts.
    """
    sha256 = hashlib.sha256()
    for name, weight in model.named_parameters():
        sha256.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.is_meta:
            continue
        sha256.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def write_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    out: str | Path,
    draft: PardDraftModel | None = None,
    batch_size: int = 32,
    num_assistant_tokens: int | None = None,
    skip_bad_rows: bool = False,
    restart: bool = False,
    sources: Sequence[dict[str, Any]] = (),
    report: Callable[[Counts, DecodingStats], None] | None = None,
    **settings: Any,
) -> Counts:
    """Let the target answer prompts, and append the answers to `out`; what is answered there is left alone.

    A row asks by its `prompt`, its `turns` (texts of a user) or its `messages`; every turn of the user is answered in
    order, in sight of the target's own earlier answers, and answers that the row brings are replaced. What comes out
    is `{"id", "sample", "prompt", "response", "response_ids"}`, or `{"id", "sample", "messages", "response_ids"}`
    with one list of ids for each answer: the very tokens, up to and with the end token where there is one.

    An interrupted call is continued by the same call. `out` with `.manifest.json` behind it says how the answers were
    made. Answers to prompts without room for `max_new_tokens` before the last position (of the target, or the draft)
    are left out and counted; so are later turns of a conversation that outgrows it.

    Greedy answers depend on the prompt alone, up to floating point. The noise of sampling depends on `seed` and on who
    else is in the batch: other rows, another `batch_size` or a batch half on disk when the process died change
    which samples come, and not their distribution.

    Args:
        target ([`PreTrainedModel`]):
            The model that answers; with a `draft`, [`with_pard`] is applied to it.
        draft ([`PardDraftModel`], *optional*):
            Makes it faster.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time; also what an interruption can cost.
        num_assistant_tokens (`int`, *optional*):
            K, proposals a round; defaults to the draft's own.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Log conversations that the chat template refuses, and leave them out.
        restart (`bool`, *optional*, defaults to `False`):
            Move an `out` that exists aside, with its manifest, and begin anew.
        sources (`Sequence[dict]`, *optional*):
            What the manifest is to say of where the rows are from.
        report (`Callable`, *optional*):
            Called after each batch with the counts and the decoding statistics so far.
        settings:
            Anything [`AnswerSettings`] takes.

    Returns:
        [`Counts`] of the file and of this call.

    Raises:
        ValueError: A row is broken, or `out` holds answers of another target or other settings; nothing was written.
    """
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, got {batch_size}.")
    answerer = Answerer(target, tokenizer, AnswerSettings(**settings), draft, num_assistant_tokens)
    asked = [conversation_of(row, place_of(row, number)) for number, row in enumerate(rows, start=1)]
    conversations = distinct(asked)
    good = list(answerer.check(conversations, skip_bad_rows))
    with AnswerFile(Path(out), answerer.identity(), answerer.end_token_ids, restart) as file:
        dialogues = answerer.dialogues(good, file.done)
        waiting = [dialogue for dialogue in dialogues if answerer.has_room(dialogue.past)]
        counts = file.counts
        counts.prompts, counts.duplicates = len(conversations), len(asked) - len(conversations)
        counts.bad_rows = len(conversations) - len(good) + sum(len(source.get("skipped", ())) for source in sources)
        counts.waiting, counts.left_out = len(waiting), len(dialogues) - len(waiting)
        run = conditions_of(target) | {"draft": draft and model_name(draft), "batch_size": batch_size}
        del run["decoding"]  # Of benchmarks, which are greedy; the settings say it here.
        file.write_manifest(run, sources)
        start = time.perf_counter()
        for first in range(0, len(waiting), batch_size):
            batch = waiting[first : first + batch_size]
            answerer.answer(batch)
            counts.shortened += sum(not dialogue.is_finished for dialogue in batch)
            file.append([dialogue.to_row() for dialogue in batch])
            run |= {"new_rows": counts.new_rows, "seconds": round(time.perf_counter() - start, 2)}
            run |= answerer.stats.to_dict() if draft is not None else {}
            file.write_manifest(run, sources)
            if report is not None:
                report(counts, answerer.stats)
    return counts
