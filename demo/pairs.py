"""Pairs by name: SmolLM2 and the bundled one, folders below a start folder, Hub ids. The last few stay loaded."""

from __future__ import annotations

import gc
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import is_offline_mode, snapshot_download
from tqdm.auto import tqdm
from transformers import AutoConfig

from pard_hf.draft.known_drafts import known_draft_for
from pard_hf.draft.model import saved_mask_token
from pard_hf.draft.packaged import is_packaged
from pard_hf.generation.validation import check_pair, check_saved_tokenizers
from pard_hf.hub.checkpoint import DRAFT_FILES
from pard_hf.loading import Pair, PairPaths, default_device, load_pair, named_pair
from pard_hf.locate import hub_problem, is_cached

from .job import DEVICE, DOWNLOADS, Job, Ticket
from .room import available_memory, check_disk, needed_memory, too_large
from .template import check_template

BUNDLED, SMOLLM2, FOLDER, HUB = "bundled pair", "SmolLM2", "local folder", "Hub id"
KINDS = (BUNDLED, SMOLLM2, FOLDER, HUB)
# What `pard` calls them on its command line.
NAMED: dict[str, Literal["smollm2", "bundled"]] = {BUNDLED: "bundled", SMOLLM2: "smollm2"}
MOST_LOADED = 2
MOST_NAME_CHARACTERS = 200
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class PairName(NamedTuple):
    """Which pair: where the models are, and there a target and its draft."""

    kind: str = BUNDLED
    target: str = ""
    draft: str = ""

    @classmethod
    def checked(cls, kind: Any, target: Any, draft: Any) -> PairName:
        """A name from what a page sent, or a `ValueError`; a draft may be left out for a target of the Hub."""
        if kind not in KINDS:
            raise ValueError(f"Expected models from one of {', '.join(KINDS)}, got {kind!r}. Choose one of these.")
        if kind in NAMED:
            return cls(kind)
        target, draft = str(target or "").strip(), str(draft or "").strip()
        for text in (target, draft):
            if len(text) > MOST_NAME_CHARACTERS or not text.isprintable():
                raise ValueError(
                    f"Expected a name of at most {MOST_NAME_CHARACTERS} characters on one line, got {len(text)}. "
                    "Shorten it, on one line."
                )
        if not target or (not draft and kind == FOLDER):
            missing = "target" if not target else "draft"
            raise ValueError(f"Expected the {kind} of a {missing}, got nothing. Type its name.")
        return cls(kind, target, draft)

    def __str__(self) -> str:
        return self.kind if self.kind in NAMED else f"{self.target} with {self.draft or 'its known draft'}"


class PairShelf:
    """Loads pairs and keeps the last two. While one is downloaded, others can be used.

    Args:
        folder (`Path`, *optional*):
            Local models must lie below it; without one none is loaded.
        device (`str`, *optional*):
            Defaults to the first CUDA device, or the CPU.
        token (`bool`, *optional*):
            `False` keeps the machine's own Hub token from visitors, and with it private models.
    """

    def __init__(self, folder: Path | None = None, device: str | None = None, token: bool | None = None):
        self.folder = folder.resolve() if folder is not None else None
        self.device = device
        self.token = token
        self.pairs: OrderedDict[PairName, Pair] = OrderedDict()
        self.lock = threading.Lock()
        self.reading = threading.Lock()

    def get(self, name: PairName) -> Pair | None:
        """The pair of a name, if it is loaded."""
        with self.lock:
            if name in self.pairs:
                self.pairs.move_to_end(name)
            return self.pairs.get(name)

    def load(self, name: PairName, report: Callable[[str], None] = lambda text: None) -> Pair:
        """The pair of a name, loaded if need be.

        Args:
            report (`Callable[[str], None]`, *optional*):
                Told what is being done; may raise to end it, and nothing is changed.

        Raises:
            ValueError: The name leads nowhere, the models do not go together, or they are too large.
            OSError: The Hub refuses, or the disk is full.
        """
        pair = self.get(name)
        if pair is not None:
            return pair
        paths = self.find(name, report)
        with self.reading:
            pair = self.get(name)
            if pair is not None:
                return pair
            with named(name, paths):
                pair = self.read(paths, report)
            with self.lock:
                self.pairs[name] = pair
        self.try_out(name, pair, report)
        with self.lock:
            while len(self.pairs) > MOST_LOADED:
                self.pairs.popitem(last=False)
        return pair

    def make_room(self, num_bytes: int) -> None:
        """Let the oldest pairs go where another one does not fit beside them.

        Raises:
            ValueError: It does not fit at all; then none has gone.
        """
        device = self.device or default_device()
        with self.lock:
            loaded = [pair_bytes(pair) for pair in self.pairs.values()]
            free = available_memory(device)
            if num_bytes > free + sum(loaded):
                raise ValueError(too_large(num_bytes, free + sum(loaded)))
            while num_bytes > free and loaded:
                free += loaded.pop(0)
                self.pairs.popitem(last=False)
        gc.collect()

    def find(self, name: PairName, report: Callable[[str], None]) -> PairPaths:
        """The folders of both models, downloaded if need be."""
        if name.kind in NAMED:
            return named_pair(NAMED[name.kind], report)
        report(f"Looking for {name.target} …")
        if name.kind == FOLDER:
            return PairPaths(str(self.local_path(name.target)), str(self.local_path(name.draft)))
        target = self.hub_path(name.target, report)
        draft = self.hub_path(name.draft or known_draft_for(target).name, report)
        return PairPaths(str(target), str(draft))

    def read(self, paths: PairPaths, report: Callable[[str], None]) -> Pair:
        """Load both models, if there is memory for them, and see that they go together."""
        report("Loading the models …")
        # What is wrong with a pair in any case: no other has to make room to find it out.
        if not is_packaged(paths.draft):
            saved_mask_token(AutoConfig.from_pretrained(paths.draft, trust_remote_code=False), paths.draft)
        check_saved_tokenizers(paths.draft, paths.target)
        self.make_room(needed_memory(paths, self.device))
        pair = load_pair(*paths, device=self.device)
        check_vocabulary(pair)
        check_template(pair.tokenizer)
        check_pair(pair.target, pair.draft, pair.draft.num_assistant_tokens, None, None)
        return pair

    def try_out(self, name: PairName, pair: Pair, report: Callable[[str], None]) -> None:
        """Run both routes once when the device is free, so that no race pays for first times."""
        with self.dropped_unless_it_runs(name), DEVICE.turn(lambda: report("Loaded; waiting for the device …")):
            report("Trying the models …")
            ids = pair.tokenizer("1", return_tensors="pt")["input_ids"].to(pair.target.device)
            for draft in (None, pair.draft):
                pair.target.generate(ids, assistant_model=draft, max_new_tokens=2, do_sample=False)

    @contextmanager
    def dropped_unless_it_runs(self, name: PairName) -> Iterator[None]:
        try:
            yield
        except Exception:
            with self.lock:
                self.pairs.pop(name, None)
            raise

    def settled(self, name: PairName) -> PairName:
        """A name as it is kept: folders by their path below the start folder, however they were written."""
        if name.kind != FOLDER:
            return name
        paths = (self.local_path(model).relative_to(str(self.folder)) for model in (name.target, name.draft))
        return PairName(FOLDER, *map(str, paths))

    def local_path(self, name: str) -> Path:
        """A folder below the start folder; what lies elsewhere is refused like what does not exist."""
        if self.folder is None:
            raise ValueError(
                "Expected models of the Hub or the bundled pair, got a local folder: the demo was started without a "
                "folder of models. Start it with `--folder`, or choose another kind."
            )
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or not (path / "config.json").is_file():
            raise ValueError(
                f"Expected a model below the folder the demo was started with, got {name!r}. Name a folder there that "
                "holds a config.json."
            )
        return path

    def hub_path(self, name: str, report: Callable[[str], None]) -> Path:
        """The folder of a model of the Hub in the cache, downloaded if need be."""
        if not HUB_ID.fullmatch(name):
            raise ValueError(f"Expected a Hub id such as `Qwen/Qwen2.5-7B-Instruct`, got {name!r}. Correct the id.")
        patterns = list(DRAFT_FILES)
        bars = bar_class(name, report)
        problem = None if is_offline_mode() else hub_problem()
        if problem is not None and not is_cached(name):
            raise OSError(f"Expected the Hub to answer for `{name}`, but it does not: {problem}. Look to the network.")
        if problem is None and not is_offline_mode():
            try:
                files: Any = snapshot_download(
                    name, allow_patterns=patterns, dry_run=True, tqdm_class=bars, token=self.token
                )
            except OSError as error:  # A dry run hides the Hub's own message.
                reason = " ".join(str(error.__cause__ or error).split())
                raise OSError(f"`{name}` cannot be downloaded: {reason}") from error
            check_disk(name, sum(file.file_size for file in files if file.will_download))
        is_away = problem is not None
        return Path(
            snapshot_download(
                name, allow_patterns=patterns, tqdm_class=bars, token=self.token, local_files_only=is_away
            )
        )


def pair_bytes(pair: Pair) -> int:
    """Bytes of a pair's weights."""
    return sum(p.numel() * p.itemsize for model in pair.models for p in model.parameters())


class LoadJob(Job):
    """Loading a pair."""

    queue = DOWNLOADS
    most_seconds = 3600.0  # A download may take long.

    def __init__(self, shelf: PairShelf, name: PairName, ticket: Ticket | None = None):
        super().__init__(ticket)
        self.shelf, self.name, self.doing = shelf, name, "Loading …"
        self.pair: Pair | None = None

    def work(self) -> None:
        self.pair = self.shelf.load(self.name, self.report)

    def report(self, text: str) -> None:
        self.check()
        self.doing = text


@contextmanager
def named(name: PairName, paths: PairPaths) -> Iterator[None]:
    """Name models in errors as the visitor did, not by their folders."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        for path, shown in ((paths.target, name.target), (paths.draft, name.draft)):
            text = text.replace(path, shown or "its known draft") if shown != path else text
        raise ValueError(text) from error


def bar_class(name: str, report: Callable[[str], None]) -> type[tqdm]:
    """A progress bar for the Hub's downloads that reports bytes instead of drawing."""

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            # A disabled bar counts nothing: one that draws into the void does.
            super().__init__(*args, **{**kwargs, "file": VOID, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B" and self.total:
                report(f"Downloading {name}: {self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB")
            else:
                report(f"Looking for {name} …")
            return shown

    return ReportingBar


class Void:
    """A file that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


VOID = Void()


def check_vocabulary(pair: Pair) -> None:
    """Raise a `ValueError` where the tokenizer makes ids that the target has no row for."""
    num_rows = pair.target.config.get_text_config().vocab_size
    if len(pair.tokenizer) > num_rows:
        raise ValueError(
            f"Expected a tokenizer of at most {num_rows} tokens, the rows of the target's vocabulary, got "
            f"{len(pair.tokenizer)}. Put the target's own tokenizer beside it."
        )
