"""One round, looked into: what the draft proposed, how sure it was, and what the target said to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pair import Pair
from .settings import Settings
from .transcript import Round


@dataclass(frozen=True)
class Proposal:
    """One draft token of a round.

    Args:
        position (`int`):
            Its place in the block, from 1.
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
    if not 1 <= number <= len(rounds):
        raise ValueError(f"Expected a round from 1 to {len(rounds)}, got {number}. Choose one in this range.")
    said = [token for round_ in rounds[: number - 1] for token in round_.tokens]
    num_drafts = min(settings.num_assistant_tokens, settings.max_new_tokens - len(said) - 1)
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
            position=place + 1,
            token=token,
            probability=float(drafted[place, token]),
            target_token=choices[place],
            target_probability=float(wanted[place, choices[place]]),
            verdict=verdict_of(place, token, this),
        )
        for place, token in enumerate(tokens.tolist())
    ]


def verdict_of(place: int, token: int, this: Round) -> str:
    if place < len(this.accepted):
        return "accepted"
    if place > len(this.accepted):
        return "not reached"
    return "rejected" if token != this.bonus else "bonus token"
