"""`m3 plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import ExitCode, UsageError


def plan(
    paths: Annotated[list[str] | None, typer.Argument(metavar="[PATH...]", show_default=False)] = None,
    model: options.Model = None,
    ctx: Annotated[
        str | None,
        typer.Option(
            metavar="N|max",
            help="Plan for a context of N tokens, or the model's (default: what PATH... takes).",
            rich_help_panel=options.RUN_PANEL,
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Plan for another machine: a TOML description, or one of gpu24-ram64, gpu24-ram192, "
            "gpu2x24-ram128, mac128, cpu256, gpu8x80.",
            rich_help_panel=options.RUN_PANEL,
        ),
    ] = None,
    kv_type: options.KVType = None,
    kv_type_v: options.KVTypeV = None,
    ubatch: options.UBatch = None,
    gpu_layers: options.GPULayers = None,
    cpu_moe: options.CPUMoE = False,
    cpu_moe_layers: options.CPUMoELayers = None,
    price_in: options.PriceIn = None,
    price_out: options.PriceOut = None,
    watts: options.Watts = None,
    price_kwh: options.PriceKWh = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    hidden: options.Hidden = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what would run on this machine, in how much memory, and how long it would take.

    Nothing is loaded. Exit code 3 says that nothing fits, with what would.

    Example:  m3 plan ./repo --ctx max --machine gpu24-ram192
    """
    from m3cli.memo import Memo
    from m3cli.model.catalog import resolve
    from m3cli.plan.planner import NoPlan
    from m3cli.report.output import write_json
    from m3cli.report.plan import plan_object, show_plan
    from m3cli.settings import cache_dir
    from m3cli.tasks.plan import PlanRequest, make_plan

    given = {key: value for key, value in locals().items() if key != "ctx"}
    settings = values.settings(given)
    corpus = None
    if paths:
        corpus = values.corpus_request(paths, settings, files_from=None, null=False, no_ignore=False)
    with Memo.of(cache_dir()) as memo:
        request = PlanRequest(
            model=resolve(settings.model, settings.models),
            cache_dir=cache_dir(),
            corpus=corpus,
            ctx=_context(ctx),
            machine=machine,
            run=values.run_options(settings),
            memo=memo,
        )
        report = make_plan(request, values.read_stdin)
    costs = report.costs(values.prices(settings))
    if as_json:
        write_json(plan_object(report, costs))
    else:
        show_plan(report, costs, values.stdout_console())
    if isinstance(report.result, NoPlan):
        raise typer.Exit(ExitCode.IMPOSSIBLE)


def _context(text: str | None) -> int | None:
    if text is None or text == "max":
        return None if text is None else 0
    if not text.isdecimal() or not int(text):
        raise UsageError(f"The value {text!r} of --ctx is no number of tokens.", "Give a number, or max.")
    return int(text)
