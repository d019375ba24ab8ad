"""Document → Chunk spans: lossless runs of whole lines, cut where a reader would pause."""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from itertools import groupby
from typing import TYPE_CHECKING

from m3cli.corpus.types import Chunk, Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TARGET_TOKENS = 512
# UTF-8 bytes that a token of source code or prose takes, about: the corpus knows nothing of models, so
# the target is kept in bytes. (Tables of numbers take more tokens.)
BYTES_PER_TOKEN = 4

# A blank line, and in front of what it stands: what opens a block at the margin, or an indentation.
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n(?=([\w@#/*\[<\"'(%$&\\\x80-\xff-])|([ \t]*)\S)")
_LONGEST_INDENT = 256
_LINE_END = re.compile(rb"\n")
_INDENT = re.compile(rb"[ \t]*(?=\S)")


def chunk_document(
    document: Document, target_tokens: int = TARGET_TOKENS, definitions: Mapping[int, int] | None = None
) -> list[Chunk]:
    """Cut `document` into chunks of at most about `target_tokens` tokens.

    The texts of the chunks joined are the document's text. A chunk ends, in its second half, before the
    outermost of the `definitions` (depth by line, counted from 1), else before a line at the margin that
    follows a blank one, else at the shallowest indentation. A line that is longer than a chunk is cut,
    preferably at a space.
    """
    text = document.text
    limit = max(4, target_tokens * BYTES_PER_TOKEN)
    is_ascii = text.isascii()  # then characters are bytes
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= limit:
        cuts = [len(data)] if data else []
    else:
        cuts = list(_cuts(data, limit, _starts(data, definitions) if definitions else {}))
    chunks = []
    start, line = 0, 1
    for cut in cuts:
        part = text[start:cut] if is_ascii else data[start:cut].decode("utf-8", "surrogatepass")
        ended = data.count(b"\n", start, cut)
        last = line + ended - (data[cut - 1] == 0x0A)
        chunks.append(_chunk(document, part, line, last))
        start, line = cut, line + ended
    return chunks


def refine(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """All chunks of a corpus, cut anew so that they end between definitions; the joined texts stay.

    That takes parsing, in as many processes as there are cores, so it is done only where the edges of
    chunks are seen.
    """
    from concurrent.futures import ThreadPoolExecutor

    documents = [list(group) for _, group in groupby(chunks, key=lambda chunk: chunk.path)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for refined in pool.map(_refined, documents):
            yield from refined


def _refined(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks of one document, cut anew if that changes anything."""
    from m3cli.corpus.syntax import definition_lines

    if len(chunks) == 1 or chunks[0].numbers is not None:
        return chunks
    document = Document(chunks[0].path, "".join(chunk.text for chunk in chunks), "")
    definitions = definition_lines(document.path, document.text)
    return chunk_document(document, definitions=definitions) if definitions else chunks


def _chunk(document: Document, text: str, first: int, last: int) -> Chunk:
    if document.numbers is None:
        return Chunk(document.path, first, last, text)
    numbers = document.numbers[first - 1 : last]
    known = [number for number in numbers if number] or [0]
    return Chunk(document.path, known[0], known[-1], text, numbers)


def _starts(data: bytes, definitions: Mapping[int, int]) -> dict[int, int]:
    """The depth of each definition by the offset at which its line begins."""
    starts = [0, *(match.end() for match in _LINE_END.finditer(data))]
    return {starts[line - 1]: depth for line, depth in definitions.items() if line <= len(starts)}


def _cuts(data: bytes, limit: int, definitions: Mapping[int, int]) -> Iterator[int]:
    """The offsets at which chunks of `data` end."""
    outer = sorted(definitions)
    start = 0
    while len(data) - start > limit:
        end = start + limit
        last = data.rfind(b"\n", start, end) + 1  # where the last line that begins in reach begins
        if last <= start:
            # 1. a line that is longer than a chunk is cut by itself
            line_end = data.find(b"\n", end) + 1 or len(data)
            yield from _line_cuts(data, start, line_end, limit)
            start = line_end
            continue
        half = start + limit // 2
        # 2. before the outermost definition, the last of several
        reach = outer[bisect_left(outer, half) : bisect_right(outer, end)]
        if reach:
            start = min(reversed(reach), key=definitions.__getitem__)
        else:
            # 3. after a blank line, else where a cut hurts least
            start = _best_paragraph(data, half, end) or _best_line(data, half, last)
        yield start
    if start < len(data):
        yield len(data)


def _best_paragraph(data: bytes, half: int, end: int) -> int:
    """Where the least indented line after a blank one begins, the last of several; 0 if there is none."""
    best = (_LONGEST_INDENT, 0)
    for match in _BLANK_LINE.finditer(data, half - 2, end + _LONGEST_INDENT):
        indent = 0 if match[1] else 1 + len(match[2])
        if indent <= best[0] and half <= match.end() <= end:
            best = indent, match.end()
    return best[1]


def _best_line(data: bytes, half: int, last: int) -> int:
    """Where the least indented line begins, of those from `half` up to `last`, the last of several."""
    start = last
    while start >= half:
        if data[start] not in b" \t\r\n":
            return start
        start = data.rfind(b"\n", 0, start - 1) + 1
    indents = [
        (len(indent[0]), -start)
        for start in (match.end() for match in _LINE_END.finditer(data, max(half - 1, 0), last))
        if (indent := _INDENT.match(data, start)) is not None
    ]
    return -min(indents)[1] if indents else last


def _line_cuts(data: bytes, start: int, line_end: int, limit: int) -> Iterator[int]:
    """Where the parts of a line end that is longer than a chunk, the last at the line's end."""
    while line_end - start > limit:
        end = start + limit
        space = data.rfind(b" ", start + limit // 2, end)
        end = space + 1 if space >= 0 else end
        while end > start + 1 and data[end] & 0xC0 == 0x80:  # not within a character
            end -= 1
        yield end
        start = end
    yield line_end
