"""One engine, many clients: a bounded queue, and a thread that answers what waits in it.

A model's context holds one sequence, so requests are answered one after the other. Next is the one that
shares most with what the KV cache holds, so that clients of two repositories do not push each other's context
out with every question; what is not there comes from the disk. Nobody is passed over more than a few times.
"""

from __future__ import annotations

import threading
from array import array
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from m3cli.engine.edits import common_prefix
from m3cli.engine.events import Finished, Prefilled, Stopped, Token
from m3cli.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from m3cli.engine.events import Engine, Event, Request

_PATIENCE = 4  # times that a request may be passed over


class BusyError(MachineError):
    """The queue is full."""


class ClosingError(MachineError):
    """The server is ending."""


def shutting_down() -> ClosingError:
    """What whoever still waits for an answer is told."""
    return ClosingError("The server is shutting down.", "Ask again when it is back.")


@dataclass(eq=False)
class Job:
    """A request in the queue, in a context of `n_ctx` tokens at least.

    `deliver` is called in the scheduler's thread, with each event and with the error that ends a job
    that fails; Finished, Stopped or an error is the last. It must not block.
    """

    request: Request
    n_ctx: int
    deliver: Callable[[Event | Exception], None]
    passed_over: int = 0
    cancelled: bool = False


class Scheduler:
    """Answers jobs in a thread of its own, which alone uses the engine.

    `open_engine` gives the engine for a context of so many tokens, the same one as long as that is large
    enough. At most `most_waiting` jobs wait.
    """

    def __init__(self, open_engine: Callable[[int], Engine], *, most_waiting: int) -> None:
        self._open_engine = open_engine
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._current: Job | None = None
        self._computing = False
        self._engine: Engine | None = None
        self._closing = False
        self._held = array("i")  # what the KV cache holds
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are being answered: 0 or 1."""
        return int(self._current is not None)

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises BusyError, ClosingError."""
        with self._changed:
            self._check_room()
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job early, with Stopped, after what it has computed is saved; nothing if it has ended."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.deliver(Stopped(0, 0))
            elif job is self._current and self._engine is not None:
                self._engine.stop()

    @property
    def alive(self) -> bool:
        """Whether there is somebody to answer."""
        return self._thread.is_alive()

    def check_room(self) -> None:
        """Raise what `submit` would raise now."""
        with self._changed:
            self._check_room()

    def _check_room(self) -> None:
        if self._closing:
            raise shutting_down()
        if len(self._waiting) >= self._most_waiting:
            raise BusyError(f"The queue is full: {self._most_waiting} wait already.", "Ask again later.")

    def close(self, seconds: float) -> None:
        """Take no more jobs, end those that run or wait, and wait until what they have computed is saved.

        A model that has computed nothing yet is not waited for; with 0 `seconds`, nothing is.
        """
        with self._changed:
            self._closing = True
            for job in self._waiting:
                job.deliver(shutting_down())
            self._waiting.clear()
            if self._current is not None:
                self._current.cancelled = True
            engine, computing = self._engine, self._computing
            self._changed.notify_all()
        if engine is not None and self._current is not None:
            if computing and seconds:
                engine.stop()
            else:
                engine.close()
        self._thread.join(seconds)

    def _run(self) -> None:
        while self._answer_next():
            pass  # each job is forgotten before the next is waited for

    def _answer_next(self) -> bool:
        """Wait for a job and answer it; False when there will be no more."""
        if (job := self._next()) is None:
            return False
        try:
            self._answer(job)
        except BaseException as error:  # noqa: BLE001 - a defect in one answer must not end the server
            self._held = array("i")
            job.deliver(self._told(error))
        with self._changed:
            self._current = None
            self._computing = False
        return True

    def _told(self, error: BaseException) -> Exception:
        """What a client hears of an error: nothing of what the end of the server has broken."""
        if self._closing:
            return shutting_down()
        return error if isinstance(error, Exception) else RuntimeError(repr(error))

    def _next(self) -> Job | None:
        """Wait for a job and take it; None when there will be no more."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            best = self._waiting[0]
            if best.passed_over < _PATIENCE:
                best = max(self._waiting, key=self._shared)  # the oldest of equals
            for job in self._waiting[: self._waiting.index(best)]:
                job.passed_over += 1
            self._waiting.remove(best)
            self._current = best
            return best

    def _shared(self, job: Job) -> int:
        if not self._held or not job.request.tokens:
            return 0
        tokens = np.asarray(job.request.tokens, np.int32)
        return common_prefix(np.frombuffer(self._held, np.int32), tokens)

    def _answer(self, job: Job) -> None:
        self._engine = engine = self._open_engine(job.n_ctx)
        tokens = array("i", job.request.tokens)
        with closing(cast("Generator[Event, None, None]", engine.generate(job.request))) as events:
            for event in events:
                self._computing = isinstance(event, (Prefilled, Token))
                if job.cancelled:  # perhaps before there was anything to stop
                    engine.stop()
                if isinstance(event, Token):
                    tokens.append(event.id)
                elif isinstance(event, (Finished, Stopped)):
                    self._held = tokens
                job.deliver(event)
