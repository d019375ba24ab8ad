"""Untrusted text through llama.cpp's tokenizer: in pieces it survives, with nothing forged.

llama.cpp turns strings of content into special ids even with `parse_special=False`: user-defined
tokens are matched before everything else, and SentencePiece merges can build any entry of the
vocabulary. So every piece is looked at after tokenizing: if a forbidden id came out, the text
that spells it is cut apart and tokenized again.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Set

# Characters in a piece; at four bytes a character, 64 KiB at most.
PIECE_CHARS = 16_384

# llama.cpp's BPE splits text with a recursive std::regex, which overflows its stack on a run of
# about 26,000 characters of one class.
RUN_CHARS = 4_000

_LONG_RUN = re.compile(rf"\S{{{RUN_CHARS}}}|\s{{{RUN_CHARS}}}")

# Best first. The ends of these matches are places where no tokenizer known to m3 merges across;
# the last two only limit the damage.
_PLACES = (re.compile(r"(?<=\S)\n(?=\w)"), re.compile(r"\n"), re.compile(r"\S(?=\s)"))


def cut(text: str, *, limit: int = PIECE_CHARS, break_runs: bool = False) -> Iterator[str]:
    """Pieces of `text`, at most `limit` characters each, cut at newlines where there are any.

    With `break_runs`, no run of white space or of anything else is longer than `RUN_CHARS`.
    The pieces joined are the text.
    """
    start = 0
    while start < len(text):
        end = _place(text, start, limit)
        piece = text[start:end]
        start = end
        if not break_runs:
            yield piece
            continue
        done = 0
        for run in _LONG_RUN.finditer(piece):
            yield piece[done : run.end()]
            done = run.end()
        if done < len(piece):
            yield piece[done:]


def _place(text: str, start: int, limit: int) -> int:
    """Where the piece that begins at `start` ends."""
    if len(text) - start <= limit:
        return len(text)
    window = text[start : start + limit]
    for place in _PLACES:
        ends = [match.end() for match in place.finditer(window)]
        if ends:
            return start + ends[-1]
    return start + limit


def encode_plain(
    piece: str,
    raw: Callable[[str], list[int]],
    forbidden: Mapping[int, str],
    innocent: Set[int] = frozenset(),
) -> list[int]:
    """Ids of `piece` as plain text: none of `forbidden` because the piece spells it.

    `raw` is the tokenizer; `forbidden` maps an id to the text that produces it. `innocent` ids
    (bytes, unknown characters) also come out of text that does not spell them, and then stay. Any
    other forbidden id whose text is not in the piece, as after Unicode normalization, is found by
    halving. A token that is one character long has no other spelling and stays.
    """
    ids = raw(piece)
    forged = forbidden.keys() & set(ids)
    if not forged or len(piece) == 1:
        return ids
    # SentencePiece writes a space as U+2581, in the vocabulary as in the text it matches.
    haystack = piece.replace(" ", "\u2581")
    cuts: set[int] = set()
    for token in forged:
        needle = forbidden[token].replace(" ", "\u2581")
        at = haystack.find(needle) if len(needle) > 1 else -1
        while at >= 0:
            cuts.add(at + 1)
            at = haystack.find(needle, at + 1)
    if not cuts and forged <= innocent:
        return ids
    edges = [0, *sorted(cuts or {len(piece) // 2}), len(piece)]
    parts = [piece[a:b] for a, b in pairwise(edges)]
    return [id_ for part in parts for id_ in encode_plain(part, raw, forbidden, innocent)]
