"""Run jobs at their times in one background thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(order=True)
class Job:
    """Something to run at `due`, and every `interval` seconds after that if there is one."""

    due: float
    order: int
    name: str = field(compare=False)
    action: Callable[[], object] = field(compare=False)
    interval: float | None = field(default=None, compare=False)
    cancelled: bool = field(default=False, compare=False)


class Scheduler:
    """A queue of jobs by time; jobs due at the same time run in the order they were added."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: list[Job] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(
        self, name: str, action: Callable[[], object], delay: float, interval: float | None = None
    ) -> Job:
        """Plan a job in `delay` seconds."""
        if interval is not None and interval <= 0:
            raise ValueError(f"the interval of {name} must be positive")
        with self._changed:
            job = Job(self._clock() + delay, next(self._order), name, action, interval)
            heapq.heappush(self._jobs, job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Never run `job` again; a run that has begun is not stopped."""
        with self._changed:
            job.cancelled = True

    def run_due(self) -> int:
        """Run all jobs whose time has come; return how many ran."""
        ran = 0
        while (job := self._take_due()) is not None:
            try:
                job.action()
            except Exception:
                logger.exception("job %s failed", job.name)
            ran += 1
            if job.interval is not None:
                self._plan_next(job)
        return ran

    def _take_due(self) -> Job | None:
        with self._changed:
            while not self._stopping and self._jobs and self._jobs[0].due <= self._clock():
                job = heapq.heappop(self._jobs)
                if not job.cancelled:
                    return job
        return None

    def _plan_next(self, job: Job) -> None:
        """Plan the next run; runs that were missed are left out."""
        assert job.interval is not None
        with self._changed:
            missed = max(0, int((self._clock() - job.due) // job.interval))
            job.due += (missed + 1) * job.interval
            heapq.heappush(self._jobs, job)

    def start(self) -> None:
        """Run jobs in a thread until `stop`."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self.run_due()
            with self._changed:
                if self._stopping:
                    return
                wait = self._jobs[0].due - self._clock() if self._jobs else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)

    def stop(self) -> None:
        """End the thread after the job that is running; the others stay planned."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
