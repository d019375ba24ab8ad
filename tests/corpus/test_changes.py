"""Diffs and logs: what they show, that they always show the same, and that nothing is run for them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.changes import FILE_LIMIT, diff
from m3cli.corpus.commits import log
from m3cli.errors import CorpusError, UsageError
from tests.git_repositories import commit, git, head, make_repository, write


def top(directory: Path) -> bytes:
    return os.fsencode(directory.resolve())


def state(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of a directory: mode, time of the last change in nanoseconds, content."""
    return {
        str(path.relative_to(directory)): (status.st_mode, status.st_mtime_ns, content)
        for path in sorted(directory.rglob("*"))
        for status in [path.lstat()]
        for content in [path.read_bytes() if path.is_file() and not path.is_symlink() else b""]
    }


def booby_trap(repository: Path, program: Path) -> None:
    """Let a repository's configuration name `program`, which leaves a file `ran` behind, wherever it can."""
    program.write_text(f"#!/bin/sh\necho \"$0 $*\" >> '{program.parent}/ran'\ncat\n")
    program.chmod(0o755)
    hooks = repository / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in (
        "post-checkout",
        "post-index-change",
        "reference-transaction",
        "pre-auto-gc",
        "fsmonitor-watchman",
    ):
        (hooks / name).write_bytes(program.read_bytes())
        (hooks / name).chmod(0o755)
    with (repository / ".git" / "config").open("a") as config:
        config.write(
            f"""
[core]
    fsmonitor = {program}
    hooksPath = {hooks}
    pager = {program}
    editor = {program}
    sshCommand = {program}
    askPass = {program}
    alternateRefsCommand = {program}
    gitProxy = {program}
    worktree = /
[diff]
    external = {program}
    submodule = diff
    ignoreSubmodules = none
    autoRefreshIndex = true
[diff "x"]
    command = {program}
    textconv = {program}
    cachetextconv = true
[filter "x"]
    clean = {program}
    smudge = {program}
    process = {program}
    required = true
[gpg]
    program = {program}
[log]
    showSignature = true
[pager]
    diff = {program}
    log = {program}
[alias]
    diff-tree = "!{program}"
    log = "!{program}"
    ls-files = "!{program}"
[interactive]
    diffFilter = {program}
[remote "origin"]
    url = ext::{program}
    uploadpack = {program}
    promisor = true
    partialclonefilter = blob:none
[credential]
    helper = !{program}
[submodule]
    recurse = true
[uploadpack]
    packObjectsHook = {program}
[trailer "x"]
    command = {program}
[maintenance]
    auto = true
[gc]
    auto = 1
"""
        )


TRAPS = "* filter=x diff=x merge=x\n"


def test_a_hostile_repository_runs_nothing_and_is_not_written_to(tmp_path: Path) -> None:
    """Filters, conversions, drivers, monitors, hooks, pagers and signatures of a repository are not run."""
    repository = make_repository(tmp_path / "r", {"a": "1\n", "b/c": "2\n", ".gitattributes": TRAPS})
    make_repository(repository / "sub", {"s": "s", ".gitattributes": TRAPS})
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "sub")
    commit(repository, {})
    signed = git(repository, "cat-file", "commit", "HEAD").replace(
        b"\n\n", b"\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n -----END PGP SIGNATURE-----\n\n", 1
    )
    signed_id = git(repository, "hash-object", "-t", "commit", "-w", "--stdin", stdin=signed).decode().strip()
    git(repository, "update-ref", "HEAD", signed_id)
    write(repository, {"a": "one\n", "b/new": "3\n", "sub/s": "other"})
    program = tmp_path / "program"
    booby_trap(repository / "sub", program)
    booby_trap(repository, program)
    before = state(repository)
    text = diff(top(repository)).decode()
    assert "-1\n+one\n" in text
    assert "+3\n" in text
    assert diff(top(repository), "HEAD~1", head="HEAD").count(b"diff --git") == 1
    assert b"A b/c" in log(top(repository), 5)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert state(repository) == before
    # The traps work: git as people use it falls into them.
    config = ["-c", "core.worktree=" + str(repository), "-c", "core.fsmonitor=false"]
    subprocess.run(["git", *config, "-C", repository, "diff"], capture_output=True, check=False)
    assert (tmp_path / "ran").exists()


def test_a_diff_shows_every_kind_of_change(tmp_path: Path) -> None:
    """Changed, new, deleted, renamed, executable, binary files and links show as git shows them."""
    repository = make_repository(
        tmp_path,
        {
            "changed": "1\n2\n3\n",
            "deleted": "gone\n",
            "old name": "".join(f"line {number}\n" for number in range(30)),
            "mode": "x\n",
            "binary": b"\0one",
            "dir/file": "below\n",
            "same": "same\n",
            ".gitignore": "ignored\n",
        },
    )
    (repository / "link").symlink_to("same")
    commit(repository, {})
    write(repository, {"changed": "1\ntwo\n3\n", "binary": b"\0two", "ignored": "x", "new": "n\n"})
    (repository / "deleted").unlink()
    (repository / "old name").rename(repository / "näme")
    (repository / "mode").chmod(0o755)
    (repository / "link").unlink()
    (repository / "link").symlink_to("changed")
    (repository / "dir" / "file").unlink()
    (repository / "dir").rmdir()
    (repository / "dir").write_text("now a file\n")
    shown = diff(top(repository))
    # git itself, once everything is in its index, says the same.
    git(repository, "add", "--all")
    options = ("--cached", "--find-renames", "--abbrev=10", "--no-ext-diff")
    assert shown == git(repository, "-c", "core.quotePath=false", "diff", *options, "HEAD")
    assert "rename from old name\nrename to näme\n".encode() in shown
    assert b"Binary files a/binary and b/binary differ\n" in shown
    assert b"old mode 100644\nnew mode 100755\n" in shown
    assert b"ignored" not in shown
    assert diff(top(repository)) == shown
    git(repository, "commit", "--quiet", "--message=x")
    committed = head(repository)
    assert diff(top(repository)) == b""
    assert diff(top(repository), "HEAD~1") == shown
    write(repository, {"changed": "not in the commits\n"})
    assert diff(top(repository), "HEAD~1", head=committed) == shown


names = st.sampled_from(
    [
        b"a",
        b"b",
        b"a/b",
        b"d/e",
        b"d/e/f",
        b"-x",
        b":y",
        b"\n:z",
        b"\xff\xfe",
        b"t\tb",
        b"q\"'\\",
        "ä".encode(),
    ]
)
contents = st.sampled_from([b"", b"1\n", b"2\n", b"1\n2\n", b"\0", b"no end", b"\xff\n"])


def flat(files: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Without files that would be where another one has a directory."""
    return {path: data for path, data in files.items() if not any(p.startswith(path + b"/") for p in files)}


@settings(max_examples=25)
@given(st.dictionaries(names, contents, min_size=1), st.dictionaries(names, contents))
def test_a_diff_of_the_disk_is_that_of_its_commit(old: dict[bytes, bytes], new: dict[bytes, bytes]) -> None:
    """Whatever names and contents change, the disk differs as it will when it has been committed."""
    with tempfile.TemporaryDirectory() as name:
        repository = make_repository(Path(name))
        write(repository, {os.fsdecode(path): data for path, data in flat(old).items()})
        commit(repository, {})
        git(repository, "rm", "-r", "--quiet", "--cached", ".")
        git(repository, "clean", "-d", "-x", "--force", "--quiet")
        write(repository, {os.fsdecode(path): data for path, data in flat(new).items()})
        disk = diff(top(repository))
        commit(repository, {})
        assert disk == diff(top(repository), "HEAD~1", head="HEAD")
        assert (disk == b"") == (flat(old) == flat(new))


def test_line_ends_of_a_checkout_are_no_change(tmp_path: Path) -> None:
    """CRLF on the disk for LF in the commit shows nothing, and in an edited file only what was edited."""
    make_repository(tmp_path, {"a": "one\ntwo\n", "b": "one\r\ntwo\r\n"})
    write(tmp_path, {"a": "one\r\ntwo\r\n"})
    assert diff(top(tmp_path)) == b""
    write(tmp_path, {"a": "one\r\n2\r\n"})
    assert diff(top(tmp_path)).endswith(b" one\n-two\n+2\n")
    write(tmp_path, {"a": "one\ntwo\n", "b": "one\ntwo\n"})
    assert diff(top(tmp_path)) == b""


def test_files_that_lfs_fetched_are_no_change(tmp_path: Path) -> None:
    """A commit has a pointer where the disk has the content; another content shows as another pointer."""
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 5\n"
    make_repository(tmp_path, {"a.bin": pointer})
    assert diff(top(tmp_path)) == b""
    write(tmp_path, {"a.bin": "hello"})
    assert diff(top(tmp_path)) == b""
    write(tmp_path, {"a.bin": "hello!"})
    assert b"-size 5\n+oid sha256:" in diff(top(tmp_path))
    assert b"+size 6\n" in diff(top(tmp_path))


def test_what_cannot_be_shown_counts_as_unchanged(tmp_path: Path) -> None:
    """Files over the limit and special ones are left as the base has them, and new ones are left out."""
    make_repository(tmp_path, {"pipe": "1\n", "a": "1\n"})
    (tmp_path / "pipe").unlink()
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, {"a": b"x" * (FILE_LIMIT + 1), "new": b"1\n" * (FILE_LIMIT // 2 + 1)})
    assert diff(top(tmp_path)) == b""
    write(tmp_path, {"a": "2\n"})
    assert diff(top(tmp_path)).endswith(b"-1\n+2\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_counts_as_unchanged(tmp_path: Path) -> None:
    """A file without permissions may or may not have changed, and is not taken for deleted."""
    make_repository(tmp_path, {"a": "1\n", "b": "1\n"})
    (tmp_path / "a").chmod(0o200)
    write(tmp_path, {"b": "2\n"})
    assert diff(top(tmp_path)).count(b"diff --git") == 1


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A directory that became a link out of the tree is deleted, and what it leads to is not read."""
    write(tmp_path / "outside", {"b": "secret\n"})
    repository = make_repository(tmp_path / "r", {"d/b": "1\n"})
    (repository / "d" / "b").unlink()
    (repository / "d").rmdir()
    (repository / "d").symlink_to(tmp_path / "outside")
    shown = diff(top(repository))
    assert b"secret" not in shown
    assert b"deleted file mode 100644" in shown
    assert b"new file mode 120000" in shown


def test_submodules_and_repositories_in_the_tree(tmp_path: Path) -> None:
    """A submodule shows by its commit; a repository that is not one of them does not show."""
    repository = make_repository(tmp_path, {"a": "1"})
    make_repository(repository / "sub", {"s": "s"})
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "sub")
    commit(repository, {})
    first = head(repository / "sub")
    make_repository(repository / "nested", {"n": "n"})
    assert diff(top(repository)) == b""
    second = commit(repository / "sub", {"s": "t"})
    assert f"-Subproject commit {first}\n+Subproject commit {second}\n".encode() in diff(top(repository))


def test_what_is_not_checked_out_is_not_deleted(tmp_path: Path) -> None:
    """Files outside a sparse checkout are as they were."""
    make_repository(tmp_path, {"a/b": "1\n", "c/d": "1\n"})
    git(tmp_path, "sparse-checkout", "set", "a")
    assert not (tmp_path / "c").exists()
    assert diff(top(tmp_path)) == b""


def test_paths_restrict_a_diff_and_a_log(tmp_path: Path) -> None:
    """Only what was named shows, and a name is no pattern."""
    make_repository(tmp_path, {"a/x": "1\n", "b/x": "1\n", "*": "1\n"})
    commit(tmp_path, {"b/x": "2\n"}, "about b")
    write(tmp_path, {"a/x": "3\n", "b/x": "3\n", "*": "3\n", "a/new": "3\n"})
    assert diff(top(tmp_path), paths=[b"a/"]).count(b"diff --git") == 2
    assert diff(top(tmp_path), paths=[b"*"]).count(b"diff --git") == 1
    assert diff(top(tmp_path), paths=[b"*", b"."]) == diff(top(tmp_path))
    assert diff(top(tmp_path), "HEAD~1", [b"a"], head="HEAD") == b""
    assert b"about b" not in log(top(tmp_path), 5, paths=[b"a"])
    assert b"about b" in log(top(tmp_path), 5, paths=[b"b", b"nothing"])


def test_a_users_settings_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffs and logs are the same under any configuration, attributes and environment."""
    files = {"ä": "".join(f"{number}\n\n" for number in range(40)), "b": "b\n", "mail": "x\n"}
    repository = make_repository(tmp_path / "r", files)
    commit(repository, {"ä": files["ä"].replace("7", "seven"), "b": "c\n"}, "Änderung\n\nBody\twith a tab")
    (repository / "mail").rename(repository / "post")
    write(repository, {"b": "d\n"})

    def everything() -> tuple[bytes, ...]:
        return (
            diff(top(repository), "HEAD~1"),
            diff(top(repository), "HEAD~1", head="HEAD"),
            log(top(repository), 9),
        )

    expected = everything()
    home = tmp_path / "home"
    write(
        home,
        {
            ".gitconfig": """
[diff]
    noprefix = true
    mnemonicPrefix = true
    algorithm = patience
    context = 9
    interHunkContext = 9
    renames = false
    orderFile = order
    indentHeuristic = false
    relative = true
    wordRegex = .
    colorMoved = zebra
[color]
    ui = always
[core]
    quotePath = true
    abbrev = 30
    attributesFile = ~/attributes
    bigFileThreshold = 1
[log]
    date = relative
    decorate = full
    mailmap = true
    showSignature = true
    diffMerges = on
    showRoot = false
[format]
    pretty = fuller
[i18n]
    logOutputEncoding = latin1
[mailmap]
    file = ~/mailmap
[notes]
    displayRef = refs/notes/*
""",
            "attributes": "* binary\n",
            ".config/git/attributes": "* -diff\n",
            "mailmap": "Other <t@example.org>\n",
        },
    )
    git(repository, "notes", "add", "--message=a note")
    (repository / ".git" / "config").write_bytes(
        (repository / ".git" / "config").read_bytes() + (home / ".gitconfig").read_bytes()
    )
    write(repository, {".git/info/attributes": "* -diff\n"})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    monkeypatch.setenv("GIT_ICASE_PATHSPECS", "1")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert everything() == expected
    assert "Änderung" in expected[2].decode()


def test_a_log_is_compact(tmp_path: Path) -> None:
    """Newest first: id, day, author without address, message, files; control characters are escaped."""
    make_repository(tmp_path, {"a": "1\n" * 9, "b": "1"})
    git(tmp_path, "mv", "a", "c")
    (tmp_path / "b").unlink()
    second = commit(tmp_path, {"d": "2"}, "Subject\n\nBody \x1b[31m\n\n  indented\n")
    third = commit(tmp_path, {}, "empty")
    assert log(top(tmp_path), 2).decode() == (
        f"commit {third[:10]} 2023-11-14 t\n    empty\n\n"
        f"commit {second[:10]} 2023-11-14 t\n    Subject\n\n    Body \\x1b[31m\n\n      indented\n\n"
        "D b\nR a -> c\nA d\n"
    )
    assert log(top(tmp_path), 1, second).startswith(b"commit " + second[:10].encode())
    assert log(top(tmp_path), 99).count(b"commit ") == 3
    commit(tmp_path, {f"many/{number}": "" for number in range(130)})
    assert log(top(tmp_path), 1).decode().endswith("… and 30 more files\n")
    with pytest.raises(UsageError, match=r"A log of 0 commits"):
        log(top(tmp_path), 0)


def test_shallow_and_partial_clones(tmp_path: Path) -> None:
    """A log ends where a shallow clone does, and a partial one needs no contents for it."""
    origin = make_repository(tmp_path / "origin", {"a": "1\n" * 9})
    git(origin, "config", "uploadpack.allowFilter", "true")
    git(origin, "mv", "a", "b")
    commit(origin, {"b": "1\n" * 8 + "2\n"})
    commit(origin, {"b": "3\n"})
    git(tmp_path, "clone", "--quiet", "--depth=2", origin.as_uri(), "shallow")
    assert log(top(tmp_path / "shallow"), 9).count(b"commit ") == 2
    git(tmp_path, "clone", "--quiet", "--filter=blob:none", origin.as_uri(), "partial")
    assert log(top(tmp_path / "partial"), 9).count(b"commit ") == 3
    write(tmp_path / "partial", {"b": "4\n"})
    assert b"-3\n+4\n" in diff(top(tmp_path / "partial"))
    with pytest.raises(CorpusError, match=r"cannot be read in .*: git failed"):
        diff(top(tmp_path / "partial"), "HEAD~2", head="HEAD~1")


def test_other_places_and_ids(tmp_path: Path) -> None:
    """Linked work trees, names that need quotes, and repositories with SHA-256 are read as well."""
    place = tmp_path / 'odd: "name"'
    place.mkdir()
    git(place, "init", "--quiet", "--object-format=sha256")
    commit(place, {"a": "1\n"})
    git(place, "worktree", "add", "--quiet", "--detach", str(tmp_path / "linked"))
    for tree in (place, tmp_path / "linked"):
        write(tree, {"a": "2\n"})
        assert b"-1\n+2\n" in diff(top(tree))
        assert log(top(tree), 1).count(b"commit ") == 1


def test_commits_that_are_not_there(tmp_path: Path) -> None:
    """No commit at all, an unknown one and an option are told apart from what can be compared."""
    make_repository(tmp_path)
    for call in (lambda: diff(top(tmp_path)), lambda: log(top(tmp_path), 1)):
        with pytest.raises(UsageError, match="There are no commits in the repository at"):
            call()
    commit(tmp_path, {"a": "1"})
    for ref in ("v9", "--output=x", "HEAD..HEAD", ""):
        with pytest.raises(UsageError, match=r"names no commit of the repository at .*git log --oneline"):
            diff(top(tmp_path), ref)
        with pytest.raises(UsageError, match="names no commit"):
            diff(top(tmp_path), head=ref)
    assert not (tmp_path / "x").exists()


def test_a_broken_repository_is_an_error(tmp_path: Path) -> None:
    """A missing object is no empty diff."""
    make_repository(tmp_path, {"a": "1\n"})
    name = git(tmp_path, "rev-parse", "HEAD:a").decode().strip()
    (tmp_path / ".git" / "objects" / name[:2] / name[2:]).unlink()
    write(tmp_path, {"a": "2\n"})
    with pytest.raises(CorpusError, match=r"The changes since HEAD cannot be read in .*: git "):
        diff(top(tmp_path))
