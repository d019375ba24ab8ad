"""`m3 model list|info|pull`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import UsageError

model = typer.Typer(name="model", help="What models there are, and what is in one.", no_args_is_help=True)


@model.command("list")
def list_models(json: options.Json = False, debug: options.Debug = False) -> None:  # noqa: ARG001 - debug: see m3cli.cli.app
    """Show every model that has a name here: aliases, downloads, the demo model.

    Example:  m3 model list
    """
    from m3cli.model.catalog import ModelRef, demo_model, downloaded_models
    from m3cli.report.model import model_list_table
    from m3cli.report.output import write_json
    from m3cli.settings import load_settings

    settings = load_settings({})
    aliases = [ModelRef(name, Path(path).expanduser(), "alias") for name, path in settings.models.items()]
    demo = demo_model()
    models = [*aliases, *downloaded_models(), *([demo] if demo else [])]
    if json:
        write_json([{"name": m.name, "path": str(m.path), "origin": m.origin} for m in models])
    else:
        values.stdout_console().print(model_list_table(models))


@model.command("info")
def info(
    name: Annotated[
        str | None, typer.Argument(metavar="FILE|NAME", help="Default: the model that `m3 ask` would use.")
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Show what a GGUF file's header says: architecture, size, context, tokenizer, licence.

    Example:  m3 model info ~/models/MiniMax-M3-Q2_K_L-00001-of-00004.gguf
    """
    from m3cli.model import preflight
    from m3cli.model.catalog import resolve
    from m3cli.model.header import read_header
    from m3cli.model.shape import ModelShape
    from m3cli.report.model import model_details, model_table
    from m3cli.report.output import write_json
    from m3cli.settings import load_settings

    settings = load_settings({"model": name})
    ref = resolve(settings.model, settings.models)
    header = read_header(ref.path)
    shape = ModelShape.from_header(header)
    problem = preflight.problem(header, shape)
    if json:
        write_json(model_details(ref, shape, problem))
    else:
        values.stdout_console().print(model_table(ref, shape, problem))


@model.command("pull")
def pull(
    name: Annotated[
        str, typer.Argument(metavar="OWNER/REPO[:QUANT]|NAME", help="A repository of the Hugging Face hub.")
    ] = "minimax-m3",
    quant: Annotated[
        str | None,
        typer.Option(metavar="auto|NAME", help="auto: the largest that fits this machine (default)."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A branch, tag or commit (default: main).")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Put the files here, not into the hub's cache."),
    ] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Do not ask: the model's licence is accepted.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what there is and what would be downloaded.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Download a quant that fits this machine, resumed and verified; print the path of its first file.

    Example:  m3 model pull bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M
    """
    from m3cli.report.output import write_json, write_stdout
    from m3cli.report.pull import PullConsole, chosen_line, license_line, offers_table, pull_object
    from m3cli.report.text import printable
    from m3cli.tasks.pull import Progress, PullRequest, plan_pull
    from m3cli.tasks.pull import pull as run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was downloaded is kept
    request = PullRequest(name, quant, revision, directory and directory.expanduser().absolute())
    received: int | None = None
    with PullConsole(quiet=quiet) as console:
        plan = plan_pull(request, every_header=dry_run)
        if not dry_run:
            console.plan(plan)
            if not accept_license and not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise UsageError(
                    f"Nobody is here to be asked about the model's {license_line(plan)}.",
                    "Read it, and give --accept-license to download the model.",
                )
            if not accept_license and not console.consent(plan):
                raise UsageError("The licence was not accepted, and nothing was downloaded.")
            received = 0
            for event in run(plan):
                console.show(event)
                received = event.received if isinstance(event, Progress) else received
            console.done(plan, received)
    if json:
        write_json(pull_object(plan, received))
    elif dry_run:
        out = values.stdout_console()
        out.print(offers_table(plan))
        out.print(printable(f"{chosen_line(plan)}\n{license_line(plan)}"), markup=False, soft_wrap=True)
    else:
        write_stdout([f"{plan.path}\n".encode("utf-8", "surrogateescape")])
