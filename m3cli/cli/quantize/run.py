"""`m3 quantize run`."""

from __future__ import annotations

import signal
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.cli.quantize.app import quantize
from m3cli.errors import UsageError


def _types(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("--candidates names no type.", "Give some, such as Q2_K,Q4_K,Q8_0.")
    return names


@quantize.command("run")
def run(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.gguf", show_default=False)],
    mixture: Annotated[
        str | None,
        typer.Option("--type", "-t", metavar="NAME", help="One of llama.cpp's mixtures, such as Q4_K_M."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A recipe of `m3 quantize recipe`, or one in a file."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Find the recipe that loses least in a file of SIZE, such as 138GB."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An importance matrix, of m3 or of llama.cpp.")
    ] = None,
    assume_imatrix: Annotated[
        bool,
        typer.Option(
            "--assume-imatrix", help="With --dry-run: plan for an importance matrix yet to be computed."
        ),
    ] = False,
    candidates: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="With --budget: types to choose from, such as Q2_K,Q4_K,Q8_0."),
    ] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Split into files with at most SIZE of weights, such as 48G."),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize weights again that are quantized already.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, metavar="N", help="0: all cores.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Choose and check everything, and write nothing.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Quantize a GGUF model: to one of llama.cpp's mixtures, by a recipe, or to what fits a budget.

    An interrupted run goes on where it was when the same command is given again.

    Example:  m3 quantize run M3-BF16.gguf --out M3.gguf --budget 138GB --imatrix M3.imatrix.gguf
    """
    from m3cli.report.output import write_file, write_json, write_stdout
    from m3cli.report.quantize_run import RunConsole, quantize_object, show_plan
    from quantize.choose import Choice, QuantizeRequest, choose
    from quantize.events import Converted, Progress
    from quantize.quantizer import Output, Quantization

    if assume_imatrix and (not dry_run or imatrix is not None):
        raise UsageError(
            "--assume-imatrix is for a plan without an importance matrix.",
            "Give it with --dry-run, without --imatrix.",
        )
    request = QuantizeRequest(
        source,
        Output(
            out,
            values.nbytes(split_max_size, "--split-max-size") if split_max_size is not None else 0,
            allow_requantize,
            threads,
        ),
        mixture,
        recipe,
        values.nbytes(budget, "--budget") if budget is not None else None,
        imatrix,
        _types(candidates) if candidates is not None else None,
        assume_imatrix,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was written is kept
    done: Converted | None = None
    with RunConsole(quiet=quiet) as console:
        for event in choose(request):
            console.show(event)
            if isinstance(event, Choice):
                choice = event
        quantization = Quantization(choice.source, choice.types, request.output, choice.file_type)
        for note in quantization.planned.notes:
            console.note(f"note: {note}")
        if dry_run and quantization.planned.total_bytes > quantization.planned.free_bytes:
            console.note("note: the disk has too little room for it")
        for step in [] if dry_run else quantization.run():
            if choice.solved and isinstance(step, Progress) and step.done == step.resumed:  # it has begun
                recipe_file = out.with_suffix(".recipe.toml")
                if recipe_file.exists():
                    console.note(f"note: {recipe_file} is left as it is; --dry-run prints the recipe")
                else:
                    write_file(recipe_file, [choice.solved.recipe.toml().encode()])
                    console.note(f"the recipe is in {recipe_file}")
            console.show(step)
            if isinstance(step, Converted):
                done = step
    if json:
        write_json(quantize_object(quantization.planned, choice, done))
    elif done is None:
        show_plan(quantization.planned, choice, values.stdout_console())
    else:
        write_stdout([f"{done.files[0]}\n".encode("utf-8", "surrogateescape")])
