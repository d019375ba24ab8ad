"""`m3 quantize verify`."""

from __future__ import annotations

import signal
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.cli.quantize.app import quantize


@quantize.command("verify")
def verify(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE.gguf", show_default=False)],
    new: Annotated[Path, typer.Argument(metavar="NEW.gguf", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="PATH", help="Run both on this text, not that of the imatrix; repeatable."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run about N tokens of it, spread evenly.")
    ] = 8192,
    window: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that are run at once; the second half counts.")
    ] = 512,
    rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Rows of each tensor to compare; 0 for all.")
    ] = 1024,
    gpu_layers: Annotated[
        int, typer.Option("--gpu-layers", min=-1, metavar="N", help="Layers on the GPU; -1 for all.")
    ] = 0,
    threads: options.Threads = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Draw a plot, too.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Exit with 1 if the mean KL divergence is above X nats."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Compare a quantized model with what it was made of: weights, and predictions on a text.

    Example:  m3 quantize verify M3-BF16.gguf M3-Q2_K.gguf --text docs/ --plot verify.svg
    """
    from m3cli.errors import ExitCode, UsageError
    from m3cli.report.output import write_file, write_json
    from m3cli.report.pictures import check_plot
    from m3cli.report.quantize_plot import plot as draw
    from m3cli.report.quantize_verify import VerifyConsole, print_tables, verify_object
    from quantize.verify import Verification, Verified, VerifyRequest

    if max_kl is not None and not text:
        raise UsageError(
            "Without a text there is no divergence to hold against --max-kl.", "Add --text PATH."
        )
    if plot is not None:
        check_plot(plot)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    paths = tuple(text or ())
    request = VerifyRequest(reference, new, paths, tokens, window, rows, gpu_layers, threads or 0)
    with VerifyConsole(quiet=quiet) as console:
        verification = Verification(request)
        console.plan(verification.planned)
        for event in verification.run():
            console.show(event)
            if isinstance(event, Verified):
                result = event
    if plot is not None:
        write_file(plot, [draw(result, plot.suffix)])
    if json:
        write_json(verify_object(result, max_kl))
    else:
        print_tables(result, values.stdout_console())
    if max_kl is not None and not result.passes(max_kl):
        raise typer.Exit(ExitCode.FINDINGS)
