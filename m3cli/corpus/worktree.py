"""What git knows of the tree that a directory lies in: its exclude files and tracked files.

A walk asks the `git` program twice at most for a work tree, and nothing that a repository brings
along can make it run something: no shell, no hooks, no file system monitor, no fetching. (Commands
that look at the content of files in the work tree are not for `run_git`: those run filters.)
Paths are bytes, absolute and without symbolic links.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH110, PTH112, PTH113, PTH118, PTH120, PTH123
from __future__ import annotations

import os
import subprocess
from functools import cached_property
from typing import IO, TYPE_CHECKING

from m3cli.corpus.ignore import IgnoreRules, read_rules

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMEOUT = 60  # seconds; reading the index of the largest known repositories takes a few
_SETTINGS_TIMEOUT = 10  # seconds; those are a few small files
_ENVIRONMENT = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "",
    "LC_ALL": "C",
}
# A hook that runs m3 has these set for its own repository; ours is found by its place.
_FOREIGN_VARIABLES = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_DIR",
    "GIT_INDEX_FILE",
    "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_WORK_TREE",
)


class GitError(Exception):
    """The git program is missing, refused or failed; the text says which, without a full stop."""


def git_environment(*, isolated: bool = False) -> dict[str, str]:
    """The variables that git is run with: it asks nothing, fetches nothing, and speaks English.

    With `isolated` it knows of no settings but those of the repository that it works on: neither
    the user's and the machine's configuration nor their attributes.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN_VARIABLES}
    if isolated:
        for name in list(environment):
            if name == "XDG_CONFIG_HOME" or (name.startswith("GIT_") and name != "GIT_EXEC_PATH"):
                del environment[name]
        environment.update(dict.fromkeys(("GIT_CONFIG_NOSYSTEM", "GIT_ATTR_NOSYSTEM"), "1"))
        # Attributes and ignore rules of the user are found by HOME alone.
        environment.update(dict.fromkeys(("GIT_CONFIG_GLOBAL", "HOME"), os.devnull))
    return environment | _ENVIRONMENT


def run_git(
    directory: bytes,
    *arguments: str,
    stdin: bytes | IO[bytes] = b"",
    may_find_nothing: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> bytes:
    """Run git for the work tree at `directory`, and only that one; return its standard output.

    With `may_find_nothing` the exit code 1 is an empty answer. `stdin` is what git reads, or an open file
    with it. `environment` is in place of `git_environment()`, `timeout` (in seconds) of the usual one. Raises
    GitError.
    """
    environment = {
        **(git_environment() if environment is None else environment),
        # A broken .git must not make git take a repository further up for this one.
        "GIT_CEILING_DIRECTORIES": os.fsdecode(os.path.dirname(directory)),
    }
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-pager"]
    try:
        done = subprocess.run(
            [*command, "-C", os.fsdecode(directory), *arguments],
            input=stdin if isinstance(stdin, bytes) else None,
            stdin=None if isinstance(stdin, bytes) else stdin,
            capture_output=True,
            check=False,
            env=environment,
            timeout=timeout or _TIMEOUT,
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed") from error
    except OSError as error:
        raise GitError(f"git could not be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise GitError(f"git gave no answer in {timeout or _TIMEOUT} seconds") from error
    if done.returncode == 0 or (may_find_nothing and done.returncode == 1):
        return done.stdout
    words = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
    raise GitError(f"git failed ({words[0]})")


class WorkTree:
    """The root of a git work tree, or a directory that is in none and is treated as if it were.

    `git_directory` is where info/exclude stands, None without git. `problems` collects whole
    sentences about what git could not tell.
    """

    def __init__(self, top: bytes, git_directory: bytes | None) -> None:
        self.top = top
        self.base = len(top.rstrip(b"/")) + 1
        self.git_directory = git_directory
        self.problems: list[str] = []
        self._hangs = False  # as git does where a setting includes a FIFO; it would do so again

    def rules(self) -> tuple[IgnoreRules, ...]:
        """Read the rules that hold for the whole tree, strongest first: info/exclude, global."""
        files = [(self._global_excludes(), "global git excludes")]
        if self.git_directory is not None:
            files.insert(0, (os.path.join(self.git_directory, b"info", b"exclude"), ".git/info/exclude"))
        found = []
        for path, label in files:
            if path is None:
                continue
            try:
                rules = read_rules(path, self.base, label, follow=True, ignore_case=self.ignore_case)
            except OSError as error:
                self.problems.append(f"The ignore rules of {label} were not applied: {describe(error)}.")
                continue
            if rules is not None:
                found.append(rules)
        return tuple(found)

    @property
    def ignore_case(self) -> bool:
        """True where git compares names without case, as it does by default on macOS."""
        return self._config.get(b"core.ignorecase", b"").lower() in (b"true", b"yes", b"on", b"1")

    def tracks(self, path: bytes) -> bool:
        """Tell if `path` is in git's index, or is a directory with something in it that is."""
        return path in self._tracked[0] or path in self._tracked[1]

    def tracks_all(self, path: bytes) -> bool:
        """Tell if `path` itself is in the index, which for a directory means a submodule."""
        return path in self._tracked[0]

    @cached_property
    def _tracked(self) -> tuple[frozenset[bytes], frozenset[bytes]]:
        """All entries of the index, and all directories that hold any of them."""
        if self.git_directory is None:
            return frozenset(), frozenset()
        try:
            if self._hangs:
                raise GitError("git gave no answer before")
            # All of them and not only the ignored ones: then git need not open any ignore file,
            # which could be a FIFO, and the answer does not depend on git's version.
            listing = run_git(self.top, "ls-files", "--cached", "-z")
        except GitError as error:
            self.problems.append(f"Tracked files that match an ignore rule may be left out: {error}.")
            return frozenset(), frozenset()
        prefix = self.top.rstrip(b"/") + b"/"
        files = frozenset(prefix + name for name in listing.split(b"\0") if name)
        directories: set[bytes] = set()
        for file in files:
            directory = os.path.dirname(file)
            while directory not in directories and len(directory) >= self.base:
                directories.add(directory)
                directory = os.path.dirname(directory)
        return files, frozenset(directories)

    @cached_property
    def _config(self) -> dict[bytes, bytes]:
        pattern = r"^core\.(excludesfile|ignorecase)$"
        arguments = ("config", "-z", "--type=path", "--get-regexp", pattern)
        try:
            answer = run_git(self.top, *arguments, may_find_nothing=True, timeout=_SETTINGS_TIMEOUT)
        except GitError as error:
            self._hangs = isinstance(error.__cause__, subprocess.TimeoutExpired)
            if self.git_directory is not None:
                self.problems.append(f"The default place of git's global excludes was used: {error}.")
            return {}
        pairs = (entry.partition(b"\n") for entry in answer.split(b"\0") if entry)
        return {key.lower(): value for key, _, value in pairs}

    def _global_excludes(self) -> bytes | None:
        configured = self._config.get(b"core.excludesfile")
        if configured is not None:
            return os.path.join(self.top, configured) if configured else None
        if home := os.environb.get(b"XDG_CONFIG_HOME"):
            return os.path.join(home, b"git", b"ignore")
        if home := os.environb.get(b"HOME"):
            return os.path.join(home, b".config", b"git", b"ignore")
        return None


def find_work_tree(directory: bytes) -> WorkTree:
    """Find the work tree that `directory` lies in; without one, `directory` stands for it."""
    top = directory
    while True:
        git_directory = git_directory_of(top)
        if git_directory is not None:
            return WorkTree(top, git_directory)
        parent = os.path.dirname(top)
        if parent == top:
            return WorkTree(directory, None)
        top = parent


def git_directory_of(top: bytes) -> bytes | None:
    """Return the directory with the shared files of the repository at `top`; None if there is none.

    `.git` is that directory, or a file that leads to it, as in submodules and linked work trees.
    Like git, this does not take an empty or broken `.git` directory for a repository.
    """
    git_directory = os.path.join(top, b".git")
    if os.path.isfile(git_directory):
        target = _first_line(git_directory)
        if not target.startswith(b"gitdir: "):
            return None
        git_directory = os.path.join(top, target.removeprefix(b"gitdir: "))
    if not os.path.lexists(os.path.join(git_directory, b"HEAD")):
        return None
    common = _first_line(os.path.join(git_directory, b"commondir"))
    shared = os.path.join(git_directory, common) if common else git_directory
    is_repository = all(os.path.isdir(os.path.join(shared, part)) for part in (b"objects", b"refs"))
    # git would wait for ever for what stands in a FIFO.
    files = [
        os.path.join(git_directory, name) for name in (b"HEAD", b"commondir", b"index", b"config.worktree")
    ]
    files += [os.path.join(shared, name) for name in (b"config", b"packed-refs", b"shallow")]
    is_readable = all(os.path.isfile(file) for file in files if os.path.exists(file))
    return shared if is_repository and is_readable else None


def _first_line(path: bytes) -> bytes:
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read(4096).partition(b"\n")[0].rstrip(b"\r")
    except OSError:
        return b""


def describe(error: OSError) -> str:
    """Return the operating system's words for an error, without a full stop."""
    return error.strerror or str(error)
