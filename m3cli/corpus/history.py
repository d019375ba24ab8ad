"""What git knows of the past of files: which commits changed them, and what a commit holds.

Everything comes from the object store. Whether a file in the work tree differs from the commit is
found out by hashing it here, because git would run the filters that the repository configures.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH120
from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.order import Standing, State
from m3cli.corpus.worktree import GitError, find_work_tree, run_git

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from m3cli.corpus.types import Source

# Commits of the past that count are between one and two times as many. The far end moves by whole
# steps: if it moved with every commit, then with every commit some file that nothing else is known of
# would fall back to the front, and all that follows it would move.
_STEP = 1000

_OBJECT_ID = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_KINDS: dict[bytes, Literal["file", "link", "submodule"]] = {
    b"100": "file",
    b"120": "link",
    b"160": "submodule",
}


@dataclass(frozen=True, slots=True)
class TreeFile:
    """An entry of a commit's tree that is no directory; `size` in bytes, 0 unless asked for."""

    kind: Literal["file", "link", "submodule"]
    id: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """The past of a work tree's files up to one commit. Paths are relative to its root.

    `touches` is explained in `Standing`; a path that is not in it was not changed in the window.
    `files` is the commit's tree. `lack` is a sentence about a history with nothing in it, else empty.
    """

    touches: Mapping[bytes, int]
    files: Mapping[bytes, TreeFile]
    lack: str = ""


def resolve_commit(top: bytes, ref: str) -> str | None:
    """The id of the commit that `ref` names in the work tree at `top`; None if it names none.

    Raises GitError.
    """
    # No name of a commit begins with a dash, and git would take it for an option.
    if not ref or ref.startswith("-") or "\0" in ref:
        return None
    answer = run_git(
        top, "rev-parse", "--verify", "--quiet", ref + "^{commit}", may_find_nothing=True
    ).strip()
    return answer.decode() if _OBJECT_ID.fullmatch(answer) else None


def read_history(top: bytes, commit: str | None = None) -> History:
    """Read the history of the work tree at `top` up to `commit`, by default HEAD.

    One pass over at most 2,000 commits, along first parents: what a merge brought in counts when it
    came in. A file that was renamed is a new one, since its text moves in any case. Raises GitError.
    """
    commit = commit or resolve_commit(top, "HEAD")
    if commit is None:
        return History({}, {}, f"The work tree {os.fsdecode(top)} has no commits yet.")
    count = int(run_git(top, "rev-list", "--first-parent", "--count", commit))
    window = count - max(0, count // _STEP - 1) * _STEP
    log = run_git(
        top,
        *("-c", "log.diffMerges=separate", "log", "--no-show-signature", "--first-parent", "-m"),
        *("--no-renames", "--no-ext-diff", "--raw", "--no-abbrev", "-z", "--format=commit %P"),
        *(f"--max-count={window}", commit, "--"),
    )
    touches = _touches(log, window)
    lack = ""
    if not touches and run_git(top, "rev-parse", "--is-shallow-repository").strip() == b"true":
        lack = f"The work tree {os.fsdecode(top)} is a shallow clone without any history."
    return History(touches, read_tree(top, commit), lack)


def _touches(log: bytes, commits: int) -> dict[bytes, int]:
    """Which of `commits` commits changed each path, from `git log --raw -z`, newest first.

    A commit without a parent does not count: it is the beginning of all, or in a shallow clone stands
    in for all that came before. Nor does a change of the mode alone.
    """
    touches: dict[bytes, int] = {}
    bit = 1 << commits
    counts = False
    fields = iter(log.split(b"\0"))
    for field in fields:
        if field.removeprefix(b"\n").startswith(b":"):  # a line feed ends the commit's own text
            path = next(fields)
            _, _, before, after, _ = field.split()
            if counts and before != after:
                touches[path] = touches.get(path, 0) | bit
        elif field:
            bit >>= 1
            counts = len(field.split()) > 1
    return touches


def read_tree(top: bytes, commit: str, *, sizes: bool = False) -> dict[bytes, TreeFile]:
    """All files of a commit by their paths, which are relative to `top`. Raises GitError."""
    listing = run_git(top, "ls-tree", "-r", "-z", "--full-tree", *(["--long"] if sizes else []), commit)
    files = {}
    for line in listing.split(b"\0"):
        if not line:
            continue
        facts, _, path = line.partition(b"\t")
        mode, _, name, *size = facts.split()
        kind = _KINDS.get(mode[:3])
        if kind is not None:
            files[path] = TreeFile(kind, name.decode(), int(size[0]) if size and size[0].isdigit() else 0)
    return files


def read_blobs(top: bytes, ids: Sequence[str], environment: Mapping[str, str] | None = None) -> list[bytes]:
    """The contents that `ids` name, all in memory. Raises GitError, also when one is missing.

    `environment` is that of `run_git`.
    """
    if not ids:
        return []
    names = "".join(f"{name}\n" for name in ids).encode()
    answer = run_git(top, "cat-file", "--batch", "--buffer", stdin=names, environment=environment)
    blobs: list[bytes] = []
    position = 0
    for _ in ids:
        end = answer.find(b"\n", position)
        facts = answer[position:end].split()
        if end < 0 or len(facts) != 3:
            raise GitError(f"git has no object {facts[0].decode() if facts else ids[len(blobs)]}")
        size = int(facts[2])
        blobs.append(answer[end + 1 : end + 1 + size])
        position = end + 1 + size + 1
    return blobs


def differs(file: bytes, blob_id: str) -> bool:
    """Tell if the content of `file` is another than that of a blob, line ends aside.

    git may have written CRLF where the commit has LF. What it put through another filter differs.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            data = stream.read()
    except OSError:
        return True
    return blob_id != id_of_blob(data, blob_id) and (
        b"\r\n" not in data or blob_id != id_of_blob(data.replace(b"\r\n", b"\n"), blob_id)
    )


def id_of_blob(data: bytes, like: str) -> str:
    """What git would call `data`, in a repository whose ids look `like` this."""
    algorithm = "sha1" if len(like) == 40 else "sha256"
    digest = hashlib.new(algorithm, b"blob %d\0" % len(data), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


class Standings:
    """How each source stands to the churn order; histories are read once for each repository.

    `notes` are whole sentences about what is not known of them.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._tops: dict[bytes, bytes | None] = {}
        self._histories: dict[tuple[bytes, str | None], History] = {}

    def of(self, sources: Iterable[Source]) -> list[Standing]:
        """The standing of each of `sources`, which are in path order. Raises GitError.

        A repository inside another one is taken for a dependency, which changes less, and ranks before
        all that hold others; else they rank in path order.
        """
        placed = [self._place(source) for source in sources]
        tops = list(dict.fromkeys(top for _, top, _ in placed if top is not None))
        nested = {top for top in tops if any(_is_inside(top, other) for other in tops)}
        ranks = {top: rank for rank, top in enumerate(sorted(tops, key=lambda top: top not in nested))}
        return [
            Standing(state, ranks[top] if top is not None else 0, touches) for state, top, touches in placed
        ]

    def _place(self, source: Source) -> tuple[State, bytes | None, int]:
        if source.blob is not None:
            blob = source.blob
            touches = self._history(blob.top, blob.commit).touches
            return State.COMMITTED, blob.top, touches.get(blob.path, 0)
        if source.file is None:
            return State.STREAM, None, 0
        file = os.path.realpath(os.fsencode(source.file))
        top = self._top(os.path.dirname(file))
        if top is None:
            return State.OUTSIDE, None, 0
        history = self._history(top, None)
        path = file[len(top.rstrip(b"/")) + 1 :]
        committed = history.files.get(path)
        is_same = committed is not None and committed.kind == "file" and not differs(file, committed.id)
        return State.COMMITTED if is_same else State.UNCOMMITTED, top, history.touches.get(path, 0)

    def _top(self, directory: bytes) -> bytes | None:
        """The root of the work tree that `directory` lies in."""
        if directory not in self._tops:
            tree = find_work_tree(directory)
            self._tops[directory] = tree.top if tree.git_directory is not None else None
        return self._tops[directory]

    def _history(self, top: bytes, commit: str | None) -> History:
        if (top, commit) not in self._histories:
            history = read_history(top, commit)
            self._histories[top, commit] = history
            if history.lack:
                self.notes.append(f"{history.lack} Its files stand in path order.")
        return self._histories[top, commit]


def _is_inside(top: bytes, other: bytes) -> bool:
    return top != other and top.startswith(other.rstrip(b"/") + b"/")
