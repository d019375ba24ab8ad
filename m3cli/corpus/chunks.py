"""Document → Chunk spans: lossless runs of whole lines, cut where a reader would pause."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from m3cli.corpus.types import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.corpus.types import Document

TARGET_TOKENS = 512
# UTF-8 bytes that a token of source code or prose takes, about: the corpus knows nothing of models, so
# the target is kept in bytes. (Tables of numbers take more tokens.)
BYTES_PER_TOKEN = 4

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_OPENS_BLOCK = re.compile(r"[\w@#/*\[<\"'(%$&\\-]")


def chunk_document(document: Document, target_tokens: int = TARGET_TOKENS) -> list[Chunk]:
    """Cut `document` into chunks of at most about `target_tokens` tokens.

    The texts of the chunks joined are the document's text. A chunk ends before a top-level line
    that follows a blank one where there is such a line in its second half, else at the shallowest
    indentation there; a line that is longer than a chunk is cut, preferably at a space.
    """
    limit = target_tokens * BYTES_PER_TOKEN
    chunks: list[Chunk] = []
    lines: list[str] = []
    sizes: list[int] = []
    first = 1  # number of lines[0]
    total = 0

    def emit(count: int) -> None:
        nonlocal first, total
        chunks.append(_chunk(document.path, first, first + count - 1, "".join(lines[:count])))
        first += count
        total -= sum(sizes[:count])
        del lines[:count], sizes[:count]

    for line in _LINE.findall(document.text):
        size = len(line.encode("utf-8", "surrogatepass"))
        while lines and total + size > limit:
            emit(_best_cut(lines, line))
        if size > limit:
            chunks.extend(_chunk(document.path, first, first, part) for part in _cut_line(line, limit))
            first += 1
        else:
            lines.append(line)
            sizes.append(size)
            total += size
    if lines:
        emit(len(lines))
    return chunks


def _chunk(path: str, start: int, end: int, text: str) -> Chunk:
    return Chunk(path, start, end, text, text_digest(text))


def text_digest(text: str) -> str:
    """A chunk's digest: of its content, not of its place."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _best_cut(lines: list[str], following: str) -> int:
    """How many of `lines` the chunk takes, `following` being the line that no longer fits."""
    half = max(1, len(lines) // 2)
    candidates = range(half, len(lines) + 1)
    starts = [*lines, following]
    return max(candidates, key=lambda i: (_cut_quality(starts[i - 1], starts[i]), i))


def _cut_quality(before: str, after: str) -> int:
    """How natural a cut between two lines is; more is better."""
    stripped = after.lstrip(" \t")
    indent = len(after) - len(stripped)
    blank_before = not before.strip()
    if blank_before and indent == 0 and _OPENS_BLOCK.match(stripped):
        return 1000
    if not stripped.strip():
        return 0
    return (500 if blank_before else 100) - min(indent, 99)


def _cut_line(line: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` UTF-8 bytes, the text of which joined is `line`."""
    step = max(1, limit // 4)  # a character is at most 4 bytes
    start = 0
    while start < len(line):
        end = min(start + step, len(line))
        # widen: most lines are ASCII, where a character is one byte
        if line[start : start + limit].isascii():
            end = min(start + limit, len(line))
        if end < len(line):
            space = line.rfind(" ", start + (end - start) // 2, end)
            end = space + 1 if space >= 0 else end
        yield line[start:end]
        start = end
