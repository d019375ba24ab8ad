"""The `m3` command: runs the command line and turns errors into sentences and exit codes."""

from __future__ import annotations

import os
import sys


def _forget_current_directory() -> None:
    """Take the current directory off the module path: it may be the very tree that is reviewed.

    It gets there by `python -m m3cli` and by an empty entry of PYTHONPATH. m3's own modules are found
    by the location of the package.
    """
    try:
        here = os.path.realpath(os.getcwd())  # noqa: PTH109 - pathlib is not imported yet
    except OSError:  # it was deleted: nothing can be imported from it
        here = ""
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) != here]  # noqa: PTH117


_forget_current_directory()

import traceback  # noqa: E402
from contextlib import suppress  # noqa: E402

from m3cli.errors import ExitCode, M3Error  # noqa: E402


def main() -> None:
    """Run `m3` with `sys.argv` and exit with the code that m3cli.errors documents."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal or locale that cannot show a character must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    from m3cli.cli.app import app, debugging

    try:
        try:
            app(prog_name="m3")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except M3Error as error:
        _complain(error.message, error.hint, debug=debugging())
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # whoever read our output has gone
        _drop_stdout()
        sys.exit(ExitCode.DONE)
    except OSError as error:
        _drop_stdout()
        _complain(
            f"The system refused to read or write something: {error}.",
            "Check where the output goes, and that there is space.",
            debug=debugging(),
        )
        sys.exit(ExitCode.IMPOSSIBLE)
    except Exception as error:  # noqa: BLE001 - the last resort: a sentence, and a traceback with --debug
        _complain(
            f"m3 failed unexpectedly: {type(error).__name__}: {error}.",
            "Run again with --debug for the traceback, and please report it.",
            debug=debugging(),
        )
        sys.exit(ExitCode.INTERNAL)


def _drop_stdout() -> None:
    """Keep the interpreter from complaining, at exit, about output that nobody takes."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, hint: str, *, debug: bool) -> None:
    from m3cli.report.text import printable, stderr_console

    if debug:
        traceback.print_exc()
    console = stderr_console()
    console.print("error:", style="bold red", end=" ")
    console.print(printable(message), markup=False)
    if hint:
        console.print(printable(hint), markup=False)


if __name__ == "__main__":
    main()
