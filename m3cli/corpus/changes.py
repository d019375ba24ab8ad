"""What changed in a work tree since a commit, as a text to read.

git reads it out of a repository of our own (see `m3cli.corpus.borrowed`); files of the work tree are read
here and not by git.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH115, PTH118, PTH120
from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from m3cli.corpus.borrowed import (
    RENAMES,
    borrowing,
    commit_id,
    is_in,
    literal_paths,
    quoted,
    translated,
)
from m3cli.corpus.history import differs, read_blobs, resolve_commit
from m3cli.corpus.names import printable
from m3cli.corpus.types import SkipReason
from m3cli.corpus.walk import Walk, WalkOptions
from m3cli.corpus.worktree import git_directory_of, run_git

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

FILE_LIMIT = 10_000_000  # bytes; larger files of the work tree are taken to be as in the base

_BATCH = 32_000_000  # bytes of changed files that are in memory at a time
_REF = "refs/m3/worktree"
_LINK, _SUBMODULE, _FILE, _PROGRAM = b"120000", b"160000", b"100644", b"100755"
_LFS_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?oid sha256:([0-9a-f]{64})\n"
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of a commit or of the index; `size` in bytes, 0 where it is not known."""

    mode: bytes
    id: str
    size: int = 0
    is_sparse: bool = False


@dataclass(frozen=True, slots=True)
class _Changed:
    """A path of the work tree that is not as in the base; without `data` its content is that of `id`."""

    path: bytes
    mode: bytes
    id: str = ""
    data: bytes | None = None


def diff(top: bytes, base: str = "HEAD", paths: Sequence[bytes] = (), *, head: str | None = None) -> bytes:
    """The unified diff, with renames, from the commit `base` to the work tree at `top` as it is now.

    `paths` are files and directories relative to `top`, taken literally; without any it is the whole
    tree. Besides the tracked files those count that no ignore file names. Line ends (CRLF or LF) are
    those of the base. What cannot be read, is larger than `FILE_LIMIT` or is no file counts as
    unchanged, and a submodule is the commit that is checked out. No difference is b"".
    With `head` it is the diff to that commit, and the work tree does not count.
    Raises UsageError when `base` is no commit, CorpusError when git cannot read what is needed.
    """
    with translated(top, "The changes since " + printable(base)):
        commit = commit_id(top, base)
        if head is not None:
            after = commit_id(top, head)
            with borrowing(top, commit) as git:
                return patch_between(git, commit, after, literal_paths(paths))
        before = {path: entry for path, entry in tree_entries(top, commit).items() if is_in(path, paths)}
        gone, changes = _changes(top, before, paths)
        batches = _batches(top, before, changes)
        batch = next(batches, [])
        if not gone and not batch:
            return b""
        with borrowing(top, commit) as git:
            parent = commit
            while True:
                _write(git, parent, gone, batch)
                parent, gone = f"{_REF}^0", []
                if not (batch := next(batches, [])):
                    break
            return patch_between(git, commit, _REF, ())


def patch_between(git: Callable[..., bytes], before: str, after: str, paths: Sequence[bytes]) -> bytes:
    """The unified diff of two commits, by the git of `borrowing`. Raises GitError."""
    places = tuple(map(os.fsdecode, paths))
    raw = git("--literal-pathspecs", "diff-tree", "-r", "-z", "--name-only", before, after, "--", *places)
    # Quoting is for bytes that are not UTF-8; other names are easier to read without it.
    quote = "false" if _is_utf8(raw) else "true"
    return git(
        *("-c", f"core.quotePath={quote}", "--literal-pathspecs", "diff-tree", "-r", "-p", *RENAMES),
        *("--unified=3", "--diff-algorithm=myers", "--indent-heuristic", "--inter-hunk-context=0"),
        *("--abbrev=10", "--src-prefix=a/", "--dst-prefix=b/", "--no-relative", "--submodule=short"),
        *("--no-color", "--no-ext-diff", "--no-textconv", before, after, "--", *places),
    )


def tree_entries(top: bytes, commit: str) -> dict[bytes, _Entry]:
    """The files of a commit, links and submodules among them, by path. Raises GitError."""
    files = {}
    for line in run_git(top, "ls-tree", "-r", "-z", "--long", "--full-tree", commit).split(b"\0"):
        facts, _, path = line.partition(b"\t")
        if path:
            mode, _, name, size = facts.split()
            files[path] = _Entry(mode, name.decode(), int(size) if size.isdigit() else 0)
    return files


def _index(top: bytes) -> dict[bytes, _Entry]:
    """The entries of the index; of a path in conflict, any one."""
    files = {}
    for line in run_git(top, "ls-files", "--cached", "--stage", "-t", "-z").split(b"\0"):
        facts, _, path = line.partition(b"\t")
        if path:
            tag, mode, name, _ = facts.split()
            files[path] = _Entry(mode, name.decode(), is_sparse=tag == b"S")
    return files


def _untracked(top: bytes) -> Iterator[bytes]:
    """What a walk finds that no ignore file names, less what belongs to repositories further down."""
    walk = Walk(top, WalkOptions(hidden=True))
    walk.run()
    base = len(top.rstrip(b"/")) + 1
    links = [left.path for left in walk.left if left.reason is SkipReason.LINK]
    nested: dict[bytes, bool] = {top: False}

    def is_nested(directory: bytes) -> bool:
        if directory not in nested:
            is_own = git_directory_of(directory) is not None
            nested[directory] = is_own or is_nested(os.path.dirname(directory))
        return nested[directory]

    for file in (*walk.files, *links):
        if not is_nested(os.path.dirname(file)):
            yield file[base:]


def _changes(
    top: bytes, before: Mapping[bytes, _Entry], paths: Sequence[bytes]
) -> tuple[list[bytes], list[tuple[bytes, bytes, str]]]:
    """The paths of `before` that are gone, and what may be changed: path, mode, and id if it is known."""
    index = {path: entry for path, entry in _index(top).items() if is_in(path, paths)}
    candidates = {*index, *(path for path in _untracked(top) if is_in(path, paths))}
    answer = run_git(top, "config", "--type=bool", "--get", "core.fileMode", may_find_nothing=True)
    keeps_modes = answer.strip() != b"false"
    is_plain = partial(_is_plain_directory, top, {})
    gone = [path for path in before if path not in candidates]
    changes: list[tuple[bytes, bytes, str]] = []
    for path in sorted(candidates):
        # git itself writes no such names to an index, but others may.
        if any(part in (b"", b".", b"..") or part.lower() == b".git" for part in path.split(b"/")):
            continue
        old, staged = before.get(path), index.get(path)
        if staged is not None and staged.mode == _SUBMODULE:
            place = os.path.join(top, path)
            is_there = is_plain(path) and git_directory_of(place) is not None
            name = (resolve_commit(place, "HEAD") if is_there else None) or staged.id
            if old is None or (old.mode, old.id) != (staged.mode, name):
                changes.append((path, staged.mode, name))
            continue
        try:
            facts = os.lstat(os.path.join(top, path)) if is_plain(os.path.dirname(path)) else None
        except (FileNotFoundError, NotADirectoryError):
            facts = None
        except OSError:
            continue
        if facts is None or stat.S_ISDIR(facts.st_mode):
            if staged is not None and staged.is_sparse:
                if old is None or (old.mode, old.id) != (staged.mode, staged.id):
                    changes.append((path, staged.mode, staged.id))
            elif old is not None:
                gone.append(path)
        elif stat.S_ISLNK(facts.st_mode):
            changes.append((path, _LINK, ""))
        elif stat.S_ISREG(facts.st_mode) and facts.st_size <= FILE_LIMIT:
            mode = _PROGRAM if facts.st_mode & stat.S_IXUSR else _FILE
            if not keeps_modes:
                known = staged or old
                mode = known.mode if known is not None and known.mode in (_FILE, _PROGRAM) else _FILE
            changes.append((path, mode, ""))
    return sorted(gone), changes


def _is_plain_directory(top: bytes, known: dict[bytes, bool], directory: bytes) -> bool:
    """Tell if no link is on the way to `directory`: what is behind one is not in the tree."""
    if directory not in known:
        place = os.path.join(top, directory) if directory else top
        known[directory] = os.path.realpath(place) == place
    return known[directory]


def _batches(
    top: bytes, before: Mapping[bytes, _Entry], candidates: Iterable[tuple[bytes, bytes, str]]
) -> Iterator[list[_Changed]]:
    """Those of `candidates` that really differ from `before`, some ten megabytes at a time."""
    batch: list[_Changed] = []
    size = 0
    for path, mode, name in candidates:
        old = before.get(path)
        if name:
            batch.append(_Changed(path, mode, name))
            continue
        file = os.path.join(top, path)
        is_file = old is not None and mode != _LINK and old.mode in (_FILE, _PROGRAM, b"100664")
        if is_file and old is not None and not differs(file, old.id):
            if mode != old.mode != b"100664":
                batch.append(_Changed(path, mode, old.id))
            continue
        try:
            data = os.readlink(file) if mode == _LINK else _read(file)
        except OSError:
            continue
        if data is None:
            continue
        batch.append(_Changed(path, mode, data=data))
        size += len(data) + (old.size if old is not None else 0)
        if size > _BATCH:
            if compared := _compared(top, before, batch):
                yield compared
            batch, size = [], 0
    if compared := _compared(top, before, batch):
        yield compared


def _read(file: bytes) -> bytes | None:
    """The content of a regular file within the limit; None for what became something else."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = stream.read(FILE_LIMIT + 1)
    return data if len(data) <= FILE_LIMIT else None


def _compared(top: bytes, before: Mapping[bytes, _Entry], batch: list[_Changed]) -> list[_Changed]:
    """The batch with the line ends of the base, less what is then no different from it."""
    found = [
        old
        for change in batch
        if change.data is not None
        and (old := before.get(change.path)) is not None
        and old.mode != _SUBMODULE
        and old.size <= FILE_LIMIT
    ]
    names = list(dict.fromkeys(entry.id for entry in found))
    contents = dict(zip(names, read_blobs(top, names), strict=True))
    kept = []
    for change in batch:
        entry = before.get(change.path)
        content = contents.get(entry.id) if entry is not None else None
        if (
            change.data is None
            or entry is None
            or content is None
            or (entry.mode == _LINK) != (change.mode == _LINK)
        ):
            kept.append(change)
        elif change.mode == _LINK:
            kept += [change] if change.data != content else []
        elif (data := _as_in(content, change.data)) != content:
            kept.append(_Changed(change.path, change.mode, data=data))
        elif entry.mode != change.mode:
            kept.append(_Changed(change.path, change.mode, entry.id))
    return kept


def _as_in(base: bytes, data: bytes) -> bytes:
    """`data` as git would store it over `base`: with its line ends, or as its Git LFS pointer."""
    plain = data.replace(b"\r\n", b"\n")
    if plain == base.replace(b"\r\n", b"\n"):
        return base
    pointer = _LFS_POINTER.match(base) if len(base) < 1024 else None
    if pointer:
        digest = hashlib.sha256(data).hexdigest().encode()
        facts = (digest, len(data))
        new = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % facts
        return base if digest == pointer[1] else new
    if b"\0" in data:
        return data
    if b"\r\n" not in base and b"\n" in base:
        return plain
    if b"\r\n" in base and base.count(b"\r\n") == base.count(b"\n"):
        return plain.replace(b"\n", b"\r\n")
    return data


def _write(git: Callable[..., bytes], parent: str, gone: Iterable[bytes], batch: Iterable[_Changed]) -> None:
    """Store the tree of `parent` with what changed as the tree of a commit at `_REF`."""
    stream = [b"commit %b\ncommitter m3 <m3> 0 +0000\ndata 0\nfrom %b\n" % (_REF.encode(), parent.encode())]
    # What is gone comes first: a file may have made place for a directory of the same name.
    stream += [b"D %b\n" % quoted(path) for path in gone]
    for change in batch:
        if change.data is None:
            stream.append(b"M %b %b %b\n" % (change.mode, change.id.encode(), quoted(change.path)))
        else:
            head = b"M %b inline %b\ndata %d\n" % (change.mode, quoted(change.path), len(change.data))
            stream += [head, change.data, b"\n"]
    git("fast-import", "--quiet", "--force", stdin=b"".join(stream))


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
