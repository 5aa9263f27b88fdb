"""One round, looked into: what the draft proposed, how sure it was, and what the target said to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pard_hf.generation.steps import proposals_from
from pard_hf.loading import Pair

from .settings import Settings
from .transcript import Round, tokens_of


@dataclass(frozen=True)
class Proposal:
    """One draft token of a round.

    Args:
        position (`int`):
            Its position in the block, from 1.
        token (`int`) and probability (`float`):
            What the draft proposed, and how sure it was.
        target_token (`int`) and target_probability (`float`):
            What the target wanted there, and how sure it was, given everything before, rejected proposals included.
        verdict (`str`):
            `"accepted"`, `"rejected"`, `"not reached"` behind a rejected one or the end of the text, or
            `"bonus token"` where the text ended with a token of the target's own that had been proposed as well.
    """

    position: int
    token: int
    probability: float
    target_token: int
    target_probability: float
    verdict: str


@torch.no_grad()
def look_inside(
    pair: Pair, prompt: Sequence[int], rounds: Sequence[Round], number: int, settings: Settings
) -> list[Proposal]:
    """Draft and verify one round again, from the text it began with.

    Nothing of a round is kept while a race runs, so looking costs the race nothing. Greedy proposals are a function of
    the text before them: computed again they are the same ones.

    Args:
        number (`int`):
            The round, from 1.

    Raises:
        ValueError: There is no such round.
    """
    said, num_drafts = before_round(rounds, number, settings)
    if num_drafts < 1:
        return []  # The last token of a text needs no proposal.
    device = pair.target.device
    ids = torch.tensor([[*prompt, *said]], device=device)
    vocab_size = pair.target.config.get_text_config().vocab_size
    logits = pair.draft.draft(ids.to(pair.draft.device), num_assistant_tokens=num_drafts)
    drafted = pair.draft.proposal_scores(logits, vocab_size).float().softmax(-1)[0].to(device)
    tokens = drafted.argmax(-1)
    this = rounds[number - 1]
    # In 16 bit a proposal that is computed again may be another one: what was accepted is what was said.
    tokens[: len(this.accepted)] = torch.tensor(this.accepted, device=device)
    wanted = pair.target(torch.cat([ids, tokens[None]], 1)).logits[0, -num_drafts - 1 : -1].float().softmax(-1)
    choices = wanted.argmax(-1).tolist()
    # Under sampling the target draws: where it was asked, what it drew is what it wanted.
    choices[: len(this.tokens)] = this.tokens[:num_drafts]
    return [
        Proposal(
            position=index + 1,
            token=token,
            probability=float(drafted[index, token]),
            target_token=choices[index],
            target_probability=float(wanted[index, choices[index]]),
            verdict=verdict_of(index, token, this),
        )
        for index, token in enumerate(tokens.tolist())
    ]


def round_of(rounds: Sequence[Round], number: int) -> Round:
    """A round by its number, from 1, or a `ValueError`."""
    if not 1 <= number <= len(rounds):
        raise ValueError(f"Expected a round from 1 to {len(rounds)}, got {number}. Choose one in this range.")
    return rounds[number - 1]


def before_round(rounds: Sequence[Round], number: int, settings: Settings) -> tuple[list[int], int]:
    """What was said before a round, and how many positions it proposed for."""
    round_of(rounds, number)
    said = tokens_of(rounds[: number - 1])
    return said, min(settings.num_assistant_tokens, settings.max_new_tokens - len(said) - 1)


@dataclass
class Node:
    """One proposal of a tree.

    Args:
        token (`int`) and probability (`float`):
            What the draft proposed, and how probable it thought the path that far.
        is_accepted (`bool`):
            Whether the target said it as well.
        children (`list[Node]`):
            The most probable first.
    """

    token: int
    probability: float
    is_accepted: bool = False
    children: list[Node] = field(default_factory=list)


@torch.no_grad()
def look_at_tree(
    pair: Pair, prompt: Sequence[int], rounds: Sequence[Round], number: int, settings: Settings
) -> list[Node]:
    """Draft the tree of one round again, with the path that was accepted; returns the nodes behind the root.

    Raises:
        ValueError: There is no such round.
    """
    said, num_drafts = before_round(rounds, number, settings)
    if num_drafts < 1:
        return []
    draft = pair.draft
    masks = [draft.mask_token_id] * (num_drafts - 1)
    ids = draft.readable(torch.tensor([[*prompt, *said, *masks]], device=draft.device))
    logits, hidden = draft.position_logits(num_drafts, input_ids=ids, use_cache=False)
    scores = draft.proposal_scores(logits, pair.target.config.get_text_config().vocab_size)
    tree = proposals_from(draft, scores, hidden, settings.tree_size, draft.device).tree
    assert tree is not None
    nodes = [Node(-1, 1.0)]
    drafted = (values[0].tolist() for values in (tree.tokens, tree.parents, tree.logprobs.exp()))
    for token, parent, probability in zip(*drafted, strict=True):
        nodes.append(Node(token, probability))
        nodes[parent].children.append(nodes[-1])
    at: Node | None = nodes[0]
    for token in rounds[number - 1].accepted:
        # In 16 bit a tree that is drafted again may lack a node.
        at = next((child for child in at.children if child.token == token), None) if at is not None else None
        if at is not None:
            at.is_accepted = True
    return nodes[0].children


def verdict_of(index: int, token: int, this: Round) -> str:
    if index < len(this.accepted):
        return "accepted"
    if index > len(this.accepted):
        return "not reached"
    return "rejected" if token != this.bonus else "bonus token"
