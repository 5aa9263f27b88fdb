"""Noise for sampling, in the order plain `generate` draws it."""

from __future__ import annotations

import torch


class Noise:
    """Exponential noise for blocks of positions.

    For a single row it is drawn one position after the other, and what a round does not use is kept for the next: the
    same seed gives the same text as plain `generate`, which draws once a token (`torch.multinomial` of one draw is
    `argmax(p / e)`). Rows of a batch advance by different counts, so there only the distribution is kept.

    Noise is drawn ahead from a generator of its own. The device's generator only ever passes over the noise of tokens
    that were emitted, so it stands where plain `generate` would leave it, after an interrupt too.

    Args:
        device (`torch.device`):
            Where noise is drawn, from that device's default generator.
        is_ordered (`bool`):
            Whether the call has a single row.
    """

    def __init__(self, device: torch.device, is_ordered: bool):
        self.device, self.is_ordered = device, is_ordered
        self.source = default_generator(device)
        self.ahead: torch.Generator | None = None
        # Each position with the generator's state after it was drawn.
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(self, *shape: int) -> torch.Tensor:
        """Noise of `shape` `[B, num_positions, V]`."""
        if not self.is_ordered:  # Also once all rows but one have left: rounds may be ahead of the host.
            return torch.empty(shape, device=self.device).exponential_()
        return torch.stack([self.at(position, shape[2]) for position in range(shape[1])], dim=1)

    def at(self, position: int, vocab_size: int) -> torch.Tensor:
        """Noise `[1, V]` of a position, counted from the first that was not used yet."""
        if self.ahead is None:
            self.ahead = torch.Generator(self.source.device)
        if not self.kept:  # Others may have drawn since.
            self.ahead.set_state(self.source.get_state())
        while len(self.kept) <= position:
            noise = torch.empty(1, vocab_size, device=self.device).exponential_(generator=self.ahead)
            self.kept.append((noise, self.ahead.get_state()))
        return self.kept[position][0]

    def use(self, num_positions: int) -> None:
        """Drop the noise of positions that were emitted, and let the device's generator pass over it."""
        if num_positions and self.kept:
            self.source.set_state(self.kept[num_positions - 1][1])
            del self.kept[:num_positions]


def default_generator(device: torch.device) -> torch.Generator:
    """The generator from which a device draws unless told otherwise."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
