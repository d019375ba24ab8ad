"""Source → Document, or a Skip with its reason: size, binary, encoding, generated, lock files."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from m3cli.corpus.decoding import decode
from m3cli.corpus.extract import ExtractOptions, document_kind, extract, is_extracted, notebook_text
from m3cli.corpus.names import suffix_of
from m3cli.corpus.types import Document, Skip, SkipReason
from m3cli.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from m3cli.corpus.types import Source

_LOCK_FILES = frozenset(
    (
        *("package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "shrinkwrap.yaml"),
        *("bun.lock", "bun.lockb", "deno.lock", "poetry.lock", "uv.lock", "pdm.lock", "pipfile.lock"),
        *("pixi.lock", "pylock.toml", "conda-lock.yml", "cargo.lock", "go.sum", "go.work.sum", "gopkg.lock"),
        *("glide.lock", "composer.lock", "symfony.lock", "gemfile.lock", "gems.locked", "flake.lock"),
        *("packages.lock.json", "paket.lock", "mix.lock", "rebar.lock", "pubspec.lock", "podfile.lock"),
        *("package.resolved", "cartfile.resolved", "chart.lock", "requirements.lock", "gradle.lockfile"),
        *("stack.yaml.lock", "cabal.project.freeze", "renv.lock", "buf.lock", "module.bazel.lock"),
        *(".terraform.lock.hcl", "brewfile.lock.json"),
    )
)
_MINIFIED_NAME = re.compile(r".+[.-]min\.(js|mjs|cjs|css)", re.IGNORECASE)
_SOURCE_MAP_NAME = re.compile(r".+\.(js|mjs|cjs|jsx|ts|tsx|css)\.map", re.IGNORECASE)
_SOURCE_MAP_TEXT = re.compile(r'\s*\{[^{]{0,2000}?"(?:version|mappings)"\s*:')
_MINIFIABLE = frozenset(
    (".js", ".mjs", ".cjs", ".jsx", ".css", ".html", ".htm", ".json", ".geojson", ".svg", ".xml", ".map")
)
_MINIFIED_SIZE = 5_000  # characters; a short file on one line costs nothing
_MINIFIED_LINE = 500  # characters a line on average; written code has 20 to 60

_HEAD_BYTES = 8192
_MANY_BYTES = 50_000_000  # from here on, a file is read once more rather than be in memory for nothing
_PIECE = 1 << 20
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # of UTF-32 too
_HEAD_LINES = 20
_HEAD_CHARACTERS = 2_000
_COMMENT = re.compile(
    r"\s*(?://[/!]?|\#+!?|/\*+!?|\*+|--+\[*|;+|%+|<!--|\(\*+|\{-|'|\.\.|dnl|rem)\s+(?P<words>.+)", re.I
)
_GENERATED = re.compile(
    r"""
    @(?:auto)?generated(?![\w.(-])
    | (?:this|the)\s(?:file|code|module|source)\s(?:is|was)\s(?:automatically\s)?@(?:auto)?generated\b
    | (?:(?:this|the)\s)?(?:code|file|module|source(?:\scode)?)?[\s:]*(?:is\s|was\s|has\sbeen\s)?
      (?:auto(?:matically)?[\s-]?)?generated\b.*\bdo\snot\s(?:edit|modify|change)
    """,
    re.IGNORECASE | re.VERBOSE,
)

_AS_USUAL = ExtractOptions()
_MOST_WAITING = 256  # documents that are read while another one is
# What to say of a document that was named and has no text to give: (before the details, what to do).
_REFUSALS = {
    SkipReason.ENCRYPTED: ("it is encrypted, ", "Save it without protection"),
    SkipReason.NO_TEXT: ("it holds no text, ", "Recognise its text first, as ocrmypdf does"),
    SkipReason.BROKEN: ("it is broken, ", "Save it again with the program that it comes from"),
    SkipReason.TOO_LARGE: ("it is too large, ", "Split it"),
    SkipReason.UNREADABLE: ("it ", "Install the readers of documents with that command"),
}


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """The largest files to read, in bytes, None for any size.

    `max_bytes` is for files found in a directory, `explicit_max_bytes` for those named one by one.
    """

    max_bytes: int | None = 2_000_000
    explicit_max_bytes: int | None = None


def read_documents(
    sources: Iterable[Source], limits: DocumentLimits, options: ExtractOptions = _AS_USUAL
) -> Iterator[Document | Skip]:
    """Read every source, in order; see `read_document`.

    What may take a process of its own is read beside the others.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    waiting: deque[Document | Skip | Future[Document | Skip]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        for source in sources:
            if is_extracted(source.path, options):
                waiting.append(pool.submit(read_document, source, limits, options))
            else:
                waiting.append(read_document(source, limits, options))
            while waiting:
                first = waiting[0]
                if isinstance(first, Future):
                    if not first.done() and len(waiting) < _MOST_WAITING:
                        break
                    first = first.result()
                waiting.popleft()
                yield first
        for result in waiting:
            yield result.result() if isinstance(result, Future) else result
    finally:
        pool.shutdown(cancel_futures=True)


def read_document(
    source: Source, limits: DocumentLimits, options: ExtractOptions = _AS_USUAL
) -> Document | Skip:
    """Read and decode one source, once, and never more of it than its limit allows.

    Of PDF, Office and other documents the text is taken (see `m3cli.corpus.extract`); their
    encoding is the name of their kind. Line ends of plain text stay as they are. The rules about lock
    files and generated or minified files do not touch what the user named.
    Raises CorpusError when such a source cannot be read.
    """
    if not source.explicit and is_lock_file(source.path):
        return Skip(source.path, SkipReason.LOCK_FILE)
    if not source.explicit and (kind := generated_by_name(source.path)):
        return Skip(source.path, SkipReason.GENERATED, kind)
    limit = limits.explicit_max_bytes if source.explicit else limits.max_bytes
    data = _read(source, limit, options)
    if isinstance(data, Skip):
        return data
    if kind := document_kind(source.path, data[:_HEAD_BYTES], options):
        return _extracted(source, kind, data)
    first, second = decode(data)
    if isinstance(first, SkipReason):
        return Skip(source.path, first, second)
    if not first.strip():
        return Skip(source.path, SkipReason.EMPTY)
    if not source.explicit and (kind := generated_by_text(source.path, first)):
        return Skip(source.path, SkipReason.GENERATED, kind)
    return Document(source.path, notebook_text(source.path, first, options), second)


def _extracted(source: Source, kind: str, data: bytes) -> Document | Skip:
    text = extract(kind, data)
    if isinstance(text, str):
        return Document(source.path, text, kind)
    reason, words = text
    if source.explicit:
        problem, remedy = _REFUSALS[reason]
        raise CorpusError(
            f"{source.file or source.path} cannot be read: {problem}{words}.", f"{remedy}, or leave it out."
        )
    return Skip(source.path, reason, words)


def _read(source: Source, limit: int | None, options: ExtractOptions) -> bytes | Skip:
    if source.file is None:
        data = source.data or b""
        return data if limit is None or len(data) <= limit else _too_large(source, len(data), limit)
    # A file may have become a FIFO or a link since the walk saw it: do not wait, do not follow.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(source.file, flags if source.explicit else flags | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return _unreadable(source, SkipReason.SPECIAL, "not a regular file")
            if limit is not None and status.st_size > limit:
                return _too_large(source, status.st_size, limit)
            if limit is None:  # a disk image should not fill the memory before it is seen to be binary
                head = file.read(_HEAD_BYTES)
                first, kind = decode(head)
                if not document_kind(source.path, head, options):
                    if first is SkipReason.BINARY:
                        return Skip(source.path, first, kind)
                    looks_plain = b"\0" not in head and not head.startswith(_WIDE_MARKS)
                    if status.st_size > _MANY_BYTES and looks_plain and _holds_nul(file):
                        return Skip(source.path, SkipReason.BINARY, "NUL bytes")
                file.seek(0)
            data = file.read(status.st_size + 1)
            if len(data) > status.st_size:  # it grows
                data += file.read() if limit is None else file.read(limit + 1 - len(data))
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else None
        return _unreadable(source, SkipReason.UNREADABLE, words or str(error), error)
    if limit is not None and len(data) > limit:
        return _too_large(source, len(data), limit)
    return data


def _holds_nul(file: BinaryIO) -> bool:
    """Whether a file that begins as text goes on with NUL bytes, as a sparse one does; without keeping it."""
    return any(b"\0" in piece for piece in iter(lambda: file.read(_PIECE), b""))


def _unreadable(source: Source, reason: SkipReason, words: str, cause: Exception | None = None) -> Skip:
    if source.explicit:
        raise CorpusError(
            f"{source.file} cannot be read: {words}.", "Check its permissions, or leave it out."
        ) from cause
    return Skip(source.path, reason, words)


def _too_large(source: Source, size: int, limit: int) -> Skip:
    return Skip(source.path, SkipReason.TOO_LARGE, f"{size:,} bytes, the limit is {limit:,}")


def is_lock_file(path: str) -> bool:
    """Whether a package manager writes the file, by its name."""
    return path.rpartition("/")[2].lower() in _LOCK_FILES


def generated_by_name(path: str) -> str:
    """Tell what in its name shows that a program wrote the file; empty if nothing does."""
    name = path.rpartition("/")[2]
    if _MINIFIED_NAME.fullmatch(name):
        return "minified, by its name"
    return "source map" if _SOURCE_MAP_NAME.fullmatch(name) else ""


def generated_by_text(path: str, text: str) -> str:
    """Tell what shows that a program wrote this text; empty if nothing does."""
    suffix = suffix_of(path)
    if suffix == ".map" and '"mappings"' in text and _SOURCE_MAP_TEXT.match(text):
        return "source map"
    # Only a comment that begins with the marker speaks of its own file; one that mentions the
    # marker, or a string in code that holds it, speaks of others.
    head = text[:_HEAD_CHARACTERS]
    for line in head.splitlines()[:_HEAD_LINES] if "generated" in head.lower() else ():
        comment = _COMMENT.match(line)
        if comment and _GENERATED.match(comment["words"]):
            return f"says: {comment['words'].strip()[:80]}"
    if suffix in _MINIFIABLE and len(text) > _MINIFIED_SIZE:
        average = len(text) // (text.count("\n") + 1)
        if average > _MINIFIED_LINE:
            return f"minified: {average:,} characters a line"
    return ""
