"""A conversion as a person and as a program sees it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.report.text import amount, duration, fact_table, printable, size, stderr_console
from quantize.events import Converted, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

    from quantize.events import Planned

_SILENCE = 300.0  # seconds; without a terminal, a line after each


class ConvertConsole:
    """Renders conversion events on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stderr = stderr_console()
        self._bar: Bar | None = None
        self._told = time.monotonic()

    def __enter__(self) -> ConvertConsole:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            self.note("interrupted; the same command with --resume goes on from here")

    def show(self, event: Progress | Converted) -> None:
        """Render one event."""
        if isinstance(event, Converted):
            total = size(sum(file.stat().st_size for file in event.files))
            self.note(f"wrote {amount(len(event.files), 'file')}, {total}, in {duration(event.seconds)}")
        elif event.done == event.resumed:  # the first
            if event.resumed:
                self.note(f"resuming at {size(event.resumed)} of {size(event.total)}")
            self._begin(event)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event.done, description=event.tensor)
        elif time.monotonic() - self._told > _SILENCE:
            self._told = time.monotonic()
            self.note(f"{size(event.done)} of {size(event.total)}")

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def _begin(self, event: Progress) -> None:
        if self._quiet or not self._stderr.is_terminal:
            return
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
        self._bar.add_task("", total=event.total, completed=event.done)


def plan_table(planned: Planned) -> Table:
    """What a conversion would write: one row a fact."""
    tensors = ", ".join(f"{count:,} {name} ({size(nbytes)})" for name, count, nbytes in planned.tensors)
    return fact_table(
        [
            ("checkpoint", size(planned.source_bytes)),
            ("parameters", f"{planned.parameters:,}"),
            ("tensors", tensors),
            *[("left out", f"{count:,} {kind} tensors") for kind, count in planned.skipped.items()],
            ("license", planned.license or "not stated"),
            *[("file", f"{file.name}, {size(file.nbytes)}") for file in planned.files],
            ("to write", f"{size(planned.total_bytes)}; {size(planned.free_bytes)} free there"),
        ]
    )


def convert_object(planned: Planned, done: Converted | None) -> dict[str, Any]:
    """The plan, and where and in how long it was carried out: null after a dry run."""
    return {
        **asdict(planned),
        "tensors": [
            {"type": name, "count": count, "nbytes": nbytes} for name, count, nbytes in planned.tensors
        ],
        "total_bytes": planned.total_bytes,
        "written": done and [str(file) for file in done.files],
        "seconds": done and round(done.seconds, 3),
    }
