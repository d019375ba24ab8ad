"""Document → the same document with fewer lines: without bodies of functions, without comments.

Every line that stays keeps its number, so that a citation still points at the file. What has no
grammar, or does not parse, stays whole.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from m3cli.corpus.languages import language_of
from m3cli.corpus.syntax import ask

if TYPE_CHECKING:
    from m3cli.corpus.types import Document

GAP = "⋮"  # the line that stands for a run of lines left out; its number is 0

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def compress(document: Document) -> Document:
    """Leave out the bodies of functions: a GAP stands for each.

    All else stays as it is: imports, signatures with their decorators, types and their fields,
    constants, docstrings, comments between definitions, and statements outside of functions. So do
    the brackets of a body, which keeps the rest readable to a parser.
    """
    if document.numbers and 0 in document.numbers:  # it was done already
        return document
    lines = _numbered_lines(document)
    language = language_of(document.path, document.text)
    spans: list[tuple[int, int]] | None = ask("bodies", language, document.text) if language else None
    kept: list[tuple[str, int]] = []
    row = 0
    for first, last in spans or ():
        if any(line.strip() for line, _ in lines[first : last + 1]):
            kept.extend(lines[row:first])
            kept.append((GAP + _line_end(lines[last][0]), 0))
            row = last + 1
    return _of_lines(document, kept + lines[row:]) if kept else document


def strip_comments(document: Document) -> Document:
    """Leave out comments, documentation and licences among them, and the lines that only they are on.

    Docstrings are no comments, and neither is a first line that names an interpreter. Where a comment
    holds two tokens apart, a blank does then. A few stay, see `outline.without_comments`.
    """
    lines = _numbered_lines(document)
    language = language_of(document.path, document.text)
    changes: list[tuple[int, str | None]] | None
    changes = ask("comments", language, _code(lines)) if language else None
    if not changes:
        return document
    changed = dict(changes)
    kept = []
    for row, (old, number) in enumerate(lines):
        line = changed.get(row, old)
        if line is not None:
            kept.append((line, number))
    return _of_lines(document, kept)


def _numbered_lines(document: Document) -> list[tuple[str, int]]:
    lines = _LINE.findall(document.text)
    return list(zip(lines, document.numbers or range(1, len(lines) + 1), strict=True))


def _code(lines: list[tuple[str, int]]) -> str:
    """Give the text without its gaps, which no language knows, line for line."""
    return "".join(line if number else _line_end(line) for line, number in lines)


def _line_end(line: str) -> str:
    return line[len(line.rstrip("\r\n")) :] if line.endswith("\n") else ""


def _of_lines(document: Document, lines: list[tuple[str, int]]) -> Document:
    return replace(
        document, text="".join(line for line, _ in lines), numbers=tuple(number for _, number in lines)
    )
