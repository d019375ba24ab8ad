"""A unified diff → the files that it changes, hunk by hunk; and what a hunk makes of a text.

Lines end at a line feed only, as in git and in `Document`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.decoding import decode
from m3cli.corpus.diff_names import (
    NOTHING,
    check_name,
    malformed,
    name_of,
    read_headers,
    without_prefixes,
)
from m3cli.corpus.names import printable
from m3cli.corpus.types import SkipReason
from m3cli.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from unidiff.patch import PatchedFile, PatchSet

    from m3cli.corpus.diff_names import GitHeader

Status = Literal["added", "modified", "renamed", "deleted", "mode"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*[mK]")
_COLOURED = re.compile(rb"^\x1b\[[0-9;]*m(?:diff --|--- |@@ )", re.MULTILINE)
_WITHOUT_DIFF = re.compile(rb"(?:commit|From) [0-9a-f]{40,64}\b")  # `git show` and mails of empty commits
_NO_DATE = re.compile(r"19(?:70-01-01|69-12-31) ")  # what diff gives as the time of a file that is not there
_REASONS = {"120000": "a link", "160000": "a submodule"}


@dataclass(frozen=True, slots=True)
class Hunk:
    """A run of changed lines, with some around them, which stand in both versions.

    Starts and lengths are in lines, counted from 1; where a length is 0 the start is the line before, 0 at
    the top. Each of `lines` is without its line feed and begins with " ", "+" or "-". `section` is what
    stands behind the second `@@`. `old_open` and `open` say that the last line of that version is the
    file's last and has no line feed.
    """

    old_start: int
    old_length: int
    start: int
    length: int
    lines: tuple[str, ...]
    section: str = ""
    old_open: bool = False
    open: bool = False

    def side(self, *, new: bool) -> list[str]:
        """The lines of one version with their line feeds."""
        sign, is_open = ("+", self.open) if new else ("-", self.old_open)
        lines = [line[1:] + "\n" for line in self.lines if line[0] in (" ", sign)]
        if is_open and lines:
            lines[-1] = lines[-1].removesuffix("\n")
        return lines

    def position(self, *, new: bool) -> int:
        """How many lines of one version stand before the hunk."""
        start, length = (self.start, self.length) if new else (self.old_start, self.old_length)
        return start - 1 if length else start

    def numbered(self) -> Iterator[tuple[int, str]]:
        """The lines with their number in the new version; for a removed one, that of the next line."""
        number = self.position(new=True) + 1
        for line in self.lines:
            yield number, line
            number += line[0] != "-"

    def halves(self) -> tuple[Hunk, Hunk]:
        """Two hunks that together are this one, which has two lines at least."""
        middle = len(self.lines) // 2
        first, second = self.lines[:middle], self.lines[middle:]
        old, new = (sum(line[0] != sign for line in first) for sign in "+-")
        before_old, before_new = self.position(new=False), self.position(new=True)

        def part(lines: tuple[str, ...], skipped_old: int, skipped_new: int, *, last: bool) -> Hunk:
            lengths = [sum(line[0] != sign for line in lines) for sign in "+-"]
            return Hunk(
                before_old + skipped_old + bool(lengths[0]),
                lengths[0],
                before_new + skipped_new + bool(lengths[1]),
                lengths[1],
                lines,
                self.section,
                self.old_open and last,
                self.open and last,
            )

        return part(first, 0, 0, last=False), part(second, old, new, last=True)

    def __str__(self) -> str:
        """The hunk as in a diff; always ends with a line feed."""
        old, new = _range(self.old_start, self.old_length), _range(self.start, self.length)
        section = f" {self.section}" if self.section else ""
        text = [f"@@ -{old} +{new} @@{section}\n"]
        last_old = max((i for i, line in enumerate(self.lines) if line[0] != "+"), default=-1)
        last_new = max((i for i, line in enumerate(self.lines) if line[0] != "-"), default=-1)
        for i, line in enumerate(self.lines):
            text.append(line + "\n")
            if (self.old_open and i == last_old) or (self.open and i == last_new):
                text.append("\\ No newline at end of file\n")
        return "".join(text)


def _range(start: int, length: int) -> str:
    return str(start) if length == 1 else f"{start},{length}"


@dataclass(frozen=True, slots=True)
class FileChange:
    """What a diff does to one file.

    `path` is as people and models see it, `raw_path` as the file system does; `old_path` is where the file
    was, or of what it is a copy, else `path`. `base` and `head` are the texts before and after, None where
    they are not known or there is none. `reason` says why the file is not reviewed, empty if it is.
    """

    path: str
    old_path: str
    status: Status
    hunks: tuple[Hunk, ...]
    base: str | None
    head: str | None
    reason: str
    raw_path: bytes = b""
    raw_old_path: bytes = b""

    @property
    def added(self) -> frozenset[int]:
        """The lines of the new version that are new or changed, counted from 1."""
        return frozenset(n for hunk in self.hunks for n, line in hunk.numbered() if line[0] == "+")

    @property
    def touched(self) -> frozenset[int]:
        """Those lines, and the ones on either side of what was taken away and not replaced."""
        lines = set(self.added)
        for hunk in self.hunks:
            shown = range(hunk.start, hunk.start + hunk.length)
            for is_same, run in groupby(hunk.numbered(), lambda item: item[1][0] == " "):
                changed = list(run)
                if not is_same and all(line[0] == "-" for _, line in changed):
                    number = changed[0][0]
                    lines |= {near for near in (number - 1, number) if near in shown}
        return frozenset(lines)

    @property
    def diff(self) -> str:
        """The change as a unified diff with git's headers, ended by a line feed."""
        lines = []
        if self.status == "renamed":
            lines += [f"rename from {self.old_path}\n", f"rename to {self.path}\n"]
        elif self.status == "added" and self.old_path != self.path:
            lines += [f"copy from {self.old_path}\n", f"copy to {self.path}\n"]
        is_new = self.status == "added" and self.old_path == self.path
        lines.append(f"--- {NOTHING}\n" if is_new else f"--- a/{self.old_path}\n")
        lines.append(f"+++ {NOTHING}\n" if self.status == "deleted" else f"+++ b/{self.path}\n")
        return "".join([*lines, *map(str, self.hunks)])

    def head_lines(self) -> dict[int, str]:
        """The lines of the new version that are known, by their numbers from 1, without their ends.

        Those are all if `head` is known, else those in the hunks.
        """
        if self.head is not None:
            return {
                number: line.removesuffix("\n").removesuffix("\r")
                for number, line in enumerate(split_lines(self.head), 1)
            }
        return {
            number: line[1:].removesuffix("\r")
            for hunk in self.hunks
            for number, line in hunk.numbered()
            if line[0] != "-"
        }

    def enclosing(self) -> list[tuple[int, int]]:
        """The lines of the functions that the change touches; see `m3cli.corpus.touched`."""
        from m3cli.corpus.touched import enclosing

        return enclosing(self)

    def changed_symbols(self) -> list[str]:
        """The names that the change defines, touches or uses; see `m3cli.corpus.touched`."""
        from m3cli.corpus.touched import changed_symbols

        return changed_symbols(self)


def split_lines(text: str) -> list[str]:
    """The lines of `text` with their line feeds; the last one may have none."""
    *lines, last = text.split("\n")
    return [line + "\n" for line in lines] + ([last] if last else [])


def misfit(lines: Sequence[str], hunks: Iterable[Hunk], *, new: bool) -> Hunk | None:
    """The first of `hunks` of which the new (or old) version does not stand in `lines` where it says.

    Carriage returns before line feeds do not count. None if all stand.
    """
    for hunk in hunks:
        start, wanted = hunk.position(new=new), hunk.side(new=new)
        found = lines[start : start + len(wanted)]
        if len(lines) < start or list(map(_plain_end, found)) != list(map(_plain_end, wanted)):
            return hunk
    return None


def _plain_end(line: str) -> str:
    return line[:-2] + "\n" if line.endswith("\r\n") else line


def applied(lines: Sequence[str], hunks: Iterable[Hunk], *, new: bool = True) -> list[str]:
    """The new version of `lines`, of which the old one stands there; with `new` false the way back."""
    result: list[str] = []
    done = 0
    for hunk in hunks:
        start = hunk.position(new=not new)
        result += lines[done:start]
        result += hunk.side(new=new)
        done = start + len(hunk.side(new=not new))
    return result + list(lines[done:])


def parse_diff(data: bytes) -> list[FileChange]:
    """The files that a unified diff changes, as far as it alone tells, in its order.

    It may be one of git with any prefix or none, a mail of `git format-patch`, or of `diff -u`; escape
    sequences for colours are taken out. Of a new file the text is known.
    Raises CorpusError for what is no such diff or is broken, which says at what line.
    """
    return [decoded(change) for change in parse_raw(data)]


def parse_raw(data: bytes) -> list[FileChange]:
    """As `parse_diff`, before decoding: in lines, bytes that are not UTF-8 are surrogate escapes."""
    text = data.decode("utf-8", "surrogateescape")
    if _COLOURED.search(data):
        text = _COLOUR.sub("", text)
    lines = split_lines(text)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    lines = _with_line_feeds(lines)
    plain, headers = read_headers(lines)
    changes: list[FileChange] = []
    places: dict[bytes, int] = {}
    for file in _patch_set(plain):
        header = headers.get(file.diff_line_no or 0)
        hunks = tuple(_hunks(file, lines))
        change = _of_git(header, hunks) if header is not None else _of_plain(file, hunks)
        if change is None:
            continue
        earlier = places.get(change.raw_path)
        if earlier is None:
            places[change.raw_path] = len(changes)
            changes.append(change)
        elif changes[earlier].status == "deleted" and change.status == "added":
            changes[earlier] = change  # a file that became a link, or the other way round
        else:
            raise CorpusError(
                f"The diff changes {change.path} twice, the second time at line {file.diff_line_no:,}.",
                "Make one diff of a series of patches, as `git diff BASE...HEAD` does.",
            )
    if not changes and not headers and data.strip() and not _WITHOUT_DIFF.match(data):
        raise CorpusError(
            "There is no change to a file in what was given as a diff.",
            "Give the output of `git diff`, or of `diff -u`.",
        )
    return changes


def _with_line_feeds(lines: list[str]) -> list[str]:
    """The lines of a diff that was written with CRLF throughout, its headers too, with LF."""
    heads = [line for line in lines if line.startswith(("diff --git ", "--- ", "+++ ", "@@ "))]
    if heads and all(line.endswith("\r\n") for line in heads):
        return [line[:-2] + "\n" if line.endswith("\r\n") else line for line in lines]
    return lines


def _patch_set(lines: list[str]) -> PatchSet:
    from unidiff.errors import UnidiffParseError
    from unidiff.patch import PatchSet

    number = 0

    def counted() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(lines, 1):  # noqa: B007 - for the error
            yield line

    try:
        return PatchSet(counted())
    except (UnidiffParseError, ValueError) as error:
        why = printable(str(error).strip()[:200])
        raise malformed(number, why[:1].lower() + why[1:]) from error


def _hunks(file: PatchedFile, lines: Sequence[str]) -> Iterator[Hunk]:
    """The hunks of a file, after a look at what the parser lets pass."""
    old_end = new_end = 0
    for found in file:
        body: list[str] = []
        open_sides: set[str] = set()
        first = last = 0
        for line in found:
            if line.line_type == "\\":
                open_sides |= set(body[-1][0].replace(" ", "+-")) if body else set()
            elif line.line_type:
                sign = line.line_type
                if open_sides & set(sign.replace(" ", "+-")):
                    raise malformed(line.diff_line_no or 0, "there is more after a line without its end")
                body.append(sign + line.value.removesuffix("\n"))
                last = line.diff_line_no or 0
                first = first or last
        behind = lines[last : last + 2]
        is_header = len(behind) == 2 and behind[0].startswith("--- ") and behind[1].startswith("+++ ")
        if body and behind and behind[0][0] in "+- " and behind[0].rstrip() != "--" and not is_header:
            raise malformed(last + 1, "the hunk before it is longer than it says")
        hunk = Hunk(
            *(found.source_start, found.source_length, found.target_start, found.target_length),
            tuple(body),
            printable(found.section_header.strip()),
            "-" in open_sides,
            "+" in open_sides,
        )
        old, new = hunk.position(new=False), hunk.position(new=True)
        if old < old_end or new < new_end:
            raise malformed(first, "the hunk does not stand behind the one before it")
        old_end, new_end = old + hunk.old_length, new + hunk.length
        if body:
            yield hunk


def _of_git(header: GitHeader, hunks: tuple[Hunk, ...]) -> FileChange:
    old, new = header.names()
    facts = header.facts
    old_mode, new_mode = header.modes
    is_new = "new file mode" in facts or facts.get("---") == NOTHING
    is_deleted = "deleted file mode" in facts or facts.get("+++") == NOTHING
    status: Status = "modified"
    if is_deleted:
        status, new = "deleted", old if new == NOTHING else new
    elif is_new or "copy to" in facts:
        status = "added"
    elif "rename to" in facts:
        status = "renamed"
    elif old_mode != new_mode and not hunks and not header.is_binary:
        status = "mode"
    if is_new:
        old = new
    reason = "binary" if header.is_binary else ""
    reason = "deleted" if is_deleted else _REASONS.get(new_mode, reason)
    if not reason and not hunks:
        only = "only copied" if old != new else "empty"
        reason = {"renamed": "only renamed", "mode": "only its mode changed", "added": only}.get(
            status, "without a change"
        )
    return _change(old, new, status, hunks, reason, header.line)


def _of_plain(file: PatchedFile, hunks: tuple[Hunk, ...]) -> FileChange | None:
    old, new = without_prefixes(name_of(file.source_file), name_of(file.target_file))
    if not hunks and not file.is_binary_file:
        return None
    first = hunks[0] if hunks else None
    no_old = first is not None and not first.old_length and _NO_DATE.match(file.source_timestamp or "")
    no_new = first is not None and not first.length and _NO_DATE.match(file.target_timestamp or "")
    status: Status = "modified"
    if old == NOTHING or no_old:
        status = "added"
    elif new == NOTHING or no_new:
        status, new = "deleted", old
    reason = "deleted" if status == "deleted" else "binary" if file.is_binary_file else ""
    return _change(new, new, status, hunks, reason, file.diff_line_no or 0)


def _change(
    old: str, new: str, status: Status, hunks: tuple[Hunk, ...], reason: str, line: int
) -> FileChange:
    for name in {old, new}:
        check_name(name, line)
    places = (new.encode("utf-8", "surrogateescape"), old.encode("utf-8", "surrogateescape"))
    head = None
    if status == "added" and old == new:
        head = "".join(line for hunk in hunks for line in hunk.side(new=True))
    return FileChange(printable(new), printable(old), status, hunks, None, head, reason, *places)


def decoded(change: FileChange, base: bytes | None = None, head: bytes | None = None) -> FileChange:
    """`change` with its lines, `base` and `head` decoded, and with a reason if that cannot be done.

    Where `head` is not given, the lines show what encoding it has.
    """
    if head is None and change.head is not None:
        head = change.head.encode("utf-8", "surrogateescape")
    reason, encoding = change.reason, "utf-8"
    after: str | None = None
    if head is not None or not reason:
        lines = [line[1:] for hunk in change.hunks for line in hunk.lines]
        # The line feed keeps the first line from being taken for a signature or a byte order mark.
        sample = "\n".join(["", *lines]).encode("utf-8", "surrogateescape") if head is None else head
        text, found = decode(sample)
        if isinstance(text, SkipReason):
            reason = reason or f"{text.value}: {found}"
        elif found.startswith(("utf-16", "utf-32")):
            reason = reason or f"binary to diff: {found}"
        else:
            after, encoding = (text if head is not None else None), found
    before = None if base is None else decode(base)[0]
    return replace(
        change,
        hunks=tuple(
            replace(hunk, lines=tuple(_decoded(line, encoding) for line in hunk.lines))
            for hunk in change.hunks
        ),
        base=None if isinstance(before, SkipReason) else before,
        head=after,
        reason=reason,
    )


def _decoded(line: str, encoding: str) -> str:
    if line.isascii():
        return line
    data = line.encode("utf-8", "surrogateescape")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("utf-8", "backslashreplace")
