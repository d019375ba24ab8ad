r"""Ignore rules in the syntax of gitignore(5), matched as git matches them.

A pattern becomes a regular expression over bytes, because git compares bytes: `?` is one byte of
a name, not one character. All patterns of a file are joined into a few expressions, last pattern
first, so that one search finds the pattern that decides.

Ignore files do not go through the pathspec library, as the globs of m3's own options do: of 600
random ignore files it refused 67 with an exception, where git takes what it can, and gave 24 another
answer than git (ranges, escapes and slashes in brackets, line ends in names).

The rules come from gitignore(5) and from what git was seen to do. The one known difference to git
before 2.53 is `literal**/x`: the manual says that such asterisks are ordinary ones, older versions
took them for `**/` when the pattern held a slash and nothing special stood before them.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH123
from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

IGNORE_FILE_LIMIT = 5_000_000  # bytes

# Patterns in one expression. The cost of `re` grows with the square of its groups.
_JOINED = 50

_BOM = b"\xef\xbb\xbf"
_STAR = b"[^/]*"
_PRINTABLE = range(0x20, 0x7F)
_POSIX_CLASSES: dict[bytes, frozenset[int]] = {
    b"alnum": frozenset(b for b in _PRINTABLE if chr(b).isalnum()),
    b"alpha": frozenset(b for b in _PRINTABLE if chr(b).isalpha()),
    b"blank": frozenset(b" \t"),
    b"cntrl": frozenset({*range(0x01, 0x20), 0x7F}),
    b"digit": frozenset(b"0123456789"),
    b"graph": frozenset(range(0x21, 0x7F)),
    b"lower": frozenset(range(ord("a"), ord("z") + 1)),
    b"print": frozenset(_PRINTABLE),
    b"punct": frozenset(b for b in range(0x21, 0x7F) if not chr(b).isalnum()),
    b"space": frozenset(b" \t\n\r"),  # git's own table: neither form feed nor vertical tab
    b"upper": frozenset(range(ord("A"), ord("Z") + 1)),
    b"xdigit": frozenset(b"0123456789abcdefABCDEF"),
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern as it was written, and whether it ignores or, negated, keeps what it matches."""

    raw: bytes
    negated: bool
    directories_only: bool
    names_only: bool  # without a slash a pattern is matched with names, at any depth
    glob: bytes

    @classmethod
    def parse(cls, line: bytes) -> Pattern:
        """Take a pattern apart: `!`, the trailing `/`, the `/` that anchors it."""
        negated = line.startswith(b"!")
        glob = line[1:] if negated else line
        directories_only = glob.endswith(b"/")
        if directories_only:
            glob = glob[:-1]
        names_only = b"/" not in glob
        return cls(line, negated, directories_only, names_only, glob.removeprefix(b"/"))

    @property
    def text(self) -> str:
        """The pattern as people read it."""
        return self.raw.decode("utf-8", "replace")


class IgnoreRules:
    """The patterns of one ignore file or option, for the paths below one directory.

    `base` is the length in bytes of that directory's path with its final slash; paths are given
    whole. `label` says where the patterns stand. `binding` rules hold for tracked files as well.
    """

    def __init__(
        self,
        lines: Iterable[bytes],
        base: int,
        label: str,
        *,
        binding: bool = False,
        ignore_case: bool = False,
    ) -> None:
        self.base = base
        self.label = label
        self.binding = binding
        self._flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
        self._patterns = [Pattern.parse(line) for line in lines]
        # By is_directory: the expressions for names and for paths, made when first needed.
        self._expressions: dict[bool, tuple[list[re.Pattern[bytes]], list[re.Pattern[bytes]]]] = {}

    def match(self, path: bytes, name: bytes, is_directory: bool) -> Pattern | None:
        """Return the last pattern that matches `path`, whose last component is `name`."""
        found = self._find(path, name, is_directory)
        return self._patterns[found] if found >= 0 else None

    def covers(self, path: bytes) -> bool:
        """Tell if the last pattern that matches the file `path`, or a directory above it, is not negated."""
        found, is_directory = -1, False
        while len(path) >= self.base:
            found = max(found, self._find(path, path[path.rfind(b"/") + 1 :], is_directory))
            path, is_directory = path[: path.rfind(b"/")], True
        return found >= 0 and not self._patterns[found].negated

    def _find(self, path: bytes, name: bytes, is_directory: bool) -> int:
        expressions = self._expressions.get(is_directory)
        if expressions is None:
            expressions = (self._join(is_directory, True), self._join(is_directory, False))
            self._expressions[is_directory] = expressions
        names, paths = expressions
        found = -1
        for expression in names:
            if hit := expression.match(name):
                found = _index(hit)
                break
        for expression in paths:
            if hit := expression.match(path, self.base):
                found = max(found, _index(hit))
                break
        return found

    def _join(self, is_directory: bool, names_only: bool) -> list[re.Pattern[bytes]]:
        """Expressions for all patterns of a kind; the group that closes last names the pattern."""
        alternatives = []
        group_numbers = count()
        for index in range(len(self._patterns) - 1, -1, -1):
            pattern = self._patterns[index]
            if pattern.names_only != names_only or (pattern.directories_only and not is_directory):
                continue
            if expression := _translate(pattern.glob, group_numbers):
                alternatives.append(b"(?P<p%d>%s)" % (index, expression))
        return [
            re.compile(rb"(?:%s)\Z" % b"|".join(alternatives[i : i + _JOINED]), self._flags)
            for i in range(0, len(alternatives), _JOINED)
        ]


def _index(hit: re.Match[bytes]) -> int:
    # The group of the alternative closes after all groups inside it, so it is the last one.
    return int((hit.lastgroup or "")[1:])


def deciding(
    stack: Iterable[IgnoreRules], path: bytes, name: bytes, is_directory: bool
) -> tuple[IgnoreRules, Pattern] | None:
    """Find what decides about `path`: the first rules of `stack`, strongest first, with a match."""
    for rules in stack:
        pattern = rules.match(path, name, is_directory)
        if pattern is not None:
            return rules, pattern
    return None


def read_rules(
    path: bytes, base: int, label: str, *, follow: bool, binding: bool = False, ignore_case: bool = False
) -> IgnoreRules | None:
    """Read an ignore file; None when there is none.

    Without `follow` a symbolic link counts as no file, as with git's own files in a work tree.
    Raises OSError when the file is there and cannot be read, or is larger than
    `IGNORE_FILE_LIMIT`.
    """
    # O_NONBLOCK: a FIFO of this name must not make the walk wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG((os.stat if follow else os.lstat)(path).st_mode):
            return None
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(descriptor, "rb") as file:
        data = file.read(IGNORE_FILE_LIMIT + 1)
    if len(data) > IGNORE_FILE_LIMIT:
        raise OSError(f"larger than {IGNORE_FILE_LIMIT:,} bytes")
    return IgnoreRules(pattern_lines(data), base, label, binding=binding, ignore_case=ignore_case)


def is_glob(line: bytes) -> bool:
    """Tell if the pattern `line` can match anything."""
    glob = Pattern.parse(line).glob
    return bool(glob) and _translate(glob, count()) is not None


def pattern_lines(data: bytes) -> list[bytes]:
    """Return the patterns in the content of an ignore file: no comments, blanks, line ends."""
    lines = []
    for line in data.removeprefix(_BOM).split(b"\n"):
        if line.startswith(b"#"):
            continue
        # git reads a line as a C string, so that a NUL ends it.
        pattern = _without_trailing_spaces(line.removesuffix(b"\r").partition(b"\0")[0])
        if pattern:
            lines.append(pattern)
    return lines


def _without_trailing_spaces(line: bytes) -> bytes:
    """Drop spaces at the end but for an escaped one; other white space belongs to the pattern."""
    stripped = line.rstrip(b" ")
    backslashes = len(stripped) - len(stripped.rstrip(b"\\"))
    if backslashes % 2 and stripped != line:
        return stripped + b" "
    return stripped


def _translate(glob: bytes, group_numbers: Iterator[int]) -> bytes | None:
    """Turn a glob into an expression for a whole path; None when it can match nothing.

    A glob is a run of units between its `**`, a unit a run of pieces between its `*`, a piece a
    run of single-byte matchers. It is enough to try the first place where a piece fits, and the
    first where a unit fits: whatever can follow a later place can follow that one. So those are
    matched without backtracking, and a hostile pattern such as `*a*a*a*a*b` cannot stall.
    """
    units: list[tuple[bytes, list[bytes]]] = [(b"", [b""])]
    position, end = 0, len(glob)
    while position < end:
        byte = glob[position : position + 1]
        if byte == b"*":
            start = position
            while position < end and glob[position : position + 1] == b"*":
                position += 1
            rest = glob[position : position + 2]
            own_component = start == 0 or glob[start - 1 : start] == b"/"
            if position - start == 1 or not own_component or not (rest[:1] in (b"", b"/") or rest == b"\\/"):
                units[-1][1].append(b"")
            elif rest[:1] == b"/":
                units.append((rb"(?:.*/)?", [b""]))
                position += 1
            else:
                units.append((rb".*", [b""]))
            continue
        if byte == b"[":
            bracket = _translate_bracket(glob, position + 1)
            if bracket is None:
                return None
            matcher, position = bracket
        elif byte == b"?":
            matcher, position = b"[^/]", position + 1
        else:
            if byte == b"\\":
                position += 1
                if position == end:
                    return None
            matcher, position = re.escape(glob[position : position + 1]), position + 1
        units[-1][1][-1] += matcher
    return _expression(units, group_numbers)


def _expression(units: list[tuple[bytes, list[bytes]]], group_numbers: Iterator[int]) -> bytes:
    def first_fit(gap: bytes, rest: bytes) -> bytes:
        # What a lookahead has found is not searched again; Python 3.10 has no atomic groups.
        name = b"g%d" % next(group_numbers)
        return b"(?=(?P<%s>%s%s))(?P=%s)" % (name, _LAZY[gap], rest, name)

    out = b""
    for number, (gap, pieces) in enumerate(units):
        body = pieces[0]
        for piece in pieces[1:-1]:
            body += first_fit(_STAR, piece)
        if len(pieces) > 1:
            body += _STAR + pieces[-1]
        out += first_fit(gap, body) if gap and number < len(units) - 1 else gap + body
    return out


_LAZY = {_STAR: rb"[^/]*?", rb"(?:.*/)?": rb"(?:.*?/)??", rb".*": rb".*?"}


def _translate_bracket(glob: bytes, position: int) -> tuple[bytes, int] | None:
    """Turn `[…]` into a class, given where its content begins; None when it is malformed."""
    end = len(glob)
    negated = glob[position : position + 1] in (b"!", b"^")
    position += negated
    members: set[int] = set()
    previous: int | None = None  # what a range can begin with
    first = True
    while first or glob[position : position + 1] != b"]":
        first = False
        if position >= end:
            return None
        byte = glob[position]
        if byte == ord("-") and previous is not None and glob[position + 1 : position + 2] not in (b"", b"]"):
            position += 2 if glob[position + 1] == ord("\\") else 1
            if position >= end:
                return None
            members.update(range(previous, glob[position] + 1))
            previous = None
        elif glob[position : position + 2] == b"[:" and (closing := glob.find(b"]", position + 2)) != -1:
            name = glob[position + 2 : closing - 1]
            if glob[closing - 1 : closing] != b":" or closing - 1 < position + 2:
                members.add(byte)
                previous = byte
            elif name in _POSIX_CLASSES:
                members |= _POSIX_CLASSES[name]
                previous = None
                position = closing
            else:
                return None
        else:
            if byte == ord("\\"):
                position += 1
                if position >= end:
                    return None
            previous = glob[position]
            members.add(previous)
        position += 1
    members.discard(ord("/"))
    if not members:
        return (b"[^/]" if negated else b"(?!)"), position + 1
    listed = b"".join(b"\\x%02x" % member for member in sorted(members))
    return (b"[^/%s]" if negated else b"[%s]") % listed, position + 1
