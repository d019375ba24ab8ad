"""How far something is that moves bytes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from m3cli.report.text import printable, size, stderr_console

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.status import Status

_SILENCE = 300.0  # seconds; without a terminal, a line after each


class BytesConsole:
    """Renders work that moves bytes on stderr. A context manager: the progress bar ends with it.

    `go_on` says after an interruption how to go on.
    """

    def __init__(self, go_on: str, *, quiet: bool = False) -> None:
        self._go_on = go_on
        self._quiet = quiet
        self._stderr = stderr_console()
        self._bar: Progress | None = None
        self._status: Status | None = None
        self._told = time.monotonic()

    def __enter__(self) -> BytesConsole:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.end()
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            self.note(f"interrupted; {self._go_on}")

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def advance(self, name: str, done: int, total: int) -> None:
        """`done` of `total` bytes are there; now it is at what is called `name`."""
        if self._bar is None and not self._quiet and self._stderr.is_terminal:
            self._begin(done, total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=printable(name))
        elif time.monotonic() - self._told > _SILENCE:
            self._told = time.monotonic()
            self.note(f"{size(done)} of {size(total)}")

    def count(self, what: str, name: str, done: int, total: int) -> None:
        """`done` of `total` things are measured or the like; now it is at what is called `name`."""
        if not self._quiet and self._stderr.is_terminal:
            if self._status is None:
                self._status = self._stderr.status("")
                self._status.start()
            self._status.update(printable(f"{what} {done:,} of {total:,}: {name}"))
        elif time.monotonic() - self._told > _SILENCE:
            self._told = time.monotonic()
            self.note(f"{what} {done:,} of {total:,}")

    def end(self) -> None:
        """Take away what `count` showed."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _begin(self, done: int, total: int) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._stderr,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task("", total=total, completed=done)
