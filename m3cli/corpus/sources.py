"""From the paths that the user named to the ordered, uniquely named sources to read."""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH110, PTH114, PTH116, PTH118, PTH119
from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.names import printable, shown, unused
from m3cli.corpus.order import path_key
from m3cli.corpus.revision import Revisions, RevisionWalk
from m3cli.corpus.types import Skip, SkipReason, Source
from m3cli.corpus.walk import Walk, WalkOptions
from m3cli.corpus.worktree import describe
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.corpus.revision import Revision
    from m3cli.corpus.types import Blob

__all__ = ["Collected", "WalkOptions", "collect", "printable", "read_path_list"]

STDIN = "-"
STDIN_NAME = "stdin"


@dataclass(frozen=True, slots=True)
class Collected:
    """Sources and skips, each in path order.

    `notes` are whole sentences about what may be missing.
    """

    sources: tuple[Source, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Argument:
    """A path that the user named: as typed, without symbolic links, and how it is shown.

    `number` is its place among all that the user named. With a `revision` it is read from that.
    """

    typed: str
    file: str
    real: bytes
    is_directory: bool
    revision: Revision | None = None
    number: int = 0
    label: str = ""

    def places(self) -> tuple[bytes, bytes]:
        """Where it is and, when it is a symbolic link itself, where the link is."""
        directory, name = os.path.split(os.fsencode(self.file.rstrip("/")))
        return self.real, os.path.join(os.path.realpath(directory), name)

    def found(self, path: bytes, file: bytes) -> _Found:
        """The source that is `file`, which is this argument or was found in it."""
        explicit = not self.is_directory
        if self.revision is None:
            return _Found(path, self.number, file=Path(os.fsdecode(file)), explicit=explicit)
        blob = self.revision.blob(self.real if explicit else file)
        return _Found(path, self.number, blob=blob, explicit=explicit)


@dataclass(frozen=True, slots=True)
class _Found:
    """A source before its name is final; `path` is what the name is made of, and the sort key."""

    path: bytes
    argument: int
    file: Path | None = None
    data: bytes | None = None
    explicit: bool = False
    blob: Blob | None = None


def collect(
    paths: Sequence[str],
    options: WalkOptions,
    *,
    stdin: Callable[[], bytes],
    cwd: Path,
    listed: Sequence[str] = (),
    ref: str | None = None,
) -> Collected:
    """Find everything that `paths` stand for: directories, files, and `-` for standard input.

    A path is shown relative to the directory when that is the only one named, else relative to
    `cwd` if it is inside, else by its last component. Whatever is named twice is read once. Paths in
    `listed` are read as if named, but those that are missing or lead out of `cwd` are skipped.
    With `ref` all but standard input is read as it is at that commit.
    Raises UsageError for what does not exist, CorpusError for what cannot be read.
    """
    if list(paths).count(STDIN) > 1:
        raise UsageError("Standard input (-) is named more than once.", "Name it once.")
    revisions = Revisions(ref) if ref is not None else None
    usable, unusable = _sift(listed, cwd, revisions)
    arguments = _labelled(_distinct(paths, usable, cwd, revisions), cwd)
    if revisions is not None and not arguments and not unusable:
        raise UsageError(
            f"Nothing is named that could be read at {ref!r}.", "Name a path in a git work tree."
        )
    named = {place for argument in arguments for place in argument.places()}
    found: list[_Found] = []
    skips: list[tuple[bytes, Skip]] = [(os.fsencode(skip.path), skip) for skip in unusable]
    notes: dict[str, None] = {}
    for argument in arguments:
        label = os.fsencode(argument.label)
        if not argument.is_directory:
            found.append(argument.found(label, os.fsencode(argument.file)))
            continue
        walk = _walk(argument, options, named)
        base = len(argument.real.rstrip(b"/")) + 1
        prefix = label + b"/" if label else b""
        found += [argument.found(prefix + file[base:], file) for file in walk.files]
        for left in walk.left:
            path = prefix + left.path[base:]
            skip = Skip(shown(path), left.reason, printable(left.detail))
            skips.append((path, skip))
        notes.update(dict.fromkeys(printable(note) for note in walk.notes))
    if STDIN in paths:
        found.append(_Found(STDIN_NAME.encode(), list(paths).index(STDIN), data=stdin(), explicit=True))
    skips.sort(key=lambda pair: path_key(pair[0]))
    return Collected(_named_uniquely(found), tuple(skip for _, skip in skips), tuple(notes))


def _walk(argument: _Argument, options: WalkOptions, named: set[bytes]) -> Walk:
    if argument.revision is not None:
        walk: Walk = RevisionWalk(argument.revision, argument.real, options, named)
    else:
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


def _sift(listed: Sequence[str], cwd: Path, revisions: Revisions | None) -> tuple[list[str], list[Skip]]:
    """Tell the paths of a list that can be read from those that are missing or lead out of `cwd`."""
    usable: list[str] = []
    skips: list[Skip] = []
    inside = os.path.join(os.path.realpath(cwd), "")
    for path in listed:
        file = os.path.join(cwd, path)
        left: tuple[SkipReason, str] | None = None
        if os.path.islink(file) and not os.path.realpath(file).startswith(inside):
            left = SkipReason.LINK, "leads out of the tree"
        elif revisions is not None and "\0" not in path:
            left = _left_at(file, path, revisions)
        elif not os.path.lexists(file):
            left = SkipReason.UNREADABLE, "does not exist"
        elif not os.path.exists(file):
            left = SkipReason.LINK, "dangling"
        if left is None:
            usable.append(path)
        else:
            skips.append(Skip(shown(os.fsencode(path)), *left))
    return usable, skips


def _left_at(file: str, typed: str, revisions: Revisions) -> tuple[SkipReason, str] | None:
    """Why a listed path cannot be read at a commit; None if it can."""
    real = os.fsencode(os.path.realpath(file))
    entry = revisions.at(real, printable(typed)).find(real)
    if entry is None:
        return SkipReason.UNREADABLE, f"does not exist at {printable(revisions.ref)}"
    return {
        "link": (SkipReason.LINK, "not followed at a commit"),
        "submodule": (SkipReason.SPECIAL, "a submodule"),
    }.get(entry.kind)


def _distinct(
    paths: Sequence[str], listed: Sequence[str], cwd: Path, revisions: Revisions | None
) -> list[_Argument]:
    """Resolve what the user named, each thing once."""
    arguments: dict[bytes, _Argument] = {}
    typed = [*enumerate(paths), *enumerate(listed, len(paths))]
    for number, path in typed:
        if path == STDIN and number < len(paths):
            continue
        argument = _resolve(path, cwd) if revisions is None else _resolve_at(path, cwd, revisions)
        arguments.setdefault(argument.real, replace(argument, number=number))
    return list(arguments.values())


def _resolve(typed: str, cwd: Path) -> _Argument:
    file = os.path.join(cwd, typed)
    try:
        if not typed:
            raise _missing(typed)
        mode = os.stat(file).st_mode
        real = os.fsencode(os.path.realpath(file))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise _missing(typed) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _missing(typed) from error
        raise CorpusError(
            f"{printable(typed)} cannot be read: {describe(error)}.",
            "Check its permissions and those of its directory.",
        ) from error
    _refuse_git_data(typed, real)
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise CorpusError(
            f"{printable(typed)} is neither a file nor a directory.",
            "A pipe or device is read from standard input: redirect it to m3 and name it -.",
        )
    return _Argument(typed, file, real, stat.S_ISDIR(mode))


def _resolve_at(typed: str, cwd: Path, revisions: Revisions) -> _Argument:
    """Resolve a path that need only exist at a commit; links on the way are those of today."""
    name = printable(typed)
    file = os.path.join(cwd, typed)
    try:
        real = os.fsencode(os.path.realpath(file))
    except ValueError as error:
        raise _missing(typed) from error
    if not typed:
        raise _missing(typed)
    _refuse_git_data(typed, real)
    revision = revisions.at(real, name)
    entry = revision.find(real)
    if entry is None:
        raise UsageError(
            f"There is no file or directory {name} at {revisions.ref!r}.",
            "Check the spelling of both; `git ls-tree -r --name-only REF` lists what a commit has.",
        )
    if entry.kind in ("link", "submodule"):
        kind = "symbolic link" if entry.kind == "link" else "submodule"
        raise UsageError(
            f"{name} is a {kind} at {revisions.ref!r}, and is not followed there.",
            "Name what it leads to."
            if entry.kind == "link"
            else "Check the submodule out, and name a path in it.",
        )
    return _Argument(typed, file, real, entry.kind == "directory", revision)


def _missing(typed: str) -> UsageError:
    return UsageError(
        f"There is no file or directory {printable(typed)}." if typed else "An empty path is named.",
        "Check the spelling, and that the path is relative to the current directory.",
    )


def _refuse_git_data(typed: str, real: bytes) -> None:
    if b".git" in real.lower().split(b"/"):
        raise UsageError(
            f"{printable(typed)} is git's own data, which m3 never reads.", "Name the work tree."
        )


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
            label = unused(os.path.basename(os.path.normpath(argument.file)), used, numbers)
            used.add(label)
        labelled.append(replace(argument, label=label))
    return labelled


def _named_uniquely(found: list[_Found]) -> tuple[Source, ...]:
    used: set[str] = set()
    numbers: dict[str, int] = {}
    sources = []
    for item in sorted(found, key=lambda item: path_key(item.path)):
        path = unused(shown(item.path), used, numbers)
        used.add(path)
        sources.append(Source(path, item.file, item.data, item.explicit, item.blob, item.argument))
    return tuple(sources)
