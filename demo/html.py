"""What the page shows, as HTML: text with its rounds, figures, tables and bars. What anybody said is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from pard_hf.evaluation.metrics import repeated_share
from pard_hf.generation.stats import DecodingStats
from pard_hf.tokens import IncrementalDetokenizer

from .chat import ChatTurn
from .inside import Node, Proposal
from .race import Lane, RaceView
from .transcript import Round

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


def plain_text(tokenizer: Any, lane: Lane) -> str:
    """What a route said, untinted."""
    text = tokenizer.decode(lane.tokens, skip_special_tokens=True)
    return f'<pre class="pard-text" tabindex="0" aria-label="text of plain generate">{escape(text)}</pre>'


def tinted_text(tokenizer: Any, lane: Lane, proposals: str) -> str:
    """What ours said: accepted tokens in the colour of their source, bonus tokens underlined; hovering names both."""
    groups = [group for round_ in lane.rounds for group in (*(run for _, run in round_.runs), (round_.bonus,))]
    texts = iter(pieces(tokenizer, groups))
    spans = []
    for number, round_ in enumerate(lane.rounds):
        title = f"round {number + 1}: {len(round_.accepted)} of {proposals} accepted"
        for source, _ in round_.runs:
            if accepted := next(texts):
                kind = f"pard-accepted pard-{source} pard-{number % 2}"
                by = f"{title}, these from {SOURCES[source]}"
                spans.append(f'<span class="{kind}" title="{by}">{escape(accepted)}</span>')
        own = f"{title}, then the target's own token"
        spans.append(f'<span class="pard-bonus" title="{own}">{escape(next(texts))}</span>')
    return f'<pre class="pard-text" tabindex="0" aria-label="text of PARD">{"".join(spans)}</pre>'


def lane_figures(lane: Lane, more: Sequence[tuple[str, str]] = ()) -> str:
    """Clock and rate of a route."""
    figures = [
        ("seconds", f"{lane.seconds:.2f}"),
        ("tokens", f"{len(lane.tokens)}"),
        ("tokens/s", f"{lane.tokens_per_second:.0f}"),
        *more,
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="pard-figures">{cells}</dl>'


def pard_figures(view: RaceView) -> str:
    more = (("τ", f"{view.acceptance_length:.2f}"), ("speedup", f"{view.speedup:.2f}"))
    return lane_figures(view.pard, more)


def banner(view: RaceView, is_float32: bool) -> str:
    """How a race stands, or how it ended."""
    if view.is_stopped:
        return verdict("Stopped. What was said so far stays.", "note")
    if not view.is_done:
        return verdict("Racing …", "note")
    notes = f" Compiling took {view.compile_seconds:.1f} s, not counted." if view.compile_seconds else ""
    if repeated_share([view.pard.tokens]) > LOOPS:
        notes += " The text repeats itself, which is easy to guess: other texts gain less."
    if view.is_identical:
        return verdict(f"Identical texts, {view.speedup:.2f} times the speed of plain generate.{notes}", "good")
    reason = (
        " In float32 they should be: please report this prompt."
        if is_float32
        else " In 16 bit two nearly equal choices can fall either way."
    )
    return verdict(f"The texts differ.{reason}{notes}", "error")


def conversation(messages: Sequence[dict[str, str]]) -> str:
    """What was said so far, by whom."""
    names = {"user": "you", "assistant": "target"}
    said = "".join(
        f'<div class="pard-{m["role"]}"><span class="pard-who">{names[m["role"]]}</span>'
        f"<pre>{escape(m['content'].strip())}</pre></div>"
        for m in messages
    )
    return f'<div class="pard-dialog" role="log" tabindex="0" aria-label="conversation">{said}</div>'


def turn_figures(turn: ChatTurn) -> str:
    """What an answer took, in words."""
    assert turn.stats is not None
    return (
        f"{len(turn.transcript.tokens)} tokens in {turn.seconds:.2f} s, τ {turn.stats.acceptance_length:.2f}"
        f"{shares(turn.stats)}; "
        f"{turn.num_reused} of {len(turn.ids)} tokens of the conversation were in the cache."
    )


def shares(stats: DecodingStats) -> str:
    """The shares of accepted tokens by source, in words; empty with the draft alone."""
    listed = ", ".join(f"{share:.0%} {SOURCES[source]}" for source, share in stats.accepted_shares.items())
    return f" (accepted: {listed})" if listed else ""


def verdict(text: str, kind: str) -> str:
    return f'<div class="pard-banner pard-{kind}" role="status">{escape(text)}</div>'


def proposals_table(tokenizer: Any, proposals: Sequence[Proposal], number: int, num_rounds: int) -> str:
    """The K proposals of a round."""
    if not proposals:
        return f"<p>Round {number} of {num_rounds} had room for the target's own token alone: nothing proposed.</p>"
    headings = "position", "draft proposed", "draft's probability", "verdict", "target wanted", "target's probability"
    rows = []
    for p in proposals:
        cells = [code(tokenizer, p.token), f"{p.probability:.1%}", p.verdict, "–", "–"]
        if p.verdict != "not reached":
            cells[3:] = code(tokenizer, p.target_token), f"{p.target_probability:.1%}"
        rows.append((f"pard-{p.verdict.replace(' ', '-')}", [str(p.position), *cells]))
    return table(
        f"Round {number} of {num_rounds}: one draft forward proposed, one target forward answered", headings, rows
    )


def accepted_table(tokenizer: Any, round_: Round, number: int, num_rounds: int) -> str:
    """The tokens of a round and what proposed each; what the others proposed depends on what was remembered then."""
    rows = [
        ("pard-accepted", [f"{position}", code(tokenizer, token), SOURCES[source]])
        for position, (token, source) in enumerate(zip(round_.accepted, round_.sources, strict=True), start=1)
    ]
    own = [f"{len(rows) + 1}", code(tokenizer, round_.bonus), "nothing: the target's own token"]
    return table(
        f"Round {number} of {num_rounds}: accepted tokens", ("position", "token", "proposed by"), [*rows, ("", own)]
    )


def tree_list(tokenizer: Any, nodes: Sequence[Node], number: int, num_rounds: int) -> str:
    """The tree of a round as nested lists, the accepted path lit."""
    if not nodes:
        return f"<p>Round {number} of {num_rounds} had room for the target's own token alone: nothing proposed.</p>"
    caption = (
        f"Round {number} of {num_rounds}: {count(nodes)} continuations in one draft forward, checked in one target "
        "forward. Each with the draft's probability of getting there; what the target said is lit."
    )
    return (
        f'<div class="pard-scroll pard-tree" tabindex="0" role="region" aria-label="tree of round {number}">'
        f"<p>{escape(caption)}</p>{branches(tokenizer, nodes)}</div>"
    )


def branches(tokenizer: Any, nodes: Sequence[Node]) -> str:
    """Nodes and what follows each."""
    items = ""
    for node in nodes:
        kind, verdict = (' class="pard-lit"', " accepted") if node.is_accepted else ("", "")
        following = branches(tokenizer, node.children) if node.children else ""
        said = f"{code(tokenizer, node.token)} {node.probability:.1%}{verdict}"
        items += f"<li><span{kind}>{said}</span>{following}</li>"
    return f"<ul>{items}</ul>"


def count(nodes: Sequence[Node]) -> int:
    return sum(1 + count(node.children) for node in nodes)


def table(caption: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls on a narrow screen; each row a class and cells of HTML, a heading first."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for kind, (first, *rest) in rows
    )
    return (
        f'<div class="pard-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def code(tokenizer: Any, token: int) -> str:
    """One token, its white space made visible."""
    text = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return f"<code>{escape(text)}</code>"


def stats_bars(stats: DecodingStats | None) -> str:
    """Position acceptance, the histogram of accepted counts, and the sources of a race."""
    if stats is None or not stats.num_rounds:
        return "<p>Run a race first: its rounds are counted here.</p>"
    acceptance = [(f"{position}", a, f"{a:.0%}") for position, a in enumerate(stats.position_acceptance, start=1)]
    counts = [(f"{n}", rounds / stats.num_rounds, f"{rounds}") for n, rounds in enumerate(stats.histogram)]
    sources = [(SOURCES[s], share, f"{share:.0%}") for s, share in stats.accepted_shares.items()]
    return (
        '<div class="pard-charts">'
        + bars(
            "Position acceptance: rounds that accepted the proposal at this position", "position", "rounds", acceptance
        )
        + bars("Accepted proposals a round, the bonus token not counted", "accepted", "rounds", counts)
        + (bars("Accepted tokens by what proposed them", "source", "accepted", sources) if sources else "")
        + "</div>"
    )


def bars(title: str, name: str, unit: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars: label, length in [0, 1], value in words."""
    drawn = [
        ("", [label, f'<span class="pard-bar" style="width:{length:.1%}"></span>', value])
        for label, length, value in rows
    ]
    return table(title, (name, "share", unit), drawn)
