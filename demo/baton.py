"""Two generations at once on one machine, in turns: neither slows the other, and each has a clock of its own."""

from __future__ import annotations

import threading
import time

import torch

from .job import Stopped

TURN_SECONDS = 0.1


class Baton:
    """The runner that holds it runs; it goes to the runner that has run for the least time.

    A runner's random state goes with it, so that both may draw from torch's generators as if alone.

    Args:
        runners (`int`):
            How many there are; they are named by number.
        turn_seconds (`float`, *optional*, defaults to 0.1):
            How long a turn takes at least. Every change of hands cools caches and thread pools.
    """

    def __init__(self, runners: int, turn_seconds: float = TURN_SECONDS):
        self.turn_seconds = turn_seconds
        self.clocks = [0.0] * runners
        self.running = set(range(runners))
        self.random_states = [random_state()] * runners
        self.holder: int | None = None
        self.since = 0.0
        self.is_stopped = False
        self.changed = threading.Condition()

    def take(self, runner: int) -> None:
        """Wait for the first turn, or the next.

        Raises:
            Stopped: The race is over.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.is_stopped or (self.holder is None and runner == self.next_runner()))
            if self.is_stopped:
                raise Stopped
            self.holder = runner
            set_random_state(self.random_states[runner])
            self.since = time.perf_counter()

    def pause(self, runner: int) -> None:
        """Called by the holder between two tokens or rounds: hands over where its turn is over.

        Raises:
            Stopped: The race is over.
        """
        if self.is_stopped:
            raise Stopped
        if len(self.running) > 1 and time.perf_counter() - self.since >= self.turn_seconds:
            self.release(runner)
            self.take(runner)

    def release(self, runner: int, has_finished: bool = False) -> None:
        """Stop the clock and let the next one run."""
        with self.changed:
            if self.holder == runner:
                self.clocks[runner] += time.perf_counter() - self.since
                self.random_states[runner] = random_state()
                self.holder = None
            if has_finished:
                self.running.discard(runner)
            self.changed.notify_all()

    def stop(self) -> None:
        """Make every runner raise `Stopped` where it next asks."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    def next_runner(self) -> int:
        return min(self.running, key=lambda runner: self.clocks[runner])

    def seconds(self, runner: int) -> float:
        """How long a runner has run, the present turn included."""
        with self.changed:
            now = time.perf_counter() - self.since if self.holder == runner else 0.0
            return self.clocks[runner] + now


def random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The state of torch's generators, of the CPU and of all CUDA devices."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
