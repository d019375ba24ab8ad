"""Putting documents into the order that was asked for: what each order needs to know is found out here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.history import Standings
from m3cli.corpus.imports import dependencies
from m3cli.corpus.names import printable
from m3cli.corpus.order import Order, State, by_argument, by_churn, by_dependency, by_relevance
from m3cli.corpus.search import score_documents
from m3cli.corpus.syntax import is_available
from m3cli.corpus.worktree import GitError
from m3cli.errors import MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from m3cli.corpus.types import Chunk, Source


def arranged(
    read: Mapping[str, Sequence[Chunk]],
    sources: Iterable[Source],
    wanted: Literal["auto"] | Order,
    question: str = "",
) -> tuple[list[str], Order, list[str]]:
    """The paths of the documents that were `read`, in path order, in the order that is `wanted`.

    With its name, and notes. Raises UsageError and MachineError for what an order lacks.
    """
    paths = list(read)
    if wanted == "path" or (wanted == "auto" and len(paths) < 2):
        return paths, "path", []
    if wanted == "dependency":
        if not is_available():
            raise MachineError(
                "The order of dependencies needs parsers that are not installed.",
                "Install them: pip install 'm3cli[code]'.",
            )
        # Imports name the directory that was named, if that is a package.
        root = _root_name(sources)
        texts = {root + path: "".join(chunk.text for chunk in chunks) for path, chunks in read.items()}
        return [paths[i] for i in by_dependency(list(texts), dependencies(texts))], wanted, []
    if wanted == "relevance":
        if not question.strip():
            raise UsageError(
                "The order of relevance needs a question.",
                "Ask one (m3 pack: --query), or choose another order.",
            )
        scores = score_documents([chunk for chunks in read.values() for chunk in chunks], question)
        return [paths[i] for i in by_relevance([scores[path] for path in paths])], wanted, []
    by_path = {source.path: source for source in sources}
    found = [by_path[path] for path in paths]
    if wanted == "given":
        return [paths[i] for i in by_argument([source.argument for source in found])], wanted, []
    return _by_churn(paths, found, may_not=wanted == "auto")


def _root_name(sources: Iterable[Source]) -> str:
    """The name of the directory that all paths are relative to, with a slash; empty if there is none."""
    for source in sources:
        if source.file is not None and str(source.file).endswith(f"/{source.path}"):
            return Path(str(source.file)[: -len(source.path) - 1]).name + "/"
    return ""


def _by_churn(
    paths: list[str], found: Sequence[Source], *, may_not: bool
) -> tuple[list[str], Order, list[str]]:
    """By churn, or by path if nothing is known of it; also if `may_not` and not all of it is known."""
    standings = Standings()
    try:
        known = standings.of(found)
    except GitError as error:
        return paths, "path", [f"The files stand in path order, not by churn: {printable(str(error))}."]
    notes = [printable(note) for note in standings.notes]
    outside = sum(standing.state is State.OUTSIDE for standing in known)
    if outside and may_not:
        return paths, "path", []
    if outside:
        notes.append(f"{outside} of {len(paths)} files are in no git work tree; their churn is unknown.")
    if not any(standing.state is State.COMMITTED or standing.touches for standing in known):
        return paths, "path", notes  # nothing is known of any of them
    return [paths[i] for i in by_churn(known)], "churn", notes
