"""Let the target write the rows a draft is trained on: prompts in, the target's own responses out.

`answers.jsonl` appears whole, by one rename. Until then each finished batch is a shard in `answers.jsonl.shards`, and
the same call continues with the rows that are missing. `answers.jsonl.manifest.json` records the target, the settings,
the sources and the runs; `answers.jsonl.counts.json` how often each token was generated, for `trim_vocabulary`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..draft.model import PardDraftModel
from ..generation.mixin import with_pard
from ..generation.stats import DecodingStats
from ..host import end_token_ids, input_device, num_positions, pad_token_id
from ..io import conditions_of, sha256_of, shown_model, whole_file, write_whole
from ..loading import bundled_pair
from ..tokens import Message, encode_prompt, next_prompt, pad_left, until_end
from .data import PROMPTS, check_rows, given_messages, read_rows, response_ids, skip_or_raise
from .endpoint import Endpoint
from .top_logits import TopLogits, top_logits_of

# Settings of a checkpoint that change its answers.
OWN_SETTINGS = (
    "bad_words_ids", "eos_token_id", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "repetition_penalty", "suppress_tokens", "top_k", "typical_p",
)  # fmt: skip


@dataclass(frozen=True)
class AnswerSettings:
    """How the answers of one file are generated; other sampling settings are the target's own `generation_config`."""

    temperature: float = 0.0  # 0 is greedy.
    top_p: float = 1.0
    max_new_tokens: int = 512
    num_samples: int = 1  # Answers to each prompt.
    seed: int = 0
    top_logits: int = 0  # Most probable tokens of the target that are stored at each token, for training.

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0), ("max_new_tokens", 1), ("num_samples", 1), ("top_logits", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Expected `{name}` of at least {least}, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Expected `top_p` above 0 and at most 1, got {self.top_p}.")
        if self.temperature == 0 and (self.num_samples, self.top_p) != (1, 1):
            raise ValueError(
                f"Expected `num_samples` of 1 and `top_p` of 1 with a `temperature` of 0, got {self.num_samples} and "
                f"{self.top_p}: greedy answers do not sample. Raise `temperature`, or drop them."
            )


@dataclass
class Counts:
    """What a file of answers holds, and what a run added to it, by the names in JSON."""

    prompts: int = 0  # Different prompts that were asked for.
    duplicates: int = 0  # Rows that repeat an earlier prompt.
    bad_rows: int = 0  # Bad rows that were skipped.
    left_out: int = 0  # Rows without room for an answer before the last position.
    shortened: int = 0  # Rows without room for their later turns.
    waiting: int = 0  # Rows that are still to be written.
    new_rows: int = 0  # Rows that this run wrote.
    new_tokens: int = 0
    rows: int = 0  # Rows of the file.
    answers: int = 0  # One for each turn.
    tokens: int = 0  # Of the answers, end tokens included.
    ended: int = 0  # Answers that end in an end token.
    cut: int = 0  # Answers that `max_new_tokens` cut short.

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the mean number of tokens of an answer."""
        return {**asdict(self), "mean_tokens": round(self.tokens / max(self.answers, 1), 2)}


class Conversation(NamedTuple):
    """The turns of a row of prompts, each the messages up to an answer, without the answers it may have."""

    digest: str  # Of the turns alone.
    id: str  # The row's own id, if any, and the digest: an edited prompt has another id.
    turns: list[list[Message]]


def conversation_of(row: dict[str, Any]) -> Conversation:
    turns: list[list[Message]] = [[]]
    for message in given_messages(row):
        if message["role"] != "assistant":
            turns[-1].append(message)
        if message["role"] == "user":
            turns.append([])
    turns.pop()
    digest = digest_of(json.dumps([[message["role"], message["content"]] for turn in turns for message in turn]))
    return Conversation(digest, f"{row['id']}:{digest}" if "id" in row else digest, turns)


@dataclass
class Sample:
    """An answer to a conversation, in progress; `prompt` holds the token ids before the next turn's answer."""

    conversation: Conversation
    number: int
    prompt: list[int]
    messages: list[Message] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    top_logits: list[TopLogits] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.answers) == len(self.conversation.turns)

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.conversation.id, "sample": self.number}
        if self.top_logits:
            row["top_logits"] = TopLogits.joined(self.top_logits).to_json()
        if len(self.conversation.turns) == len(self.conversation.turns[0]) == 1:
            prompt, response = (message["content"] for message in self.messages)
            return {**row, "prompt": prompt, "response": response, "response_ids": self.answers[0]}
        return {**row, "messages": self.messages, "response_ids": self.answers}


@dataclass
class ResponseGenerator:
    """A target, with or without a draft, that answers batches of conversations turn by turn."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: AnswerSettings
    draft: PardDraftModel | None = None
    num_assistant_tokens: int | None = None

    def __post_init__(self) -> None:
        settings, draft, config = self.settings, self.draft, self.target.generation_config
        models = [self.target] if draft is None else [with_pard(self.target), draft]
        self.stats, self.num_positions = DecodingStats(), min(num_positions(model.config) for model in models)
        self.end_token_ids = end_token_ids(config)
        if not self.end_token_ids and self.tokenizer.eos_token_id is not None:
            self.end_token_ids = [self.tokenizer.eos_token_id]
        self.generate_kwargs: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": settings.temperature > 0,
            "eos_token_id": self.end_token_ids or None,
            "pad_token_id": pad_token_id(config) or 0,
            "return_dict_in_generate": True,
        }
        if settings.temperature > 0:
            self.generate_kwargs |= {"temperature": settings.temperature, "top_p": settings.top_p}
        if draft is not None:
            self.generate_kwargs |= {"assistant_model": draft, "num_assistant_tokens": self.num_assistant_tokens}

    def identity(self) -> dict[str, Any]:
        """Return what the answers depend on, which does not include the draft."""
        own, settings = self.target.generation_config.to_diff_dict(), asdict(self.settings)
        if not self.settings.top_logits:
            del settings["top_logits"]  # Manifests of files without them may be older than the setting.
        return {
            "target": model_name(self.target),
            "settings": {
                **settings,
                "dtype": str(self.target.dtype).removeprefix("torch."),
                "generation_config": {name: own[name] for name in OWN_SETTINGS if name in own},
                "chat_template_sha256": digest_of(self.tokenizer.chat_template),
                "weights_sha256": weights_digest(self.target),
            },
        }

    def template_problem(self, conversation: Conversation) -> str | None:
        """Return why the chat template cannot write a conversation; `None` if it can."""
        answer = {"role": "assistant", "content": "…"}
        messages = [message for turn in conversation.turns for message in (*turn, answer)]
        if self.tokenizer.chat_template is None and len(messages) > 2:
            return "the target's tokenizer has no chat template to write its roles (one `prompt` needs none)"
        try:
            encode_prompt(self.tokenizer, messages[:-1])
        except Exception as error:  # Chat templates raise errors of many kinds.
            return f"the target's chat template fails: {error}"
        return None

    def samples(self, conversations: Iterable[Conversation], done: set[tuple[str, int]]) -> list[Sample]:
        """Prepare what is not `done`, conversations of as many turns and of like length together, longest first."""
        samples = []
        for conversation in conversations:
            missing = [n for n in range(self.settings.num_samples) if (conversation.digest, n) not in done]
            prompt = encode_prompt(self.tokenizer, conversation.turns[0]) if missing else []
            samples += [Sample(conversation, number, prompt) for number in missing]
        return sorted(samples, key=lambda s: (len(s.conversation.turns), len(s.prompt)), reverse=True)

    def has_room(self, sample: Sample) -> bool:
        return len(sample.prompt) + self.settings.max_new_tokens <= self.num_positions

    def answer(self, batch: Sequence[Sample]) -> None:
        """Answer the turns of a batch one after the other, each sample's as long as it has room."""
        while asked := [sample for sample in batch if not sample.is_finished and self.has_room(sample)]:
            answers = self.generate(asked)
            for sample, top_logits in zip(asked, self.top_logits(asked, answers), strict=False):
                sample.top_logits.append(top_logits)
            for sample, answer in zip(asked, answers, strict=True):
                turns, content = sample.conversation.turns, self.tokenizer.decode(answer, skip_special_tokens=True)
                sample.messages += [*turns[len(sample.answers)], {"role": "assistant", "content": content}]
                sample.answers.append(answer)
                if not sample.is_finished:
                    messages = [*sample.messages, *turns[len(sample.answers)]]
                    sample.prompt = next_prompt(self.tokenizer, messages, sample.prompt, answer)

    def top_logits(self, samples: Sequence[Sample], answers: Sequence[list[int]]) -> list[TopLogits]:
        """Return what the target says of each answer, if that is stored."""
        if not self.settings.top_logits:
            return []
        # Rows of a vocabulary that were added as padding are no tokens.
        num_ids = min(len(self.tokenizer), self.target.config.get_text_config().vocab_size)
        prompts = [sample.prompt for sample in samples]
        return top_logits_of(self.target, prompts, answers, min(self.settings.top_logits, num_ids), num_ids)

    def seed_of(self, samples: Sequence[Sample]) -> int:
        """Return a seed that follows from what the batch holds, so that the order of batches does not change it."""
        keys = [(s.conversation.digest, s.number, len(s.answers)) for s in samples]
        return int(digest_of(json.dumps([self.settings.seed, keys])), 16)

    def generate(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Generate the next answer of each sample, up to and with its end token."""
        device = input_device(self.target)
        inputs = pad_left([sample.prompt for sample in samples], self.generate_kwargs["pad_token_id"]).items()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed_of(samples))
            output = self.target.generate(**{n: values.to(device) for n, values in inputs}, **self.generate_kwargs)
        self.stats += getattr(output, "stats", None) or DecodingStats()
        longest = max(len(sample.prompt) for sample in samples)
        return [until_end(answer, self.end_token_ids) for answer in output.sequences[:, longest:].tolist()]


@dataclass
class ServedGenerator(ResponseGenerator):
    """A target that a server runs; `target` describes it, and may lie on the meta device, without weights."""

    endpoint: Endpoint | None = None

    def identity(self) -> dict[str, Any]:
        """Return what the answers depend on; whose weights are served, only the server knows."""
        assert self.endpoint is not None
        found = super().identity()
        found["settings"] |= {"served_model": self.endpoint.model, "dtype": None, "weights_sha256": None}
        return found

    def generate(self, samples: Sequence[Sample]) -> list[list[int]]:
        assert self.endpoint is not None
        settings = self.settings
        sampling = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
        sampling |= {"top_p": settings.top_p, "seed": self.seed_of(samples) % 2**31}
        prompts = [sample.prompt for sample in samples]
        return self.endpoint.complete(prompts, self.end_token_ids, self.tokenizer, **sampling)


def digest_of(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def model_name(model: PreTrainedModel) -> str:
    """Return a Hub id, the last part of a folder, or the class of a model that comes from neither."""
    name = model.config.name_or_path
    if name in bundled_pair():
        return f"bundled {Path(name).name}"
    return shown_model(name) if name else type(model).__name__


def weights_digest(model: PreTrainedModel) -> str:
    """Digest the first 16 values of every weight, of offloaded ones the shape: a name may have other weights later."""
    sha256 = hashlib.sha256()
    for name, weight in model.named_parameters():
        sha256.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            sha256.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def manifest_path(path: Path) -> Path:
    return beside(path, "manifest.json")


class AnswerFile:
    """A `.jsonl` file of answers of one `identity`, its shards while it is unfinished, and its manifest.

    One process writes. A second one loses and doubles no row, as shards have names of their own and a row that comes
    twice is taken once, but the first to finish may end it: the command repeated completes the file. Raises a
    `ValueError` for rows of another identity or without a manifest; `restart` moves earlier rows aside.
    """

    def __init__(self, path: Path, identity: dict[str, Any], end_token_ids: Sequence[int], restart: bool = False):
        if path.suffix != ".jsonl":
            raise ValueError(f"Expected an output file that ends in `.jsonl`, got `{path.name}`. Choose another name.")
        if restart and row_files(path):
            move_aside(path)
        self.path, self.identity, self.end_token_ids = path, identity, end_token_ids
        self.counts, self.done, self.token_counts = Counts(), set[tuple[str, int]](), Counter[int]()
        files = row_files(path)
        self.runs = earlier_runs(path, identity) if files else []
        for row in itertools.chain.from_iterable(map(read_rows, files)):
            self.count(row)

    def count(self, row: dict[str, Any]) -> None:
        """Count a row on disk, unless it was counted before."""
        if (key := key_of(row)) in self.done:
            return
        self.done.add(key)
        self.counts.rows += 1
        for answer in response_ids(row):
            is_ended = bool(answer) and answer[-1] in self.end_token_ids
            self.counts.answers += 1
            self.counts.tokens += len(answer)
            self.counts.ended += is_ended
            self.counts.cut += not is_ended
            self.token_counts.update(answer)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as a shard of their own."""
        shard = beside(self.path, "shards") / f"{time.time_ns()}.{os.getpid()}.jsonl"
        shard.parent.mkdir(parents=True, exist_ok=True)
        write_whole(shard, "".join(map(json_line, rows)))
        tokens_before = self.counts.tokens
        for row in rows:
            self.count(row)
        self.counts.new_rows += len(rows)
        self.counts.waiting -= len(rows)
        self.counts.new_tokens += self.counts.tokens - tokens_before

    def finish(self) -> str:
        """Merge the shards into the file and remove them; returns the SHA-256 of the file."""
        files, seen = row_files(self.path), set[tuple[str, int]]()
        if files != [self.path]:
            with whole_file(self.path) as written, written.open("w", encoding="utf-8", newline="\n") as merged:
                for row in itertools.chain.from_iterable(map(read_rows, files)):
                    if (key := key_of(row)) not in seen:
                        seen.add(key)
                        self.count(row)  # One that another process wrote.
                        merged.write(json_line(row))
                merged.flush()
                os.fsync(merged.fileno())  # Before its shards are removed.
        shards = beside(self.path, "shards")
        for file in {*files, *shards.glob("*.partial")} - {self.path}:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # There is none, or another process still writes there.
            shards.rmdir()
        token_counts = dict(self.token_counts.most_common())
        write_whole(beside(self.path, "counts.json"), json_line({"token_counts": token_counts}))
        return sha256_of(self.path).hexdigest()

    def write_manifest(
        self, run: dict[str, Any], sources: Sequence[dict[str, Any]], sha256: str | None = None
    ) -> None:
        """Write the manifest with `run` as the last of the runs; `sha256` is that of the finished file."""
        runs = [*self.runs, *([run] if self.counts.new_rows else [])]
        stats = sum((DecodingStats(tuple(r["histogram"])) for r in runs if "histogram" in r), DecodingStats())
        manifest = {
            "output": {"name": self.path.name, "sha256": sha256},
            "is_complete": sha256 is not None,
            **self.identity,
            "counts": self.counts.to_dict(),
            "sources": list(sources),
            "acceptance_length": round(stats.acceptance_length, 4) if stats.num_rounds else None,
            "runs": runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(manifest_path(self.path), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def key_of(row: dict[str, Any]) -> tuple[str, int]:
    """Return the digest of a row's conversation, and which of its samples the row is."""
    return row["id"].rpartition(":")[2], row["sample"]


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def row_files(path: Path) -> list[Path]:
    """List the files that hold rows: the finished one, if it has any, and the shards in the order of their writing."""
    is_there = path.exists() and path.stat().st_size > 0
    return [path] * is_there + sorted(beside(path, "shards").glob("*.jsonl"))


def earlier_runs(path: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the runs that wrote a file of answers; a `ValueError` if they were not of `identity`."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        before = {"target": manifest.get("target"), **manifest["settings"]}
        runs = list(manifest["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a readable manifest `{manifest_path(path).name}` of the rows in `{path}`, got "
            f"{type(error).__name__}. Pass `--restart` to move the rows aside, or choose another output."
        ) from error
    now = {"target": identity["target"], **identity["settings"]}
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"Expected the settings of the answers in `{path}`, but `{name}` was {before.get(name)!r} and is "
                f"{now.get(name)!r}. Take the same, pass `--restart` to move the old answers aside, or choose another "
                "output."
            )
    return runs


def move_aside(path: Path) -> None:
    """Rename a file of answers, its manifest, counts and shards to the first free one of `name.1.jsonl`, …."""
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    free = next(name for name in names if not name.exists() and not manifest_path(name).exists())
    suffixes = ("manifest.json", "counts.json", "shards")
    for old, new in ((path, free), *((beside(path, suffix), beside(free, suffix)) for suffix in suffixes)):
        if old.exists():
            old.rename(new)


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
    endpoint: Endpoint | None = None,
    **settings: Any,
) -> Counts:
    """Let the target answer prompts, and write the answers to `out`; answers that are there already are kept.

    A row asks by its `prompt`, its `turns` (texts of a user) or its `messages`; answers in it are replaced. Rows of
    `out` are `{"id", "sample", "prompt", "response", "response_ids"}`, or `{"id", "sample", "messages",
    "response_ids"}` with one list of ids for each answer: the very tokens, up to and with the end token. Prompts and
    later turns without room for `max_new_tokens` before the last position are left out and counted.

    Greedy answers depend on the prompt alone, up to floating point; samples on `seed` and on the rest of the batch.
    `settings` are fields of [`AnswerSettings`].

    Args:
        draft ([`PardDraftModel`], *optional*):
            Makes generation faster, by `num_assistant_tokens` proposals a round; applies [`with_pard`] to the target.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time; an interruption loses one batch at most.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Log and leave out rows that ask nothing or that the chat template refuses.
        restart (`bool`, *optional*, defaults to `False`):
            Move earlier answers aside, with their manifest, and begin anew.
        sources (`Sequence[dict]`, *optional*):
            Where the rows are from, for the manifest.
        report (`Callable`, *optional*):
            Called after each batch with the counts and the decoding statistics so far.
        endpoint ([`Endpoint`], *optional*):
            A server that runs the target, of which only config and generation config are read here.

    Raises:
        ValueError: A row is bad, or `out` has answers of another target or other settings; nothing was written.
    """
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, got {batch_size}.")
    if endpoint is not None and draft is not None:
        raise ValueError("Expected no draft with an endpoint, got one. Serve the target with it (`docs/serving.md`).")
    if endpoint is not None and settings.get("top_logits"):
        raise ValueError("Expected no `top_logits` with an endpoint, whose logits stay there. Leave one of them out.")
    generator = ResponseGenerator(target, tokenizer, AnswerSettings(**settings), draft, num_assistant_tokens)
    if endpoint is not None:
        generator = ServedGenerator(target, tokenizer, AnswerSettings(**settings), endpoint=endpoint)
    skipped = [number for source in sources for number in source.get("skipped", ())]
    num_rows, digests, conversations = 0, set[str](), list[Conversation]()
    for row in check_rows(enumerate(rows, 1), "row {}", PROMPTS, skip_bad_rows, skipped):
        num_rows += 1
        if (conversation := conversation_of(row)).digest in digests:
            continue
        digests.add(conversation.digest)
        if (problem := generator.template_problem(conversation)) is None:
            conversations.append(conversation)
        else:
            skip_or_raise("a conversation to answer", row.source, problem, skip_bad_rows)
    file = AnswerFile(Path(out), generator.identity(), generator.end_token_ids, restart)
    samples = generator.samples(conversations, file.done)
    waiting = [sample for sample in samples if generator.has_room(sample)]
    counts = file.counts
    counts.prompts, counts.duplicates = len(digests), num_rows - len(digests)
    counts.bad_rows = len(digests) - len(conversations) + len(skipped)
    counts.waiting, counts.left_out = len(waiting), len(samples) - len(waiting)
    run = conditions_of(target) | {"draft": draft and model_name(draft), "batch_size": batch_size}
    del run["decoding"]  # The settings record it.
    if endpoint is not None:
        run |= {"device": "a server", "dtype": None}
    file.write_manifest(run, sources)
    start = time.perf_counter()
    for first in range(0, len(waiting), batch_size):
        batch = waiting[first : first + batch_size]
        generator.answer(batch)
        counts.shortened += sum(not sample.is_finished for sample in batch)
        file.append([sample.to_row() for sample in batch])
        run |= {"new_rows": counts.new_rows, "seconds": round(time.perf_counter() - start, 2)}
        run |= generator.stats.to_dict() if draft is not None else {}
        file.write_manifest(run, sources)
        if report is not None:
            report(counts, generator.stats)
    file.write_manifest(run, sources, file.finish())
    return counts
