"""Parse the command line of `pard`, call the library, print.

Heavy imports stand inside the commands, so that `pard --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

import typer

from . import __version__
from .training.settings import TrainingSettings

if TYPE_CHECKING:
    from .conversation import Conversation
    from .evaluation.race import RaceResult
    from .generation.stats import DecodingStats
    from .hub.engines import Finding
    from .loading import Pair

app = typer.Typer(
    rich_markup_mode=None,
    help="Parallel draft models for transformers. A flag with a LIST is given once, with commas, or several times.",
)

EXIT_DIFFERENT = 3  # A float32 text differs from plain generate's.
WIDTH = 80  # Columns of `pard demo`.
STAND_IN = "The bundled pair answers, a tiny stand-in: name models, or take a chat model with --pair smollm2."
ROUTE_NAMES = (
    "ar, ar_plus, ad, pld, tier1, tier2, head, tree, tree_head, adaptive, copy, successors, lookup, lookup_kept, "
    "lookup_adaptive, every_source, every_source_adaptive; some also with _compiled"
)
UNDERLINE, RESET = "\033[4m", "\033[0m"
TINTS = {"draft": "\033[32m", "copy": "\033[36m", "successors": "\033[33m"}
# Flags that may stand without a value: what they may be given, and what they mean without.
OPTIONAL_VALUES = {"--correction-head": (r"frozen|joint", "frozen"), "--lookup": (r"\d+", "10")}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; bad input prints one line to standard error and returns 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["pard", *words[:1]])
    command = typer.main.get_command(app)
    try:
        code = command(with_optional_values(words), prog_name="pard", obj=words, standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _warn(f"{name}: {message}. See `{name} --help`.")
        return error.exit_code
    except (ValueError, OSError, FloatingPointError) as error:
        _warn(f"{name}: {error}")
        return 2
    if code == 130:
        _warn(f"{name}: interrupted")
    return code


def with_optional_values(words: list[str]) -> list[str]:
    """Write flags of `OPTIONAL_VALUES` that stand alone with their value: typer has no optional values."""
    written = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        pattern, default = OPTIONAL_VALUES.get(word, ("", None))
        is_alone = default is not None and not re.fullmatch(pattern, following)
        written.append(f"{word}={default}" if is_alone else word)
    return written


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _words(text: str) -> list[str]:
    """Split a comma-separated list, unless it is the name of a file."""
    from .io import is_path_there

    return [text] if "," not in text or is_path_there(text) else text.split(",")


def _paths(text: str) -> list[Path]:
    return [Path(word) for word in _words(text)]


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected whole numbers separated by commas, got {text!r}") from None


def _several(help: str, split: Callable[[str], list[Any]] = _words) -> Any:
    """Declare a flag that takes several values."""
    return typer.Option(help=help, parser=split, callback=lambda lists: sum(lists or [], []), metavar="LIST")


def _flag(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, **settings)


Text = str | None
Texts = list[str] | None
Integers = list[int] | None
Target = Annotated[Text, _flag("folder or Hub id of the target model (default: the bundled target)")]
Draft = Annotated[Text, _flag("folder or Hub id of the draft model (default: the bundled draft)")]
NamedPair = Literal["smollm2", "bundled"]
PairFlag = Annotated[
    NamedPair | None,
    _flag("a target and its draft by name: smollm2, SmolLM2-135M-Instruct; bundled, a stand-in for tests", "--pair"),
]
Dtype = Annotated[str, _flag("of the weights; auto: the checkpoint's, float32 on a CPU")]
Device = Annotated[Text, _flag("cpu, cuda, cuda:1 … (default: cuda where there is one)")]
MaxNewTokens = Annotated[int, _flag("new tokens at most")]
NumAssistantTokens = Annotated[int | None, _flag("K, draft tokens proposed a round (default: the draft's own)", min=1)]
TreeSize = Annotated[int | None, _flag("N, nodes of a tree verified a round; 0 = chain (default: the draft's)")]
Lookup = Annotated[
    int | None,
    _flag(
        "also, or with no draft only, propose from the text and the target's habits, N tokens deep",
        min=1,
        metavar="[N]",
    ),
]
Temperature = Annotated[float, _flag("0 is greedy", min=0)]
Color = Annotated[Literal["auto", "always", "never"], _flag("tint accepted tokens")]
SkipBadRows = Annotated[bool, _flag("leave broken rows out instead of stopping", "--skip-bad-rows")]
PROMPT_SETS = "a .jsonl or .jsonl.gz file, or a Hub data set as hub:org/name[:split[:field]]"


def print_versions(is_asked: bool) -> None:
    """Print the version of this package and of those that decide what `generate` does; import none of them."""
    if is_asked:
        print(" · ".join(f"{package} {version_of(package)}" for package in ("pard-hf", "torch", "transformers")))
        raise typer.Exit


def version_of(package: str) -> str:
    try:
        return __version__ if package == "pard-hf" else version(package)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def pard(
    versions: Annotated[
        bool, _flag("print versions and exit", "--version", callback=print_versions, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[Text, typer.Argument(help="the prompt; '-' or nothing reads standard input")] = None,
    file: Annotated[
        list[Path] | None, _several("a text file with a prompt, or .jsonl rows with a `prompt` each", _paths)
    ] = None,
    target: Target = None,
    draft: Draft = None,
    named: PairFlag = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_new_tokens: MaxNewTokens = 128,
    num_assistant_tokens: NumAssistantTokens = None,
    assistant_tree_size: TreeSize = None,
    lookup: Lookup = None,
    batch_size: Annotated[int, _flag("texts at a time, for several prompts", min=1)] = 8,
    temperature: Temperature = 0.0,
    seed: Annotated[int | None, _flag("seed for sampling")] = None,
    raw: Annotated[bool, _flag("do not put the prompt into the chat template", "--raw")] = False,
    as_json: Annotated[bool, _flag("print one JSON object a prompt instead of text", "--json")] = False,
    color: Color = "auto",
) -> None:
    """Complete one prompt, streamed; or all prompts of files, in batches."""
    is_stand_in = named is target is draft is None
    target, draft = _of_pair(named, target, draft)
    prompts, is_single = _read_prompts(prompt, file or [])

    import torch

    from .evaluation.prompts import make_batches
    from .evaluation.report import make_console, progress_bar
    from .generation.memory import AssistantMemory
    from .generation.stats import DecodingStats
    from .host import end_token_ids, pad_token_id
    from .tokens import encode_prompt

    pair = _load(target, draft, dtype, device, may_lack_draft=lookup is not None)
    proposing = _proposing(pair, num_assistant_tokens, assistant_tree_size, lookup)
    if is_stand_in:
        _warn(STAND_IN)
    if seed is not None:
        torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        **proposing,
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": True,
        **_sampling(temperature),
    }
    is_tinted = is_single and not as_json and _is_tinted(color)
    if is_single and not as_json:
        arguments["streamer"] = TintedStreamer(pair.tokenizer, is_tinted)
    if lookup is not None and not is_single:
        arguments["assistant_memory"] = AssistantMemory(pair.target)
    encoded = [encode_prompt(pair.tokenizer, prompt, raw) for prompt in prompts]
    config, answers = pair.target.generation_config, dict[int, list[int]]()
    stats, start = DecodingStats(), time.perf_counter()
    batches = make_batches(encoded, batch_size, pad_token_id(config), pair.target.device)
    with nullcontext() if is_single else progress_bar(make_console(is_error=True)) as advance:
        for batch in batches:
            output = pair.target.generate(**batch.inputs, **arguments)
            answers |= batch.new_texts(output.sequences, end_token_ids(config))
            stats += output.stats
            if advance is not None:
                speed = sum(map(len, answers.values())) / (time.perf_counter() - start)
                advance(len(batch.indices) / len(prompts), f"{len(answers)}/{len(prompts)} · {speed:.1f} tokens/s")
    seconds = time.perf_counter() - start
    num_new_tokens = sum(map(len, answers.values()))
    for index, prompt in enumerate(prompts):
        text = pair.tokenizer.decode(answers[index], skip_special_tokens=True)
        row: dict[str, Any] = {"text": text, "num_new_tokens": len(answers[index])}
        if is_single:
            row |= {"seconds": round(seconds, 4), "tokens_per_second": round(num_new_tokens / seconds, 2)}
            names = ("num_assistant_tokens", "prompt_lookup_num_tokens")
            row |= {**{name: proposing[name] for name in names if name in proposing}, **stats.to_dict()}
        if as_json:
            print(json.dumps(row if is_single else {"prompt": prompt, **row}, ensure_ascii=False))
        elif not is_single:
            print(f"[{index + 1}/{len(prompts)}] {prompt.rstrip()}\n\n{text.rstrip()}\n")
    if not (is_single and as_json):
        _warn(
            f"{num_new_tokens} tokens · {num_new_tokens / seconds:.2f} tokens/s (prefill included) · "
            f"τ {stats.acceptance_length:.2f} · α {stats.acceptance_rate:.2f} · "
            f"{stats.num_rounds} rounds of {_depths(proposing)}{_shares(stats, is_tinted)}"
        )


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _is_tinted(color: str) -> bool:
    return color == "always" or (color == "auto" and sys.stdout.isatty())


def _proposing(
    pair: Pair, num_assistant_tokens: int | None, assistant_tree_size: int | None, lookup: int | None
) -> dict[str, Any]:
    """Return the arguments of `generate` that say what proposes, and how much."""
    arguments: dict[str, Any] = {"assistant_tree_size": assistant_tree_size}
    if lookup is not None:
        arguments["prompt_lookup_num_tokens"] = lookup
    if pair.draft is not None:
        num_drafts = pair.draft.num_assistant_tokens if num_assistant_tokens is None else num_assistant_tokens
        arguments |= {"assistant_model": pair.draft, "num_assistant_tokens": num_drafts}
    elif num_assistant_tokens is not None:
        raise ValueError("Expected a draft with `--num-assistant-tokens`, got none. Name one, or pass `--lookup N`.")
    return arguments


def _depths(proposing: dict[str, Any]) -> str:
    """Describe how deep rounds propose: K of the draft, N of lookup."""
    titles = {"num_assistant_tokens": "K = {}", "prompt_lookup_num_tokens": "lookup {}"}
    return " and ".join(title.format(proposing[name]) for name, title in titles.items() if name in proposing)


def _shares(stats: DecodingStats, is_tinted: bool = False) -> str:
    """List the shares of accepted tokens by source, each in the tint of its tokens; empty with a draft alone."""
    shares = []
    for name, share in stats.accepted_shares.items():
        tint, reset = (TINTS[name], RESET) if is_tinted else ("", "")
        shares.append(f"{tint}{name} {share:.0%}{reset}")
    return f" · accepted from {', '.join(shares)}" if shares else ""


def _of_pair(named: NamedPair | None, target: str | None, draft: str | None) -> tuple[str | None, str | None]:
    """Return the target and draft that `--pair` names, or those given; `None` for both is the bundled pair."""
    if named is None:
        return target, draft
    if target is not None or draft is not None:
        raise ValueError("Expected `--pair` or a target and a draft, got both. Drop one of them.")
    return (None, None) if named == "bundled" else (named, named)


def _load(
    target: str | None, draft: str | None, dtype: str, device: str | None, *, may_lack_draft: bool = False
) -> Pair:
    """Load a pair; `may_lack_draft` allows a target alone."""
    _find(target, draft)

    from .loading import SMOLLM2, load_models, load_pair

    _show_downloads_only()
    if target is None or draft is not None:
        return load_pair(target, draft, dtype, device)
    if not may_lack_draft:
        raise ValueError(
            f"Expected a draft for the target `{target}`, got none. Name one with --draft, "
            + ("its own with --pair smollm2, " if target == SMOLLM2 else "")
            + "or pass --lookup to do without."
        )
    return load_models(target, None, dtype, device)


def _served(endpoint: str, target: str | None, draft: str | None) -> tuple[Pair, Any]:
    """Describe the target that a server runs, and find the server."""
    if target is None or draft is not None:
        raise ValueError(
            "Expected --target, whose tokenizer and template write the prompts, and no --draft with --endpoint, got "
            + ("no target." if target is None else "a draft. Serve the target with it.")
        )
    _find(target, None)

    from .loading import Pair, describe_target
    from .training.endpoint import Endpoint

    found = Endpoint(endpoint)
    model, tokenizer = describe_target(target)
    return Pair(model, None, tokenizer), found


def _show_downloads_only() -> None:
    """Leave the bars of the Hub's downloads, on a terminal, and none of reading weights."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()


def _find(*names: str | None) -> None:
    """Refuse names that lead nowhere, and wait no longer than seconds for the Hub."""
    from .locate import find_checkpoints

    if (sentence := find_checkpoints(*names)) is not None:
        _warn(sentence)


def _read_prompts(prompt: str | None, files: list[Path]) -> tuple[list[str], bool]:
    """Read the prompts, and whether there is a single one, which is streamed."""
    from .evaluation.prompts import read_prompts
    from .io import read_text, text_problem

    if files and prompt is not None:
        raise ValueError("Expected a prompt or `--file`, got both. Drop one of them.")
    prompts = [] if files else [sys.stdin.read() if prompt in (None, "-") else str(prompt)]
    is_single = len(files) < 2
    for file in files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            is_single = False
            prompts += [row["prompt"] for row in read_prompts(file)]
        else:
            prompts.append(read_text(file))
    if not prompts:
        raise ValueError("Expected at least one prompt in the files, got none. Add a row with a `prompt`.")
    for text in prompts:
        if not text.strip():
            raise ValueError("Expected a prompt, got only white space. Pass it as an argument, `--file` or stdin.")
        if (problem := text_problem(text)) is not None:
            raise ValueError(f"Expected a prompt in UTF-8, but {problem}. Fix the prompt.")
    return prompts, is_single


class TintedStreamer:
    """Print tokens as they arrive, accepted ones in the tint of what proposed them."""

    def __init__(self, tokenizer: Any, is_tinted: bool):
        from .tokens import IncrementalDetokenizer

        self.text = IncrementalDetokenizer(tokenizer)
        self.is_tinted = is_tinted
        self.is_prompt = True
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        if not self.is_prompt:
            self.show(value)
        self.is_prompt = False

    def put_accepted(self, value: Any, source: str = "draft") -> None:
        self.show(value, TINTS[source] if self.is_tinted else "")

    def show(self, value: Any, tint: str = "") -> None:
        ids = value.flatten().tolist()
        self.tokens += ids
        new = self.text.add(ids)
        sys.stdout.write(f"{tint}{new}{RESET}" if tint and new else new)
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n")


CHAT_HELP = "/clear forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


@app.command()
def chat(
    target: Target = None,
    draft: Draft = None,
    named: PairFlag = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_new_tokens: Annotated[int, _flag("new tokens of an answer at most", min=1)] = 512,
    num_assistant_tokens: NumAssistantTokens = None,
    assistant_tree_size: TreeSize = None,
    lookup: Lookup = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int | None, _flag("seed for sampling")] = None,
    color: Color = "auto",
) -> None:
    """Chat with a target in the terminal; by default SmolLM2.

    Accepted tokens are tinted by what proposed them. Ctrl-C stops an answer; /clear forgets the conversation, /quit or
    Ctrl-D ends it.
    """
    if named == "bundled":
        raise ValueError("Expected a pair that can chat, got the bundled one, a stand-in. Take `--pair smollm2`.")
    target, draft = _of_pair(named if target or draft else "smollm2", target, draft)
    pair = _load(target, draft, dtype, device, may_lack_draft=lookup is not None)
    if pair.tokenizer.chat_template is None:
        raise ValueError("Expected a target with a chat template, got none. Name a model that was trained to chat.")

    import torch

    from .conversation import Conversation
    from .generation.memory import AssistantMemory

    if seed is not None:
        torch.manual_seed(seed)
    arguments = {**_proposing(pair, num_assistant_tokens, assistant_tree_size, lookup), **_sampling(temperature)}
    if lookup is not None:
        arguments["assistant_memory"] = AssistantMemory(pair.target)
    if sys.stdin.isatty():
        _warn(CHAT_HELP)
    conversation = Conversation()
    for text in _said():
        if text == "/quit":
            break
        elif text == "/clear":
            conversation = Conversation()
        elif text.startswith("/"):
            _warn(CHAT_HELP)
        elif text:
            _answer(pair, conversation, text, max_new_tokens, _is_tinted(color), arguments)


def _said() -> Iterator[str]:
    """Read what the user says, line by line, up to Ctrl-D."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Where there is none, lines cannot be edited.
            import readline  # noqa: F401
        prompt = "› "
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _warn(f"\n{CHAT_HELP}")
            continue
        yield text


def _answer(
    pair: Pair, conversation: Conversation, text: str, max_new_tokens: int, is_tinted: bool, arguments: dict[str, Any]
) -> None:
    """Stream the answer to `text`, show its speed, and keep both in the conversation."""
    import torch

    from .host import cache_of, num_positions

    ids = conversation.prompt(pair.tokenizer, text)
    room = min(num_positions(model.config) for model in pair.models) - len(ids)
    if room < 1:
        return _warn(f"Expected a conversation of fewer than {len(ids) + room} tokens, got {len(ids)}. Type /clear.")
    cache, streamer, output = conversation.take_cache(ids), TintedStreamer(pair.tokenizer, is_tinted), None
    num_kept, start = 0 if cache is None else cache.get_seq_length(), time.perf_counter()
    try:
        output = pair.target.generate(
            torch.tensor([ids], device=pair.target.device),
            past_key_values=cache,
            max_new_tokens=min(max_new_tokens, room),
            streamer=streamer,
            return_dict_in_generate=True,
            **arguments,
        )
    except KeyboardInterrupt:
        streamer.end()
    seconds, answer = time.perf_counter() - start, streamer.tokens
    print(flush=True)
    speed = f"{len(answer) / seconds:.1f} tokens/s · {num_kept} tokens in the cache"
    if output is None:
        _warn(f"stopped after {len(answer)} tokens · {speed}\n")
    else:
        _warn(f"τ {output.stats.acceptance_length:.2f} · {speed}{_shares(output.stats, is_tinted)}\n")
    if answer:
        conversation.keep(pair.tokenizer, text, ids, answer, None if output is None else cache_of(output))


@app.command(epilog="Ends with 3 where a text differs from plain generate's in float32.")
def demo(
    target: Target = None,
    draft: Draft = None,
    named: PairFlag = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_new_tokens: MaxNewTokens = 128,
    num_assistant_tokens: NumAssistantTokens = None,
    assistant_tree_size: TreeSize = None,
    lookup: Lookup = None,
    repeats: Annotated[int, _flag("timed runs a prompt and route", min=1)] = 1,
    compiled: Annotated[
        bool | None, _flag("race compiled plain generate too (default: on a GPU)", "--compiled/--no-compiled")
    ] = None,
) -> int:
    """Race plain generate against PARD on real prompts; by default SmolLM2 where it can be had."""
    from .evaluation.benchmark import is_exact
    from .evaluation.prompts import CHAT_PROMPTS, DEMO_PROMPTS
    from .evaluation.race import PARD, PLAIN, compile_plain, race
    from .evaluation.report import GAP, make_console, progress_bar
    from .loading import SMOLLM2, default_pair
    from .tokens import encode_prompt

    if named is target is draft is None:
        named, why = default_pair()
        print(f"{textwrap.fill(why, WIDTH)}\n\n" if why else "", end="")
    target, draft = _of_pair(named, target, draft)
    pair = _load(target, draft, dtype, device, may_lack_draft=lookup is not None)
    ours = _proposing(pair, num_assistant_tokens, assistant_tree_size, lookup)
    on, dtype = pair.target.device, str(pair.target.dtype).removeprefix("torch.")
    print(f"{_depths(ours)} · {dtype} · {on} · greedy · up to {max_new_tokens} new tokens\n")
    prompts = CHAT_PROMPTS if target == SMOLLM2 else DEMO_PROMPTS
    encoded = [encode_prompt(pair.tokenizer, prompt) for prompt in prompts]
    with_compiled = on.type != "cpu" if compiled is None else compiled
    if with_compiled and (reason := compile_plain(pair, max(encoded, key=len), max_new_tokens)) is not None:
        with_compiled = False
        print(f"Compiled plain generate is left out: {reason}.\n")
    heading = f"with {' and '.join(['the draft'] * (pair.draft is not None) + ['lookup'] * (lookup is not None))}"
    results = []
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True), start=1):
        print(_wrapped(f"[{number}/{len(prompts)}] {prompt.rstrip()}"), flush=True)
        with progress_bar(make_console(is_error=True)) as advance:
            results.append(race(pair, ids, max_new_tokens, repeats, with_compiled, advance, **ours))
        _show_race(results[-1], heading)
    total = sum(results[1:], results[0])
    print(f"all prompts: identical {total.agreement(PARD)} · {_speeds(total)}")
    if not is_exact(pair.target.dtype):
        itself = [f"{way}: identical {total.agreement(way)}" for way in total.gaps if way not in (PLAIN, PARD)]
        print(f"plain generate against itself: {' · '.join(itself)} ({GAP})")
    if target is None:
        print("The bundled pair is a stand-in to see the mechanism, not a useful assistant.")
    if not total.gaps[PARD] or not is_exact(pair.target.dtype):
        return 0
    _warn(
        f"pard demo: Expected the texts of plain `generate` in {dtype}, got {total.agreement(PARD)} identical. "
        "Please report the pair of models and the versions."
    )
    return EXIT_DIFFERENT


def _wrapped(text: str) -> str:
    """Wrap long lines of a text behind their indentation."""
    wrapped = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        wrapped += textwrap.wrap(line, WIDTH, subsequent_indent=indent, replace_whitespace=False) or [""]
    return "\n".join(wrapped)


def _show_race(result: RaceResult, ours: str) -> None:
    """Print the texts of a race, once where they are the same, and their speeds."""
    from .evaluation.race import PARD, PLAIN

    texts = {f"{PLAIN}, and the same {ours}": result.texts[PLAIN]}
    if result.gaps[PARD]:
        texts = {PLAIN: result.texts[PLAIN], ours: result.texts[PARD]}
    for heading, text in texts.items():
        shown = f"{UNDERLINE}{heading}{RESET}" if sys.stdout.isatty() else heading
        print(f"\n{shown}\n{_wrapped(text.rstrip())}")
    identical = "NO" if result.gaps[PARD] else "yes"
    print(f"\n  identical: {identical} · {result.num_new_tokens} tokens · {_speeds(result)}\n", flush=True)


def _speeds(result: RaceResult) -> str:
    """Format τ, tokens per second and the speedups over eager and, if it ran, compiled plain `generate`."""
    from .evaluation.race import COMPILED, PARD, PLAIN

    plain, pard = (result.num_new_tokens / result.seconds[way] for way in (PLAIN, PARD))
    speedups = {way: seconds / result.seconds[PARD] for way, seconds in result.seconds.items()}
    over_compiled = f" ({speedups[COMPILED]:.2f} over compiled plain)" if COMPILED in speedups else ""
    return (
        f"τ {result.stats.acceptance_length:.2f}\n  plain {plain:.0f} tokens/s · PARD {pard:.0f} tokens/s · "
        f"speedup {speedups[PLAIN]:.2f}{over_compiled}" + _shares(result.stats).replace(" · ", "\n  ", 1)
    )


@app.command(epilog="Ends with 3 where a text differs from plain generate's in float32.")
def bench(
    context: typer.Context,
    target: Target = None,
    draft: Draft = None,
    named: PairFlag = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_new_tokens: MaxNewTokens = 128,
    prompts: Annotated[Texts, _several(f"`demo`, {PROMPT_SETS} (default: demo)")] = None,
    limit: Annotated[int, _flag("prompts a set")] = 16,
    seed: Annotated[int, _flag("which prompts of a set")] = 0,
    length: Annotated[int | None, _flag("put other text before prompts up to so many tokens", "--context")] = None,
    routes: Annotated[Texts, _several(f"among {ROUTE_NAMES} (default: all that apply)")] = None,
    num_assistant_tokens: Annotated[
        Integers, _several("K, draft tokens a round (default: the draft's)", _integers)
    ] = None,
    assistant_tree_size: Annotated[int, _flag("N, nodes of a tree where a route drafts one")] = 64,
    lookup: Annotated[int, _flag("depth of what is proposed without a draft", metavar="[N]")] = 10,
    batch_sizes: Annotated[Integers, _several("texts at a time (default: 1)", _integers)] = None,
    repeats: Annotated[int, _flag("timed runs of each route")] = 3,
    output: Annotated[Path | None, _flag("write the JSON here: a .json file, or a folder")] = None,
    resume: Annotated[bool, _flag("continue an interrupted run's --output", "--resume")] = False,
    as_json: Annotated[bool, _flag("print the result as one JSON object, tables to standard error", "--json")] = False,
) -> int:
    """Measure plain generate, its rivals and PARD on the same prompts, interleaved."""
    if output is None and resume:
        raise ValueError("Expected `--output` with `--resume`, got none. Name a file.")
    if output is not None and output.suffix != ".json":
        output = output / "bench.json"
    target, draft = _of_pair(named, target, draft)

    from transformers.utils import logging

    from .evaluation.benchmark import Benchmark, BenchmarkSettings, differences, is_exact, run_benchmark, run_metadata
    from .evaluation.prompts import load_prompt_sets
    from .evaluation.report import difference_sentence, make_console, progress_bar, show_cell
    from .evaluation.routes import ROUTES

    sets = load_prompt_sets(prompts or ["demo"])
    settings = BenchmarkSettings(
        routes=tuple(routes or ROUTES),
        batch_sizes=tuple(batch_sizes or [1]),
        num_assistant_tokens=tuple(num_assistant_tokens or ()),
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        limit=limit,
        seed=seed,
        context=length,
        tree_size=assistant_tree_size,
        lookup_num_tokens=lookup,
    )
    logging.set_verbosity_error()  # The stock loop warns of its own defaults in every call.
    pair, console = _load(target, draft, dtype, device, may_lack_draft=True), make_console(is_error=as_json)
    metadata = run_metadata(pair, settings, context.obj, target, draft)
    with progress_bar(make_console(is_error=True)) as advance:
        benchmark = Benchmark(pair, settings, advance)
        result = run_benchmark(benchmark, sets, metadata, output, resume, partial(show_cell, console))
    different = differences(result["cells"]) if is_exact(pair.target.dtype) else []
    for route, difference in different[:1]:
        _warn(f"pard bench: {difference_sentence(route, difference)}")
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    return EXIT_DIFFERENT if different else 0


@app.command()
def data(
    prompts: Annotated[list[str], _several(f"{PROMPT_SETS} (split: train)")],
    output: Annotated[Path, _flag(".jsonl file that the rows are appended to")],
    target: Target = None,
    draft: Annotated[Text, _flag("folder or Hub id of a draft that makes it faster")] = None,
    endpoint: Annotated[Text, _flag("OpenAI-compatible server that runs --target, as http://HOST:8000/v1")] = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, _flag("probability mass sampled from")] = 1.0,
    num_samples: Annotated[int, _flag("answers to a prompt")] = 1,
    top_logits: Annotated[
        int, _flag("store so many of the target's most probable tokens at each token: none runs in training", min=0)
    ] = 0,
    max_new_tokens: MaxNewTokens = 512,
    batch_size: Annotated[int, _flag("prompts at a time")] = 16,
    limit: Annotated[int | None, _flag("read this many prompts at most", min=1)] = None,
    seed: Annotated[int, _flag("seed for sampling")] = 0,
    num_assistant_tokens: NumAssistantTokens = None,
    dtype: Dtype = "auto",
    device: Device = None,
    skip_bad_rows: SkipBadRows = False,
    restart: Annotated[bool, _flag("move an old --output aside and begin anew", "--restart")] = False,
) -> None:
    """Let the target write the answers a draft is trained on.

    Rows {prompt}, {turns} or {messages} in, training rows out. The same command continues an interrupted run.
    """
    from .evaluation.report import make_console, progress_bar
    from .training.responses import write_answers

    sources: list[dict[str, Any]] = []
    rows = list(itertools.islice(_read_all(prompts, skip_bad_rows, sources), limit))
    if not rows:
        raise ValueError(f"Expected at least one prompt in {', '.join(prompts)}, got none. Name another file.")
    served = None if endpoint is None else _served(endpoint, target, draft)
    pair = _load(target, draft, dtype, device, may_lack_draft=True) if served is None else served[0]
    settings: dict[str, Any] = {"batch_size": batch_size, "num_assistant_tokens": num_assistant_tokens, "seed": seed}
    settings |= {"num_samples": num_samples, "temperature": temperature, "top_p": top_p}
    settings |= {"max_new_tokens": max_new_tokens, "skip_bad_rows": skip_bad_rows, "restart": restart}
    settings |= {"top_logits": top_logits}
    settings |= {"endpoint": None if served is None else served[1]}
    with progress_bar(make_console(is_error=True)) as advance:
        progress = Progress(advance)
        answered = pair.target, pair.tokenizer, rows, output
        counts = write_answers(*answered, draft=pair.draft, sources=sources, report=progress, **settings)
    if counts.left_out or counts.shortened:
        _warn(
            f"{counts.left_out} rows had no room for an answer, {counts.shortened} for every turn: lower "
            "`--max-new-tokens` to have them."
        )
    print(json.dumps({"output": output.name, **counts.to_dict(), **progress.ratios()}))


def _read_all(prompts: list[str], skip_bad_rows: bool, sources: list[dict[str, Any]]) -> Iterator[Any]:
    """Read the rows of files and Hub data sets in order; append the name and digest of each to `sources`."""
    from .evaluation.prompts import HUB_PREFIX, read_hub_conversations
    from .io import sha256_of
    from .training.data import PROMPTS, check_rows, read_rows

    for source in prompts:
        skipped: list[int] = []
        if source.startswith(HUB_PREFIX):
            name, found = read_hub_conversations(source)
            digest = hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()
            rows = check_rows(enumerate(found, start=1), f"row {{}} of `{source}`", PROMPTS, skip_bad_rows, skipped)
        else:
            name, digest = Path(source).name, sha256_of(Path(source)).hexdigest()
            rows = read_rows(source, skip_bad_rows, PROMPTS, skipped)
        sources.append({"name": name, "sha256": digest, "skipped": skipped})
        yield from rows


class Progress:
    """Show the progress of `pard data` on standard error: a bar on a terminal, else one line every five seconds."""

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self.advance = advance if sys.stderr.isatty() else None
        self.start = self.last = time.perf_counter()
        self.speed, self.acceptance_length, self.share = 0.0, 0.0, 0.0

    def __call__(self, counts: Any, stats: Any) -> None:
        now, num_rows = time.perf_counter(), counts.new_rows + counts.waiting
        self.speed, self.acceptance_length = counts.new_tokens / (now - self.start), stats.acceptance_length
        acceptance = f" · τ {self.acceptance_length:.2f}" if stats.num_rounds else ""
        text = f"{counts.new_rows}/{num_rows} rows · {self.speed:.1f} tokens/s{acceptance}"
        if self.advance is not None:
            share = counts.new_rows / max(num_rows, 1)
            self.advance(share - self.share, text)
            self.share = share
        elif now - self.last >= 5.0 or not counts.waiting:
            self.last = now
            _warn(text)

    def ratios(self) -> dict[str, float]:
        """Return tokens a second and, with a draft, the acceptance length."""
        acceptance = {"acceptance_length": round(self.acceptance_length, 4)} if self.acceptance_length else {}
        return {"tokens_per_second": round(self.speed, 2), **acceptance}


# The first flag of each section of `pard train --help`, and the heading.
SECTIONS = {
    "base": "Required", "num_draft_tokens": "Method", "max_length": "Rows", "target": "Evaluation", "epochs": "Run",
    "help": "Other",
}  # fmt: skip


class HelpInSections(typer.core.TyperCommand):
    """Show flags under the headings of `SECTIONS`, without the frames of rich, which cut long names."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: list[tuple[str, list[Any]]] = []
        for flag in self.get_params(ctx):
            if flag.name in SECTIONS:
                sections.append((SECTIONS[flag.name], []))
            sections[-1][1].append(flag.get_help_record(ctx))
        for heading, records in sections:
            with formatter.section(heading):
                formatter.write_dl(records)


def train(context: typer.Context, **settings: Any) -> None:
    """Adapt a small causal LM into a parallel draft. Rows: {text}, {prompt, response} or {messages}."""
    _find(settings["base"], settings["target"])

    from .evaluation.acceptance import prepare_evaluator
    from .hub.model_card import draft_card
    from .io import shown_command
    from .training.train import train_draft

    given = {name: value for name, value in settings.items() if value is not None}
    given["training_arguments"] = dict(given.get("training_arguments", ()))
    chosen = TrainingSettings(**given, command=shown_command(context.obj))
    print(json.dumps({"draft": str(train_draft(chosen, prepare_evaluator, draft_card))}))


def _training_flag(setting: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """Make the flag of a training setting, whose type is `kind`."""
    help, none, parse = setting.metadata["help"], setting.metadata.get("none"), setting.metadata.get("parse")
    is_required = setting.default is setting.default_factory is dataclasses.MISSING
    option = _flag(help, f"--{setting.name.replace('_', '-')}")
    if none:
        option.parser = lambda word: None if word == none else int(word)
    if get_origin(kind) in (list, dict):
        split = (lambda word: [parse(word)]) if parse else _paths if kind == list[Path] else _words
        kind, option = list[Any], _several(help, split)
    default = setting.default
    if default is dataclasses.MISSING:  # Required, or an empty list.
        default = inspect.Parameter.empty if is_required else None
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_kinds = get_type_hints(TrainingSettings)
_flags = [_training_flag(one, _kinds[one.name]) for one in dataclasses.fields(TrainingSettings) if one.metadata]
_flags.sort(key=lambda flag: flag.default is not inspect.Parameter.empty)  # The required ones first.
train.__signature__ = inspect.Signature([inspect.signature(train).parameters["context"], *_flags])  # type: ignore[attr-defined]
app.command(cls=HelpInSections)(train)


DraftArgument = Annotated[Text, typer.Argument(help="folder or Hub id of the draft")]


def _checkpoints(named: NamedPair | None, draft: str | None, target: str | None) -> tuple[str, str | None]:
    """Return folders or Hub ids of a draft and its target, by the flags of `pard check` and `pard export`."""
    if named is not None:
        from .loading import named_pair

        _of_pair(named, target, draft)
        target, draft = named_pair(named)
    if draft is None:
        raise ValueError("Expected a draft or `--pair`, got neither. Name a folder, a Hub id or a pair.")
    _find(draft, target)
    return draft, target


@app.command()
def check(
    draft: DraftArgument = None,
    target: Annotated[Text, _flag("folder or Hub id of the target; only config and tokenizer are read")] = None,
    named: PairFlag = None,
    as_json: Annotated[bool, _flag("print the findings once more, as one JSON object", "--json")] = False,
) -> int:
    """Check whether vLLM and TensorRT-LLM would load a draft, and what is wrong if not.

    Weights are not loaded. Exit code 0 where both would load it, 1 where one would not.
    """
    draft, target = _checkpoints(named, draft, target)

    from .hub.engines import ENGINES, check_draft, would_load
    from .io import source_of

    if target is not None and (source := source_of(target)) is not None:
        print(f"target: {source}")
    findings = check_draft(draft, target)
    code = _print_findings(findings)
    if as_json:
        engines = {engine: would_load(findings, engine) for engine in ENGINES}
        print(json.dumps({"engines": engines, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    return code


def _print_findings(findings: list[Finding]) -> int:
    """Print one line an engine and one a finding; return 1 if an engine would not load the draft."""
    from .hub.engines import ENGINES, would_load

    for engine, title in ENGINES.items():
        print(f"{title}: would {'' if would_load(findings, engine) else 'not '}load it")
    for finding in findings:
        kind = "must be fixed" if finding.is_blocking else "note"
        print(f"{kind} ({finding.engine.replace('both', 'both engines')}): {finding.message}")
    return 0 if all(would_load(findings, engine) for engine in ENGINES) else 1


@app.command()
def export(
    output: Annotated[Path, _flag("folder to write, not there yet or empty")],
    draft: DraftArgument = None,
    target: Annotated[Text, _flag("folder or Hub id of the target, read for its vocabulary size")] = None,
    named: PairFlag = None,
    pad_vocab_to: Annotated[int | None, _flag("vocabulary size, where no target is at hand")] = None,
) -> int:
    """Write a draft as vLLM and TensorRT-LLM load it: one mask key, the target's vocabulary size.

    Exit code 0 where both would load it, 1 where it is written and one of them would not.
    """
    draft, target = _checkpoints(named, draft, target)

    from .hub.checkpoint import read_json, vocab_size
    from .hub.engines import check_draft
    from .hub.export import export_draft

    _show_downloads_only()
    folder = export_draft(draft, output, target, pad_vocab_to)
    findings = check_draft(folder, target, name=str(output))
    code = _print_findings(findings)
    print(json.dumps({"draft": str(folder), "vocab_size": vocab_size(read_json(folder, "config.json"))}))
    return code


@app.command()
def card(
    checkpoint: Annotated[
        Text,
        typer.Argument(help="folder or Hub id, `bundled-draft` or `bundled-target`; known drafts are not downloaded"),
    ] = None,
    render_all: Annotated[bool, _flag("render every card of this repository into a folder", "--all")] = False,
    results: Annotated[Texts, _several("results of `pard bench`; of a folder, those of the checkpoint")] = None,
    output: Annotated[Path | None, _flag("file, or folder with --all (default: standard output)")] = None,
    target: Annotated[Text, _flag("a target it serves (default: the one it was trained for)")] = None,
    license: Annotated[Text, _flag("as the Hub names it, such as apache-2.0")] = None,
    base_model: Annotated[Text, _flag("Hub id of the model it was made from (default: the files')")] = None,
    datasets: Annotated[Texts, _several("Hub ids of its training data (default: the files')")] = None,
    language: Annotated[Texts, _several("of its training text, such as en")] = None,
    tags: Annotated[Texts, _several("added to those of every card")] = None,
) -> None:
    """Render the model card of a draft from its config, provenance and results.

    Reads config.json, provenance.json, result files and the table of published drafts; marks what none of them holds.
    """
    from .hub.model_card import all_names, card_source, model_card

    if render_all == (checkpoint is not None):
        raise ValueError("Expected a checkpoint or --all, got " + ("both." if render_all else "neither."))
    stated: dict[str, Any] = {"target": target, "license": license, "base_model": base_model}
    stated |= {"datasets": datasets, "language": language, "tags": tags}
    flags = [f"--{name.replace('_', '-')}" for name, value in stated.items() if value]
    if render_all and flags:
        raise ValueError(f"Expected {', '.join(flags)} with one checkpoint only, got --all.")
    if render_all and (output is None or output.is_file()):
        raise ValueError("Expected with --all a folder for the cards: pass --output model_cards.")
    if checkpoint is not None and checkpoint not in all_names():
        _find(checkpoint)
    written = []
    for name in [checkpoint] if checkpoint is not None else all_names():
        text = model_card(card_source(name, results or [], **stated))
        if output is None:
            print(text)
            return
        written.append(output / f"{name.split('/')[-1]}.md" if render_all else output)
        text.save(written[-1])
    print(json.dumps({"cards": [file.name for file in written]}))


KINDS = {"ok": "green", "note": "yellow", "problem": "red"}


@app.command()
def doctor(
    target: Target = None,
    draft: Draft = None,
    named: PairFlag = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> int:
    """Look at this machine: versions, devices, what will compile, whether a pair fits memory.

    Weights are not loaded. Exit code 0, or 1 where there is a problem.
    """
    target, draft = _of_pair(named, target, draft)

    from .doctor import examine

    code = 0
    for kind, text in examine(target, draft, dtype, device):
        typer.echo(typer.style(f"{kind:9}", fg=KINDS[kind]) + text)
        code |= kind == "problem"
    return code


if __name__ == "__main__":
    sys.exit(main())
