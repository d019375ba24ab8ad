"""From what the user pointed at to all of its chunks: the stages of this room in one call."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.arrange import arranged
from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.documents import DocumentLimits, read_documents
from m3cli.corpus.extract import ExtractOptions
from m3cli.corpus.repositories import git_sections, with_clones
from m3cli.corpus.revision import with_data
from m3cli.corpus.sources import WalkOptions, collect
from m3cli.corpus.types import Skip, SkipReason, skip_counts
from m3cli.errors import CorpusError, MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from m3cli.corpus.order import Order
    from m3cli.corpus.types import Chunk, Document, Source


@dataclass(frozen=True, slots=True)
class CorpusRequest:
    """What to read: paths as the user typed them, and the rules for directories among them.

    `listed` paths come from a list that a program wrote, such as `git ls-files`: what is missing
    among them, or a link out of the current directory, is left out with a reason. `outputs` are
    files that are about to be written from this corpus, and so are never part of it.

    `strip_comments` leaves comments out of source code, `compress` the bodies of functions.
    `ref` names a commit, at which everything but standard input is read instead of on the disk.
    `order` is explained in `m3cli.corpus.order`; `auto` is churn if all files are in git work trees,
    else path; relevance is that for `question`. At the end stand, if asked for, the changes of each
    work tree since the commit `diff`, and its last `log` commits. A path may be the URL of a remote
    repository, which is then cloned for the time of reading, at `ref`.
    """

    paths: tuple[str, ...]
    walk: WalkOptions = field(default_factory=WalkOptions)
    limits: DocumentLimits = field(default_factory=DocumentLimits)
    extract: ExtractOptions = field(default_factory=ExtractOptions)
    listed: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    ref: str | None = None
    order: Literal["auto"] | Order = "path"
    question: str = ""
    compress: bool = False
    strip_comments: bool = False
    diff: str | None = None
    log: int = 0

    @property
    def label(self) -> str:
        """What people know this corpus by: the paths that were named."""
        paths = [*self.paths, *self.listed]
        # Links keep the names that the user gave them.
        named = ["standard input" if path == "-" else os.path.abspath(path) for path in paths[:3]]  # noqa: PTH100
        return ", ".join(named) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The chunks of all documents in `order`, and every path that was seen and left out.

    `paths` are those of the documents. Their texts are in the chunks alone, so that a large corpus is in
    memory once.
    """

    paths: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    order: Order = "path"


def read_corpus(request: CorpusRequest, stdin: Callable[[], bytes], cwd: Path | None = None) -> Corpus:
    """Read, decode and chunk everything that `request` names.

    Raises UsageError for a path or commit that does not exist, CorpusError for one that cannot be
    read or when no text is found at all.
    """
    return CorpusReading(request, stdin, cwd).corpus


class CorpusReading:
    """A corpus that is read when it is needed, once. Raises what `read_corpus` does."""

    def __init__(self, request: CorpusRequest, stdin: Callable[[], bytes], cwd: Path | None = None) -> None:
        self._request = request
        self._stdin = stdin
        self._cwd = cwd
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """All of it."""
        if self._corpus is None:
            for _ in self.chunks():
                pass
        assert self._corpus is not None
        return self._corpus

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order, each as soon as its place is known."""
        if self._corpus is not None:
            yield from self._corpus.chunks
            return
        with ExitStack() as stack:
            yield from self._read(with_clones(self._request, stack))

    def _read(self, request: CorpusRequest) -> Iterator[Chunk]:
        cwd = self._cwd or _current_directory()
        collected = collect(
            request.paths,
            request.walk,
            listed=request.listed,
            stdin=self._stdin,
            cwd=cwd,
            ref=request.ref,
        )
        outputs = {output.resolve() for output in request.outputs}
        wanted = [source for source in collected.sources if not _is_among(source, outputs)]
        sources, too_large = _within_limits(wanted, request.limits)
        # 1. the files
        unread: list[Skip] = []
        read: dict[str, list[Chunk]] = {}
        for result in self._documents(sources):
            if isinstance(result, Skip):
                unread.append(result)
                continue
            read[result.path] = chunk_document(result)
            if request.order == "path":
                yield from read[result.path]
        skips = (*collected.skips, *too_large, *unread)
        if not read:
            raise CorpusError(
                f"There is no text to read in {_named((*request.paths, *request.listed))}{_why(skips)}.",
                _remedy(skips),
            )
        paths, order, notes = arranged(read, sources, request.order, request.question)
        if request.order != "path":
            for path in paths:
                yield from read[path]
        # 2. what git says of them, which changes most
        for document in git_sections(request, cwd, read):
            read[document.path] = chunk_document(document)
            paths.append(document.path)
            yield from read[document.path]
        chunks = tuple(chunk for path in paths for chunk in read[path])
        self._corpus = Corpus(tuple(paths), chunks, skips, (*collected.notes, *notes), order)

    def _documents(self, sources: Iterable[Source]) -> Iterator[Document | Skip]:
        results = read_documents(with_data(sources), self._request.limits, self._request.extract)
        if self._request.compress or self._request.strip_comments:
            return _reduced(results, self._request)
        return results


def _current_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise UsageError(
            "The current directory does not exist any more.", "Change to another one."
        ) from error


def _reduced(results: Iterable[Document | Skip], request: CorpusRequest) -> Iterator[Document | Skip]:
    """The documents without comments and bodies, as far as they are not wanted. Raises MachineError."""
    from concurrent.futures import ThreadPoolExecutor

    from m3cli.corpus.reduce import compress, strip_comments
    from m3cli.corpus.syntax import is_available

    if not is_available():
        raise MachineError(
            "--compress and --strip-comments need parsers that are not installed.",
            "Install them: pip install 'm3cli[code]'.",
        )

    def reduce(result: Document | Skip) -> Document | Skip:
        if isinstance(result, Skip):
            return result
        document = strip_comments(result) if request.strip_comments else result
        document = compress(document) if request.compress else document
        return document if document.text.strip() else Skip(result.path, SkipReason.EMPTY, "only comments")

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(reduce, results)


def _is_among(source: Source, files: Collection[Path]) -> bool:
    """Whether the source would be read from one of `files`, which are without links."""
    if source.blob is not None:
        return Path(os.fsdecode(source.blob.top), os.fsdecode(source.blob.path)) in files
    # A walk follows no links; what the user named may be one.
    if source.file is None or not (source.explicit or any(source.file.name == file.name for file in files)):
        return False
    return source.file.resolve() in files


def _within_limits(sources: Iterable[Source], limits: DocumentLimits) -> tuple[list[Source], list[Skip]]:
    """Leave out files of a commit that are too large, before they are in memory."""
    kept: list[Source] = []
    skips: list[Skip] = []
    for source in sources:
        limit = limits.explicit_max_bytes if source.explicit else limits.max_bytes
        if source.blob is None or limit is None or source.blob.size <= limit:
            kept.append(source)
        else:
            words = f"{source.blob.size:,} bytes, the limit is {limit:,}"
            skips.append(Skip(source.path, SkipReason.TOO_LARGE, words))
    return kept, skips


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
