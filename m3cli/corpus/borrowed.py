"""A repository of our own that only borrows the objects of another one, for git to read from.

Neither the other one's configuration and attributes nor the user's have any say in it: no filter, text
conversion, diff driver, hook, pager or signature program runs, and the same history gives the same bytes
everywhere. Nothing is written to the repository that is asked about.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH118, PTH123
from __future__ import annotations

import os
import re
import tempfile
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from m3cli.corpus.history import resolve_commit
from m3cli.corpus.names import printable, shown
from m3cli.corpus.worktree import GitError, git_directory_of, git_environment, run_git
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RENAMES = ("-M50%", "-l1000")


@contextmanager
def translated(top: bytes, what: str) -> Iterator[None]:
    """Raise CorpusError where git or the file system fails at `what`."""
    try:
        yield
    except GitError as error:
        raise CorpusError(
            f"{what} cannot be read in {shown(top)}: {printable(str(error))}.",
            "See what `git status` says there; a partial clone lacks files that were never checked out.",
        ) from error
    except OSError as error:
        raise CorpusError(
            f"{what} cannot be read in {shown(top)}: {error.strerror or error}.",
            "Check the permissions there, and the space for temporary files.",
        ) from error


def commit_id(top: bytes, ref: str) -> str:
    """The id of the commit that `ref` names. Raises UsageError when there is none."""
    if git_directory_of(top) is None:
        raise UsageError(
            f"{shown(top)} is no git work tree, so that it has no changes or history.",
            "Name a path in a git work tree.",
        )
    commit = resolve_commit(top, ref)
    if commit is not None:
        return commit
    if resolve_commit(top, "HEAD") is None:
        raise UsageError(
            f"There are no commits in the repository at {shown(top)}.", "Commit something first."
        )
    raise UsageError(
        f"{ref!r} names no commit of the repository at {shown(top)}.",
        "`git log --oneline --all` lists what can be named; a shallow clone has only the latest commits.",
    )


def _narrows(paths: Sequence[bytes]) -> bool:
    return bool(paths) and all(path.strip(b"/") not in (b"", b".") for path in paths)


def is_in(path: bytes, paths: Sequence[bytes]) -> bool:
    """Whether `path` is one of `paths` or below one; without any it is."""
    if not _narrows(paths):
        return True
    return any(path == wanted or path.startswith(wanted + b"/") for wanted in map(_tidy, paths))


def literal_paths(paths: Sequence[bytes]) -> list[bytes]:
    """`paths` as git takes them, none for all."""
    return [_tidy(path) for path in paths] if _narrows(paths) else []


def _tidy(path: bytes) -> bytes:
    return path.rstrip(b"/").removeprefix(b"./")


@contextmanager
def borrowing(top: bytes, commit: str) -> Iterator[Callable[..., bytes]]:
    """A bare repository in a temporary directory that has the objects of the one at `top`: its `run_git`."""
    shared = git_directory_of(top)
    if shared is None:
        raise GitError("the repository is gone")
    with tempfile.TemporaryDirectory(prefix="m3-", ignore_cleanup_errors=True) as name:
        place = os.path.realpath(name)
        environment = git_environment(isolated=True) | {
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_DEFAULT_HASH": "sha1" if len(commit) == 40 else "sha256",
        }
        directory = os.path.join(os.fsencode(place), b"git")
        options = ("--bare", "--quiet", "--template=")
        run_git(os.fsencode(place), "init", *options, os.fsdecode(directory), environment=environment)
        os.makedirs(os.path.join(directory, b"objects", b"info"), exist_ok=True)  # noqa: PTH103 - bytes
        with open(os.path.join(directory, b"objects", b"info", b"alternates"), "wb") as file:
            file.write(quoted(os.path.realpath(os.path.join(shared, b"objects"))) + b"\n")
        if boundary := shallow_commits(top):
            with open(os.path.join(directory, b"shallow"), "wb") as file:
                file.write(b"".join(name + b"\n" for name in sorted(boundary)))
        yield partial(run_git, directory, environment=environment | {"GIT_DIR": os.fsdecode(directory)})


def shallow_commits(top: bytes) -> frozenset[bytes]:
    """The ids of the commits at which a shallow clone ends."""
    shared = git_directory_of(top)
    file = os.path.join(shared or top, b"shallow")
    if shared is None or not os.path.isfile(file):  # noqa: PTH113 - bytes
        return frozenset()
    with open(file, "rb") as stream:
        return frozenset(line for line in stream.read().split() if re.fullmatch(rb"[0-9a-f]{40,64}", line))


def quoted(path: bytes) -> bytes:
    """`path` in quotes, as git reads it in its own files."""
    return b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"'
