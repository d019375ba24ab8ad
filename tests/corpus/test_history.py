"""What git's history says of files, and that nothing of a repository runs when it is asked."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus import worktree
from m3cli.corpus.history import TreeFile, differs, read_blobs, read_history, read_tree, resolve_commit
from m3cli.corpus.worktree import GitError
from tests.git_repositories import commit, git, head, import_commits, make_repository, write


def top(directory: Path) -> bytes:
    return os.fsencode(directory.resolve())


def order(directory: Path, ref: str = "HEAD") -> list[str]:
    """Paths at a commit in churn order."""
    history = read_history(top(directory), resolve_commit(top(directory), ref))
    paths = sorted(history.files)
    return [os.fsdecode(path) for path in sorted(paths, key=lambda path: history.touches.get(path, 0))]


def test_touches_are_bits_of_commits(tmp_path: Path) -> None:
    """Each commit has a bit, later ones higher; the first commit of all has none."""
    make_repository(tmp_path, {"a": "1", "b": "1", "c": "1"})
    commit(tmp_path, {"a": "2"})
    commit(tmp_path, {})
    commit(tmp_path, {"a": "3", "b": "2"})
    assert read_history(top(tmp_path)).touches == {b"a": 0b1010, b"b": 0b1000}
    assert order(tmp_path) == ["c", "b", "a"]
    assert order(tmp_path, "HEAD~2") == ["b", "c", "a"]


def test_a_change_of_the_mode_alone_is_none(tmp_path: Path) -> None:
    """A file that became executable has the same text, and stays where it is."""
    make_repository(tmp_path, {"a": "1", "b": "1"})
    (tmp_path / "a").chmod(0o755)
    commit(tmp_path, {})
    assert read_history(top(tmp_path)).touches == {}


def test_a_merge_counts_when_it_comes_in(tmp_path: Path) -> None:
    """What a branch changed counts at the merge, however long ago it was committed."""
    make_repository(tmp_path, {"a": "1", "b": "1", "c": "1"})
    git(tmp_path, "checkout", "--quiet", "-b", "side")
    commit(tmp_path, {"a": "2"})
    git(tmp_path, "checkout", "--quiet", "main")
    commit(tmp_path, {"b": "2"})
    for setting in ("separate", "off", "combined"):
        git(tmp_path, "config", "log.diffMerges", setting)
        git(tmp_path, "reset", "--quiet", "--hard", "main")
        git(tmp_path, "merge", "--quiet", "--no-ff", "--message=m", "side")
        assert order(tmp_path) == ["c", "b", "a"]
        assert order(tmp_path, "HEAD^2") == ["b", "c", "a"]
        git(tmp_path, "reset", "--quiet", "--hard", "HEAD~1")


def test_a_renamed_file_is_a_new_one(tmp_path: Path) -> None:
    """The new name has one change, and the old one no place in the order."""
    make_repository(tmp_path, {"a": "1\n" * 50, "b": "1", "c": "1"})
    commit(tmp_path, {"b": "2"})
    git(tmp_path, "config", "diff.renames", "copies")
    git(tmp_path, "mv", "a", "z")
    commit(tmp_path, {})
    assert order(tmp_path) == ["c", "b", "z"]


def test_the_far_end_of_the_window_stands_still(tmp_path: Path) -> None:
    """Over hundreds of commits that change one file, all others keep their order, however old they are."""
    olds = [b"old%02d" % number for number in range(20)]
    started = [dict.fromkeys([*olds, b"busy"], b"0")]
    started += [{olds[number * 7 % 20]: b"%d" % number} for number in range(60)]
    import_commits(tmp_path, [*started, *({b"busy": b"%d" % number} for number in range(2038))])
    git(tmp_path, "tag", "end")
    assert git(tmp_path, "rev-list", "--count", "end") == b"2099\n"
    first = order(tmp_path, "end~1800")
    assert first[-1] == "busy"
    assert first != sorted(first)
    for back in range(100, 1800, 170):
        assert order(tmp_path, f"end~{back}") == first
    # At 2,000 commits the window begins at the thousandth, and what is older is all the same age.
    moved = [*(name.decode() for name in olds), "busy"]
    assert [order(tmp_path, f"end~{back}") for back in (99, 98, 0)] == [moved, moved, moved]


names = st.sampled_from([b"a", b"b", b"c/d", b"c/e", b"-x", b":y", b"\n:z", b"\xff\xfe", b"t\tb", b"q\"'\\"])


@settings(max_examples=25)
@given(st.lists(st.sets(names, min_size=1), min_size=1, max_size=6), st.sets(names, min_size=1))
def test_files_that_no_commit_touches_keep_their_order(past: list[set[bytes]], changed: set[bytes]) -> None:
    """After any commit, git says of all other files what it said before, whatever their names."""
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name)
        content = iter(range(1000))
        history = [{path: b"%d" % next(content) for path in paths} for paths in [*past, changed]]
        import_commits(repository, history)
        before, after = order(repository, "HEAD~1"), order(repository)
        known = {os.fsdecode(path) for paths in history for path in paths}
        assert set(after) == known
        touched = {os.fsdecode(path) for path in changed}
        untouched = [path for path in before if path not in touched]
        assert after[: len(untouched)] == untouched


def test_a_shallow_clone_counts_what_it_has(tmp_path: Path) -> None:
    """The oldest commit of a shallow clone stands for all before it, so it does not count as a change."""
    origin = make_repository(tmp_path / "origin", {"a": "1", "b": "1", "c": "1"})
    for name in ("c", "a", "b", "a"):
        commit(origin, {name: head(origin)})
    for depth, expected in ((1, ["a", "b", "c"]), (2, ["b", "c", "a"]), (3, ["c", "b", "a"])):
        clone = tmp_path / f"clone{depth}"
        git(tmp_path, "clone", "--quiet", f"--depth={depth}", origin.as_uri(), str(clone))
        assert order(clone) == expected
        assert ("shallow clone without any history" in read_history(top(clone)).lack) == (depth == 1)
    assert read_history(top(origin)).lack == ""


def test_a_repository_without_commits_lacks_history(tmp_path: Path) -> None:
    """Before the first commit there is nothing to order by, which is said and is no error."""
    make_repository(tmp_path)
    history = read_history(top(tmp_path))
    assert (history.touches, history.files) == ({}, {})
    assert history.lack.endswith("has no commits yet.")
    assert resolve_commit(top(tmp_path), "HEAD") is None


def test_names_of_commits(tmp_path: Path) -> None:
    """Branches, tags, ids and relations name commits; options, trees, ranges and nonsense do not."""
    make_repository(tmp_path, {"a": "1"})
    first = head(tmp_path)
    git(tmp_path, "tag", "--annotate", "--message=x", "v1")
    second = commit(tmp_path, {"a": "2"})
    git(tmp_path, "update-ref", "refs/heads/--output=x", first)
    for ref in ("v1", "HEAD~1", "@^", first, first[:10], "refs/tags/v1", "main~1"):
        assert resolve_commit(top(tmp_path), ref) == first
    assert resolve_commit(top(tmp_path), "main") == second
    for ref in ("", "v2", "-", "--all", "--output=x", "^HEAD", "HEAD~1..HEAD", "HEAD HEAD", "a\0b", "main^9"):
        assert resolve_commit(top(tmp_path), ref) is None


def test_a_tree_lists_files_links_and_submodules(tmp_path: Path) -> None:
    """Every entry has its kind and, when asked for, its size; contents come back in the order asked for."""
    repository = make_repository(tmp_path / "r", {"a\nb": b"x\0y", "d/-e": b"\nlong\n" * 9, "\udcff": b""})
    (repository / "link").symlink_to("d")
    make_repository(repository / "sub", {"s": "s"})
    files = read_tree(top(repository), commit(repository, {}), sizes=True)
    assert {path: (file.kind, file.size) for path, file in files.items()} == {
        b"a\nb": ("file", 3),
        b"d/-e": ("file", 54),
        b"link": ("link", 1),
        b"sub": ("submodule", 0),
        b"\xff": ("file", 0),
    }
    assert files[b"sub"].id == head(repository / "sub")
    ids = [files[path].id for path in (b"\xff", b"d/-e", b"a\nb", b"\xff")]
    assert read_blobs(top(repository), ids) == [b"", b"\nlong\n" * 9, b"x\0y", b""]
    assert read_blobs(top(repository), []) == []
    with pytest.raises(GitError, match="git has no object 0123456789"):
        read_blobs(top(repository), [ids[0], "0123456789" * 4])


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_a_file_differs_by_its_content(tmp_path: Path, algorithm: str) -> None:
    """Other bytes, a link, a FIFO and nothing at all differ; another time stamp or CRLF does not."""
    git(tmp_path, "init", "--quiet", f"--object-format={algorithm}")
    commit(tmp_path, {"a": "one\ntwo\n"})
    file: TreeFile = read_tree(top(tmp_path), head(tmp_path))[b"a"]
    path = tmp_path / "a"
    os.utime(path, (0, 0))
    assert not differs(os.fsencode(path), file.id)
    path.write_bytes(b"one\r\ntwo\r\n")
    assert not differs(os.fsencode(path), file.id)
    path.write_bytes(b"one\r\ntwo!\r\n")
    assert differs(os.fsencode(path), file.id)
    path.write_text("one\ntwo\n\n")
    assert differs(os.fsencode(path), file.id)
    path.unlink()
    assert differs(os.fsencode(path), file.id)
    write(tmp_path, {"b": "one\ntwo\n"})
    path.symlink_to("b")
    assert differs(os.fsencode(path), file.id)
    path.unlink()
    os.mkfifo(path)
    assert differs(os.fsencode(path), file.id)


def test_nothing_that_a_repository_configures_is_run(tmp_path: Path) -> None:
    """Filters, hooks, signature programs and external diffs of a repository stay where they are."""
    repository = make_repository(tmp_path / "r", {"a": "1", ".gitattributes": "* filter=evil diff=evil\n"})
    program = tmp_path / "evil"
    program.write_text(f"#!/bin/sh\necho ran >> '{tmp_path}/ran'\ncat\n")
    program.chmod(0o755)
    signed = git(repository, "cat-file", "commit", "HEAD").replace(
        b"\n\n", b"\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n -----END PGP SIGNATURE-----\n\n", 1
    )
    signed = signed.replace(b"author", b"parent %s\nauthor" % head(repository).encode(), 1)
    signed_id = git(repository, "hash-object", "-t", "commit", "-w", "--stdin", stdin=signed).decode().strip()
    git(repository, "update-ref", "HEAD", signed_id)
    for key, value in {
        "core.fsmonitor": program,
        "core.hooksPath": tmp_path,
        "core.pager": program,
        "diff.external": program,
        "diff.evil.command": program,
        "diff.evil.textconv": program,
        "filter.evil.clean": program,
        "filter.evil.smudge": program,
        "gpg.program": program,
        "log.showSignature": "true",
    }.items():
        git(repository, "config", key, str(value))
    write(repository, {"a": "2"})
    assert b"evil" in (repository / ".git" / "config").read_bytes()
    history = read_history(top(repository))
    assert differs(os.fsencode(repository / "a"), history.files[b"a"].id)
    assert read_blobs(top(repository), [history.files[b"a"].id]) == [b"1"]
    assert not (tmp_path / "ran").exists()
    git(repository, "log", "-1", "--format=%G?")  # it would run, if it were let
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "git is not installed"),
        ("echo 'error: unknown option' >&2; exit 129", r"git failed \(error: unknown option\)"),
        ("exec sleep 60", r"git gave no answer in 0.2 seconds"),
    ],
)
def test_a_git_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, words: str
) -> None:
    """No git, one that is too old and one that hangs are told apart."""
    programs = tmp_path / "bin"
    programs.mkdir()
    if script is not None:
        (programs / "git").write_text(f"#!/bin/sh\nPATH={os.environ['PATH']}\n{script}\n")
        (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(worktree, "_TIMEOUT", 0.2)
    with pytest.raises(GitError, match=words):
        read_history(top(tmp_path))
