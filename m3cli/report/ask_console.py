"""An ask as a person sees it: the answer on stdout, everything else on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from m3cli.engine.events import (
    Finished,
    Loaded,
    LoadProgress,
    Notice,
    NotSaved,
    Prefilled,
    Restored,
    Saved,
    Stopped,
    Updated,
)
from m3cli.errors import OutputClosedError
from m3cli.report.text import amount, duration, printable, size, skip_lines, skip_summary, stderr_console
from m3cli.tasks.ask import UNCITED, Answer, Text
from m3cli.tasks.context import Packed
from m3cli.tasks.sweep import Window

if TYPE_CHECKING:
    from rich.progress import Progress
    from typing_extensions import Self

    from m3cli.tasks.ask import AskEvent
    from m3cli.tasks.citations import Citation

_LONG = 2.0  # seconds; what takes longer is worth a line


class AskConsole:
    """Renders ask events as they come. A context manager: the progress bar ends with it."""

    def __init__(
        self,
        *,
        answer_to: TextIO | None,
        quiet: bool = False,
        verbose: bool = False,
        show_thinking: bool = False,
    ) -> None:
        self._answer_to = answer_to
        self._quiet = quiet
        self._verbose = verbose
        self._show_thinking = show_thinking
        self._stderr = stderr_console()
        self._progress: Progress | None = None
        self._answering = False
        self._thinking = False
        self._restored: Restored | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end_progress()

    def show(self, event: AskEvent) -> None:
        """Render one event."""
        if isinstance(event, Text):
            self._text(event)
        elif isinstance(event, Packed):
            self._packed(event)
        elif isinstance(event, LoadProgress):
            self._advance("loading the model", event.fraction, 1.0, "")
        elif isinstance(event, Loaded):
            self._end_progress()
        elif isinstance(event, Window):
            self._end_progress()
            self.note(
                f"window {event.number} of {event.of}: {event.tokens:,} tokens, "
                f"{amount(event.passages, 'passage')} that bear on the question"
            )
        elif isinstance(event, Restored):
            self._restored = event
        elif isinstance(event, Updated):
            self._end_progress()
            self._updated(event)
        elif isinstance(event, Saved):
            self._end_progress()
            self._saved(event)
        elif isinstance(event, Stopped):
            self._end_progress()
            self._stopped(event)
        elif isinstance(event, Prefilled):
            self._prefilled(event)
        elif isinstance(event, (Notice, NotSaved)):
            self._end_progress()
            self.note(f"note: {event.text}")
        elif isinstance(event, Finished):
            self._end_progress()
        elif isinstance(event, Answer):
            self._answered(event)

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def _packed(self, event: Packed) -> None:
        pack, corpus = event.pack, event.corpus
        skipped = f" (skipped: {skip_summary(corpus.skips)})" if corpus.skips else ""
        self.note(f"read {amount(len(corpus.paths), 'file')}{skipped}")
        if pack.strategy == "whole":
            self.note(f"context: all of it, {event.prompt_tokens:,} tokens")
        else:
            files = amount(len({chunk.path for chunk in pack.omitted}), "file")
            self.note(
                f"context: {event.prompt_tokens:,} tokens, "
                f"the {amount(len(pack.chunks), 'excerpt')} that match the question best; "
                f"left out {amount(len(pack.omitted), 'excerpt')} of {files} "
                f"(whole: {pack.tokens_needed:,} tokens)"
            )
        if self._verbose:
            for line in skip_lines(corpus.skips):
                self.note(line)
            for chunk in pack.omitted:
                self.note(f"  left out {chunk.path}:{chunk.start_line}-{chunk.end_line}: over the budget")

    def _prefilled(self, event: Prefilled) -> None:
        # Not rich's own estimate: it forgets what is older than 30 seconds, less than a batch may take.
        detail = ""
        restored = self._restored.tokens if self._restored else 0
        if event.done > restored and event.seconds > 0:
            rate = (event.done - restored) / event.seconds
            detail = f"{rate:,.0f} tokens/s, {duration((event.total - event.done) / rate)} left"
        self._advance("reading", event.done, event.total, detail)
        if event.done >= event.total:
            self._end_progress()
            if self._restored:
                self.note(
                    f"context: {event.total:,} tokens, {restored:,} restored "
                    f"in {self._restored.seconds:.1f} s, {event.total - restored:,} prefilled"
                )
                self._restored = None

    def _updated(self, event: Updated) -> None:
        if event.computed:
            self.note(
                f"updated in place: {amount(event.edits, 'edit')}, {event.computed:,} tokens computed in "
                f"{event.seconds:.1f} s"
            )
        self.note(f"{event.staleness:.1%} of what this context was computed from has changed since")

    def _saved(self, event: Saved) -> None:
        if self._verbose or event.seconds > _LONG:
            self.note(
                f"saved {event.tokens:,} tokens for later, {size(event.nbytes)}, in {event.seconds:.1f} s"
            )

    def _stopped(self, event: Stopped) -> None:
        if event.saved:
            self.note(f"interrupted; {event.saved:,} of {event.done:,} tokens are saved for the next run")

    def _text(self, event: Text) -> None:
        self._end_progress()
        if event.kind == "thinking":
            if self._show_thinking and not self._quiet:
                self._stderr.print(printable(event.text), style="dim", end="", markup=False)
                self._thinking = True
            return
        if self._thinking:
            self._stderr.print()
            self._thinking = False
        if self._answer_to is not None:
            text = event.text if self._answering else event.text.lstrip()
            self._answering = self._answering or bool(text)
            self._write(printable(text))

    def _answered(self, answer: Answer) -> None:
        if self._answer_to is not None:
            sources = "".join(f"  {printable(_citation_line(c))}\n" for c in answer.citations)
            self._write("\n" + ("\nSources:\n" if sources else "") + sources)
        times = answer.timings
        remote = answer.packed.model.file is None and answer.restored_tokens
        cached = f" ({answer.restored_tokens:,} of them in its cache)" if remote else ""
        self.note(
            f"loaded in {times.load:.1f} s, "
            f"read {answer.packed.prompt_tokens:,} tokens{cached} in {times.prefill:.1f} s, "
            f"wrote {answer.generated_tokens:,} in {times.decode:.1f} s"
        )
        if UNCITED in answer.warnings:
            self.note(f"note: {UNCITED}")
        if answer.finish_reason == "length":
            self.note(
                f"note: the answer was cut at {answer.generated_tokens:,} tokens; --max-tokens allows more"
            )

    def _write(self, text: str) -> None:
        if self._answer_to is not None:
            try:
                self._answer_to.write(text)
                self._answer_to.flush()
            except BrokenPipeError as error:
                raise OutputClosedError("Standard output is closed.") from error

    def _advance(self, what: str, done: float, total: float, detail: str) -> None:
        if self._quiet or not self._stderr.is_terminal:
            return
        if self._progress is None:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._stderr,
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(what, detail=detail, total=total)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total, detail=detail)

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _citation_line(citation: Citation) -> str:
    lines = f"{citation.start_line}" + (
        f"-{citation.end_line}" if citation.end_line != citation.start_line else ""
    )
    mark = "[ok]" if citation.verified else "[unverified]"
    return f"{mark} {citation.path}:{lines}" + (f" ({citation.problem})" if citation.problem else "")
