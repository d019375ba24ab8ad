"""`m3 quantize convert`."""

from __future__ import annotations

import signal
from enum import Enum
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.cli.quantize.app import quantize


class OutTypeChoice(str, Enum):
    """`--type`."""

    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"
    q8_0 = "q8_0"


@quantize.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIRECTORY", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.gguf", show_default=False)],
    out_type: Annotated[
        OutTypeChoice,
        typer.Option("--type", "-t", help="Type of the weights; norms, router and indexer stay f32."),
    ] = OutTypeChoice.bf16,
    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Split into files with at most SIZE of weights, such as 48G."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything but the weights, and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted conversion ended.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Convert a MiniMax-M3 checkpoint (safetensors) to a GGUF file that keeps its sparse attention.

    Example:  m3 quantize convert ./MiniMax-M3 --out M3-BF16.gguf --split-max-size 48G
    """
    from m3cli.report.output import write_json, write_stdout
    from m3cli.report.quantize import ConvertConsole, convert_object, plan_table
    from quantize.convert import Conversion
    from quantize.events import Converted, ConvertRequest

    split = values.nbytes(split_max_size, "--split-max-size") if split_max_size is not None else 0
    conversion = Conversion(ConvertRequest(source, out, out_type.value, split, resume))
    done: Converted | None = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was converted is kept
    with ConvertConsole(quiet=quiet) as console:
        for note in conversion.planned.notes:
            console.note(f"note: {note}")
        if dry_run and conversion.planned.total_bytes > conversion.planned.free_bytes:
            console.note("note: the disk has too little room for it")
        for event in [] if dry_run else conversion.run():
            console.show(event)
            if isinstance(event, Converted):
                done = event
    if json:
        write_json(convert_object(conversion.planned, done))
    elif done is None:
        values.stdout_console().print(plan_table(conversion.planned))
    else:
        write_stdout([f"{done.files[0]}\n".encode("utf-8", "surrogateescape")])
