"""Find the citations in an answer and check each against what the model was shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from m3cli.corpus.types import Chunk

# `path:12`, `path:12-18`, `path:L12-L18`, `path#L12-L18`, `path, lines 12-18`, `path (line 12)`
_LINES = re.compile(
    r"""(?: (?::|\#)L? | `?[ ]*,?[ ]*[(\[]?lines?:?[ ]+ )
        (?P<start>[0-9]{1,9}) (?: [ ]?(?:-|–|—|to|\.\.)[ ]?L?(?P<end>[0-9]{1,9}) )? (?![0-9]|\.[0-9])""",
    re.VERBOSE,
)
_MORE = re.compile(r",[ ]?(?P<start>[0-9]{1,9})[-–](?P<end>[0-9]{1,9})(?![0-9])")
# What may stand left of the line numbers if it is no path of the pack: something with a suffix
# or a slash, so that neither `12:30` nor `note:3` nor `localhost:8080` is taken for a citation.
_PATH_LIKE = re.compile(r"(?:[\w.@+~-]+/)+[\w.@+~-]+|[\w@+~-]+\.[A-Za-z][\w]{0,9}")
# A path of the pack that follows one of these is the end of some other, longer path. Letters of
# other scripts are not among them: prose without spaces may touch a path.
_PATH_CHARACTER = re.compile(r"[A-Za-z0-9_./-]")
_LONGEST_PATH = 4096


@dataclass(frozen=True, slots=True)
class Citation:
    """A place that the answer names. `problem` says why it is not verified, else is empty.

    Verified means: the path is in the pack, and these lines of it were shown to the model. It
    does not mean that the lines support the claim.
    """

    text: str
    path: str
    start_line: int
    end_line: int
    verified: bool
    problem: str = ""


def check_citations(answer: str, chunks: Iterable[Chunk]) -> list[Citation]:
    """Citations of `answer` in order, each place once, checked against the packed `chunks`."""
    shown: dict[str, list[tuple[int, int]]] = {}
    for chunk in chunks:
        shown.setdefault(chunk.path, []).append((chunk.start_line, chunk.end_line))
    found: dict[tuple[str, int, int], Citation] = {}
    for match in _LINES.finditer(answer):
        named = _path_before(answer, match.start(), shown)
        if named is None:
            continue
        path = _resolve(named, shown)
        text = named + match[0].lstrip("`*")
        for start, end in _ranges(answer, match):
            problem = _problem(named, path, start, end, shown)
            found.setdefault(
                (path or named, start, end), Citation(text, path or named, start, end, not problem, problem)
            )
    return list(found.values())


def without_citations(answer: str) -> str:
    """`answer` without the line numbers of its citations, whatever was shown; the paths stay."""
    pieces, start = [], 0
    for match in _LINES.finditer(answer):
        if match.start() >= start and _path_before(answer, match.start(), {}) is not None:
            pieces.append(answer[start : match.start()])
            start = match.end()
            while more := _MORE.match(answer, start):
                start = more.end()
    return "".join([*pieces, answer[start:]])


def _ranges(answer: str, match: re.Match[str]) -> Iterator[tuple[int, int]]:
    """The lines of a citation, and of the ranges that follow it: `path:2-3, 5-6`."""
    yield int(match["start"]), int(match["end"] or match["start"])
    while more := _MORE.match(answer, match.end()):
        yield int(more["start"]), int(more["end"])
        match = more


def _path_before(answer: str, end: int, shown: Mapping[str, object]) -> str | None:
    """The path that ends at `end`: the longest one of the pack, else anything like a path."""
    before = answer[max(0, end - _LONGEST_PATH) : end].rstrip("`*")
    candidates = [
        path
        for path in shown
        if before.endswith(path) and not _PATH_CHARACTER.match(before[: len(before) - len(path)][-1:])
    ]
    if candidates:
        return max(candidates, key=len)
    word = re.search(r"[^\s`'\"()\[\]{}<>,;|*]+$", before)
    if word is None or "://" in word[0] or not _PATH_LIKE.fullmatch(word[0]):
        return None
    return word[0]


def _resolve(named: str, shown: Mapping[str, object]) -> str | None:
    """The path of the pack that was meant: itself, or the only one that ends so."""
    if named in shown:
        return named
    name = named.removeprefix("./")
    matches = [path for path in shown if path == name or path.endswith("/" + name)]
    return matches[0] if len(matches) == 1 else None


def _problem(
    named: str, path: str | None, start: int, end: int, shown: Mapping[str, Sequence[tuple[int, int]]]
) -> str:
    if path is None:
        return f"{named} is not in the pack"
    if start < 1 or end < start:
        return "not a line range"
    spans = shown[path]
    if end > max(last for _, last in spans):
        return f"lines up to {max(last for _, last in spans)} were shown"
    covered = {line for first, last in spans for line in range(max(first, start), min(last, end) + 1)}
    if len(covered) < end - start + 1:
        return "not all of these lines were shown"
    return ""
