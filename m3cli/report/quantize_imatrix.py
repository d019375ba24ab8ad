"""The computation of an importance matrix as a person and as a program sees it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.report.progress import BytesConsole
from m3cli.report.text import amount, duration
from quantize.imatrix import Computed, ModelLoaded, Planned, Probing, Progress

if TYPE_CHECKING:
    from quantize.imatrix import ImatrixEvent, Unused

_SILENCE = 60.0  # seconds; without a terminal, a line after each
_SHOWN = 8  # layers, and experts of a layer


class ImatrixConsole(BytesConsole):
    """Renders the events on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("the same command with --resume goes on from here", quiet=quiet)
        self._what = ""

    def __enter__(self) -> ImatrixConsole:
        return self

    def show(self, event: ImatrixEvent) -> None:
        """Render one event; that something was saved goes without saying."""
        if isinstance(event, Planned):
            windows = f"{amount(event.windows, 'window')} of {event.window:,} tokens"
            self.note(f"{windows}, from a text of {event.text_tokens:,} tokens")
            if event.resumed:
                self.note(f"resuming after {amount(event.resumed, 'window')}")
        elif isinstance(event, ModelLoaded):
            self.note(f"model loaded in {duration(event.seconds)}")
        elif isinstance(event, Progress):
            text = f"{event.tokens_per_second:,.0f} tokens/s, {duration(event.seconds_left)} left"
            self._progress("window", event.done, event.total, text)
        elif isinstance(event, Probing):
            text = f"{duration(event.seconds_left)} left"
            self._progress("sensitivity", event.done, event.total, text)
        elif isinstance(event, Computed):
            self._computed(event)

    def _progress(self, what: str, done: int, total: int, text: str) -> None:
        if self._bar is not None and self._what != what:
            self._bar.stop()
            self._bar = None
        self._what = what
        if self._bar is None and not self._quiet and self._stderr.is_terminal:
            self._begin(done, total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif time.monotonic() - self._told > _SILENCE:
            self._told = time.monotonic()
            self.note(f"{what} {done:,} of {total:,}, {text}")

    def _begin(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn(self._what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._stderr,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task("", total=total, completed=done)

    def _computed(self, event: Computed) -> None:
        what = f"{amount(event.tensors, 'tensor')} from {event.tokens:,} tokens"
        if event.sensitivities:
            what += f", the sensitivities of {event.sensitivities:,}"
        self.note(f"wrote {event.out}: {what}, in {duration(event.seconds)}")
        for unused in event.unused[:_SHOWN]:
            self.note(f"note: {_sentence(unused)}")
        if len(event.unused) > _SHOWN:
            self.note(f"note: so it is in {amount(len(event.unused) - _SHOWN, 'more layer')}")
        if event.advice:
            self.note(f"note: {event.advice}")


def _sentence(unused: Unused) -> str:
    experts = ", ".join(map(str, unused.experts[:_SHOWN]))
    more = f" and {len(unused.experts) - _SHOWN:,} more" if len(unused.experts) > _SHOWN else ""
    return (
        f"in layer {unused.layer}, no token was sent to {len(unused.experts):,} of {unused.total:,} experts: "
        f"{experts}{more}"
    )


def imatrix_object(planned: Planned, computed: Computed) -> dict[str, Any]:
    """What was computed, of how much text, and which experts no token was sent to."""
    return {
        **asdict(computed),
        "out": str(computed.out),
        "window": planned.window,
        "text_tokens": planned.text_tokens,
        "resumed": planned.resumed,
        "seconds": round(computed.seconds, 3),
        "advice": computed.advice or None,
    }
