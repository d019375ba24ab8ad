"""A server as the person sees it who started it: its address on stdout, what it does on stderr."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from m3cli.report.ask_console import AskConsole
from m3cli.report.text import printable

if TYPE_CHECKING:
    from m3cli.engine.events import Event

# The terminal or the reader of a pipe has gone; rich would end the process.
_NOBODY_LISTENS = (OSError, ValueError, SystemExit)


class ServeConsole(AskConsole):
    """Renders reading the files, then a line for each answer. Nothing that clients send is shown."""

    def __init__(self, address_to: TextIO, *, quiet: bool = False, debug: bool = False) -> None:
        super().__init__(answer_to=None, quiet=quiet)
        self._address_to = address_to
        self._debug = debug

    def listening(self, url: str) -> None:
        """The server can be reached now."""
        with suppress(OSError, ValueError):
            self._address_to.write(f"{url}\n")
            self._address_to.flush()

    def heard(self, event: Event) -> None:
        """An event of reading the files."""
        with suppress(*_NOBODY_LISTENS):
            self.show(event)

    def report(self, sentence: str) -> None:
        """A line with the time of day."""
        with suppress(*_NOBODY_LISTENS):
            self.note(f"{time.strftime('%H:%M:%S')} {sentence}")

    def crashed(self, error: BaseException) -> None:
        """A defect of the server: told even when it is quiet, as the client is not told what it was."""
        with suppress(*_NOBODY_LISTENS):
            self._stderr.print("error:", style="bold red", end=" ")
            words = printable(f"an answer failed: {type(error).__name__}: {error}")
            self._stderr.print(words, markup=False)
            if self._debug:
                traceback.print_exception(error)
