"""From what the user pointed at to all of its chunks: the stages of this room in one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.documents import DocumentLimits, read_documents
from m3cli.corpus.sources import WalkOptions, collect
from m3cli.corpus.types import skip_counts
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.corpus.types import Chunk, Document, Skip, Source


@dataclass(frozen=True, slots=True)
class CorpusRequest:
    """What to read: paths as the user typed them, and the rules for directories among them.

    `listed` paths come from a list that a program wrote, such as `git ls-files`: what is missing
    among them, or a link out of the current directory, is left out with a reason. `output` is a file
    that is about to be written from this corpus, and so is never part of it.
    """

    paths: tuple[str, ...]
    walk: WalkOptions = field(default_factory=WalkOptions)
    limits: DocumentLimits = field(default_factory=DocumentLimits)
    listed: tuple[str, ...] = ()
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in corpus order with their chunks, and every path that was seen and left out."""

    documents: tuple[Document, ...]
    chunks: tuple[Chunk, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]


def read_corpus(request: CorpusRequest, stdin: Callable[[], bytes], cwd: Path | None = None) -> Corpus:
    """Read, decode and chunk everything that `request` names.

    Raises UsageError for a path that does not exist, CorpusError for one that cannot be read or
    when no text is found at all.
    """
    try:
        here = cwd or Path.cwd()
    except FileNotFoundError as error:
        raise UsageError(
            "The current directory does not exist any more.", "Change to another one."
        ) from error
    collected = collect(request.paths, request.walk, listed=request.listed, stdin=stdin, cwd=here)
    sources = [source for source in collected.sources if not _is_file(source, request.output)]
    documents, unread = read_documents(sources, request.limits)
    skips = (*collected.skips, *unread)
    if not documents:
        raise CorpusError(
            f"There is no text to read in {_named((*request.paths, *request.listed))}{_why(skips)}.",
            _remedy(skips),
        )
    chunks = tuple(chunk for document in documents for chunk in chunk_document(document))
    return Corpus(tuple(documents), chunks, skips, collected.notes)


def _is_file(source: Source, file: Path | None) -> bool:
    return file is not None and source.file is not None and source.file.resolve() == file.resolve()


def _named(paths: Sequence[str]) -> str:
    names = ["standard input" if path == "-" else path for path in paths[:3]]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(names) + more


def _why(skips: Sequence[Skip]) -> str:
    return "".join(
        [": left out were ", ", ".join(f"{count} {reason}" for reason, count in skip_counts(skips).items())]
        if skips
        else []
    )


def _remedy(skips: Sequence[Skip]) -> str:
    if not skips:
        return "Name a directory or file that holds text."
    return "See which with `m3 pack --verbose`; --no-ignore, --hidden and --max-file-size let more in."
