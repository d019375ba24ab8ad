"""`m3 eval`."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from m3cli.cli import options, values
from m3cli.errors import ExitCode, M3Error, UsageError

if TYPE_CHECKING:
    from m3cli.engine.events import KVType
    from m3cli.tasks.evaluate.results import Evaluation, Mode, Run

MEASURE_PANEL = "What is measured"


def evaluate(
    paths: Annotated[list[str] | None, typer.Argument(metavar="[PATH...]", show_default=False)] = None,
    model: options.Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Tasks or groups: code, meaning, retrieval, tracing, aggregation, coreference, ruler, all "
            "(default: code,meaning).",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="N,…|auto",
            help="Lengths in tokens, such as 4k,8k,16k (auto: doubling, up to the context).",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = "auto",
    depths: Annotated[
        int,
        typer.Option(min=1, max=100, metavar="N", help="Rows of the heatmap.", rich_help_panel=MEASURE_PANEL),
    ] = 5,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Questions of each task at each length and depth.",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = 5,
    seed: options.Seed = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE,…",
            help="Types of the KV cache to measure: f16, q8_0, q4_0, or keys:values.",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODE,…",
            help="Compare ways to show a corpus: whole, recap, quote, end, select, sweep; or all.",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after so long, such as 30m.", rich_help_panel=MEASURE_PANEL),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Ask again what was asked before.", rich_help_panel=MEASURE_PANEL),
    ] = False,
    require: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Exit with 1 if the effective context of a group is below N tokens.",
            rich_help_panel=MEASURE_PANEL,
        ),
    ] = None,
    files_from: options.FilesFrom = None,
    null: options.Nul = False,
    ref: options.Ref = None,
    order: options.Order = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    no_ignore: options.NoIgnore = False,
    hidden: options.Hidden = None,
    max_file_size: options.MaxFileSize = None,
    ctx: options.Ctx = None,
    ubatch: options.UBatch = None,
    flash_attention: options.FlashAttention = None,
    allow_dense: options.AllowDense = False,
    threads: options.Threads = None,
    lora: options.Lora = None,
    gpu_layers: options.GPULayers = None,
    cpu_moe: options.CPUMoE = False,
    cpu_moe_layers: options.CPUMoELayers = None,
    override_tensor: options.OverrideTensor = None,
    tensor_split: options.TensorSplit = None,
    main_gpu: options.MainGPU = None,
    mmap: options.MMap = None,
    mlock: options.MLock = None,
    cache: options.Cache = None,
    checkpoint_every: options.CheckpointEvery = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a report, too.", rich_help_panel=options.OUTPUT_PANEL),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|.svg", help="Draw the heatmap, too.", rich_help_panel=options.OUTPUT_PANEL
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure how much context this model really uses on this machine; `m3 ask` then goes by it.

    Texts are made of what PATH... holds, or else of what ships with Python. What was measured is kept: a run
    that was stopped goes on when it is repeated.

    Example:  m3 eval ./repo --lengths 4k,16k,64k --report eval.html
    """
    from m3cli.report.eval_console import EvalConsole
    from m3cli.report.pictures import check_plot
    from m3cli.tasks.evaluate.results import Evaluation
    from m3cli.tasks.evaluate.run import EvalRequest, Evaluator

    settings = values.settings({**locals(), "server": False})
    corpus = None
    if paths or files_from is not None:
        corpus = values.corpus_request(
            paths or [],
            settings,
            files_from=files_from,
            null=null,
            no_ignore=no_ignore,
            order=settings.order,
            ref=ref,
        )
    if plot is not None:
        check_plot(plot)
    if report is not None and not report.parent.is_dir():
        raise UsageError(f"There is no directory {report.parent} for the report.", "Make it first.")
    required = _lengths(require, "--require") if require is not None else ()
    request = EvalRequest(
        context=values.context_request(corpus, settings, allow_dense=allow_dense),
        tasks=tuple(_words(tasks)),
        lengths=() if lengths == "auto" else _lengths(lengths, "--lengths"),
        depths=depths,
        samples=samples,
        seed=settings.seed,
        kv_types=_kv_types(kv),
        modes=_modes(compare),
        time_limit=values.seconds(time_limit, "--time-limit") if time_limit is not None else None,
        fresh=fresh,
    )
    with (
        EvalConsole(quiet=quiet) as console,
        Evaluator(request, open_engine=values.open_engine, stdin=values.read_stdin) as evaluator,
    ):
        values.note_demo(console, request.context, settings)
        if required and max(required) > evaluator.lengths[-1]:
            raise UsageError(
                f"The longest length is {evaluator.lengths[-1]:,}, and --require asks for more.",
                "Measure as long ones with --lengths.",
            )
        try:
            for event in evaluator.run():
                console.show(event)
                if isinstance(event, Evaluation):
                    result = event
        except (KeyboardInterrupt, M3Error):
            console.end()
            if any(run.outcomes for run in evaluator.result.runs):
                _write(evaluator.result, report, plot, json=json)
            raise
    _write(result, report, plot, json=json)
    if not result.complete:
        raise typer.Exit(ExitCode.CAP_REACHED)
    if required and not all(_reaches(run, max(required)) for run in result.runs if run.mode == "whole"):
        raise typer.Exit(ExitCode.FINDINGS)


def _reaches(run: Run, length: int) -> bool:
    """Whether the effective context of all groups is at least `length`; of none, it is not."""
    groups = run.groups()
    return bool(groups) and all(group.relative.length >= length for group in groups)


def _write(result: Evaluation, report: Path | None, plot: Path | None, *, json: bool) -> None:
    from m3cli.report.eval_html import render
    from m3cli.report.eval_json import eval_object
    from m3cli.report.eval_plot import plot as draw
    from m3cli.report.eval_text import print_evaluation
    from m3cli.report.output import write_files, write_json

    pages = [] if report is None else [(report, [render(result).encode("utf-8", "replace")])]
    pictures = [] if plot is None else [(plot, [draw(result, plot.suffix)])]
    failures = write_files(pages + pictures)
    if json:
        write_json(eval_object(result))
    else:
        print_evaluation(result, values.stdout_console())
    if failures:
        raise failures[0]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _lengths(text: str, option: str) -> tuple[int, ...]:
    """`4k,8192,1M` in tokens, in powers of 1,024 as contexts are counted. Raises UsageError."""
    lengths = []
    for word in _words(text):
        match = re.fullmatch(r"(\d{1,9})([kKmM]?)", word)
        length = int(match[1]) * {"": 1, "k": 1024, "m": 1 << 20}[match[2].lower()] if match else 0
        if not length:
            raise UsageError(f"{word!r} of {option} is no length in tokens.", "Write it as 8192, 8k or 1M.")
        lengths.append(length)
    if not lengths:
        raise UsageError(f"{option} names no length.", "Write it as 4k,8k,16k.")
    return tuple(lengths)


def _kv_types(text: str | None) -> tuple[tuple[KVType, KVType], ...]:
    types = []
    for word in _words(text):
        key, _, value = word.partition(":")
        value = value or key
        known = ("f16", "q8_0", "q4_0")
        if key not in known or value not in known:
            raise UsageError(f"{word!r} is no type of KV cache.", f"The types are {', '.join(known)}.")
        types.append((cast("KVType", key), cast("KVType", value)))
    return tuple(dict.fromkeys(types))


def _modes(text: str | None) -> tuple[Mode, ...]:
    from m3cli.tasks.evaluate.results import MODES, Mode

    words = _words(text)
    if words == ["all"]:
        return MODES
    if wrong := [word for word in words if word not in get_args(Mode)]:
        raise UsageError(f"There is no mode {wrong[0]}.", f"The modes are {', '.join(MODES)}.")
    return tuple(dict.fromkeys(cast("Mode", word) for word in words)) or ("whole",)
