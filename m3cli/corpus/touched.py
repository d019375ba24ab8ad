"""What a change touches: the lines of the functions around it, and the names in it."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import groupby
from typing import TYPE_CHECKING

from m3cli.corpus.languages import language_of
from m3cli.corpus.patch import split_lines
from m3cli.corpus.syntax import ask, definition_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from m3cli.corpus.patch import FileChange

LONGEST = 200  # lines; of a longer function only what is around the change counts
_AROUND = 20  # lines before and after, in such a function
_NEAR = 10  # lines before and after, where no function is known
MOST_SYMBOLS = 40

_WIDEST = 2_000  # characters of a line that are looked at

_IDENTIFIER = re.compile(r"(?<![\w$])[^\W\d][\w$]{2,}")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`')
_COMMENT = re.compile(
    r"^\s*(?:#(?!\s*(?:define|include|if|undef)\b)|//|/\*|\*(?=\s|$)|--\s|;;|<!--|%).*|\s(?://|#\s).*"
)
_DEFINES = re.compile(
    r"\b(?:def|class|func|function|fn|fun|interface|struct|enum|trait|type|impl|module|namespace|object|record|"
    r"protocol|extension|union|sub|proc|macro|const|let|var|val|static|message|service|define|table|view)"
    r"\b[\s*&]*(?:\([^)]*\)\s*)?(?P<name>[^\W\d][\w$]*)"
)
_CALLED = re.compile(r"(?P<name>[^\W\d][\w$]*[!?]?)\s*(?:<[^<>()]*>\s*)?\(")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+")
# Words of the languages in `languages`, and the names that every program has.
_KEYWORDS = frozenset(
    """
    abstract and any array as assert async auto await bool boolean break byte case cast catch chan char
    class cls const constexpr continue debugger declare def default defer del delete desc dict do double
    dyn echo elif else elseif elsif end ensure enum error except exit explicit export extends extern False
    false final finally float fn for foreach from fun func function get global goto guard if impl
    implements import in include init inline instanceof int int32 int64 interface internal is lambda len
    let list local long loop macro map match mod module move mut mutable namespace native new nil None
    nonlocal not null nullptr num object of open operator or out override package pass private proc
    protected protocol pub public raise range readonly ref register rescue restrict return Self self set
    short signed sizeof static std str String string struct sub super switch synchronized template then
    This this throw throws trait transient True true try tuple type typedef typename typeof undefined
    union unless unsafe unsigned until use using val var virtual void volatile when where while with yield
    """.split()
)


def enclosing(change: FileChange) -> list[tuple[int, int]]:
    """The first and last lines, in the new version, of the functions that have changed lines, from 1.

    A function is known where its language's parser is there; else, and where one is longer than LONGEST,
    it is some lines around the change. If `head` is not known, it is the hunks. The ranges do not overlap and
    are in order; where lines were only removed, they hold those beside.
    """
    if change.head is None:
        return _joined(
            (hunk.start, hunk.start + hunk.length - 1) for hunk in change.hunks if hunk.length and hunk.start
        )
    count = len(split_lines(change.head))
    if not count or not change.hunks:
        return []
    changed = sorted(set(_changed_lines(change, count)))
    definitions = definition_lines(change.path, change.head)
    if not definitions:
        return _joined((max(1, line - _NEAR), min(count, line + _NEAR)) for line in changed)
    lines = change.head_lines()
    starts = sorted(definitions)
    ends = _ends(starts, definitions, count)
    ranges = []
    for line in changed:
        at = bisect_right(starts, line) - 1
        first, last = (starts[at], ends[at]) if at >= 0 else (1, starts[0] - 1)
        while last > line and not lines[last].strip():
            last -= 1
        if last - first >= LONGEST:
            first, last = max(first, line - _AROUND), min(last, line + _AROUND)
        ranges.append((first, last))
    return _joined(ranges)


def _changed_lines(change: FileChange, count: int) -> Iterator[int]:
    """The lines that are new, and those beside ones that were removed without others in their place."""
    for hunk in change.hunks:
        for is_kept, group in groupby(hunk.numbered(), key=lambda item: item[1][0] == " "):
            run = [] if is_kept else list(group)
            added = [number for number, line in run if line[0] == "+"]
            yield from added
            if run and not added:
                yield min(max(run[0][0] - 1, 1), count)
                yield min(run[0][0], count)


def _ends(starts: list[int], depths: Mapping[int, int], count: int) -> list[int]:
    """The last line of each definition: the one before the next that is not inside of it."""
    ends = [count] * len(starts)
    around: list[int] = []
    for at, start in enumerate(starts):
        while around and depths[starts[around[-1]]] >= depths[start]:
            ends[around.pop()] = start - 1
        around.append(at)
    return ends


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def changed_symbols(change: FileChange) -> list[str]:
    """The names that a change has to do with, most telling first, at most MOST_SYMBOLS.

    First those that changed lines define and the definitions that enclose them, then those that changed
    lines call or use, long and composed ones first. Keywords, comments and strings do not count, nor do plain
    words where the language is not known.
    """
    found = dict.fromkeys([*_defined_in(change), *_definitions_around(change)])
    uses: dict[str, tuple[bool, int, int]] = {}
    for sign, text in _code_of(change):
        called = {match["name"] for match in _CALLED.finditer(text)}
        for name in _IDENTIFIER.findall(text):
            value = (name in called, len(_PART.findall(name)), sign == "+")
            uses[name] = max(uses.get(name, value), value)
    if language_of(change.path, change.head or "") is None:  # most words of prose are no names
        uses = {name: value for name, value in uses.items() if value[0] or value[1] > 1}
    found.update(dict.fromkeys(sorted(uses, key=uses.__getitem__, reverse=True)))
    return [name for name in found if name not in _KEYWORDS and len(name) > 2][:MOST_SYMBOLS]


def _defined_in(change: FileChange) -> Iterator[str]:
    for _, text in _code_of(change):
        yield from (match["name"] for match in _DEFINES.finditer(text))


def _definitions_around(change: FileChange) -> Iterator[str]:
    """The names of the definitions that changed lines are in, inner ones first."""
    definitions = definition_lines(change.path, change.head) if change.head is not None else None
    lines = change.head_lines()
    if not definitions:
        for hunk in change.hunks:
            yield from _name_in([hunk.section])
        return
    starts = sorted(definitions)
    for line in sorted(set(_changed_lines(change, len(lines)))) if lines else ():
        depth = None
        for start in reversed(starts[: bisect_right(starts, line)]):
            if depth is None or definitions[start] < depth:
                depth = definitions[start]
                yield from _name_in([lines[n] for n in range(start, min(start + 30, len(lines) + 1))])
            if not depth:
                break


def _name_in(lines: Iterable[str]) -> Iterator[str]:
    """The name that the first line of code which is no comment or decorator defines."""
    for line in lines:
        code = _COMMENT.sub("", _LITERAL.sub('""', line[:_WIDEST]))
        if not code.strip() or code.lstrip().startswith(("@", "#[", "[")):
            continue
        if match := _DEFINES.search(code) or _CALLED.search(code):
            yield match["name"]
            return


def _code_of(change: FileChange) -> Iterator[tuple[str, str]]:
    """The changed lines with their signs, without comments and strings; those that were added first."""
    after, before = _without_comments(change.path, change.head), _without_comments(change.path, change.base)
    for wanted in "+-":
        for hunk in change.hunks:
            old = hunk.position(new=False) + 1
            for number, line in hunk.numbered():
                known, at = (after, number) if wanted == "+" else (before, old)
                if line[0] == wanted:
                    text = known.get(at, line[1:]) if known is not None else _COMMENT.sub("", line[1:_WIDEST])
                    yield wanted, _LITERAL.sub('""', text[:_WIDEST])
                old += line[0] != "+"


def _without_comments(path: str, text: str | None) -> dict[int, str] | None:
    """The lines that have comments, without them; None where no parser tells."""
    language = language_of(path, text) if text is not None else None
    rows = ask("comments", language, text) if language and text is not None else None
    return None if rows is None else {row + 1: line or "" for row, line in rows}
