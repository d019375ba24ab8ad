"""`m3 quantize imatrix`."""

from __future__ import annotations

import signal
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.cli.quantize.app import quantize


@quantize.command("imatrix")
def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text to measure on: a file or directory; repeatable.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.gguf", show_default=False)],
    window: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="Tokens that are computed together.")
    ] = 512,
    windows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Take N windows, spread over the text (default: all)."),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option("--add", metavar="FILE", help="Add what is in this matrix of the model; repeatable."),
    ] = None,
    output_tensor: Annotated[
        bool,
        typer.Option("--output-tensor/--no-output-tensor", help="Measure the output matrix too."),
    ] = True,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity/--no-sensitivity",
            help="Measure too what an error in each tensor does, for --budget: one short pass a tensor.",
        ),
    ] = True,
    threads: options.Threads = None,
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Layers on the GPU (default: all).",
            rich_help_panel=options.PLACE_PANEL,
        ),
    ] = None,
    cpu_moe: options.CPUMoE = False,
    save_every: Annotated[
        str, typer.Option(metavar="TIME", help="Save after each TIME, such as 30s or 5m.")
    ] = "60s",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted computation ended.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Compute an importance matrix: which columns of a model's weights matter, measured on text.

    With it comes how much the model's predictions suffer from errors in each tensor.

    MODEL is a GGUF file or a name of `m3 model list`; one that is quantized already will do. The result is
    a file in llama.cpp's format. An interrupted computation goes on with --resume.

    Example:  m3 quantize imatrix M3-Q8_0.gguf --data ./texts --out M3.imatrix.gguf
    """
    from m3cli.model.catalog import resolve
    from m3cli.report.output import write_json, write_stdout
    from m3cli.report.quantize_imatrix import ImatrixConsole, imatrix_object
    from quantize.imatrix import Computed, ImatrixComputation, ImatrixRequest

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was computed is kept
    request = ImatrixRequest(
        resolve(model, values.settings({}).models).path,
        tuple(data),
        out,
        window=window,
        windows=windows,
        add=tuple(add or ()),
        output_tensor=output_tensor,
        sensitivities=sensitivity,
        gpu_layers=-1 if gpu_layers is None else gpu_layers,
        cpu_moe=cpu_moe,
        threads=threads or 0,
        save_every=values.seconds(save_every, "--save-every"),
        resume=resume,
    )
    with ImatrixConsole(quiet=quiet) as console:
        computation = ImatrixComputation(request)
        for event in computation.run():
            console.show(event)
            if isinstance(event, Computed):
                done = event
    if json:
        write_json(imatrix_object(computation.planned, done))
    else:
        write_stdout([f"{done.out}\n".encode("utf-8", "surrogateescape")])
