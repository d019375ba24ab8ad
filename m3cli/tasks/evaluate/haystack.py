"""What haystacks are made of: the user's own files, or what ships with Python."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Document
from m3cli.errors import CorpusError
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.evaluate.trial import Material

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.prompt.pack import CountBatch

PYTHON = f"the library of Python {sys.version_info[0]}.{sys.version_info[1]}"

# Directories of the library that hold tests, tables, or what others have installed.
_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "pydoc_data")
)
_TOKEN_BYTES = 6  # of text, at most, on average


def own_material(chunks: Sequence[Chunk], label: str, longest: int, count: CountBatch) -> Material:
    """Material from the user's corpus; Python's library follows where it is shorter than `longest` tokens.

    Raises CorpusError where that has to be and is not there.
    """
    text = "".join(chunk.text for chunk in chunks)
    missing = longest - pack_chunks(chunks, count).tokens
    if missing <= 0:
        return Material(text, tuple(chunks), label, own=True)
    more = python_material(missing)
    return Material(text, (*chunks, *more.chunks), f"{label}, and then {more.label}", own=True)


def python_material(longest: int) -> Material:
    """Material for `longest` tokens: prose from Python's documentation, and its library's sources.

    Raises CorpusError where this Python has no sources.
    """
    wanted = longest * _TOKEN_BYTES
    chunks: list[Chunk] = []
    size = 0
    for document in _sources():
        chunks += chunk_document(document)
        size += len(document.text)
        if size >= wanted:
            break
    if not chunks:
        raise CorpusError(
            "This Python has no sources of its library to make long texts of.",
            "Name files or directories to take instead: m3 eval PATH...",
        )
    text = _documentation()
    if len(text) < wanted:
        text += "\n\n".join(chunk.text for chunk in chunks)
    return Material(text, tuple(chunks), PYTHON, own=False)


def _documentation() -> str:
    """The chapters that `help()` shows, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return ""
    return "\n\n".join(topics[name] for name in sorted(topics))


def _sources() -> Iterator[Document]:
    """The library's modules in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.parts):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Document(f"python-library/{relative.as_posix()}", text, "utf-8")
