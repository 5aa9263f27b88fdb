"""What the page shows as HTML where no component fits: texts by round, messages, a tree. All of it is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch

from pard_hf.evaluation.metrics import repeated_share
from pard_hf.tokens import IncrementalDetokenizer

from .race import Lane, Node, Race, Round

# Share of repeated 4-grams from which a text is said to repeat itself.
LOOPS = 0.3
# What proposed a token, in words.
SOURCES = {"draft": "the draft", "copy": "the text", "successors": "the target's own habits"}


def message(text: str, is_error: bool = False) -> str:
    """A line of status, read out by screen readers; empty where there is no message."""
    role, kind = ("alert", "error") if is_error else ("status", "note")
    return f'<div class="pard-message pard-{kind}" role="{role}">{escape(text)}</div>'


def pieces(tokenizer: Any, groups: Sequence[Sequence[int]]) -> list[str]:
    """The text of each group of tokens; together they are the text of all.

    A character that needs tokens of several groups shows in the last of them.
    """
    text = IncrementalDetokenizer(tokenizer)
    texts = [text.add(group) for group in groups]
    if texts:
        texts[-1] += text.rest()
    return texts


def tinted(tokenizer: Any, rounds: Sequence[Round], clock: Callable[[Round], float] | None = None) -> str:
    """A text: accepted tokens in the colour of their source, the target's own underlined; hovering names the round.

    With `clock` each piece says when it was there (`data-t`, seconds) and how many tokens it has (`data-n`).
    """
    groups = [group for round_ in rounds for group in (*(run for _, run in round_.runs), (round_.bonus,))]
    texts = iter(pieces(tokenizer, groups))
    spans = []
    for number, round_ in enumerate(rounds):
        shared = f'title="round {number + 1}: {len(round_.accepted)} accepted; '
        when = "" if clock is None else f' data-t="{clock(round_):.3f}"'
        for source, run in round_.runs:
            kind = f"pard-accepted pard-{source} pard-{number % 2}"
            by = f'{shared}this from {SOURCES[source]}"'
            spans.append(f'<span class="{kind}" {by}{when} data-n="{len(run)}">{escape(next(texts))}</span>')
        own = f"{shared}this is the target's own token\""
        spans.append(f'<span class="pard-bonus" {own}{when} data-n="1">{escape(next(texts))}</span>')
    return "".join(spans)


def race(job: Race) -> str:
    """How a race stands, and both columns; one that has ended carries the clocks by which the page replays it."""
    more = [("τ", f"{job.ours.acceptance_length:.2f}")]
    columns = column("Plain generate", job.plain, job, []) + column("PARD", job.ours, job, more)
    replay = ' data-replay=""' if job.is_done else ""
    return f'<div{replay}>{verdict(job)}<div class="pard-columns">{columns}</div></div>'


def column(name: str, lane: Lane, job: Race, more: list[tuple[str, str]]) -> str:
    """A route: clock, rate and text, which is tinted once it is all there."""
    figures = [
        ("seconds", f"{lane.seconds:.2f}"),
        ("tokens", f"{len(lane.tokens)}"),
        ("tokens/s", f"{lane.tokens_per_second:.0f}"),
        *more,
    ]
    cells = "".join(f'<div><dt>{title}</dt><dd data-figure="{title}">{value}</dd></div>' for title, value in figures)
    tokenizer = job.pair.tokenizer
    if job.is_over:
        text = tinted(tokenizer, lane.rounds, lane.clock)
    else:  # Cheap: it is shown while the other route, or this one, is timed.
        text = escape(tokenizer.decode(lane.tokens, skip_special_tokens=True))
    kind = "plain" if lane is job.plain else "pard"
    return (
        f'<section id="{kind}"><h2>{name}</h2><dl class="pard-figures">{cells}</dl>'
        f'<pre class="pard-text" tabindex="0" aria-label="text of {name}">{text}</pre></section>'
    )


def verdict(job: Race) -> str:
    """How a race stands, or how it ended."""
    if not (job.is_over or job.is_stopped):
        return banner(job.doing, "note")
    if not job.is_done:
        return banner("Stopped. What was said so far stays.", "note")
    target = job.pair.target
    dtype = str(target.dtype).removeprefix("torch.")
    where = f"in {dtype} on this {'GPU' if target.device.type == 'cuda' else target.device.type.upper()}"
    notes = f" Compiling took {job.ours.compile_seconds:.1f} s, not counted." if job.ours.compile_seconds else ""
    if repeated_share([job.ours.tokens]) > LOOPS:
        notes += " The text repeats itself, which is easy to guess: other texts gain less."
    if not job.is_identical:
        reason = (
            "In float32 they should be the same: please report this prompt."
            if target.dtype == torch.float32
            else "In 16 bit two nearly equal choices can fall either way."
        )
        return banner(f"The texts differ. {reason}{notes}", "error")
    times = round(job.speedup, 2)
    how, kind = ("faster", "good") if times > 1 else ("slower here" if times < 1 else "as fast", "note")
    return banner(f"{times:.2f}x: {how}, {where}; same text.{notes}", kind)


def banner(text: str, kind: str) -> str:
    return (
        f'<div class="pard-banner pard-{kind}" role="status"><span>{escape(text)}</span>'
        '<button class="pard-again" hidden>Replay</button></div>'
    )


def conversation(turns: Sequence[tuple[str, str]]) -> str:
    """What was said so far, by whom; the texts are HTML."""
    names = {"user": "you", "assistant": "target"}
    said = "".join(
        f'<div class="pard-{who}"><span class="pard-who">{names[who]}</span><pre>{text}</pre></div>'
        for who, text in turns
    )
    return f'<div class="pard-dialog" role="log" tabindex="0" aria-label="conversation">{said}</div>'


def shares(lane: Lane) -> str:
    """The shares of accepted tokens by source, in words."""
    found = (lane.stats and lane.stats.accepted_shares) or {}
    return ", ".join(f"{share:.0%} {SOURCES[source]}" for source, share in found.items())


def tree(tokenizer: Any, lane: Lane, number: int) -> str:
    """The tree of a round as nested lists, the accepted path lit, and the target's own token."""
    nodes, round_ = lane.nodes(number), lane.rounds[number - 1]
    path = accepted_path(nodes, round_)
    following: dict[int, list[int]] = {}
    for column, node in enumerate(nodes):
        if node.token >= 0:  # The others had no candidate left.
            following.setdefault(node.parent, []).append(column)

    def branches(parent: int) -> str:
        items = "".join(
            f"<li>{leaf(tokenizer, nodes[column], column in path)}{branches(column)}</li>"
            for column in following.get(parent, [])
        )
        return f"<ul>{items}</ul>" if items else ""

    caption = (
        f"Round {number} of {len(lane.rounds)}: {sum(map(len, following.values()))} proposals, checked in one target "
        "forward. Each with the probability, as the sources saw it, of the text getting there."
    )
    own = f'<p>Accepted: {len(path)}. Then the target\'s own token: <span class="pard-bonus">'
    return (
        f'<div class="pard-tree" tabindex="0" role="region" aria-label="tree of round {number}"><p>{caption}</p>'
        f"{branches(-1)}{own}{code(tokenizer, round_.bonus)}</span></p></div>"
    )


def accepted_path(nodes: Sequence[Node], round_: Round) -> list[int]:
    """The columns of the nodes that were accepted."""
    path: list[int] = []
    for token in round_.accepted:
        parent = path[-1] if path else -1
        path += [c for c, node in enumerate(nodes) if (node.parent, node.token) == (parent, token)][:1]
    return path


def leaf(tokenizer: Any, node: Node, is_accepted: bool) -> str:
    said = f"{code(tokenizer, node.token)} {node.probability:.1%} from {SOURCES[node.source]}"
    return f'<span class="pard-accepted pard-{node.source} pard-0">{said}, accepted</span>' if is_accepted else said


def code(tokenizer: Any, token: int) -> str:
    """One token, its white space made visible."""
    text = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return f"<code>{escape(text)}</code>"
