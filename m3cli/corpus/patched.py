"""A diff that was handed over → its files' versions before and after, from a directory that holds either."""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH113, PTH118, PTH120
from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.corpus.names import shown
from m3cli.corpus.patch import applied, decoded, misfit, split_lines
from m3cli.corpus.worktree import describe
from m3cli.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.corpus.patch import FileChange, Hunk


@dataclass(frozen=True, slots=True)
class _Found:
    """A change and what the directory has of it: the lines of each version that stands there, or None.

    `wrong` is the first hunk of which neither does.
    """

    change: FileChange
    new: list[str] | None = None
    old: list[str] | None = None
    wrong: Hunk | None = None


def after_patch(changes: Sequence[FileChange], roots: Sequence[bytes], limit: int) -> list[FileChange]:
    """`changes`, as of `parse_raw`, with the texts of both versions, decoded.

    The files are in that of `roots`, absolute and without links, which has most of them. They are the new
    version if every hunk's new side stands where it says; where the old side does, the hunks are applied
    in memory. Where nothing tells them apart, they are as the others. Of a file that is not there only
    the hunks are known, and of one with more than `limit` bytes.
    Raises CorpusError for a file in which neither version stands.
    """
    root = max(roots, key=lambda root: sum(_is_there(root, change) for change in changes))
    found = [_look(root, change, limit) for change in changes]
    for item in found:
        if item.wrong is not None:
            raise CorpusError(
                f"The diff does not apply: in {item.change.path} in {shown(root)} neither version of the "
                f"hunk at line {item.wrong.start:,} stands where it says.",
                "Check out the commit before or after it, or review it alone in an empty directory.",
            )
    is_old = any(item.new is None and item.old is not None for item in found)
    is_new = any(item.old is None and item.new is not None for item in found)
    return [_with_texts(item, prefer_old=is_old and not is_new) for item in found]


def _is_there(root: bytes, change: FileChange) -> bool:
    return any(os.path.isfile(os.path.join(root, path)) for path in (change.raw_path, change.raw_old_path))


def _look(root: bytes, change: FileChange, limit: int) -> _Found:
    if change.reason:
        return _Found(change)
    is_new = change.status == "added" and change.raw_path == change.raw_old_path
    try:
        after = _read(root, change.raw_path, limit)
        before = after if change.raw_path == change.raw_old_path else _read(root, change.raw_old_path, limit)
    except OSError as error:
        return _Found(replace(change, reason=f"unreadable: {describe(error)}"))
    if isinstance(after, str) or isinstance(before, str):
        return _Found(replace(change, reason=after if isinstance(after, str) else str(before)))
    if is_new:
        whole = change.hunks[0].side(new=True) if change.hunks else []
        if after is None:
            return _Found(change, old=[])
        wrong = misfit(after, change.hunks, new=True)
        if wrong is None and len(after) != len(whole):
            wrong = change.hunks[0]
        return _Found(change, new=after if wrong is None else None, wrong=wrong)
    if after is None and before is None:
        return _Found(change)
    wrong_after = misfit(after, change.hunks, new=True) if after is not None else None
    wrong_before = misfit(before, change.hunks, new=False) if before is not None else None
    new = after if after is not None and wrong_after is None else None
    old = before if before is not None and wrong_before is None else None
    neither = new is None and old is None
    return _Found(change, new, old, (wrong_after or wrong_before) if neither else None)


def _read(root: bytes, path: bytes, limit: int) -> list[str] | str | None:
    """The lines of a file, or why they are not read; None if it is not there. Raises OSError."""
    place = os.path.join(root, path)
    directory = os.path.dirname(place)
    # A link on the way could lead out of the tree.
    if os.path.realpath(directory) != os.path.normpath(directory):
        return "behind a link" if os.path.lexists(place) else None
    try:
        facts = os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(facts.st_mode):
        return "a link" if stat.S_ISLNK(facts.st_mode) else "not a regular file"
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "not a regular file"
        data = stream.read(limit + 1)
    if len(data) > limit:
        return f"larger than {limit:,} bytes"
    return split_lines(data.decode("utf-8", "surrogateescape"))


def _with_texts(found: _Found, *, prefer_old: bool) -> FileChange:
    change, new, old = found.change, found.new, found.old
    if new is not None and not (prefer_old and old is not None):
        old = applied(new, change.hunks, new=False)
    elif old is not None:
        new = applied(old, change.hunks)
    else:
        return decoded(change)
    is_new = change.status == "added" and change.raw_path == change.raw_old_path
    return decoded(change, None if is_new else _encoded(old), _encoded(new))


def _encoded(lines: Sequence[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")
