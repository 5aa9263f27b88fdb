"""Noise for sampling, in the order plain `generate` draws it."""

from __future__ import annotations

from types import ModuleType

import torch


class Noise:
    """Exponential noise for blocks of positions.

    For a single row it is drawn one position after the other, and what a round does not use is kept for the next: the
    same seed gives the same text as plain `generate`, which draws once a token (`torch.multinomial` of one draw is
    `argmax(p / e)`). Rows of a batch advance by different counts, so there only the distribution is kept.

    Args:
        device (`torch.device`):
            Where noise is drawn, from that device's default generator.
        is_ordered (`bool`):
            Whether the call has a single row.
    """

    def __init__(self, device: torch.device, is_ordered: bool):
        self.device, self.is_ordered = device, is_ordered
        self.generator: ModuleType = torch.cuda if device.type == "cuda" else torch
        # Each position with the generator's state before it was drawn.
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(self, *shape: int) -> torch.Tensor:
        """Noise of `shape` `[B, num_positions, V]`."""
        if not self.is_ordered:  # Also once all rows but one have left: rounds may be ahead of the host.
            return torch.empty(shape, device=self.device).exponential_()
        while len(self.kept) < shape[1]:
            state = self.generator.get_rng_state()
            self.kept.append((torch.empty(1, shape[2], device=self.device).exponential_(), state))
        return torch.stack([noise for noise, _ in self.kept[: shape[1]]], dim=1)

    def use(self, num_positions: int) -> None:
        """Drop the noise of positions that were emitted."""
        del self.kept[:num_positions]

    def rewind(self) -> None:
        """Leave the generator where plain `generate` leaves it: as if what was not used had not been drawn."""
        if self.kept:
            self.generator.set_rng_state(self.kept[0][1])
            self.kept.clear()
