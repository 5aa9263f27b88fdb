"""The recurrences of hybrids over the few tokens of a round, all at once, and the state after any first ones of them.

The families' functions for several tokens work in chunks that a round does not fill, and give the state after the last
token only: for what was accepted they would run again. Here `n` tokens see one another through `[n, n]` weights, as
inside a chunk, and what enters a state is kept, so that a state after some of them is one product
(https://huggingface.co/papers/2405.21060, https://huggingface.co/papers/2412.06464).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# From which tokens `[B, n]` enter, first ones of each row, to the state after them.
Advance = Callable[[torch.Tensor], torch.Tensor]


def state_space(arguments: dict[str, Any], state: torch.Tensor | None) -> tuple[torch.Tensor, Advance]:
    """Compute Mamba-2 over tokens from a state `[B, heads, p, s]`: outputs `[B, n, heads, p]`, as `mamba2_chunk_scan`.

    Step sizes `dt` are ready. Heads stand by group, `[B, groups, heads of a group, ...]`.
    """
    values, steps = arguments["hidden_states"].float(), arguments["dt"].float()
    batch_size, num_tokens, num_heads, width = values.shape
    keys, queries = (arguments[name].float().transpose(1, 2).contiguous() for name in ("B", "C"))
    groups = keys.shape[1], num_heads // keys.shape[1]
    decay = (arguments["A"].float() * steps).view(batch_size, num_tokens, *groups).permute(0, 2, 3, 1)
    inputs = (values * steps[..., None]).view(batch_size, num_tokens, *groups, width).permute(0, 2, 3, 1, 4)
    if state is None:
        state = values.new_zeros(batch_size, num_heads, width, keys.shape[-1])
    by_group = state.float().view(batch_size, *groups, width, -1)

    total = decay.cumsum(-1)
    weights = (queries @ keys.transpose(-1, -2)).unsqueeze(2) * between(total[..., None])[..., 0]
    of_state = by_group.flatten(2, 3) @ queries.transpose(-1, -2)
    of_state = of_state.view(batch_size, *groups, width, num_tokens).transpose(-1, -2) * total.exp()[..., None]
    output = (weights @ inputs + of_state).permute(0, 3, 1, 2, 4).reshape(values.shape)
    if arguments.get("D") is not None:
        output = output + arguments["D"][..., None] * values
    return output, partial(state_space_after, inputs, keys, decay, by_group)


def state_space_after(
    inputs: torch.Tensor, keys: torch.Tensor, decay: torch.Tensor, state: torch.Tensor, enters: torch.Tensor
) -> torch.Tensor:
    """Return the state `[B, heads, p, s]` after the tokens that enter."""
    stays = ~enters[:, None, None].to(decay.device)
    total = decay.masked_fill(stays, 0).cumsum(-1)
    remaining = (total[..., -1:] - total).exp().masked_fill(stays, 0)
    added = (inputs * remaining[..., None]).transpose(-1, -2) @ keys.unsqueeze(2)
    return (state * total[..., -1, None, None].exp() + added).flatten(1, 2)


def delta_rule(arguments: dict[str, Any], state: torch.Tensor | None) -> tuple[torch.Tensor, Advance]:
    """Compute a gated delta rule over tokens from a state `[B, heads, k, v]`: outputs `[B, n, heads, v]`.

    The decay `g` is one of each head, `[B, n, heads]`, or of each of its channels, `[B, n, heads, k]`. What a token
    adds to the state depends on what the earlier ones added: a triangular system.
    """
    names = ("query", "key", "value", "g", "beta")
    query, key, value, decay, beta = (arguments[name].float().transpose(1, 2) for name in names)
    group = value.shape[1] // key.shape[1]
    query, key = (heads.repeat_interleave(group, dim=1) if group > 1 else heads for heads in (query, key))
    if arguments.get("use_qk_l2norm_in_kernel"):
        query, key = (heads * (heads.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for heads in (query, key))
    query = query / key.shape[-1] ** 0.5
    decay = decay.unsqueeze(-1) if decay.dim() == 3 else decay
    if state is None:
        state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
    state = state.to(value.dtype)

    total = decay.cumsum(2)
    remaining = between(total)
    overlap = weighted(key, key, remaining).tril(-1) * beta[..., None]
    new = (value - (key * total.exp()) @ state) * beta[..., None]
    added = torch.linalg.solve_triangular(overlap, new, upper=False, unitriangular=True)
    output = (query * total.exp()) @ state + weighted(query, key, remaining) @ added
    output = output.transpose(1, 2).contiguous().to(arguments["query"].dtype)
    return output, partial(delta_rule_after, key, added, decay, state)


def delta_rule_after(
    key: torch.Tensor, added: torch.Tensor, decay: torch.Tensor, state: torch.Tensor, enters: torch.Tensor
) -> torch.Tensor:
    """Return the state `[B, heads, k, v]` after the tokens that enter."""
    stays = ~enters[:, None, :, None].to(decay.device)
    total = decay.masked_fill(stays, 0).cumsum(2)
    end = total[:, :, -1:]
    return state * end.transpose(2, 3).exp() + (key * (end - total).exp()).transpose(2, 3) @ added.masked_fill(
        stays, 0
    )


def between(total: torch.Tensor) -> torch.Tensor:
    """Return what is left at token t of what entered at token u, `[..., t, u, c]`, by sums of logs `[..., n, c]`."""
    later = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(later[..., None], -torch.inf).exp()


def weighted(queries: torch.Tensor, keys: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
    """Multiply queries and keys `[..., n, k]`, each channel weighted by `remaining`: `[..., t, u]`."""
    if remaining.shape[-1] == 1:
        return (queries @ keys.transpose(-1, -2)) * remaining[..., 0]
    return torch.einsum("...tk,...uk,...tuk->...tu", queries, keys, remaining)
