"""A small sequential head on the parallel draft, which makes logits depend on the token chosen before.

The K predictions of one parallel forward are independent marginals. At depth k >= 1 this head adds to the logits
`W (E[x] * sigmoid(G h))`, of rank 64 to 256, with x the token before (on a tree: the parent) and h the draft's last
hidden state at that position.
Related: Domino (https://huggingface.co/papers/2605.29707), DSpark (https://huggingface.co/papers/2607.05147).

Shapes: B batch size, K positions, V vocabulary size, C `num_candidates`, F tokens that one position may follow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

DEFAULT_RANK, DEFAULT_NUM_CANDIDATES = 128, 64
# A number, or a tensor `[1]` for compiled code that is to serve every depth.
Depth = int | torch.Tensor


class CorrectionHead(nn.Module):
    """The weights of the correction, which is zero before training.

    Args:
        vocab_size (`int`) and hidden_size (`int`):
            Of the draft.
        rank (`int`, *optional*, defaults to 128):
            Width of the head.
        num_candidates (`int`, *optional*, defaults to 64):
            How many of a position's most likely tokens are corrected while drafting; training corrects all tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        rank: int = DEFAULT_RANK,
        num_candidates: int = DEFAULT_NUM_CANDIDATES,
    ):
        super().__init__()
        for name, value in (("rank", rank), ("num_candidates", num_candidates)):
            if type(value) is not int or value < 1:
                raise ValueError(f"Expected `{name}` of a correction head to be an integer above 0, got {value!r}.")
        self.vocab_size, self.hidden_size, self.rank = vocab_size, hidden_size, rank
        self.num_candidates = min(num_candidates, vocab_size)
        self.previous = nn.Embedding(vocab_size, rank)
        self.gate = nn.Linear(hidden_size, rank)
        self.output = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return the correction of all logits, `[rows, V]`, for hidden states and the tokens before, `[rows]`."""
        return self.output(self.previous(previous) * self.gate(hidden).sigmoid())

    @torch.no_grad()
    def resized(self, vocab_size: int) -> CorrectionHead:
        """Copy the head to another vocabulary size; new tokens are not corrected and correct nothing."""
        head = CorrectionHead(vocab_size, self.hidden_size, self.rank, self.num_candidates)
        head.to(self.gate.weight.device, self.gate.weight.dtype)
        head.gate.load_state_dict(self.gate.state_dict())
        kept = min(vocab_size, self.vocab_size)
        for mine, theirs in ((head.previous.weight, self.previous.weight), (head.output.weight, self.output.weight)):
            mine.zero_()[:kept] = theirs[:kept]
        return head


def at_depth(values: torch.Tensor, depth: Depth) -> torch.Tensor:
    """Return what belongs to a depth of values `[B, K, ...]`, `[B, 1, ...]`."""
    return values[:, depth : depth + 1] if isinstance(depth, int) else values.index_select(1, depth)


class CorrectedPositions:
    """The positions of one round, corrected one by one as the tokens before them are chosen.

    `hidden` `[B, K, hidden_size]` are the draft's last hidden states, `scores` `[B, K, V]` its logits, V the target's.
    """

    def __init__(self, head: CorrectionHead, hidden: torch.Tensor, scores: torch.Tensor):
        weight = head.gate.weight  # A draft may be spread over devices; the head is on one.
        self.head, self.scores = head, scores.to(weight.device, torch.float32)
        self.gates = head.gate(hidden.to(weight)).sigmoid()
        self.best, self.candidates = self.scores.topk(min(head.num_candidates, scores.shape[-1]), dim=-1)
        # Tokens that only a larger target has are never proposed; the head has no rows for them.
        self.columns = self.candidates.clamp(max=head.vocab_size - 1)
        self.rest = self.scores.scatter(-1, self.candidates, -torch.inf).logsumexp(dim=-1)  # Of all other tokens.

    def correction(self, depth: Depth, previous: torch.Tensor) -> torch.Tensor:
        """Return the corrections `[B, F, C]` of a depth's candidates after each of the tokens `[B, F]`."""
        previous = previous.clamp(max=self.head.vocab_size - 1)
        inputs = self.head.previous(previous) * at_depth(self.gates, depth)
        correction = (inputs @ self.head.output.weight[at_depth(self.columns, depth).squeeze(1)].mT).float()
        if self.scores.shape[-1] <= self.head.vocab_size:
            return correction
        return correction.masked_fill(at_depth(self.candidates, depth) >= self.head.vocab_size, 0.0)

    def logprobs(self, depth: Depth, previous: torch.Tensor | None) -> torch.Tensor:
        """Return log-probabilities `[B, F, C]` of a depth's candidates; at depth 0 `previous` is `None` and F is 1."""
        scores = at_depth(self.best, depth)
        if previous is not None:
            scores = scores + self.correction(depth, previous)
        rest = at_depth(self.rest, depth)
        return scores - torch.logaddexp(scores.logsumexp(dim=-1), rest).unsqueeze(-1)

    def chain(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose position by position, from logits `[B, V]`; return tokens `[B, K]` and their logits `[B, K, V]`."""
        tokens, scores = [choose(self.scores[:, 0])], [self.scores[:, 0]]
        for depth in range(1, self.scores.shape[1]):
            correction = self.correction(depth, tokens[-1].unsqueeze(1)).squeeze(1)
            scores.append(self.scores[:, depth].scatter_add(-1, self.candidates[:, depth], correction))
            tokens.append(choose(scores[-1]))
        return torch.stack(tokens, dim=1), torch.stack(scores, dim=1)
