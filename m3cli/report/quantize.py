"""A conversion as a person and as a program sees it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.report.progress import BytesConsole
from m3cli.report.text import amount, duration, fact_table, size
from quantize.events import Converted, Progress

if TYPE_CHECKING:
    from rich.table import Table

    from quantize.events import Planned


class ConvertConsole(BytesConsole):
    """Renders conversion events on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("the same command with --resume goes on from here", quiet=quiet)

    def __enter__(self) -> ConvertConsole:
        return self

    def show(self, event: Progress | Converted) -> None:
        """Render one event."""
        if isinstance(event, Converted):
            total = size(sum(file.stat().st_size for file in event.files))
            self.note(f"wrote {amount(len(event.files), 'file')}, {total}, in {duration(event.seconds)}")
            return
        if event.done == event.resumed and event.resumed:  # the first
            self.note(f"resuming at {size(event.resumed)} of {size(event.total)}")
        self.advance(event.tensor, event.done, event.total)


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
