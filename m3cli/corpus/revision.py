"""Reading directories as they are at a commit, without touching the work tree.

The rules are those of a walk, and are taken from the commit too. All files of a commit are tracked,
so of a .gitignore only a `!pattern` counts, which here as there overrules a weaker .m3ignore.
Paths are absolute bytes, as if the commit were checked out.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH112, PTH118, PTH119, PTH120
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from m3cli.corpus.history import read_blobs, read_tree, resolve_commit
from m3cli.corpus.ignore import IGNORE_FILE_LIMIT, IgnoreRules, pattern_lines
from m3cli.corpus.types import Blob, SkipReason
from m3cli.corpus.walk import Walk, WalkOptions
from m3cli.corpus.worktree import GitError, WorkTree, find_work_tree
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from m3cli.corpus.history import TreeFile
    from m3cli.corpus.types import Source

_BATCH_BYTES = 32_000_000  # of file contents that are in memory at a time
_BATCH_FILES = 2_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a commit's tree; looks to a walk like an entry of a directory on the disk."""

    path: bytes
    name: bytes
    kind: Literal["directory", "file", "link", "submodule"]

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002 - os.DirEntry's argument
        """True for a directory."""
        return self.kind == "directory"

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002 - os.DirEntry's argument
        """True for a regular file."""
        return self.kind == "file"

    def is_symlink(self) -> bool:
        """True for a symbolic link."""
        return self.kind == "link"


class Revision:
    """The files of one commit of the repository whose work tree is at `top`."""

    def __init__(self, top: bytes, commit: str, files: Mapping[bytes, TreeFile]) -> None:
        self.top = top
        self.commit = commit
        self._prefix = top.rstrip(b"/") + b"/"
        self._files = files
        # Directory → name → entry; a directory of a commit is never empty.
        self.directories: dict[bytes, dict[bytes, Entry]] = {top: {}}
        for path, file in files.items():
            place = self._prefix + path
            entry = Entry(place, os.path.basename(place), file.kind)
            while True:
                directory = os.path.dirname(place)
                known = directory in self.directories
                self.directories.setdefault(directory, {})[entry.name] = entry
                if known:
                    break
                place = directory
                entry = Entry(place, os.path.basename(place), "directory")

    def find(self, place: bytes) -> Entry | None:
        """What the commit has at `place`."""
        if place == self.top:
            return Entry(place, b"", "directory")
        return self.directories.get(os.path.dirname(place), {}).get(os.path.basename(place))

    def blob(self, place: bytes) -> Blob:
        """The file at `place`."""
        path = place[len(self._prefix) :]
        file = self._files[path]
        return Blob(self.top, self.commit, path, file.id, file.size)

    @cached_property
    def ignore_files(self) -> dict[bytes, bytes | None]:
        """The content of each ignore file by its place; None if it is too large. Raises CorpusError."""
        found = {
            entry.path: self.blob(entry.path)
            for entries in self.directories.values()
            for name in (b".m3ignore", b".gitignore")
            if (entry := entries.get(name)) is not None and entry.kind == "file"
        }
        small = {place: blob for place, blob in found.items() if blob.size <= IGNORE_FILE_LIMIT}
        contents = _contents(list(small.values()))
        return dict.fromkeys(found) | dict(zip(small, contents, strict=True))


class Revisions:
    """The commits that one ref names, one for each work tree that the user's paths lie in."""

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self._revisions: dict[bytes, Revision] = {}

    def at(self, place: bytes, shown: str) -> Revision:
        """The commit of the work tree around `place`, which need not exist any more.

        Raises UsageError when there is no work tree or no such commit in it, CorpusError when git
        cannot read it.
        """
        directory = place
        while not os.path.isdir(directory):
            directory = os.path.dirname(directory)
        tree = find_work_tree(directory)
        if tree.git_directory is None:
            raise UsageError(
                f"{shown} is in no git work tree, so that it cannot be read at {self.ref!r}.",
                "Leave out --ref, or name paths in a git work tree.",
            )
        if tree.top not in self._revisions:
            self._revisions[tree.top] = self._read(tree.top)
        return self._revisions[tree.top]

    def _read(self, top: bytes) -> Revision:
        try:
            commit = resolve_commit(top, self.ref)
            if commit is not None:
                return Revision(top, commit, read_tree(top, commit, sizes=True))
        except GitError as error:
            raise _unreadable(repr(self.ref), error) from error
        raise UsageError(
            f"{self.ref!r} names no commit of the repository at {os.fsdecode(top)}.",
            "`git log --oneline --all` lists what can be named; a shallow clone has only the latest commits.",
        )


class RevisionWalk(Walk):
    """A walk through the tree of a commit; `run` raises CorpusError when git cannot read from it."""

    def __init__(
        self, revision: Revision, root: bytes, options: WalkOptions, named: Collection[bytes] = ()
    ) -> None:
        super().__init__(root, options, named)
        self._revision = revision

    def run(self) -> None:
        """Walk the whole tree."""
        frames = [self._first_frame()]
        while frames:
            frame = frames.pop()
            entries = self._revision.directories[frame.path]
            frame = self._with_own_rules(frame, entries.keys() - {b".git"})
            for name in sorted(entries):
                inner = self._visit(cast("os.DirEntry[bytes]", entries[name]), frame)
                if inner is not None:
                    frames.append(inner)
        # Nothing else in a commit is neither file nor directory nor link.
        self.left = [
            replace(left, detail="a submodule") if left.reason is SkipReason.SPECIAL else left
            for left in self.left
        ]

    def _enter(self, tree: WorkTree) -> WorkTree:
        return _AllTracked(tree.top, tree.git_directory)

    def _directory_rules(
        self,
        tree: WorkTree,
        directory: bytes,
        names: Collection[bytes] | None,  # noqa: ARG002 - it is as quick to look
    ) -> tuple[IgnoreRules, ...]:
        found = []
        for name, binding in ((b".m3ignore", True), (b".gitignore", False)):
            path = os.path.join(directory, name)
            if path not in self._revision.ignore_files:
                continue
            label = os.fsdecode(path[tree.base :])
            content = self._revision.ignore_files[path]
            if content is None:
                self.notes.append(
                    f"The ignore rules of {label} were not applied: larger than {IGNORE_FILE_LIMIT:,} bytes."
                )
                continue
            base = len(directory.rstrip(b"/")) + 1
            lines = pattern_lines(content)
            found.append(IgnoreRules(lines, base, label, binding=binding, ignore_case=tree.ignore_case))
        return tuple(found)

    def _describe_link(self, path: bytes) -> str:  # noqa: ARG002 - where it leads is a matter of the disk
        return "not followed at a commit"


class _AllTracked(WorkTree):
    """A work tree as its commit has it: with nothing in it that git does not track."""

    def tracks(self, path: bytes) -> bool:  # noqa: ARG002 - the same for each
        return True

    def tracks_all(self, path: bytes) -> bool:  # noqa: ARG002 - the same for each
        return False


def with_data(sources: Iterable[Source]) -> Iterator[Source]:
    """The sources in the same order, those of a commit with their content in `data`.

    Reads ahead by some ten megabytes. Raises CorpusError for contents that git does not have, as in a
    partial clone.
    """
    batch: list[Source] = []
    size = 0
    for source in sources:
        if (
            size > _BATCH_BYTES
            or len(batch) >= _BATCH_FILES
            or _top(source) != _top(batch[0] if batch else source)
        ):
            yield from _filled(batch)
            batch, size = [], 0
        batch.append(source)
        size += source.blob.size if source.blob is not None else 0
    yield from _filled(batch)


def _filled(batch: list[Source]) -> Iterator[Source]:
    """`batch`, which is all from one repository, or has nothing from any."""
    contents = iter(_contents([source.blob for source in batch if source.blob is not None]))
    for source in batch:
        yield source if source.blob is None else replace(source, data=next(contents))


def _top(source: Source) -> bytes | None:
    return source.blob.top if source.blob is not None else None


def _contents(blobs: list[Blob]) -> list[bytes]:
    try:
        return read_blobs(blobs[0].top, [blob.id for blob in blobs]) if blobs else []
    except GitError as error:
        raise _unreadable(f"commit {blobs[0].commit}", error) from error


def _unreadable(name: str, error: GitError) -> CorpusError:
    return CorpusError(
        f"The files at {name} cannot be read: {error}.",
        "See what `git log` says there; a partial clone has no files of commits that were never checked out.",
    )
