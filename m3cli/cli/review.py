"""`m3 review`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import ExitCode, UsageError

_CHANGE = "What is reviewed"
_NOISE = "What is reported"


class SeverityChoice(str, Enum):
    """`--min-severity`."""

    info = "info"
    warning = "warning"
    error = "error"


class FailOnChoice(str, Enum):
    """`--fail-on`."""

    warning = "warning"
    error = "error"
    never = "never"


class ContextChoice(str, Enum):
    """`--context`."""

    diff = "diff"
    related = "related"
    repo = "repo"


class FormatChoice(str, Enum):
    """`--format`."""

    text = "text"
    json = "json"
    sarif = "sarif"
    rdjson = "rdjson"
    rdjsonl = "rdjsonl"
    gitlab = "gitlab"
    github = "github"
    markdown = "markdown"


def review(
    path: Annotated[str, typer.Argument(metavar="PATH", show_default=False)] = ".",
    base: Annotated[
        str,
        typer.Option(
            metavar="REF|auto",
            help="Review what came since the merge base with this commit (auto: the target branch in CI, "
            "else the default branch, else HEAD).",
            rich_help_panel=_CHANGE,
        ),
    ] = "auto",
    head: Annotated[
        str | None,
        typer.Option(
            metavar="REF", help="Review up to this commit, not the work tree.", rich_help_panel=_CHANGE
        ),
    ] = None,
    staged: Annotated[
        bool, typer.Option("--staged", help="Review what `git commit` would take.", rich_help_panel=_CHANGE)
    ] = False,
    diff: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-", help="Review a unified diff, from a file or stdin.", rich_help_panel=_CHANGE
        ),
    ] = None,
    review_context: Annotated[
        ContextChoice | None,
        typer.Option(
            "--context",
            help="What the model sees beside the diff: the functions around it (diff), also what is related "
            "to them (related, the default), or the whole base (repo), which `m3 warm --ref BASE` prepares.",
            rich_help_panel=_CHANGE,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Project settings (default: .m3.toml of the base commit, never of the change).",
            rich_help_panel=_CHANGE,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Have the model try to refute each finding (default).",
            rich_help_panel=_NOISE,
        ),
    ] = True,
    min_severity: Annotated[
        SeverityChoice | None,
        typer.Option(help="Report nothing below (default: info).", rich_help_panel=_NOISE),
    ] = None,
    fail_on: Annotated[
        FailOnChoice | None,
        typer.Option(help="Exit with 1 from this severity on (default: error).", rich_help_panel=_NOISE),
    ] = None,
    max_findings: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Report at most N, the most severe.", rich_help_panel=_NOISE),
    ] = None,
    review_ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="GLOB[:RULE,…]",
            help="Report nothing, or not these rules, in files that match; repeatable.",
            rich_help_panel=_NOISE,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Report nothing that this file knows.", rich_help_panel=_NOISE),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what is found, and what --baseline knows, into such a file.",
            rich_help_panel=_NOISE,
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop after TIME, such as 90s or 10m, with exit code 4.",
            rich_help_panel=options.RUN_PANEL,
        ),
    ] = None,
    token_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Stop when N tokens were computed, with exit code 4.",
            rich_help_panel=options.RUN_PANEL,
        ),
    ] = None,
    form: Annotated[
        FormatChoice,
        typer.Option("--format", help="What stdout gets.", rich_help_panel=options.OUTPUT_PANEL),
    ] = FormatChoice.text,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FORMAT=FILE",
            help="Also write it into a file in this format; repeatable.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    model: options.Model = None,
    endpoint: options.Endpoint = None,
    api_key_env: options.APIKeyEnv = None,
    order: options.Order = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    max_tokens: options.MaxTokens = None,
    ctx: options.Ctx = None,
    kv_type: options.KVType = None,
    kv_type_v: options.KVTypeV = None,
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
    op_offload: options.OpOffload = None,
    no_host: options.NoHost = None,
    mmap: options.MMap = None,
    mlock: options.MLock = None,
    server: options.Server = None,
    cache: options.Cache = None,
    update: options.Update = None,
    checkpoint_every: options.CheckpointEvery = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Review a change: few findings, each at a line that was changed, the same on every run.

    Exit code 1 says that there is something at or above --fail-on.

    Example:  m3 review --base main

    Example:  git diff | m3 review --diff - --format rdjson
    """
    from m3cli.corpus.reviewed import ChangesRequest, read_changes
    from m3cli.report.ask_console import AskConsole
    from m3cli.report.output import write_files, write_stdout
    from m3cli.report.review_console import show_review
    from m3cli.report.review_formats import FORMATS
    from m3cli.tasks.findings import SEVERITIES, Review
    from m3cli.tasks.review import Reviewing, ReviewRequest, project_file
    from m3cli.tasks.review import review as run
    from m3cli.tasks.review_check import PathRule, Wanted, baseline_bytes, read_baseline

    outputs = [_output(text, FORMATS) for text in output or ()]
    changes = read_changes(
        ChangesRequest(path, base, head, staged, None if diff is None else values.read_input(diff, "--diff"))
    )
    settings = values.settings(locals(), project=config or project_file(changes))
    known = read_baseline(baseline) if baseline is not None else {}
    wanted = Wanted(
        settings.min_severity,
        settings.max_findings or None,
        tuple(map(PathRule.parse, settings.review_ignore)),
        frozenset(known),
    )
    corpus = values.corpus_request(
        [path], settings, files_from=None, null=False, no_ignore=False, order=values.order(settings)
    )
    request = ReviewRequest(
        changes,
        values.context_request(corpus, settings, allow_dense=allow_dense, reviews=True),
        settings.review_context,
        check,
        wanted,
        values.seconds(time_limit, "--time-limit") if time_limit else None,
        token_limit,
        values.sampling(settings),
    )
    found: Review | None = None
    with AskConsole(answer_to=None, quiet=quiet) as console:
        values.note_demo(console, request.context, settings)
        for event in run(request, open_engine=values.open_engine, stdin=values.read_stdin):
            if isinstance(event, Review):
                found = event
            elif isinstance(event, Reviewing):
                more = f" and {len(event.paths) - 3} more" if len(event.paths) > 3 else ""
                console.note(
                    f"reviewing {', '.join(event.paths[:3])}{more} ({event.number} of {event.total}, "
                    f"{event.tokens:,} tokens)"
                )
            else:
                console.show(event)
        assert found is not None
        written = [(file, FORMATS[name](found)) for name, file in outputs]
        if write_baseline is not None:
            written.append((write_baseline, [baseline_bytes([*found.findings, *found.excess], known)]))
        failures = write_files(written)  # told at the end: a review that took hours is shown first
        console.note(
            f"reviewed in {found.seconds:.1f} s: {found.prompt_tokens:,} tokens read, "
            f"{found.restored_tokens:,} of them restored, {found.generated_tokens:,} written"
        )
    if form is FormatChoice.text:
        show_review(found, values.stdout_console())
    else:
        write_stdout(FORMATS[form.value](found))
    if failures:
        raise failures[0]
    if not found.complete:
        raise typer.Exit(ExitCode.CAP_REACHED)
    levels = SEVERITIES[SEVERITIES.index(settings.fail_on) :] if settings.fail_on != "never" else ()
    if any(finding.severity in levels for finding in found.findings):
        raise typer.Exit(ExitCode.FINDINGS)


def _output(text: str, formats: object) -> tuple[str, Path]:
    """`FORMAT=FILE`. Raises UsageError."""
    name, separator, file = text.partition("=")
    known = [str(each) for each in formats]  # type: ignore[attr-defined]
    if not separator or not file or name not in known:
        raise UsageError(
            f"--output {text} is not FORMAT=FILE.",
            f"Write sarif=review.sarif; formats are {', '.join(known)}.",
        )
    return name, Path(file)
