"""`m3 pack`."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.prompt.pack import Pack
    from m3cli.prompt.template import Template
    from m3cli.tasks.pack import PackResult


class FormatChoice(str, Enum):
    """`--format`."""

    xml = "xml"
    markdown = "markdown"
    json = "json"
    plain = "plain"


def pack(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH...", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write to a file, not to stdout.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    format: Annotated[  # noqa: A002 - the option's name
        FormatChoice,
        typer.Option(
            "--format", "-f", help="How files are written down.", rich_help_panel=options.OUTPUT_PANEL
        ),
    ] = FormatChoice.xml,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="At most N tokens; the rest is left out, and counted.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    query: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Over the budget, keep what matches TEXT best.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = "",
    split_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Write several files of at most N tokens each: FILE-1, FILE-2, ….",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    line_numbers: Annotated[
        bool,
        typer.Option(
            "--line-numbers",
            help="Put its number in front of each line.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    diff: options.Diff = False,
    base: options.Base = None,
    log: options.Log = 0,
    compress: options.Compress = False,
    strip_comments: options.StripComments = False,
    template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write in the form of a Jinja template (files, tree, omitted, query).",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Put it on the clipboard, not on stdout.", rich_help_panel=options.OUTPUT_PANEL
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write an HTML page that shows where the tokens are, and what was left out.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    tree: Annotated[
        bool,
        typer.Option(
            "--tree", help="Show tokens by directory on stderr.", rich_help_panel=options.OUTPUT_PANEL
        ),
    ] = False,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact/--no-redact",
            help="Replace passwords, keys and tokens, as detect-secrets finds them.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = True,
    model: options.Model = None,
    ref: options.Ref = None,
    order: options.Order = None,
    files_from: options.FilesFrom = None,
    null: options.Nul = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    no_ignore: options.NoIgnore = False,
    hidden: options.Hidden = None,
    html_text: options.HTMLText = None,
    notebook_outputs: options.NotebookOutputs = None,
    max_file_size: options.MaxFileSize = None,
    cache: options.Cache = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write files and directories as one text that a model can read; no model is run.

    Example:  m3 pack ./repo --budget 100000 --query "retry logic" -o repo.xml
    """
    from m3cli.report.pack_console import show_pack
    from m3cli.settings import cache_dir
    from m3cli.tasks.pack import PackRequest, counter
    from m3cli.tasks.pack import pack as run

    settings = values.settings(locals())
    target = _Target(None if output is None or str(output) == "-" else output, split_tokens, copy, report)
    corpus = values.corpus_request(
        paths or [],
        settings,
        files_from=files_from,
        null=null,
        no_ignore=no_ignore,
        # The same bytes on every machine, unless another order was asked for: history is local.
        order="path" if order is None else settings.order,
        ref=ref,
        outputs=target.files(),
        question=query,
        compress=compress,
        strip_comments=strip_comments,
        diff=base or ("HEAD" if diff else None),
        log=log,
    )
    kept = cache_dir() if settings.cache else None
    with counter(settings.model, settings.models, kept) as (tokenizer, name, memo):
        request = PackRequest(
            corpus=corpus,
            format=format.value,
            budget=budget,
            query=query,
            tokenizer=tokenizer,
            counted_by=name,
            redact=redact,
            memo=memo,
            line_numbers=line_numbers,
            template=_template(template) if template is not None else None,
            split_tokens=split_tokens,
        )
        result = run(request, stdin=values.read_stdin)
    target.write(result, title=_title(paths or []), budget=budget)
    if not quiet:
        show_pack(result, tree=tree, verbose=verbose)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a pack goes."""

    output: Path | None
    split_tokens: int | None
    copy: bool
    report: Path | None

    def __post_init__(self) -> None:
        if self.split_tokens is not None and self.output is None:
            raise UsageError("--split-tokens writes several files.", "Name them with --output FILE.")

    def files(self) -> tuple[Path, ...]:
        """All files that will be written, and those of an earlier run: none of them is part of the pack."""
        files = [file for file in (self.output, self.report) if file is not None]
        if self.split_tokens is not None and self.output is not None:
            name = re.compile(rf"{re.escape(self.output.stem)}-[0-9]+{re.escape(self.output.suffix)}")
            with suppress(OSError):
                files += [file for file in self.output.parent.iterdir() if name.fullmatch(file.name)]
        return tuple(files)

    def write(self, result: PackResult, *, title: str, budget: int | None) -> None:
        """Raises MachineError, naming the file that could not be written."""
        from m3cli.report.output import copy_text, write_file, write_stdout

        def encoded(pack: Pack) -> Iterator[bytes]:
            return (part.encode("utf-8", "replace") for part in pack.parts)

        if self.output is None and not self.copy:
            write_stdout(encoded(result.pack))
        elif self.output is not None and not result.split:
            write_file(self.output, encoded(result.pack))
        elif self.output is not None:
            for number, pack in enumerate(result.split, 1):
                name = f"{self.output.stem}-{number}{self.output.suffix}"
                write_file(self.output.with_name(name), encoded(pack))
        if self.copy:
            copy_text(result.text)
        if self.report is not None:
            from m3cli.report.pack_html import render

            write_file(self.report, [render(result, title=title, budget=budget).encode()])


def _title(paths: list[str]) -> str:
    named = ["standard input" if path == "-" else Path(path).absolute().name or path for path in paths[:3]]
    return ", ".join(named) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _template(file: Path) -> Template:
    from m3cli.prompt.template import Template

    try:
        source = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"The template {file} cannot be read: {words}.", "Name a readable file.") from error
    return Template(source, str(file))
