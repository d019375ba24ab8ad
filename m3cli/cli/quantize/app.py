"""The group of the `m3 quantize` commands; each is a module beside this one."""

from __future__ import annotations

import typer

quantize = typer.Typer(
    name="quantize", help="From a published checkpoint to a model file that fits.", no_args_is_help=True
)


@quantize.callback()
def group() -> None:
    """From a published checkpoint to a model file that fits."""
