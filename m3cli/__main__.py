"""The `m3` command: runs the command line and turns errors into sentences and exit codes."""

from __future__ import annotations

import errno
import os
import sys


def _forget_current_directory() -> None:
    """Take the current directory off the module path: it may be the very tree that is reviewed.

    It gets there by `python -m m3cli` and by an empty entry of PYTHONPATH.
    """
    try:
        here = os.path.realpath(os.getcwd())  # noqa: PTH109 - pathlib is not imported yet
    except OSError:  # it was deleted: nothing can be imported from it
        here = ""
    if here == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # noqa: PTH120
        here = ""  # m3 runs from this very directory: its modules are in use anyway
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) != here]  # noqa: PTH117


_forget_current_directory()

import traceback  # noqa: E402
from contextlib import suppress  # noqa: E402

from m3cli.errors import ExitCode, M3Error, OutputClosedError  # noqa: E402

# What is said of a library and of a thread that there is no memory for.
_NO_MEMORY = ("failed to map segment", "can't start new thread")


def main() -> None:
    """Run `m3` with `sys.argv` and exit with the code that m3cli.errors documents."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # a terminal or locale that cannot show a character must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        from m3cli.cli.app import app

        app(prog_name="m3")
    except OutputClosedError as error:
        _drop_stdout()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except M3Error as error:
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except OSError as error:
        _drop_stdout()
        _complain(
            f"The system refused to read or write something: {error}.",
            "Allow more open files (ulimit -n)."
            if error.errno in (errno.EMFILE, errno.ENFILE)
            else "Check where the output goes, and that there is space.",
        )
        sys.exit(ExitCode.IMPOSSIBLE)
    except Exception as error:  # noqa: BLE001 - the last resort: a sentence, and a traceback with --debug
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            more = f": {error}" if str(error) and isinstance(error, MemoryError) else ""
            _complain(
                f"m3 itself ran out of memory{more}.".replace("..", "."),
                "Read fewer files at a time, raise the limit on memory, or close other programs.",
            )
            sys.exit(ExitCode.IMPOSSIBLE)
        _complain(
            f"m3 failed unexpectedly: {type(error).__name__}: {error}.",
            "Run again with --debug for the traceback, and please report it.",
        )
        sys.exit(ExitCode.INTERNAL)


def _open_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed: the next file opened would take its place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _drop_stdout() -> None:
    """Keep the interpreter from complaining, at exit, about output that nobody takes."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, hint: str) -> None:
    try:
        _show(message, hint)
    except (ImportError, MemoryError, OSError):  # there is no room even for what shows it
        shown = "".join(c if c.isprintable() else " " for c in f"error: {message} {hint}")
        with suppress(OSError):
            os.write(2, f"{shown}\n".encode("utf-8", "replace"))


def _show(message: str, hint: str) -> None:
    from m3cli.cli.app import debugging
    from m3cli.report.text import printable, stderr_console

    if debugging():
        traceback.print_exc()
    console = stderr_console()
    console.print("error:", style="bold red", end=" ")
    console.print(printable(message), markup=False)
    if hint:
        console.print(printable(hint), markup=False)


if __name__ == "__main__":
    main()
