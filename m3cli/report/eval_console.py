"""An evaluation while it runs, on stderr: the table of scores grows, and below it stands what is computed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from m3cli.engine.events import LoadProgress, Notice, NotSaved, Prefilled, Restored
from m3cli.report.eval_text import length_name
from m3cli.report.text import amount, duration, printable, stderr_console
from m3cli.tasks.evaluate.results import Evaluation
from m3cli.tasks.evaluate.run import Asked, Trying
from m3cli.tasks.sweep import Window

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from m3cli.tasks.evaluate.run import EvalEvent

_SILENCE = 60.0  # seconds; without a terminal, at most a line in so long


class EvalConsole:
    """Renders the events of an evaluation. A context manager: the live table ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stderr = stderr_console()
        self._live: Live | None = None
        self._started = self._told = time.monotonic()
        self._asked = self._known = 0
        self._trying: Trying | None = None
        self._restored = 0
        self._doing = ""
        # way (KV types and mode) → task → length → (sum of scores, count)
        self._scores: dict[str, dict[str, dict[int, tuple[float, int]]]] = {}

    def __enter__(self) -> EvalConsole:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.end()
        if kind is KeyboardInterrupt:
            self.note("interrupted; the answers so far are kept, the same command goes on from there")

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def show(self, event: EvalEvent) -> None:
        """Render one event."""
        if isinstance(event, Trying):
            self._trying, self._doing = event, ""
        elif isinstance(event, LoadProgress):
            self._doing = f"loading the model: {event.fraction:.0%}"
        elif isinstance(event, Restored):
            self._restored = event.tokens
        elif isinstance(event, Prefilled):
            self._doing = self._prefill(event)
        elif isinstance(event, Window):
            self._doing = f"swept {event.number:,} of {event.of:,} windows"
        elif isinstance(event, Asked):
            self._add(event)
        elif isinstance(event, (Notice, NotSaved)):
            self.note(f"note: {event.text}")
        elif isinstance(event, Evaluation):
            self.end()
            self._finished(event)
            return
        else:
            return
        self._update()

    def end(self) -> None:
        """Take the live table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _prefill(self, event: Prefilled) -> str:
        if event.done == event.total:
            self._restored = 0
            return ""
        words = f"reading {event.done:,} of {event.total:,} tokens"
        computed = event.done - self._restored
        if computed > 0 and event.seconds > 0:
            left = (event.total - event.done) * event.seconds / computed
            words += f", {computed / event.seconds:,.0f} tokens/s, {duration(left)} left"
        return words

    def _add(self, event: Asked) -> None:
        self._asked += 1
        self._known += event.known
        outcome = event.outcome
        tasks = self._scores.setdefault(self._way(), {}).setdefault(outcome.task, {})
        total, count = tasks.get(outcome.length, (0.0, 0))
        tasks[outcome.length] = (total + outcome.score, count + 1)

    def _way(self) -> str:
        trying = self._trying
        return f"{trying.type_k}/{trying.type_v} {trying.mode}" if trying is not None else ""

    def _update(self) -> None:
        if self._quiet:
            return
        if not self._stderr.is_terminal:
            now = time.monotonic()
            if now - self._told > _SILENCE:
                self._told = now
                self.note(self._line())
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self._stderr, transient=True, refresh_per_second=4)
            self._live.start()
        self._live.update(self._render())

    def _line(self) -> str:
        """Where it is, in one line."""
        trying = self._trying
        words = [f"{amount(self._asked, 'question')} in {duration(time.monotonic() - self._started)}"]
        if trying is not None:
            words.append(f"{trying.task} at {length_name(trying.length)} ({self._way()})")
        return "; ".join([*words, self._doing] if self._doing else words)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        way = self._way()
        table = Table(title=f"KV cache {way}", box=None, title_justify="left", padding=(0, 2, 0, 0))
        table.add_column("task")
        tasks = self._scores.get(way, {})
        lengths = sorted({length for scores in tasks.values() for length in scores})
        for length in lengths:
            table.add_column(length_name(length), justify="right")
        for task, scores in tasks.items():
            cells = []
            for length in lengths:
                total, count = scores.get(length, (0.0, 0))
                cells.append(f"{total / count:.0%} of {count}" if count else "")
            table.add_row(task, *cells)
        return Group(table, Text(printable(self._line()), style="dim"))

    def _finished(self, event: Evaluation) -> None:
        asked = sum(len(run.outcomes) for run in event.runs)
        words = f"{amount(asked, 'question')} in {duration(event.seconds)}"
        if event.known:
            words += f", {event.known:,} of them answered in earlier runs"
        self.note(f"{words}; {event.computed_tokens:,} tokens prefilled")
        if not event.complete:
            self.note("the time limit was reached; the same command goes on from there")
