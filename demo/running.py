"""The jobs that run, under the session and the kind they belong to: what a stop button stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .job import Job, Stopped

STOP_SECONDS = 10
MOST_JOBS = 64


class RunningJobs:
    """One job of each kind for each session."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], Job] = {}
        self.lock = threading.Lock()

    @contextmanager
    def keep(self, job: Job, kind: str, session: str | None) -> Iterator[None]:
        """Remember a job while it runs; one that was stopped, until its stop button asks how it ended."""
        key = str(session), kind
        with self.lock:
            self.jobs[key] = job
            while len(self.jobs) > MOST_JOBS:  # Left behind by visitors who went without a word.
                self.jobs.pop(next(iter(self.jobs)))
        try:
            yield
        except (GeneratorExit, Stopped):
            raise
        except BaseException:
            self.forget(key, job)
            raise
        self.forget(key, job)

    def forget(self, key: tuple[str, str], job: Job) -> None:
        """Let go of a job, unless another one has taken its place."""
        with self.lock:
            if self.jobs.get(key) is job:
                del self.jobs[key]

    def stop(self, kind: str, session: str | None) -> Job | None:
        """Stop a session's job of a kind and give it a moment to end; returns it, if there was one."""
        with self.lock:
            job = self.jobs.pop((str(session), kind), None)
        if job is not None:
            job.stop()
            if job.needs_device:
                job.wait(STOP_SECONDS)
        return job

    def leave(self, session: str) -> None:
        """Stop all jobs of a session whose page was closed."""
        with self.lock:
            jobs = [self.jobs.pop(key) for key in list(self.jobs) if key[0] == session]
        for job in jobs:
            job.stop()
