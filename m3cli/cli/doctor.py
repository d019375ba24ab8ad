"""`m3 doctor`."""

from __future__ import annotations

import typer

from m3cli.cli import options, values
from m3cli.errors import ExitCode


def doctor(json: options.Json = False, debug: options.Debug = False) -> None:  # noqa: ARG001 - debug: see m3cli.cli.app
    """Show what this installation can do, and what is wrong with it.

    Example:  m3 doctor
    """
    from dataclasses import asdict

    from m3cli.report.doctor import doctor_table
    from m3cli.report.output import write_json
    from m3cli.settings import load_settings
    from m3cli.tasks.doctor import diagnose

    diagnosis = diagnose(load_settings({}))
    if json:
        write_json(asdict(diagnosis))
    else:
        values.stdout_console().print(doctor_table(diagnosis))
    if diagnosis.problems:
        raise typer.Exit(ExitCode.IMPOSSIBLE)
