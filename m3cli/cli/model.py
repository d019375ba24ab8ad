"""`m3 model list|info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3cli.cli import options, values

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
