"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.settings import Settings

CORPUS_PANEL = "What is read"
MODEL_PANEL = "Model"
OUTPUT_PANEL = "Output"

FilesFrom = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-",
        help="Read more paths from a file or stdin, one a line.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Nul = Annotated[
    bool,
    typer.Option(
        "-0", "--null", help="Paths of --files-from end in NUL bytes.", rich_help_panel=CORPUS_PANEL
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Read only files that match; repeatable.", rich_help_panel=CORPUS_PANEL
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Leave out files that match; repeatable.", rich_help_panel=CORPUS_PANEL
    ),
]
NoIgnore = Annotated[
    bool,
    typer.Option(
        "--no-ignore", help="Read ignored files (.gitignore, .m3ignore) too.", rich_help_panel=CORPUS_PANEL
    ),
]
Hidden = Annotated[
    bool | None,
    typer.Option(
        "--hidden/--no-hidden", help="Read files whose names begin with a dot.", rich_help_panel=CORPUS_PANEL
    ),
]
MaxFileSize = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES", min=1, help="Skip larger files (default 2000000).", rich_help_panel=CORPUS_PANEL
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FILE|NAME",
        help="A GGUF file or a name of `m3 model list`.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="List everything left out.", rich_help_panel=OUTPUT_PANEL)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", rich_help_panel=OUTPUT_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT_PANEL)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT_PANEL)]


class StrategyChoice(str, Enum):
    """`--strategy`."""

    auto = "auto"
    whole = "whole"
    select = "select"


class ThinkChoice(str, Enum):
    """`--think`."""

    off = "off"
    on = "on"
    adaptive = "adaptive"


class KVTypeChoice(str, Enum):
    """`--kv-type`."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class SwitchChoice(str, Enum):
    """`--flash-attention`."""

    auto = "auto"
    on = "on"
    off = "off"


def stdout_console() -> Console:
    """Tables on standard output; not cut at 80 columns when that is a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def read_stdin() -> bytes:
    """All of standard input. Raises UsageError when it is closed."""
    if sys.stdin is None:
        raise UsageError("Standard input is closed.", "Pipe or redirect something into m3.")
    return sys.stdin.buffer.read()


def corpus_request(
    paths: list[str],
    settings: Settings,
    *,
    files_from: str | None,
    null: bool,
    no_ignore: bool,
    output: Path | None = None,
) -> CorpusRequest:
    """What to read. Raises UsageError if nothing is named or the path list cannot be read."""
    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.corpus.documents import DocumentLimits
    from m3cli.corpus.sources import WalkOptions, read_path_list

    listed: list[str] = []
    if files_from is not None:
        if files_from == "-" and "-" in paths:
            raise UsageError(
                "Standard input cannot be both the list of paths and a document.",
                "Put the list into a file and name that with --files-from.",
            )
        try:
            data = read_stdin() if files_from == "-" else Path(files_from).read_bytes()
        except OSError as error:
            raise UsageError(
                f"The path list {files_from} cannot be read: {error.strerror}.",
                "Name a readable file, or - for stdin.",
            ) from error
        listed = read_path_list(data, nul=null)
    if not paths and not listed:
        raise UsageError("There is nothing to read.", "Name a directory, a file, or - for standard input.")
    given_limit = settings.max_file_size if settings.origins.get("max_file_size") else None
    return CorpusRequest(
        paths=tuple(paths),
        listed=tuple(listed),
        walk=WalkOptions(
            include=settings.include,
            exclude=settings.exclude,
            use_ignore_files=not no_ignore,
            hidden=settings.hidden,
        ),
        limits=DocumentLimits(max_bytes=settings.max_file_size, explicit_max_bytes=given_limit),
        output=output,
    )
