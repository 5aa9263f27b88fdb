"""Work that is watched while it runs, in a queue for the device, and ends when nobody watches it any more."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TICK_SECONDS = 0.15
STOP_SECONDS = 5
# What one visitor, one address and all together may have in the queue.
MOST_OF_A_VISITOR, MOST_OF_AN_ADDRESS, MOST_WAITING = 2, 16, 64


class Stopped(Exception):
    """Raised inside work that is not waited for any more."""


@dataclass(eq=False)
class Ticket:
    """A place in the queue, and whose it is: a session of a page, and the address it comes from."""

    session: str = ""
    address: str = ""


class Queue:
    """Who works, `at_once` at most, and behind them who waits, in the order of arrival."""

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self.tickets: list[Ticket] = []
        self.lock = threading.Lock()

    def join(self, ticket: Ticket) -> None:
        """Take the last place.

        Raises:
            ValueError: The queue is full, or its owner's share of it.
        """
        with self.lock:
            of_session = sum(ticket.session == other.session != "" for other in self.tickets)
            of_address = sum(ticket.address == other.address != "" for other in self.tickets)
            if of_session >= MOST_OF_A_VISITOR or of_address >= MOST_OF_AN_ADDRESS:
                raise ValueError(
                    f"Expected at most {MOST_OF_A_VISITOR} requests of a page, {MOST_OF_AN_ADDRESS} of an address, "
                    "got one more. Wait for an answer, or press Stop."
                )
            if len(self.tickets) >= MOST_WAITING:
                raise ValueError(f"Expected at most {MOST_WAITING} requests in the queue, got one more. Try later.")
            self.tickets.append(ticket)

    def num_before(self, ticket: Ticket) -> int:
        """How many must end first."""
        with self.lock:
            return max(self.tickets.index(ticket) - self.at_once + 1, 0)

    def leave(self, ticket: Ticket) -> None:
        with self.lock:
            if ticket in self.tickets:
                self.tickets.remove(ticket)

    @contextmanager
    def turn(self, wait: Callable[[], None]) -> Iterator[None]:
        """Wait in this thread for a turn at the device; `wait` is called meanwhile and may raise."""
        self.join(ticket := Ticket())
        try:
            while self.num_before(ticket):
                wait()
                time.sleep(TICK_SECONDS)
            yield
        finally:
            self.leave(ticket)


DEVICE, DOWNLOADS = Queue(), Queue(at_once=4)
# What stop buttons end.
JOBS: weakref.WeakSet[Job] = weakref.WeakSet()


class Job:
    """Work in a thread of its own, which waits for it in a queue.

    A subclass does its work in `work`, which calls `check` often.
    """

    queue = DEVICE
    most_seconds = 300.0

    def __init__(self, ticket: Ticket | None = None):
        self.ticket = ticket or Ticket()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.error: BaseException | None = None
        self.is_stopped = self.is_over = False
        self.deadline = float("inf")
        self.doing = ""
        JOBS.add(self)

    def work(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        self.deadline = time.monotonic() + self.most_seconds
        try:
            self.work()
        except BaseException as error:  # Raised again in `watch`.
            self.error = error
        finally:
            self.is_over = True
            self.queue.leave(self.ticket)

    def check(self) -> None:
        """Raise [`Stopped`] where the job has been stopped, a `ValueError` where its time is over."""
        if self.is_stopped:
            raise Stopped
        if self.is_late:
            raise ValueError(
                f"Expected an end within {self.most_seconds:.0f} seconds, got none: it was stopped. "
                "Ask for fewer new tokens, or choose a smaller model."
            )

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def is_ended_early(self) -> bool:
        return self.is_stopped or self.is_late

    def stop(self) -> None:
        """End the job where it next checks."""
        self.is_stopped = True

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Check at every line of Python: for what is others' code, such as a chat template, and may never end."""

        def trace(*event: Any) -> Any:
            self.check()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)

    async def watch(self) -> AsyncIterator[str]:
        """Run; yields several times a second what is being done. Closing the iterator stops the job.

        Its place is free again when the work has ended.

        Raises:
            Stopped: The job was stopped; it may still work where it has not checked for seconds.
            Exception: What the work raised, or the queue.
        """
        self.queue.join(self.ticket)
        try:
            while before := self.queue.num_before(self.ticket):
                yield f"In the queue: {before} before you."
                await asyncio.sleep(TICK_SECONDS)
                self.check()
            self.thread.start()
            while not self.is_stopped and await self.goes_on(TICK_SECONDS):
                yield self.doing
            is_left_behind = await self.goes_on(STOP_SECONDS)
        finally:
            self.stop()
            if not self.thread.ident:
                self.queue.leave(self.ticket)
        if is_left_behind:
            raise Stopped
        if self.error is not None:
            raise self.error

    async def goes_on(self, seconds: float) -> bool:
        """Wait for the end, or about so long; returns whether the work goes on."""
        for _ in itertools.takewhile(lambda _: not self.is_over, range(round(seconds / 0.03))):
            await asyncio.sleep(0.03)
        return not self.is_over


def stop_jobs(session: str, kind: type[Job] = Job) -> list[Job]:
    """Stop a session's jobs of a kind, running or waiting; return them."""
    jobs = [job for job in list(JOBS) if job.ticket.session == session and isinstance(job, kind) and not job.is_over]
    for job in jobs:
        job.stop()
    return jobs
