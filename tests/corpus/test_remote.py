"""Clones of repositories elsewhere: what they hold, what they never do, and how they fail."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3cli.corpus.remote import cloned, is_remote, masked
from m3cli.errors import CorpusError, M3Error, UsageError
from tests.git_repositories import commit, git, head, make_repository, write


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of temporary files, which is empty before and has to be empty after."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def failure(url: str, ref: str | None = None, timeout: float = 20) -> M3Error:
    """How a clone fails."""
    with pytest.raises((UsageError, CorpusError)) as caught, cloned(url, ref, timeout=timeout):
        pass
    assert caught.value.message.endswith(".")
    assert caught.value.hint.endswith(".")
    return caught.value


def test_urls_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five protocols and scp-like addresses are remote; what exists, drives and other helpers are not."""
    for url in (
        *("https://host/repo.git", "HTTP://host/repo", "ssh://git@host:22/repo", "git://host/repo"),
        *("file:///srv/repo.git", "git@host:group/repo.git", "me@[::1]:repo", "git@host:~me/repo"),
    ):
        assert is_remote(url), url
    for path in (
        *("", ".", "src", "C:\\src", "C:/src", "c:src", "ext::sh -c x", "fd::7", "ftp://host/x", "host:path"),
        *("./git@host:path", "dir/git@host:path", "https:", "https://", "-", "a\0b", "git@host:", "s3://b/k"),
    ):
        assert not is_remote(path), path
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"git@host:path": "", "https:/host/x": ""})
    assert not is_remote("git@host:path")
    assert not is_remote("https://host/x")


def test_a_clone_is_shallow_and_is_removed(tmp_path: Path, temporary: Path) -> None:
    """One commit of one branch, in a private directory that bears the repository's name, and then nothing."""
    origin = make_repository(tmp_path / "tool.git", {"a": "1"})
    commit(origin, {"a": "2"})
    git(origin, "tag", "v1")
    git(origin, "branch", "other")
    said: list[str] = []
    with cloned(origin.as_uri(), report=said.append) as tree:
        assert tree.name == "tool"
        assert temporary in tree.parents
        assert tree.parent.stat().st_mode & 0o777 == 0o700
        assert (tree / "a").read_text() == "2"
        assert head(tree) == head(origin)
        assert git(tree, "rev-list", "--count", "HEAD") == b"1\n"
        assert git(tree, "for-each-ref") == b""
        assert git(tree, "status", "--porcelain") == b""
    assert said == [f"Cloning {origin.as_uri()} …"]
    assert list(temporary.iterdir()) == []


def test_a_branch_a_tag_or_a_commit(tmp_path: Path, temporary: Path) -> None:
    """Each kind of ref leads to its files, and `history` to so many commits of it."""
    origin = make_repository(tmp_path / "r", {"a": "first"})
    first = head(origin)
    git(origin, "tag", "--annotate", "--message=x", "v1")
    git(origin, "checkout", "--quiet", "-b", "feature/x")
    commit(origin, {"a": "second"})
    commit(origin, {"a": "third"})
    git(origin, "checkout", "--quiet", "main")
    for ref, content in ((None, "first"), ("v1", "first"), ("refs/tags/v1", "first"), ("feature/x", "third")):
        with cloned(origin.as_uri(), ref) as tree:
            assert (tree / "a").read_text() == content
    with cloned(origin.as_uri(), first) as tree:
        assert head(tree) == first
    with cloned(origin.as_uri(), "feature/x", 2, directory=tmp_path) as tree:
        assert tmp_path in tree.parents
        assert temporary not in tree.parents
        assert git(tree, "rev-list", "--count", "HEAD") == b"2\n"
    for ref in ("v2", "0123456789" * 4):
        error = failure(origin.as_uri(), ref)
        assert isinstance(error, UsageError)
        assert error.message == f"{origin.as_uri()} has no branch, tag or commit {ref!r} that it gives out."
    assert list(temporary.iterdir()) == []


def test_a_repository_with_sha256(tmp_path: Path, temporary: Path) -> None:
    """The kind of ids is found out."""
    origin = tmp_path / "r"
    git(tmp_path, "init", "--quiet", "--object-format=sha256", "--initial-branch=main", str(origin))
    name = commit(origin, {"a": "1"})
    for ref in (None, "main", name):
        with cloned(origin.as_uri(), ref) as tree:
            assert head(tree) == name


def test_a_hostile_repository_runs_nothing(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No filter of the user's or the repository's, no hook, template or submodule; links lead nowhere."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho \"$0 $*\" >> '{tmp_path}/ran'\ncat\n")
    program.chmod(0o755)
    inner = make_repository(tmp_path / "inner", {"s": "s"})
    origin = make_repository(
        tmp_path / "r",
        {
            ".gitattributes": "* filter=x diff=x ident text eol=crlf\n*.txt working-tree-encoding=UTF-16\n"
            "lfs filter=lfs\n",
            "a": "$Id$\none\ntwo\n",
            "b.txt": "one\n".encode("utf-16"),  # which git commits as UTF-8
            "lfs": "version https://git-lfs.github.com/spec/v1\n",
            ".lfsconfig": f"[lfs]\n    url = file://{tmp_path}/lfs\n",
        },
    )
    git(origin, "submodule", "--quiet", "add", inner.as_uri(), "sub")
    (origin / "escape").symlink_to("../../..")
    (origin / "passwd").symlink_to("/etc/passwd")
    git(origin, "add", "escape", "passwd")
    git(origin, "commit", "--quiet", "--message=x")
    git(origin, "config", "uploadpack.packObjectsHook", str(program))
    git(origin, "config", "core.fsmonitor", str(program))
    # What the user has set up, and what the repository must not make use of.
    template = tmp_path / "template"
    hooks = {f"hooks/{name}": program.read_bytes() for name in ("post-checkout", "reference-transaction")}
    write(template, hooks)
    write(origin / ".git", hooks)
    for hook in (*template.glob("hooks/*"), *(origin / ".git").glob("hooks/*")):
        hook.chmod(0o755)
    (tmp_path / "gitconfig").write_text(
        f"""
[init]
    templateDir = {template}
[core]
    hooksPath = {template}/hooks
    pager = {program}
    autocrlf = true
[filter "x"]
    smudge = {program}
    clean = {program}
    required = true
[filter "lfs"]
    smudge = {program}
    process = {program}
    required = true
[fetch]
    recurseSubmodules = true
[submodule]
    recurse = true
[url "ext::{program} "]
    insteadOf = rewritten://
"""
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    with cloned(origin.as_uri()) as tree:
        assert (tree / "a").read_bytes() == b"$Id$\none\ntwo\n"
        assert (tree / "b.txt").read_bytes() == b"one\n"
        assert (tree / "lfs").read_text().startswith("version")
        assert list((tree / "sub").iterdir()) == []
        assert (tree / "passwd").is_symlink()
        assert not (tree / ".git" / "hooks").exists()
        assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert (tmp_path / "inner" / "s").exists()
    assert list(temporary.iterdir()) == []
    # The traps work: a clone as people make it falls into them.
    subprocess.run(
        ["git", "clone", "--quiet", origin.as_uri(), tmp_path / "victim"], capture_output=True, check=False
    )
    assert (tmp_path / "ran").exists()


def test_only_the_protocol_that_was_asked_for(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewritten address that leads to a helper is refused before anything runs."""
    (tmp_path / "gitconfig").write_text(
        f'[protocol]\n    allow = always\n[url "ext::touch {tmp_path}/ran "]\n    insteadOf = https://host/\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert "leads to another protocol" in failure("https://host/repo").message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "url",
    [
        *("--upload-pack=touch x", "-x", "ext::sh -c x", "/srv/repo", "repo", "https://host/a\nb", ""),
        *("ssh://-oProxyCommand=x/repo", "ssh://u@-oProxyCommand=x/repo", "git@-oProxyCommand=x:repo"),
        *("file:///a b", "https://host/\x1b[2J", "git@host:a\0b"),
    ],
)
def test_addresses_that_git_could_misread_are_refused(url: str, temporary: Path) -> None:
    """Options, helpers, control characters and hosts that begin with a dash never reach git."""
    error = failure(url)
    assert isinstance(error, UsageError)
    assert "is no address of a repository" in error.message
    assert "\x1b" not in error.message


@pytest.mark.parametrize(
    "ref", ["", "-x", "--all", "+main", "a:b", "^main", "a b", "a\nb", "HEAD~1", "a..b", "*"]
)
def test_refs_that_git_could_misread_are_refused(ref: str, tmp_path: Path, temporary: Path) -> None:
    """Options, refspecs, patterns, ranges and relations are no names."""
    origin = make_repository(tmp_path / "r", {"a": "1"})
    assert "is no branch, tag or commit id" in failure(origin.as_uri(), ref).message


def test_secrets_of_an_address_are_masked(temporary: Path) -> None:
    """No message holds a password or token."""
    assert masked("https://me:secret@host/r?token=secret") == "https://***@host/r?***"
    assert masked("https://secret@host:8443/r@v1") == "https://***@host:8443/r@v1"
    assert masked("git@host:r") == "git@host:r"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said: list[str] = []
        with (
            pytest.raises(CorpusError) as caught,
            cloned(f"http://me:secret@{address}/r", report=said.append),
        ):
            pass
    assert caught.value.message.startswith(f"http://***@{address}/r cannot be reached: ")
    assert said == [f"Cloning http://***@{address}/r …"]
    assert "secret" not in str(caught.value)


def test_failures_are_told_apart(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository, no commits, a full disk, a login, a slow server and no git each say what to do."""
    error = failure((tmp_path / "none").as_uri())
    assert isinstance(error, UsageError)
    assert error.message == f"There is no git repository at {(tmp_path / 'none').as_uri()}."
    assert "has no commits" in failure(make_repository(tmp_path / "empty").as_uri()).message
    assert list(temporary.iterdir()) == []
    programs = tmp_path / "bin"
    programs.mkdir()
    path = os.environ["PATH"]
    for words, expected in (
        ("fatal: write error: No space left on device", "The disk is full"),
        ("fatal: could not read Username for 'https://h': terminal prompts disabled", "needs a login"),
        ("git@h: Permission denied (publickey).\nfatal: Could not read from remote", "needs a login"),
        ("fatal: unable to access 'https://h/r/': Could not resolve host: h", "cannot be reached: unable to"),
        ("remote: Repository not found.\nfatal: repository 'h' not found", "There is no git repository"),
        ("error: Server does not allow request for unadvertised object 01", "has no branch, tag or commit"),
        ("fatal: something new", "cannot be cloned: something new."),
    ):
        (programs / "git").write_text(f'#!/bin/sh\nPATH={path}\ncat >&2 <<"END"\n{words}\nEND\nexit 128\n')
        (programs / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        assert expected in failure("https://h/r").message
    (programs / "git").write_text(f"#!/bin/sh\nPATH={path}\nsleep 60 & sleep 60\n")
    assert "was not cloned in 0.2 seconds" in failure("https://h/r", timeout=0.2).message
    (programs / "git").unlink()
    assert "git is not installed" in failure("https://h/r").message
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "No directory can be made" in failure("https://h/r").message
    assert list(temporary.iterdir()) == []


def test_a_login_is_never_asked_for(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for SSH has no terminal to ask at and no window to open."""
    program = tmp_path / "ssh"
    program.write_text(
        "#!/bin/sh\n(: < /dev/tty) 2> /dev/null && echo terminal >&2\n"
        'echo "ssh: asks ${SSH_ASKPASS}$SSH_ASKPASS_REQUIRE: Permission denied (publickey)" >&2\nexit 255\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(program))
    monkeypatch.setenv("SSH_ASKPASS", "window")
    assert "needs a login" in failure("git@host:group/repo").message


def test_an_error_or_an_interrupt_leaves_nothing_behind(tmp_path: Path, temporary: Path) -> None:
    """The clone is gone when its user fails, and when Ctrl-C ends git in the middle."""
    origin = make_repository(tmp_path / "r", {"a": "1", "d/e": "2"})
    with pytest.raises(ZeroDivisionError), cloned(origin.as_uri()):
        raise ZeroDivisionError
    assert list(temporary.iterdir()) == []
    (tmp_path / "ssh").write_text(f"#!/bin/sh\necho $$ > '{tmp_path}/pid'\nexec sleep 60\n")
    (tmp_path / "ssh").chmod(0o755)
    script = (
        "from m3cli.corpus.remote import cloned\n"
        f"with cloned('git@host:r', directory={str(temporary)!r}):\n    pass\n"
    )
    environment = {**os.environ, "GIT_SSH_COMMAND": str(tmp_path / "ssh")}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(list(temporary.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said
    assert list(temporary.iterdir()) == []
    helper = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{helper}").exists() and "sleep" in Path(f"/proc/{helper}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(
    not (Path(subprocess.check_output(["git", "--exec-path"], text=True).strip()) / "git-daemon").exists(),
    reason="git daemon is not installed",
)
def test_a_server(tmp_path: Path, temporary: Path) -> None:
    """A clone over the network is as one of a directory; what the server does not export is not there."""
    origin = make_repository(tmp_path / "served" / "r", {"a": "1"})
    first = head(origin)
    commit(origin, {"a": "2"})
    (origin / ".git" / "git-daemon-export-ok").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--listen=127.0.0.1", f"--port={port}", f"--base-path={tmp_path / 'served'}", "--reuseaddr"]
    exec_path = subprocess.check_output(["git", "--exec-path"], text=True).strip()
    with subprocess.Popen([f"{exec_path}/git-daemon", *options], stderr=subprocess.DEVNULL) as daemon:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            url = f"git://127.0.0.1:{port}/r"
            with cloned(url) as tree:
                assert (tree / "a").read_text() == "2"
            with cloned(url, first) as tree:
                assert (tree / "a").read_text() == "1"
            assert "has no branch, tag or commit 'nope'" in failure(url, "nope").message
            assert isinstance(failure(f"git://127.0.0.1:{port}/none"), M3Error)
        finally:
            daemon.terminate()
    assert "cannot be reached" in failure(url).message
