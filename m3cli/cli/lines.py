"""Where the questions of a conversation come from: a person at a terminal, or standard input."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prompt_toolkit.history import History

_BLOCK = '"""'


def typed(history: Path) -> Iterator[str]:
    """Lines typed at a terminal, with editing and a history that outlasts the process.

    Alt-Enter begins a new line within a question, Ctrl-C takes back what was typed, Ctrl-D ends. The
    prompt goes to stderr: stdout is for answers.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: object) -> None:
        event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

    session: PromptSession[str] = PromptSession(
        history=_history(history), key_bindings=bindings, output=create_output(stdout=sys.stderr)
    )
    while True:
        try:
            yield session.prompt("? ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _history(path: Path) -> History:
    """What was typed before; kept in a file, unless it cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason not to answer
                super().store_string(string)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.is_file():  # and not a pipe or a device, of which there is no end
            path.open("rb").close()
            return KeptHistory(str(path))
    except OSError:
        pass
    return InMemoryHistory()


def piped(stream: TextIO | None) -> Iterator[str]:
    """Lines of a stream; those between two lines of three quotation marks are one question."""
    block: list[str] | None = None
    for line in stream or ():
        text = line.rstrip("\r\n")
        if text.strip() == _BLOCK:
            if block is not None:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(text)
        else:
            yield text
    if block:
        yield "\n".join(block)
