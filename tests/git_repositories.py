"""Git repositories for tests: by hand, or hundreds of commits at once."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# A commit's id depends on them.
IDENTITY = {
    f"GIT_{role}_{fact}": value
    for role in ("AUTHOR", "COMMITTER")
    for fact, value in (("NAME", "t"), ("EMAIL", "t@example.org"), ("DATE", "1700000000 +0000"))
}


def git(directory: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """Run git in `directory`; any failure fails the test."""
    command = ["git", "-c", "protocol.file.allow=always", "-C", str(directory), *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, check=False, env={**os.environ, **IDENTITY}
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make_repository(directory: Path, files: Mapping[str, str | bytes] | None = None) -> Path:
    """A repository on branch main, with a first commit of `files` if there are any."""
    directory.mkdir(parents=True, exist_ok=True)
    git(directory, "init", "--quiet", "--initial-branch=main")
    if files:
        commit(directory, files)
    return directory


def write(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """Write `files`, making their directories."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def commit(directory: Path, files: Mapping[str, str | bytes], message: str = "x") -> str:
    """Write `files`, commit all that is there, ignored or not; return the commit's id."""
    write(directory, files)
    git(directory, "add", "--all", "--force", ".")
    git(directory, "commit", "--quiet", "--allow-empty", f"--message={message}")
    return head(directory)


def head(directory: Path) -> str:
    """The id of the commit that is checked out."""
    return git(directory, "rev-parse", "HEAD").decode().strip()


def import_commits(directory: Path, commits: Sequence[Mapping[bytes, bytes]]) -> None:
    """A new repository with commits, each of which writes some files; nothing is checked out."""
    make_repository(directory)
    stream: list[bytes] = []
    for number, files in enumerate(commits):
        stream.append(b"commit refs/heads/main\ncommitter t <t@example.org> %d +0000\ndata 0\n" % number)
        for name, content in files.items():
            quoted = b"".join(b"\\%03o" % byte for byte in name)
            stream.append(b'M 100644 inline "%s"\ndata %d\n%s\n' % (quoted, len(content), content))
    git(directory, "fast-import", "--quiet", stdin=b"".join(stream))
