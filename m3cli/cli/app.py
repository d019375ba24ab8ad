"""The root of the command line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from m3cli import __version__
from m3cli.cli.ask import ask
from m3cli.cli.cache import cache
from m3cli.cli.chat import chat
from m3cli.cli.doctor import doctor
from m3cli.cli.evaluate import evaluate
from m3cli.cli.model import model
from m3cli.cli.pack import pack
from m3cli.cli.plan import plan
from m3cli.cli.quantize import quantize
from m3cli.cli.review import review
from m3cli.cli.serve import serve
from m3cli.cli.warm import warm

app = typer.Typer(
    name="m3",
    help="Ask questions of a whole repository or document set, with a model that runs on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example:  m3 ask ./repo "where is the retry logic, and is it safe?"',
)
app.command()(ask)
app.command()(chat)
app.command()(warm)
app.command()(review)
app.command()(pack)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(serve)
app.add_typer(model)
app.add_typer(cache)
app.add_typer(quantize)
app.command()(doctor)


def debugging() -> bool:
    """Whether errors are to be shown with their traceback: `--debug` anywhere, or `M3_DEBUG`."""
    options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return "--debug" in options or bool(os.environ.get("M3_DEBUG"))


def print_version(on: bool) -> None:
    """Print the version and exit, if `on`."""
    if on:
        typer.echo(f"m3 {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Settings that hold for every command."""
