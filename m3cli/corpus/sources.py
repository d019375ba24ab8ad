"""From the paths that the user named to the ordered, uniquely named sources to read."""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH110, PTH114, PTH116, PTH118, PTH119, PTH122
from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.types import Skip, SkipReason, Source
from m3cli.corpus.walk import Walk, WalkOptions
from m3cli.corpus.worktree import describe
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Collected", "WalkOptions", "collect", "printable", "read_path_list"]

STDIN = "-"
STDIN_NAME = "stdin"

# What could move a cursor, end a line, reorder text or hide in it, and bytes that are no UTF-8.
# A fixed list, so that a path looks the same under every version of the Unicode tables.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


@dataclass(frozen=True, slots=True)
class Collected:
    """Sources and skips, each in the order of their paths' components, compared as bytes.

    `notes` are whole sentences about what may be missing.
    """

    sources: tuple[Source, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Argument:
    """A path that the user named: as typed, without symbolic links, and how it is shown."""

    typed: str
    file: str
    real: bytes
    is_directory: bool
    label: str = ""

    def places(self) -> tuple[bytes, bytes]:
        """Where it is and, when it is a symbolic link itself, where the link is."""
        directory, name = os.path.split(os.fsencode(self.file.rstrip("/")))
        return self.real, os.path.join(os.path.realpath(directory), name)


@dataclass(frozen=True, slots=True)
class _Found:
    """A source before its name is final; `path` is what the name is made of, and the sort key."""

    path: bytes
    file: Path | None = None
    data: bytes | None = None
    explicit: bool = False


def collect(
    paths: Sequence[str],
    options: WalkOptions,
    *,
    stdin: Callable[[], bytes],
    cwd: Path,
    listed: Sequence[str] = (),
) -> Collected:
    """Find everything that `paths` stand for: directories, files, and `-` for standard input.

    A path is shown relative to the directory when that is the only one named, else relative to
    `cwd` if it is inside, else by its last component. Whatever is named twice is read once. Paths in
    `listed` are read as if named, but those that are missing or lead out of `cwd` are skipped.
    Raises UsageError for what does not exist, CorpusError for what cannot be read.
    """
    if list(paths).count(STDIN) > 1:
        raise UsageError("Standard input (-) is named more than once.", "Name it once.")
    usable, unusable = _sift(listed, cwd)
    arguments = _labelled(_distinct([*(path for path in paths if path != STDIN), *usable], cwd), cwd)
    named = {place for argument in arguments for place in argument.places()}
    found: list[_Found] = []
    skips: list[tuple[bytes, Skip]] = [(os.fsencode(skip.path), skip) for skip in unusable]
    notes: dict[str, None] = {}
    for argument in arguments:
        label = os.fsencode(argument.label)
        if not argument.is_directory:
            found.append(_Found(label, file=Path(argument.file), explicit=True))
            continue
        walk = _walk(argument, options, named)
        base = len(argument.real.rstrip(b"/")) + 1
        prefix = label + b"/" if label else b""
        found += [_Found(prefix + file[base:], file=Path(os.fsdecode(file))) for file in walk.files]
        for left in walk.left:
            path = prefix + left.path[base:]
            skip = Skip(_shown(path), left.reason, printable(left.detail))
            skips.append((path, skip))
        notes.update(dict.fromkeys(printable(note) for note in walk.notes))
    if STDIN in paths:
        found.append(_Found(STDIN_NAME.encode(), data=stdin(), explicit=True))
    skips.sort(key=lambda pair: pair[0].split(b"/"))
    return Collected(_named_uniquely(found), tuple(skip for _, skip in skips), tuple(notes))


def _walk(argument: _Argument, options: WalkOptions, named: set[bytes]) -> Walk:
    walk = Walk(argument.real, options, named)
    try:
        walk.run()
    except OSError as error:
        raise CorpusError(
            f"The directory {printable(argument.typed)} cannot be read: {describe(error)}.",
            "Check its permissions, or name another one.",
        ) from error
    return walk


def read_path_list(data: bytes, nul: bool) -> list[str]:
    """Return the paths in a list with one on each line or, with `nul`, ended by NUL bytes.

    Blank lines are passed over. A file that is called `-` is told from standard input by `./-`.
    """
    if nul:
        names = data.split(b"\0")
    else:
        names = [line.removesuffix(b"\r") for line in data.split(b"\n")]
        names = [name for name in names if name.strip()]
    return [os.fsdecode(b"./-" if name == b"-" else name) for name in names if name]


def printable(text: str) -> str:
    r"""Escape what must not reach a terminal or a prompt: `\n`, `\x1b`, `\u202e`, `\xff`.

    `\xNN` from 80 up is a byte that is not UTF-8; a backslash is left as it is.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0], f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _shown(path: bytes) -> str:
    """A path as people and models see it: the same in every locale, so not os.fsdecode."""
    return printable(path.decode("utf-8", "surrogateescape"))


def _sift(listed: Sequence[str], cwd: Path) -> tuple[list[str], list[Skip]]:
    """Tell the paths of a list that can be read from those that are missing or lead out of `cwd`."""
    usable: list[str] = []
    skips: list[Skip] = []
    inside = os.path.join(os.path.realpath(cwd), "")
    for path in listed:
        file = os.path.join(cwd, path)
        if not os.path.lexists(file):
            skips.append(Skip(_shown(os.fsencode(path)), SkipReason.UNREADABLE, "does not exist"))
        elif os.path.islink(file) and not os.path.realpath(file).startswith(inside):
            skips.append(Skip(_shown(os.fsencode(path)), SkipReason.LINK, "leads out of the tree"))
        elif not os.path.exists(file):
            skips.append(Skip(_shown(os.fsencode(path)), SkipReason.LINK, "dangling"))
        else:
            usable.append(path)
    return usable, skips


def _distinct(paths: Sequence[str], cwd: Path) -> list[_Argument]:
    """Resolve what the user named, each thing once."""
    arguments: dict[bytes, _Argument] = {}
    for typed in paths:
        argument = _resolve(typed, cwd)
        arguments.setdefault(argument.real, argument)
    return list(arguments.values())


def _resolve(typed: str, cwd: Path) -> _Argument:
    shown = printable(typed)
    missing = UsageError(
        f"There is no file or directory {shown}." if typed else "An empty path is named.",
        "Check the spelling, and that the path is relative to the current directory.",
    )
    if not typed:
        raise missing
    file = os.path.join(cwd, typed)
    try:
        mode = os.stat(file).st_mode
        real = os.fsencode(os.path.realpath(file))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise missing from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise missing from error
        raise CorpusError(
            f"{shown} cannot be read: {describe(error)}.", "Check its permissions and those of its directory."
        ) from error
    if b".git" in real.lower().split(b"/"):
        raise UsageError(f"{shown} is git's own data, which m3 never reads.", "Name the work tree.")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise CorpusError(
            f"{shown} is neither a file nor a directory.",
            "A pipe or device is read from standard input: redirect it to m3 and name it -.",
        )
    return _Argument(typed, file, real, stat.S_ISDIR(mode))


def _labelled(arguments: list[_Argument], cwd: Path) -> list[_Argument]:
    """Give each argument the name that it is shown by."""
    if len(arguments) == 1 and arguments[0].is_directory:
        return arguments
    here = os.path.join(os.path.normpath(cwd), "")
    inside = {}
    for argument in arguments:
        place = os.path.normpath(argument.file)
        if os.path.join(place, "").startswith(here):
            inside[argument.real] = place[len(here) :]
    used = set(inside.values())
    numbers: dict[str, int] = {}
    labelled = []
    for argument in arguments:
        label = inside.get(argument.real)
        if label is None:
            label = _unused(os.path.basename(os.path.normpath(argument.file)), used, numbers)
            used.add(label)
        labelled.append(replace(argument, label=label))
    return labelled


def _named_uniquely(found: list[_Found]) -> tuple[Source, ...]:
    used: set[str] = set()
    numbers: dict[str, int] = {}
    sources = []
    for item in sorted(found, key=lambda item: item.path.split(b"/")):
        path = _unused(_shown(item.path), used, numbers)
        used.add(path)
        sources.append(Source(path, item.file, item.data, item.explicit))
    return tuple(sources)


def _unused(path: str, used: set[str], numbers: dict[str, int]) -> str:
    """Return `path`, or with `~2`, `~3`, … before its extension if that is taken.

    `numbers` remembers the last number that each path was given.
    """
    if path not in used:
        return path
    stem, extension = os.path.splitext(path)
    number, candidate = numbers.get(path, 1), path
    while candidate in used:
        number += 1
        candidate = f"{stem}~{number}{extension}"
    numbers[path] = number
    return candidate
