"""`m3 cache list|rm|prune|path`."""

from __future__ import annotations

from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import UsageError

cache = typer.Typer(
    name="cache", help="What was computed of contexts and is kept for the next run.", no_args_is_help=True
)


@cache.command("list")
def list_entries(json: options.Json = False, debug: options.Debug = False) -> None:  # noqa: ARG001 - debug: see m3cli.cli.app
    """Show every saved context: size, age, model, and what it was made of.

    Example:  m3 cache list
    """
    from m3cli.report.cache import cache_object, cache_table
    from m3cli.report.output import write_json

    store = values.snapshots()
    if json:
        write_json(cache_object(store))
    else:
        values.stdout_console().print(cache_table(store))


@cache.command("rm")
def remove(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", show_default=False)] = None,
    all_entries: Annotated[bool, typer.Option("--all", help="Remove every saved context.")] = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Remove saved contexts by the beginning of their id, as `m3 cache list` shows it.

    Example:  m3 cache rm 3f9a12
    """
    if bool(ids) == all_entries:
        raise UsageError("Name what to remove, or --all.", "m3 cache list shows the ids.")
    store = values.snapshots()
    entries = store.entries()
    chosen = entries if all_entries else []
    for text in ids or []:
        found = [entry for entry in entries if entry.directory.name.startswith(text)]
        names = {entry.directory.name for entry in found}
        if len(names) != 1:
            raise UsageError(
                f"{'No saved context begins' if not names else f'{len(names)} saved contexts begin'} with "
                f"{text!r}.",
                "m3 cache list shows the ids.",
            )
        chosen += found
    for entry in chosen:
        store.remove(entry)


@cache.command("prune")
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep at most SIZE, such as 20G (default: the cache's limit)."),
    ] = None,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Remove the contexts used longest ago until the rest fits, and what killed runs have left.

    Example:  m3 cache prune --max-size 20G
    """
    from m3cli.report.text import amount, size, stderr_console

    removed = values.snapshots().prune(
        values.nbytes(max_size, "--max-size") if max_size is not None else None
    )
    total = sum(entry.nbytes for entry in removed)
    stderr_console().print(f"removed {amount(len(removed), 'saved context')}, {size(total)}")


@cache.command("path")
def path(debug: options.Debug = False) -> None:  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
    """Print the cache directory, which M3_CACHE_DIR can set.

    Example:  du -sh "$(m3 cache path)"
    """
    from m3cli.report.output import write_stdout
    from m3cli.settings import cache_dir

    write_stdout([f"{cache_dir()}\n".encode("utf-8", "surrogateescape")])
