"""The `m3` command: runs the command line and turns errors into sentences and exit codes."""

from __future__ import annotations

import os
import sys

from m3cli.errors import CancelledError, ExitCode, M3Error


def main() -> None:
    """Run `m3` with `sys.argv` and exit with the code that m3cli.errors documents."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal or locale that cannot show a character must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    from m3cli.cli.app import app, debugging

    try:
        app(prog_name="m3")
    except CancelledError as error:
        sys.exit(error.exit_code)
    except M3Error as error:
        if debugging():
            raise
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # whoever read our output has gone; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.DONE)
    except Exception as error:
        if debugging():
            raise
        _complain(
            f"m3 failed unexpectedly: {type(error).__name__}: {error}.",
            "Run again with --debug for the traceback, and please report it.",
        )
        sys.exit(ExitCode.INTERNAL)


def _complain(message: str, hint: str) -> None:
    from rich.console import Console

    from m3cli.report.text import printable

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(printable(message), markup=False)
    if hint:
        console.print(printable(hint), markup=False)


if __name__ == "__main__":
    main()
