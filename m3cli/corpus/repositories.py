"""Repositories in a corpus: remote ones, cloned for the time of reading, and what git says of local ones."""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH112, PTH118, PTH120
from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from m3cli.corpus.names import unused
from m3cli.corpus.types import Document
from m3cli.corpus.worktree import find_work_tree
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import ExitStack
    from pathlib import Path

    from m3cli.corpus.corpus import CorpusRequest


def with_clones(request: CorpusRequest, stack: ExitStack) -> CorpusRequest:
    """`request` with a directory for each URL among its paths, which lasts as long as `stack`.

    The clones are at the request's `ref`, if it names one. Raises UsageError, CorpusError.
    """
    if not any(":" in path for path in request.paths):
        return request
    from m3cli.corpus.remote import cloned, is_remote

    remote = [path for path in request.paths if is_remote(path)]
    if not remote:
        return request
    if request.ref is not None and len(remote) < len(request.paths) + len(request.listed):
        raise UsageError(
            "--ref cannot be of a remote repository and of local files at once.", "Pack them one by one."
        )
    directories = {url: str(stack.enter_context(cloned(url, request.ref, 1 + request.log))) for url in remote}
    return replace(request, paths=tuple(directories.get(path, path) for path in request.paths), ref=None)


def git_sections(request: CorpusRequest, cwd: Path, used: Collection[str]) -> Iterator[Document]:
    """The last commits and the changes of each work tree that was named, as documents of their own.

    Raises UsageError for a commit that does not exist or files that are in no work tree, CorpusError
    when git fails.
    """
    if request.diff is None and not request.log:
        return
    from m3cli.corpus.changes import diff
    from m3cli.corpus.commits import log

    if request.diff is not None and request.ref is not None:
        raise UsageError(
            "Changes since a commit are those of the files on the disk, and --ref reads others.",
            "Leave out --ref, or --diff and --base.",
        )
    for top, paths in _work_trees(request, cwd).items():
        sections: list[tuple[str, bytes]] = []
        if request.log:
            sections.append((f"git log -{request.log}", log(top, request.log, request.ref or "HEAD", paths)))
        if request.diff is not None:
            sections.append((f"git diff {request.diff}", diff(top, request.diff, paths)))
        taken = set(used)
        for name, data in sections:
            path = unused(name, taken, {})
            taken.add(path)
            if data.strip():
                yield Document(path, data.decode("utf-8", "replace"), "utf-8")


def _work_trees(request: CorpusRequest, cwd: Path) -> dict[bytes, list[bytes]]:
    """The root of each work tree that something named lies in, and what of it was named, relative to it."""
    trees: dict[bytes, list[bytes]] = {}
    for path in (*request.paths, *request.listed):
        if path == "-":
            continue
        place = os.path.realpath(os.path.join(os.fsencode(cwd), os.fsencode(path)))
        tree = find_work_tree(place if os.path.isdir(place) else os.path.dirname(place))
        if tree.git_directory is not None:
            trees.setdefault(tree.top, []).append(place[tree.base :])
    if not trees:
        raise UsageError(
            "Nothing that was named is in a git work tree, which --diff, --base and --log need.",
            "Leave them out.",
        )
    return {top: [] if b"" in paths else paths for top, paths in trees.items()}
