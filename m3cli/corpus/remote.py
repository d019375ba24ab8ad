"""A repository elsewhere, named by its URL: a shallow clone in a private directory while it is read.

Fetching uses the user's own settings, such as a proxy and credential helpers. The checkout uses none: what
a repository's attributes name, a filter of the user's among them, is not run, and every file has the
bytes that were committed. Symbolic links become links, which nothing in this room follows.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.names import printable
from m3cli.corpus.worktree import describe, git_environment
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from m3cli.errors import M3Error

_SCHEMES = ("https", "http", "ssh", "git", "file")
_URL = re.compile(rf"({'|'.join(_SCHEMES)})://.+", re.IGNORECASE | re.DOTALL)
_SCP = re.compile(r"[^/\\\s:@]+@(?P<host>\[[0-9a-fA-F:.]+\]|[^/\\\s:@\[\]]+):.+", re.DOTALL)
_USER_INFORMATION = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"\?.*", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
# What git-check-ref-format forbids, and what a refspec gives a meaning.
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-+/.]|[/.]$|\.lock$")
_COMMIT_ID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_TIMEOUT = 900.0  # seconds
# A file's content is as it was committed, whatever the repository's attributes ask for.
_ATTRIBUTES = "* -text -eol -filter -ident -working-tree-encoding\n"
_QUIET = (
    *("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0"),
    *("-c", "maintenance.auto=false", "-c", "submodule.recurse=false", "--no-pager"),
)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A way in which git fails, known by its words; `{name}` and `{ref}` are filled in."""

    words: str
    kind: type[M3Error]
    message: str
    hint: str


# The first that matches counts.
_FAILURES = (
    _Failure(
        r"no space left|disk quota exceeded|file too large",
        CorpusError,
        "The disk is full, so that {name} cannot be cloned.",
        "Make room there, or set TMPDIR to a directory on another disk.",
    ),
    _Failure(
        r"transport '.*' not allowed",
        CorpusError,
        "{name} cannot be cloned: your git configuration or the server leads to another protocol.",
        "Name the address that it leads to; `git config --get-regexp '^url'` shows what is rewritten.",
    ),
    _Failure(
        r"couldn't find remote ref HEAD\b",
        UsageError,
        "{name} has no commits on its default branch.",
        "Name another branch with --ref.",
    ),
    _Failure(
        r"couldn't find remote ref|not our ref|unadvertised object|no such ref|invalid refspec",
        UsageError,
        "{name} has no branch, tag or commit {ref} that it gives out.",
        "`git ls-remote` lists branches and tags; a commit needs its whole id, and a server may refuse it.",
    ),
    _Failure(
        r"could not read (?:username|password)|authentication failed|permission denied \(|terminal prompts"
        r"|host key verification failed|returned error: 40[13]|access denied|invalid credentials",
        CorpusError,
        "{name} does not exist, or needs a login that git does not have.",
        "Check the address with `git ls-remote`, which may ask; a credential helper or key serves m3 too.",
    ),
    _Failure(
        r"could not resolve|failed to connect|unable to connect|couldn't connect"
        r"|connection (?:refused|reset|timed)|network is unreachable|no route to host|timed out"
        r"|ssl|certificate|name or service not known"
        r"|temporary failure in name resolution|error in the http2|early eof|hung up unexpectedly",
        CorpusError,
        "{name} cannot be reached: {words}.",
        "Check the network, the proxy and the host's name, and try again.",
    ),
    _Failure(
        r"not found|does not appear to be a git repository|does not exist|no such file|not a git repository"
        r"|returned error: 404|repository not exported",
        UsageError,
        "There is no git repository at {name}.",
        "Check the address; `git ls-remote` tells whether git finds it.",
    ),
)


def is_remote(argument: str) -> bool:
    r"""Tell a repository's URL from a path: `https://`, `ssh://`, `git://`, `file://`, `user@host:path`.

    Whatever exists on the disk is a path, and so is `C:\directory`.
    """
    if os.path.lexists(argument.replace("\0", "")):
        return False
    return _URL.fullmatch(argument) is not None or _SCP.fullmatch(argument) is not None


def masked(url: str) -> str:
    """A URL as it may be shown: without user, password and query, printable."""
    return printable(_QUERY.sub("?***", _USER_INFORMATION.sub("***@", url)) if "://" in url else url)


@contextmanager
def cloned(
    url: str,
    ref: str | None = None,
    history: int = 1,
    *,
    directory: Path | None = None,
    timeout: float = _TIMEOUT,
    report: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """Clone the repository at `url`, give the work tree, and remove it when the block ends, however it ends.

    `ref` is a branch, a tag or a whole commit id, by default the repository's default branch. `history` is
    how many of the latest commits come along. The clone lies in a private directory that is made in
    `directory`, by default that of temporary files; it has no submodules, and Git LFS files are pointers.
    `report` gets a sentence at the start. `timeout` is in seconds.
    Raises UsageError for what does not exist or may not be named, CorpusError for what cannot be fetched.
    """
    scheme = _check(url, ref, history)
    name = masked(url)
    if report is not None:
        report(f"Cloning {name}{f' at {printable(ref)}' if ref else ''} …")
    try:
        holder = tempfile.TemporaryDirectory(prefix="m3-clone-", dir=directory, ignore_cleanup_errors=True)
    except OSError as error:
        raise CorpusError(
            f"No directory can be made for a clone of {name}: {describe(error)}.",
            "Make room there, or set TMPDIR to a directory that can be written to.",
        ) from error
    with holder:
        tree = Path(holder.name, _directory_name(url))
        clone = _Clone(url, ref or "HEAD", tree, timeout)
        clone.fetch(scheme, history)
        clone.check_out()
        yield tree


def _check(url: str, ref: str | None, history: int) -> str:
    """The protocol of a URL. Raises UsageError for one, or a ref, that git could take for something else."""
    scp = _SCP.fullmatch(url)
    match = _URL.fullmatch(url)
    host = scp["host"] if scp else _USER_INFORMATION.sub("", url).partition("://")[2]
    if url.startswith("-") or _CONTROL.search(url) or host.startswith("-") or not (match or scp):
        raise UsageError(
            f"{masked(url)!r} is no address of a repository that m3 clones.",
            "Name one that begins with https://, ssh://, git:// or file://, or like git@host:path.",
        )
    if ref is not None and (not ref or _NO_REF.search(ref)):
        raise UsageError(
            f"{printable(ref)!r} is no branch, tag or commit id, so that {masked(url)} cannot be read at it.",
            "Name a branch or tag as `git ls-remote` lists it, or a whole commit id.",
        )
    if history < 1:
        raise UsageError(f"A clone with {history} commits was asked for.", "Ask for one at least.")
    return match[1].lower() if match else "ssh"


def _directory_name(url: str) -> str:
    """The last part of a URL, as `git clone` names its directory, if that is harmless."""
    last = re.split(r"[/:]", _QUERY.sub("", url).rstrip("/").removesuffix("/.git").rstrip("/"))[-1]
    last = last.removesuffix(".git")
    return last if _NAME.fullmatch(last) and len(last) <= 100 else "repository"


class _Clone:
    """The steps of a clone of `url` at `ref` into `tree`; all raise UsageError or CorpusError."""

    def __init__(self, url: str, ref: str, tree: Path, timeout: float) -> None:
        self._url = url
        self._ref = ref
        self._tree = tree
        self._timeout = timeout
        self._isolated = {**git_environment(isolated=True), "GIT_LFS_SKIP_SMUDGE": "1"}

    def fetch(self, scheme: str, history: int) -> None:
        """Make an empty repository, and fetch the latest commits of the ref into it."""
        environment = git_environment() | {
            "GIT_ALLOW_PROTOCOL": scheme,
            "GIT_ASKPASS": "",
            "SSH_ASKPASS": "",
            "SSH_ASKPASS_REQUIRE": "never",
            "GCM_INTERACTIVE": "never",
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        command = (
            *("fetch", "--quiet", "--no-progress", f"--depth={history}", "--no-tags"),
            *("--no-recurse-submodules", "--", self._url, self._ref),
        )
        is_commit = _COMMIT_ID.fullmatch(self._ref) is not None
        algorithms = ("sha1", "sha256") if not is_commit else ("sha1" if len(self._ref) == 40 else "sha256",)
        words = ""
        # The ids of a repository are of one kind, and git has to know which before it asks.
        for algorithm in algorithms:
            options = ("--quiet", "--template=", "--initial-branch=main", f"--object-format={algorithm}")
            place = self._tree.with_name(f"{self._tree.name}-{algorithm}")
            self._run(self._isolated, "init", *options, "--", str(place))
            words = self._try(environment, "-C", str(place), *command)
            if not words:
                place.rename(self._tree)
                return
            if "mismatched algorithms" not in words:
                break
        raise self._error(words)

    def check_out(self) -> None:
        """Write the files of the commit that was fetched."""
        information = self._tree / ".git" / "info"
        information.mkdir(exist_ok=True)
        (information / "attributes").write_text(_ATTRIBUTES)
        command = ("checkout", "--quiet", "--force", "--detach", "--no-recurse-submodules", "FETCH_HEAD")
        self._run(self._isolated, "-C", str(self._tree), *command, "--")

    def _run(self, environment: Mapping[str, str], *arguments: str) -> None:
        if words := self._try(environment, *arguments):
            raise self._error(words)

    def _try(self, environment: Mapping[str, str], *arguments: str) -> str:
        """Run git; return what it says when it fails, else nothing."""
        name = masked(self._url)
        try:
            # A session of its own has no terminal that ssh could ask at, and is ended as a whole.
            process = subprocess.Popen(
                ["git", *_QUIET, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**environment, "GIT_CEILING_DIRECTORIES": str(self._tree.parent)},
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise CorpusError(
                f"git is not installed, so that {name} cannot be cloned.",
                "Install git, or name a directory.",
            ) from error
        except OSError as error:
            raise CorpusError(
                f"git could not be run to clone {name}: {describe(error)}.", "Check the installation of git."
            ) from error
        with process:
            try:
                _, said = process.communicate(timeout=self._timeout)
            except subprocess.TimeoutExpired as error:
                raise CorpusError(
                    f"{name} was not cloned in {self._timeout:g} seconds.",
                    "Try again with a faster network, or clone it with git and name the directory.",
                ) from error
            finally:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        if process.returncode == 0:
            return ""
        return said.decode("utf-8", "replace").strip() or f"exit code {process.returncode}"

    def _error(self, words: str) -> M3Error:
        name = masked(self._url)
        words = words.replace(self._url, name)
        if user := _USER_INFORMATION.search(self._url):
            words = words.replace(user[0], "***@")
        said = [line for line in words.splitlines() if re.match(r"(?:fatal|error|ssh|remote):", line, re.I)]
        fatal = next((line for line in said if line.lower().startswith("fatal:")), words.splitlines()[-1])
        told = printable(fatal.partition(": ")[2] or fatal).rstrip(".")
        for failure in _FAILURES:
            if re.search(failure.words, words, re.IGNORECASE):
                message = failure.message.format(name=name, ref=repr(self._ref), words=told)
                return failure.kind(message, failure.hint)
        return CorpusError(f"{name} cannot be cloned: {told}.", "See what `git clone` says of it.")
