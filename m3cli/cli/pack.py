"""`m3 pack`."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli import options, values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.memo import Memo
    from m3cli.model.tokens import Tokenizer
    from m3cli.settings import Settings


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
    from m3cli.report.output import write_file, write_stdout
    from m3cli.report.pack_console import show_pack
    from m3cli.tasks.pack import PackRequest
    from m3cli.tasks.pack import pack as run

    settings = values.settings(locals())
    corpus = values.corpus_request(
        paths or [],
        settings,
        files_from=files_from,
        null=null,
        no_ignore=no_ignore,
        # The same bytes on every machine, unless another order was asked for: history is local.
        order="path" if order is None else settings.order,
        ref=ref,
        output=output,
    )
    with _tokenizer(settings) as (tokenizer, name, memo):
        request = PackRequest(corpus, format.value, budget, query, tokenizer, name, redact, memo)
        result = run(request, stdin=values.read_stdin)
    data = (part.encode("utf-8", "replace") for part in result.pack.parts)
    if output is None or str(output) == "-":
        write_stdout(data)
    else:
        write_file(output, data)
    if not quiet:
        show_pack(result, tree=tree, verbose=verbose)


@contextmanager
def _tokenizer(settings: Settings) -> Iterator[tuple[Tokenizer | None, str, Memo | None]]:
    """The tokenizer and name of the model that is set up, None without even the demo model; the memo."""
    from m3cli.memo import Memo
    from m3cli.model.catalog import demo_model, resolve
    from m3cli.settings import cache_dir
    from m3cli.tasks.model import open_model

    memo = Memo(cache_dir() / "memo.sqlite") if settings.cache else None
    with ExitStack() as stack:
        if memo is not None:
            stack.callback(memo.close)
        if settings.model is None and demo_model() is None:
            yield None, "", memo
            return
        opened = stack.enter_context(open_model(resolve(settings.model, settings.models), memo))
        yield opened.tokenizer, "the demo model" if opened.ref.origin == "demo" else opened.ref.name, memo
