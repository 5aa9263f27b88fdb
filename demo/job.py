"""Work that is watched while it runs, one piece at a time, and ends when it is not watched any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

TICK_SECONDS = 0.12
# Two jobs would fight for the same cores. The page's queue keeps others waiting; this keeps a job that is being
# stopped and the next one apart.
DEVICE = threading.Lock()


class Stopped(Exception):
    """Raised inside work that is not waited for any more."""


class Job:
    """Work in threads of its own. A job that does not compute (`needs_device = False`) runs beside others.

    Args:
        parts (`Callable[[], None]`):
            Each runs in one thread, calls `check` often, and may raise.
    """

    needs_device = True

    def __init__(self, *parts: Callable[[], None]):
        self.threads = [threading.Thread(target=self.run, args=(part,), daemon=True) for part in parts]
        self.num_running = len(parts)
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.is_stopped = False

    def run(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Stopped:
            pass
        except BaseException as error:  # Raised again in `watch`.
            self.errors.append(error)
            self.stop()
        finally:
            with self.lock:
                self.num_running -= 1
                is_last = self.is_over
            if is_last and self.needs_device:
                DEVICE.release()

    @property
    def is_over(self) -> bool:
        return self.num_running == 0

    def check(self) -> None:
        """Raise [`Stopped`] where the job has been stopped."""
        if self.is_stopped:
            raise Stopped

    def stop(self) -> None:
        """End the job where it next checks."""
        self.is_stopped = True

    def watch(self) -> Iterator[None]:
        """Run; yields about eight times a second. Closing the iterator stops the job and waits for nothing.

        The device is free again when the last part has ended.

        Raises:
            Stopped: The job was stopped.
            Exception: What a part raised.
        """
        while self.needs_device and not DEVICE.acquire(timeout=TICK_SECONDS):
            self.check()
            yield
        for thread in self.threads:
            thread.start()
        try:
            while not self.is_over:
                self.wait(TICK_SECONDS)
                if not self.is_stopped:
                    yield
        finally:
            if not self.is_over:
                self.stop()
        if self.errors:
            raise self.errors[0]
        self.check()

    def wait(self, seconds: float) -> None:
        """Wait for the end, or about so long."""
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(seconds / len(self.threads))
