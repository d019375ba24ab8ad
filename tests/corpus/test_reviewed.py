"""What a review compares, in real repositories: which versions, which files, with which texts."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.corpus.patch import FileChange, split_lines
from m3cli.corpus.reviewed import MAX_BYTES, Changes, ChangesRequest, read_changes
from m3cli.errors import CorpusError, UsageError
from tests.corpus.test_changes import TRAPS, booby_trap, state
from tests.git_repositories import IDENTITY, commit, git, head, make_repository, write

if TYPE_CHECKING:
    from pathlib import Path

VARIABLES = (
    *("CI", "CI_MERGE_REQUEST_DIFF_BASE_SHA", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "GITHUB_BASE_REF"),
    *("BITBUCKET_PR_DESTINATION_BRANCH", "SYSTEM_PULLREQUEST_TARGETBRANCH", "CHANGE_TARGET"),
    *("BUILDKITE_PULL_REQUEST_BASE_BRANCH", "CI_COMMIT_TARGET_BRANCH", "DRONE_TARGET_BRANCH"),
)


@pytest.fixture(autouse=True)
def _on_a_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def read(place: Path, **options: object) -> Changes:
    """What is reviewed at `place`."""
    return read_changes(ChangesRequest(str(place), **options))  # type: ignore[arg-type]


def by_path(changes: Changes) -> dict[str, FileChange]:
    """The files of a review by their paths, each of which stands once."""
    found = {change.path: change for change in changes.files}
    assert len(found) == len(changes.files)
    return found


def branched(directory: Path) -> tuple[Path, str]:
    """A repository with a branch `topic` checked out, whose base on main has been left behind by main."""
    repository = make_repository(directory, {"x": "1\n2\n3\n", "same": "s\n"})
    base = head(repository)
    git(repository, "checkout", "--quiet", "-b", "topic")
    commit(repository, {"x": "1\ntwo\n3\n"})
    git(repository, "checkout", "--quiet", "main")
    commit(repository, {"other": "of main\n"})
    git(repository, "checkout", "--quiet", "topic")
    return repository, base


def test_a_branch_is_compared_with_where_it_left_the_default_branch(tmp_path: Path) -> None:
    """What main got since does not count, and what is not committed does, unless a head is named."""
    repository, base = branched(tmp_path)
    write(repository, {"x": "1\ntwo\n3\n4\n", "new": "n\n"})
    changes = read(repository)
    files = by_path(changes)
    assert (changes.base, changes.head, changes.top) == (base, "", os.fsencode(repository))
    assert changes.notes == (
        f"The work tree is compared with main, the default branch, from {base[:10]} on.",
    )
    assert (files["x"].base, files["x"].head, files["x"].added) == ("1\n2\n3\n", "1\ntwo\n3\n4\n", {2, 4})
    assert (files["new"].base, files["new"].head, files["new"].added) == (None, "n\n", {1})
    committed = read(repository, head="HEAD")
    assert [change.added for change in committed.files] == [{2}]
    assert committed.head == head(repository)
    assert by_path(read(repository, base="main", head="topic")).keys() == {"x"}


def test_on_the_default_branch_only_uncommitted_changes_count(tmp_path: Path) -> None:
    """HEAD is the base where nothing else would be, and no difference is no error."""
    repository = make_repository(tmp_path / "origin", {"x": "1\n"})
    assert read(repository).files == ()
    write(repository, {"x": "2\n"})
    changes = read(repository)
    assert by_path(changes)["x"].diff == "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n"
    assert "HEAD, which is on main" in changes.notes[0]
    git(repository, "branch", "--move", "trunk")
    assert "as there is no default branch" in read(repository).notes[0]
    git(repository, "commit", "--quiet", "--all", "--message=x")
    git(tmp_path, "clone", "--quiet", str(repository), "clone")
    commit(tmp_path / "clone", {"x": "3\n"})
    changes = read(tmp_path / "clone")
    assert "origin/HEAD, the default branch" in changes.notes[0]
    assert changes.files[0].head == "3\n"


def test_the_index_is_compared_without_the_work_tree(tmp_path: Path) -> None:
    """What is staged is reviewed as it is staged, whatever the file is now."""
    repository = make_repository(tmp_path, {"x": "1\n", "y": "1\n", "d/z": "z\n" * 9})
    write(repository, {"x": "2\n", "y": "2\n", "new": "n\n"})
    (repository / "y").chmod(0o755)
    git(repository, "add", "x", "new")
    git(repository, "mv", "d/z", "d/moved")
    write(repository, {"x": "3\n", "untracked": "u\n"})
    before = state(repository)
    changes = read(repository, staged=True)
    files = by_path(changes)
    assert files.keys() == {"x", "new", "d/moved"}
    assert (files["x"].base, files["x"].head) == ("1\n", "2\n")
    assert files["d/moved"].reason == "only renamed"
    assert (changes.base, changes.head) == (head(repository), "")
    assert by_path(read(repository / "d", staged=True)).keys() == {"d/moved"}
    assert state(repository) == before


def test_a_conflict_in_the_index(tmp_path: Path) -> None:
    """An index that holds several versions of a file is none."""
    repository, _ = branched(tmp_path)
    git(repository, "checkout", "--quiet", "main")
    commit(repository, {"x": "1\nzwei\n3\n"})
    command = ["git", "-C", repository, "merge", "topic"]
    subprocess.run(command, capture_output=True, check=False, env={**os.environ, **IDENTITY})
    with pytest.raises(UsageError, match="x is in conflict"):
        read(repository, staged=True)


def test_every_reason_not_to_review(tmp_path: Path) -> None:
    """Files that no person wrote or reads are listed with the reason, and the others have none."""
    minified = "var a=1;" * 1000 + "\n"
    files = {
        "gen/a.py": "a\n",
        "gen/kept.py": "a\n",
        "lib/b.c": "b\n",
        "data.txt": "1\n",
        "by_hand.go": "package x\n",
        "old.go": "// Code generated by x. DO NOT EDIT.\n",
        "big": "x\n" * (MAX_BYTES // 2 + 1),
        "bin": b"\0",
        "moved": "same\n" * 9,
        "mode": "m\n",
        "gone": "g\n",
        ".gitattributes": (
            "gen/* linguist-generated\ngen/kept.py -linguist-generated\nlib/** linguist-vendored=true\n"
            "*.txt -diff\nyarn.lock linguist-generated=false\n"
        ),
    }
    repository = make_repository(tmp_path, files)
    changed: dict[str, str | bytes] = {
        name: content + "// x\n" for name, content in files.items() if isinstance(content, str)
    }
    changed |= {
        "bin": b"\0\1",
        "by_hand.go": "// Code generated by x. DO NOT EDIT.\npackage x\n",
        "go.sum": "x\n",
        "yarn.lock": "y\n",
        "a.min.js": "a\n",
        "b.js": minified,
        "new.go": "// Code generated by x. DO NOT EDIT.\n",
        "empty": "",
        "wide": "müde\n".encode("utf-16"),
        ".gitattributes": files[".gitattributes"] + "* linguist-generated\n",  # type: ignore[operator]
    }
    for name in ("gone", "mode", "moved"):
        del changed[name]
    write(repository, changed)
    (repository / "gone").unlink()
    (repository / "mode").chmod(0o755)
    (repository / "moved").rename(repository / "here")
    (repository / "link").symlink_to("x")
    make_repository(repository / "sub", {"s": "s"})
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "sub")
    reasons = {change.path: change.reason for change in read(repository).files}
    assert reasons == {
        "gen/a.py": "generated: linguist-generated in .gitattributes",
        "gen/kept.py": "",
        "lib/b.c": "vendored: linguist-vendored in .gitattributes",
        "data.txt": "without a diff: -diff or binary in .gitattributes",
        "by_hand.go": "",
        "old.go": "generated: says: Code generated by x. DO NOT EDIT.",
        "new.go": "generated: says: Code generated by x. DO NOT EDIT.",
        "big": "larger than 2,000,000 bytes",
        "bin": "binary",
        "here": "only renamed",
        "mode": "only its mode changed",
        "gone": "deleted",
        ".gitattributes": "",
        "go.sum": "generated: a lock file",
        "yarn.lock": "",
        "a.min.js": "generated: minified, by its name",
        "b.js": "generated: minified: 4,000 characters a line",
        "empty": "empty",
        "wide": "binary",
        "link": "a link",
        "sub": "a submodule",
    }


def test_a_hostile_repository_runs_nothing_and_is_not_written_to(tmp_path: Path) -> None:
    """Nothing that the configuration or the attributes of a repository name is run for a review."""
    repository = make_repository(tmp_path / "r", {"a": "1\n", "b": "2\n", ".gitattributes": TRAPS})
    git(repository, "checkout", "--quiet", "-b", "topic")
    commit(repository, {"a": "one\n"})
    write(repository, {"b": "two\n"})
    git(repository, "add", "b")
    text = git(repository, "diff", "HEAD~1")
    booby_trap(repository, tmp_path / "program")
    before = state(repository)
    assert by_path(read(repository, staged=True)).keys() == {"b"}
    assert by_path(read(repository, head="topic")).keys() == {"a"}
    assert by_path(read(repository, diff=text)).keys() == {"a", "b"}
    assert state(repository) == before
    assert by_path(read(repository)).keys() == {"a", "b"}
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert {path: facts[2] for path, facts in state(repository).items()} == {
        path: facts[2] for path, facts in before.items()
    }


@pytest.mark.parametrize(
    ("variables", "base"),
    [
        ({"GITHUB_BASE_REF": "main"}, "origin/main"),
        ({"CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}, "origin/main"),
        ({"SYSTEM_PULLREQUEST_TARGETBRANCH": "refs/heads/main"}, "origin/main"),
        ({"DRONE_TARGET_BRANCH": "main", "DRONE_BUILD_EVENT": "pull_request"}, "origin/main"),
        ({"CI_MERGE_REQUEST_DIFF_BASE_SHA": "", "GITHUB_BASE_REF": "", "CI": "true"}, "origin/HEAD"),
    ],
    ids=str,
)
def test_the_target_of_a_pull_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], base: str
) -> None:
    """In continuous integration its variables name the base, and only commits count."""
    repository, _ = branched(tmp_path / "origin")
    git(repository, "checkout", "--quiet", "main")
    git(tmp_path, "clone", "--quiet", repository.as_uri(), "clone")
    clone = tmp_path / "clone"
    git(clone, "checkout", "--quiet", "topic")
    write(clone, {"left by the build": "b\n", "x": "dirty\n"})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    changes = read(clone)
    assert [(change.path, change.added) for change in changes.files] == [("x", {2})]
    assert f"HEAD is compared with {base}" in changes.notes[0]
    assert changes.head == head(clone)


def test_the_base_that_gitlab_names_is_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit itself goes before the branch."""
    repository, base = branched(tmp_path)
    monkeypatch.setenv("CI_MERGE_REQUEST_DIFF_BASE_SHA", base)
    monkeypatch.setenv("CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "gone")
    assert read(repository).base == base


def test_shallow_clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone without the target or the merge base is told to fetch more; a merge of both is enough."""
    repository, _ = branched(tmp_path / "origin")
    for number in range(3):
        commit(repository, {"x": f"{number}\n"})
    git(tmp_path, "clone", "--quiet", "--depth=1", "--no-single-branch", repository.as_uri(), "all")
    with pytest.raises(
        CorpusError, match=r"origin/main and HEAD have no commit in common.*shallow.*--unshallow"
    ):
        read(tmp_path / "all", base="origin/main")
    git(repository, "merge", "--quiet", "--message=merge", "main")
    main = git(repository, "rev-parse", "main").decode().strip()
    git(repository, "checkout", "--quiet", "--detach", "main")
    git(repository, "merge", "--quiet", "--no-ff", "--message=merge", "topic~1")
    git(repository, "branch", "merged")
    monkeypatch.setenv("GITHUB_BASE_REF", "main")
    for depth in (1, 2):
        git(
            tmp_path,
            "clone",
            "--quiet",
            f"--depth={depth}",
            "--branch=merged",
            repository.as_uri(),
            f"{depth}",
        )
    with pytest.raises(
        CorpusError, match=r"origin/main, the target that GITHUB_BASE_REF names.*fetch-depth: 0"
    ):
        read(tmp_path / "1")
    changes = read(tmp_path / "2")
    assert (changes.base, [change.path for change in changes.files]) == (main, ["x"])


def test_unrelated_histories(tmp_path: Path) -> None:
    """Commits without a common ancestor cannot be compared."""
    repository = make_repository(tmp_path, {"x": "1\n"})
    git(repository, "checkout", "--quiet", "--orphan", "other")
    commit(repository, {"x": "2\n"})
    with pytest.raises(CorpusError, match=r"main and HEAD have no commit in common.*unrelated"):
        read(repository, base="main")


def test_options_and_places_that_make_no_sense(tmp_path: Path) -> None:
    """Each error says what is wrong and what to do."""
    repository = make_repository(tmp_path / "r", {"x": "1\n"})
    (tmp_path / "plain").mkdir()
    with pytest.raises(UsageError, match="is in no git work tree"):
        read(tmp_path / "plain")
    with pytest.raises(UsageError, match="There is no file or directory"):
        read(tmp_path / "nothing")
    for options in ({"base": "v9"}, {"head": "v9"}, {"base": "--output=x"}):
        with pytest.raises(UsageError, match="names no commit"):
            read(repository, **options)
    conflicts = [
        {"staged": True, "head": "HEAD"},
        {"staged": True, "base": "HEAD"},
        {"diff": b"", "base": "HEAD"},
        {"diff": b"", "head": "HEAD"},
        {"diff": b"", "staged": True},
    ]
    for conflict in conflicts:
        with pytest.raises(UsageError, match="cannot be reviewed at once"):
            read(repository, **conflict)


def test_line_numbers_agree_with_the_text(tmp_path: Path) -> None:
    """Carriage returns, form feeds and other separators do not count as line ends, before or after."""
    odd = "a\rb\n\x0cc\u2028d\x85\ne\n"
    repository = make_repository(
        tmp_path, {"odd": odd, "crlf": "1\r\n2\r\n", "latin": "é\n".encode("latin-1")}
    )
    latin = "café crème\ndéjà vu\n".encode("latin-1")
    write(repository, {"odd": odd + "f\n", "crlf": "1\n2\n3\n", "latin": latin, "bom": "\ufeffx\n"})
    files = by_path(read(repository))
    assert (files["odd"].added, files["odd"].head_lines()[4]) == ({4}, "f")
    assert files["odd"].head_lines()[1] == "a\rb"
    assert (files["crlf"].added, files["crlf"].head_lines()) == ({3}, {1: "1", 2: "2", 3: "3"})
    assert files["latin"].head_lines() == {1: "café crème", 2: "déjà vu"}
    assert files["latin"].hunks[0].lines[-1] == "+déjà vu"
    assert files["bom"].head_lines() == {1: "x"}


contents = st.lists(st.sampled_from(["a", "b", "c", "", "\r", "x\u2028y", "é"]), max_size=8).map("\n".join)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents, contents)
def test_texts_are_those_of_the_commits(tmp_path_factory: pytest.TempPathFactory, old: str, new: str) -> None:
    """Whatever was edited, base and head are the blobs, and unchanged lines stand in both."""
    repository = make_repository(tmp_path_factory.mktemp("r"), {"x": old, "y": "y"})
    commit(repository, {"x": new})
    files = by_path(read(repository, base="HEAD~1", head="HEAD"))
    if old == new:
        assert not files
        return
    change = files["x"]
    assert (change.base, change.head) == (old, new)
    numstat = git(repository, "diff", "--numstat", "HEAD~1", "HEAD").split()
    assert len(change.added) == int(numstat[0])
    assert set(change.head_lines()) == set(range(1, len(split_lines(new)) + 1))


def test_a_diff_over_either_version(tmp_path: Path) -> None:
    """The directory may hold the version after the change or the one before, and is left as it is."""
    old = {"x": "1\n2\n3\n", "from": "".join(f"{n}\n" for n in range(20)), "gone": "g\n"}
    new = {"x": "1\ntwo\n3\n", "to": old["from"].replace("7\n", "seven\n"), "new": "n\n"}
    repository = make_repository(tmp_path / "r", old)
    git(repository, "mv", "from", "to")
    git(repository, "rm", "--quiet", "gone")
    commit(repository, new)
    text = git(repository, "diff", "HEAD~1")
    write(tmp_path / "plain", old)
    for place in (repository, tmp_path / "plain"):
        before = state(place)
        changes = read(place, diff=text)
        files = by_path(changes)
        assert {path: change.head for path, change in files.items() if not change.reason} == new
        assert (files["x"].base, files["to"].base, files["new"].base) == (old["x"], old["from"], None)
        assert files["gone"].reason == "deleted"
        assert (changes.base, changes.head) == ("", "")
        assert state(place) == before
    assert read(repository, diff=b"").files == ()


def test_lines_that_were_only_removed_do_not_tell_the_version(tmp_path: Path) -> None:
    """A hunk without context stands in both versions; the other files decide."""
    old = {"x": "1\n2\n3\n", "y": "1\n2\n"}
    repository = make_repository(tmp_path, old)
    write(repository, {"x": "1\n3\n", "y": "1\ntwo\n"})
    text = git(repository, "diff", "--unified=0")
    for files in ({"x": "1\n3\n", "y": "1\ntwo\n"}, old):
        write(repository, files)
        assert by_path(read(repository, diff=text))["x"].head == "1\n3\n"


def test_a_diff_that_does_not_apply(tmp_path: Path) -> None:
    """The error names the file and the hunk."""
    repository = make_repository(tmp_path, {"x": "1\n2\n3\n", "new": "other\n"})
    text = b"--- a/x\n+++ b/x\n@@ -2,2 +2,2 @@\n 2\n-4\n+5\n"
    with pytest.raises(
        CorpusError, match=r"does not apply: in x in .* neither version of the hunk at line 2"
    ):
        read(repository, diff=text)
    with pytest.raises(CorpusError, match="does not apply: in new"):
        read(repository, diff=b"--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+mine\n")


def test_a_diff_alone(tmp_path: Path) -> None:
    """Without the files only the lines in the hunks are known, and a note says so."""
    text = b"--- a/x.py\n+++ b/x.py\n@@ -7,2 +7,2 @@ def f():\n a\n-b\n+c\n"
    text += b"--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+n\n"
    changes = read(tmp_path, diff=text)
    files = by_path(changes)
    assert (files["x.py"].head, files["x.py"].head_lines(), files["x.py"].added) == (
        None,
        {7: "a", 8: "c"},
        {8},
    )
    assert files["n"].head == "n\n"
    assert changes.top is None
    assert "Of 1 of its files only the hunks are known" in changes.notes[1]


def test_a_diff_in_a_subdirectory_and_over_crlf(tmp_path: Path) -> None:
    """Paths may be relative to the directory that was named; carriage returns of its files do not matter."""
    repository = make_repository(tmp_path, {"d/x": "1\r\n2\r\n"})
    text = b"--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n 1\n-2\n+3\n"
    (change,) = read(repository / "d", diff=text).files
    assert change.head_lines() == {1: "1", 2: "3"}


def test_a_diff_does_not_lead_out_of_the_tree(tmp_path: Path) -> None:
    """Links, also on the way, are not followed, and devices are not read."""
    write(tmp_path, {"outside/secret": "s\n", "r/plain": "p\n"})
    (tmp_path / "r" / "d").symlink_to(tmp_path / "outside")
    (tmp_path / "r" / "secret").symlink_to(tmp_path / "outside" / "secret")
    os.mkfifo(tmp_path / "r" / "fifo")
    hunk = "@@ -1 +1 @@\n-s\n+t\n"
    text = "".join(f"--- a/{name}\n+++ b/{name}\n{hunk}" for name in ("d/secret", "secret", "fifo"))
    reasons = {change.path: change.reason for change in read(tmp_path / "r", diff=text.encode()).files}
    assert reasons == {"d/secret": "behind a link", "secret": "a link", "fifo": "not a regular file"}


def test_only_changes_below_a_path_count(tmp_path: Path) -> None:
    """A directory or a file in the work tree narrows the review, and paths stay those of the tree."""
    repository = make_repository(tmp_path, {"a/x": "1\n", "b/x": "1\n"})
    write(repository, {"a/x": "2\n", "b/x": "2\n"})
    for place in (repository / "a", repository / "a" / "x"):
        changes = read(place)
        assert by_path(changes).keys() == {"a/x"}
        assert changes.notes[-1].startswith("Only changes in a")
