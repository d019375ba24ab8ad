"""The latest commits of a repository, as a text to read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from m3cli.corpus.borrowed import (
    RENAMES,
    borrowing,
    commit_id,
    literal_paths,
    shallow_commits,
    translated,
)
from m3cli.corpus.names import printable, shown
from m3cli.corpus.worktree import GitError
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LISTED_FILES = 100  # for each commit; how many more there are is said


def log(top: bytes, count: int, commit: str = "HEAD", paths: Sequence[bytes] = ()) -> bytes:
    """The last `count` commits up to `commit` as UTF-8 text, newest first.

    Each has its id, ISO day and author, its message, and the files that it changed against its first
    parent, `LISTED_FILES` at most, with git's status letters. Of a shallow clone's oldest commit nobody
    knows what it changed. `paths` are as in `diff`; only commits that changed something there count.
    Raises UsageError when `commit` is none, CorpusError when git cannot read what is needed.
    """
    if count < 1:
        raise UsageError(f"A log of {count} commits was asked for.", "Ask for one at least.")
    with translated(top, "The history up to " + printable(commit)):
        tip = commit_id(top, commit)
        shallow = shallow_commits(top)
        with borrowing(top, tip) as git:
            literal = literal_paths(paths)
            answer = git(
                *("--literal-pathspecs", "log", "-z", f"--max-count={count}", "--no-patch", "--no-notes"),
                *("--no-show-signature", "--no-decorate", "--no-mailmap", "--no-color", "--encoding=UTF-8"),
                *("--format=%H%x00%P%x00%as%x00%an%x00%B", tip, "--", *map(os.fsdecode, literal)),
            )
            fields = answer.split(b"\0")
            commits = [fields[i : i + 5] for i in range(0, len(fields) - 4, 5)]
            known = [(parts[0], parts[1].split(b" ")[0]) for parts in commits if parts[0] not in shallow]
            files = _touched(git, known, literal)
        texts = [
            _commit_text(*parts, files=None if parts[0] in shallow else files.get(parts[0], []))
            for parts in commits
        ]
        return "\n".join(texts).encode()


def _touched(
    git: Callable[..., bytes], commits: Sequence[tuple[bytes, bytes]], paths: Sequence[bytes]
) -> dict[bytes, list[str]]:
    """For each commit, with its first parent or none, a line for each file that it changed."""
    if not commits:
        return {}
    stdin = b"".join(b"%b %b\n" % pair if pair[1] else pair[0] + b"\n" for pair in commits)
    command = ("--literal-pathspecs", "diff-tree", "--stdin", "-z", "-r", "--root", "--name-status")
    try:
        answer = git(*command, *RENAMES, "--no-ext-diff", "--", *map(os.fsdecode, paths), stdin=stdin)
    except GitError:
        # A clone without blobs cannot tell how similar two files are.
        answer = git(*command, "--no-renames", "--no-ext-diff", "--", *map(os.fsdecode, paths), stdin=stdin)
    files: dict[bytes, list[str]] = {}
    lines: list[str] = []
    fields = iter(answer.split(b"\0"))
    for field in fields:
        if len(field) >= 40:
            lines = files.setdefault(field, [])
        elif field:
            status = field[:1].decode()
            names = [shown(next(fields)) for _ in range(2 if status in "RC" else 1)]
            lines.append(f"{status} {' -> '.join(names)}")
    return files


def _commit_text(
    name: bytes, parents: bytes, date: bytes, author: bytes, message: bytes, *, files: list[str] | None
) -> str:
    merge = "merge of " + " ".join(parent[:10].decode() for parent in parents.split()) + "\n"
    lines = message.decode("utf-8", "surrogateescape").strip("\n").split("\n")
    # A tab is the one control character that belongs into a message.
    body = ["\t".join(printable(part) for part in line.rstrip("\r").split("\t")) for line in lines]
    text = f"commit {name[:10].decode()} {date.decode()} {shown(author)}\n"
    text += merge if b" " in parents else ""
    text += "".join(f"    {line}".rstrip() + "\n" for line in body) if any(body) else ""
    if files is None:
        return text + "The clone is shallow and ends here; what this one changed is not in it.\n"
    text += "\n" * bool(files)
    text += "".join(f"{line}\n" for line in files[:LISTED_FILES])
    return text + (f"… and {len(files) - LISTED_FILES:,} more files\n" if len(files) > LISTED_FILES else "")
