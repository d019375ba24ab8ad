"""From the user's paths to ordered chunks: which order, what is said about it, and reading at a commit."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus import revision
from m3cli.corpus.corpus import Corpus, CorpusRequest, read_corpus
from m3cli.corpus.documents import DocumentLimits
from m3cli.corpus.sources import WalkOptions
from m3cli.corpus.types import SkipReason
from m3cli.errors import CorpusError, UsageError
from tests.git_repositories import commit, git, make_repository, write

if TYPE_CHECKING:
    from collections.abc import Callable


def read(cwd: Path, *paths: str, **request: object) -> Corpus:
    return read_corpus(
        CorpusRequest(paths or (".",), **request),  # type: ignore[arg-type]
        lambda: b"piped\n",
        cwd,
    )


def paths_of(corpus: Corpus) -> list[str]:
    assert list(dict.fromkeys(chunk.path for chunk in corpus.chunks)) == list(corpus.paths)
    return list(corpus.paths)


def texts_of(corpus: Corpus) -> dict[str, str]:
    return {
        path: "".join(chunk.text for chunk in corpus.chunks if chunk.path == path) for path in corpus.paths
    }


def skips_of(corpus: Corpus) -> dict[str, tuple[SkipReason, str]]:
    return {skip.path: (skip.reason, skip.detail) for skip in corpus.skips}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in which b, a and d/c were changed last, in this order, and e never."""
    root = make_repository(tmp_path / "r", {"a": "1", "b": "1", "d/c": "1", "e": "1"})
    for name in ("b", "a", "d/c"):
        commit(root, {name: "2"})
    return root


def test_the_order_is_by_path_unless_another_is_wanted(repository: Path) -> None:
    """Without a wish the corpus is in path order, and says so; history and arguments give the others."""
    assert (read(repository).order, paths_of(read(repository))) == ("path", ["a", "b", "d/c", "e"])
    for wanted in ("auto", "churn"):
        corpus = read(repository, order=wanted)
        assert (corpus.order, paths_of(corpus), corpus.notes) == ("churn", ["e", "b", "a", "d/c"], ())
    corpus = read(repository, "e", "d", "a", order="given")
    assert (corpus.order, paths_of(corpus)) == ("given", ["e", "d/c", "a"])


def test_given_order_is_that_of_arguments_and_lists(repository: Path) -> None:
    """Arguments come first, then a list; a directory is in path order without what was named beside it."""
    corpus = read(repository, "e", ".", "-", "a", listed=("b", "lost", "a", "d/c"), order="given")
    assert paths_of(corpus) == ["e", "stdin", "a", "b", "d/c"]
    write(repository, {"d/b": "1", "d/a": "1"})
    assert paths_of(read(repository, "d", "a", order="given")) == ["d/a", "d/b", "d/c", "a"]
    corpus = read_corpus(
        CorpusRequest((), listed=("e", "a", "e", "b"), order="given"), lambda: b"", repository
    )
    assert paths_of(corpus) == ["e", "a", "b"]


def test_what_is_not_committed_stands_last(repository: Path) -> None:
    """Modified, staged, untracked and ignored files stand last, by their churn; a time stamp is no change."""
    write(repository, {"e": "3", "z": "new", "staged": "new", ".gitignore": "ignored\n", "ignored": "x"})
    git(repository, "add", "staged")
    os.utime(repository / "b", (0, 0))
    options = WalkOptions(use_ignore_files=False)
    dirty = read(repository, order="auto", walk=options)
    assert paths_of(dirty) == ["b", "a", "d/c", "e", "ignored", "staged", "z"]
    write(repository, {"b": "3"})
    dirty = read(repository, order="auto", walk=options)
    assert paths_of(dirty) == ["a", "d/c", "e", "ignored", "staged", "z", "b"]
    commit(repository, {})
    assert read(repository, order="auto", walk=options) == dirty


def test_a_staged_change_that_was_taken_back_is_none(repository: Path) -> None:
    """What counts is the text that the model sees, not what the index holds."""
    write(repository, {"e": "3"})
    git(repository, "add", "e")
    write(repository, {"e": "1"})
    assert paths_of(read(repository, order="churn")) == ["e", "b", "a", "d/c"]


def test_every_clone_has_the_same_order(repository: Path, tmp_path: Path) -> None:
    """The order depends on the commit alone: not on place, packing, time stamps, or the file system."""
    clone = tmp_path / "elsewhere"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    git(clone, "gc", "--quiet")
    for number, path in enumerate(sorted(clone.rglob("*"))):
        os.utime(path, (number, number))
    assert read(clone, order="auto") == read(repository, order="auto")
    git(clone, "worktree", "add", "--quiet", str(tmp_path / "linked"), "HEAD")
    linked = read(tmp_path / "linked", order="auto")  # where .git is a file, so one skip differs
    assert (linked.order, linked.chunks) == ("churn", read(repository, order="auto").chunks)


def test_outside_of_git_the_order_is_by_path(repository: Path, tmp_path: Path) -> None:
    """That a directory is in no work tree is worth a note only to those who asked for churn."""
    write(tmp_path, {"plain/b": "1", "plain/a": "1"})
    corpus = read(tmp_path, "plain", order="auto")
    assert (corpus.order, paths_of(corpus), corpus.notes) == ("path", ["a", "b"], ())
    corpus = read(tmp_path, "plain", order="churn")
    assert (corpus.order, paths_of(corpus)) == ("path", ["a", "b"])
    assert corpus.notes == ("2 of 2 files are in no git work tree; their churn is unknown.",)
    corpus = read(tmp_path, "plain", "r", order="auto")
    assert (corpus.order, paths_of(corpus)[0], corpus.notes) == ("path", "plain/a", ())
    corpus = read(tmp_path, "plain", "r", order="churn")
    assert (corpus.order, paths_of(corpus)) == (
        "churn",
        ["r/e", "r/b", "r/a", "r/d/c", "plain/a", "plain/b"],
    )
    assert corpus.notes == ("2 of 6 files are in no git work tree; their churn is unknown.",)


def test_standard_input_stands_last(repository: Path) -> None:
    """Piped text changes most, and does not keep files from their order."""
    corpus = read(repository, "-", ".", order="auto")
    assert (corpus.order, paths_of(corpus)) == ("churn", ["e", "b", "a", "d/c", "stdin"])
    assert read(repository, "-", order="auto").order == "path"


def test_without_commits_the_order_is_by_path(tmp_path: Path) -> None:
    """A repository without commits has one note, and the order of paths."""
    root = make_repository(tmp_path / "r")
    write(root, {"b": "1", "a": "1"})
    corpus = read(root, order="auto")
    assert (corpus.order, paths_of(corpus)) == ("path", ["a", "b"])
    assert corpus.notes == (f"The work tree {root} has no commits yet. Its files stand in path order.",)


def test_when_git_fails_the_order_is_by_path(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A git that is missing is one note, and none for those who did not ask for churn."""
    monkeypatch.setenv("PATH", str(tmp_path))
    corpus = read(repository, order="auto", walk=WalkOptions(use_ignore_files=False))
    assert (corpus.order, paths_of(corpus)) == ("path", ["a", "b", "d/c", "e"])
    assert corpus.notes == ("The files stand in path order, not by churn: git is not installed.",)
    assert read(repository, walk=WalkOptions(use_ignore_files=False)).notes == ()


def test_a_shallow_clone_without_history_says_so(repository: Path, tmp_path: Path) -> None:
    """In a clone of depth 1 only uncommitted files are told from the others."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", repository.as_uri(), str(clone))
    write(clone, {"a": "3"})
    corpus = read(clone, order="auto")
    assert (corpus.order, paths_of(corpus)) == ("churn", ["b", "d/c", "e", "a"])
    assert corpus.notes == (
        f"The work tree {clone} is a shallow clone without any history. Its files stand in path order.",
    )


def test_repositories_stand_one_after_the_other(repository: Path, tmp_path: Path) -> None:
    """Each repository has its own history; one inside another, as a submodule, stands before it."""
    other = make_repository(tmp_path / "other", {"x": "1", "y": "1"})
    commit(other, {"x": "2"})
    corpus = read(tmp_path, "r", "other", order="auto")
    assert paths_of(corpus) == ["other/y", "other/x", "r/e", "r/b", "r/a", "r/d/c"]
    git(repository, "submodule", "--quiet", "add", other.as_uri(), "vendor")
    commit(repository, {})
    write(repository, {"b": "3", "vendor/y": "2"})
    assert paths_of(read(repository, order="auto")) == ["vendor/x", "e", "a", "d/c", "vendor/y", "b"]


HOSTILE = {
    "src/a.py": "import os\n" * 900,
    "src/n\nl": "line end\n",
    "-rf": "leading dash\n",
    "bad\udcff.txt": "name that is no UTF-8\n",
    ":(top)": "pathspec magic\n",
    "latin1.txt": "caf\xe9 cr\xe8me\n".encode("latin-1"),
    "utf16.txt": "sixteen\n".encode("utf-16"),
    "crlf.bat": b"echo\r\n",
    "image.png": b"\x89PNG\r\n\x1a\n\0\0",
    "empty": "",
    "large.txt": "x" * 3000,
    "poetry.lock": "locked\n",
    "app.min.js": "minified\n",
    ".hidden/h.txt": "hidden\n",
    ".gitignore": "*.log\nbuild/\n!keep.log\n",
    ".m3ignore": "secret*\nkeep.log\n",
    "a.log": "tracked though ignored\n",
    "keep.log": "m3ignore is stronger\n",
    "sub/.gitignore": "!secret2\n",
    "sub/secret1": "no\n",
    "sub/s.txt": "yes\n",
    "sub/secret2": "yes: a deeper file says so\n",
    "build/out/b.txt": "tracked in an ignored directory\n",
    "build/.m3ignore": "c.txt\n",
    "build/c.txt": "no\n",
    "文件/名.md": "中文\n",
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A clean work tree with every kind of file that has a rule of its own."""
    root = make_repository(tmp_path / "hostile", HOSTILE)
    (root / "link").symlink_to("src")
    (root / "dangling").symlink_to("nowhere")
    commit(root, {"src/a.py": "import sys\n", "a.log": "2\n"})
    commit(root, {"-rf": "changed\n"})
    return root


@pytest.mark.parametrize("order", ["path", "churn"])
@pytest.mark.parametrize(
    "options",
    [
        WalkOptions(),
        WalkOptions(hidden=True),
        WalkOptions(use_ignore_files=False, hidden=True),
        WalkOptions(include=("*.py", "*.txt"), exclude=("/bad*",)),
    ],
)
@pytest.mark.parametrize(
    ("place", "paths"),
    [
        (".", ["."]),
        (".", ["src", "build", "-rf", "secret", "link"]),
        ("sub", [".."]),
        ("..", ["hostile/sub"]),
    ],
)
def test_head_reads_as_a_clean_work_tree(
    hostile: Path, order: str, options: WalkOptions, place: str, paths: list[str]
) -> None:
    """At HEAD the documents, their names, their order and what is left out are those of the work tree."""
    commit(hostile, {"secret": "named, so never ignored\n"})
    limits = DocumentLimits(max_bytes=2500)
    request = CorpusRequest(tuple(paths), options, limits, order=order)  # type: ignore[arg-type]
    on_disk = read_corpus(request, lambda: b"", hostile / place)
    at_head = read_corpus(replace(request, ref="HEAD"), lambda: b"", hostile / place)
    assert at_head.paths == on_disk.paths
    assert (at_head.chunks, at_head.order, at_head.notes) == (on_disk.chunks, on_disk.order, on_disk.notes)
    reasons = {skip.path: skip.reason for skip in at_head.skips}
    assert reasons == {skip.path: skip.reason for skip in on_disk.skips if skip.path != ".git/"}


lines = st.lists(
    st.sampled_from(["a", "!a", "b/", "!b/", "/a", "*", "!*", "b/a", "!b/a", "**/a", "[ab]", "!/b"]),
    max_size=4,
).map(lambda patterns: "".join(f"{pattern}\n" for pattern in patterns))
rules = st.dictionaries(
    st.sampled_from([".gitignore", ".m3ignore", "b/.gitignore", "b/.m3ignore", "b/b/.m3ignore"]),
    lines,
    max_size=4,
)


@settings(max_examples=25)
@given(rules)
def test_ignore_files_mean_the_same_at_a_commit(files: dict[str, str]) -> None:
    """Whatever the ignore files say of tracked files, they say it at the commit as well."""
    with tempfile.TemporaryDirectory() as name:
        root = make_repository(Path(name), files)
        commit(root, {path: f"{path}\n" for path in ("a", "c", "b/a", "b/c", "b/b/a", "b/b/c")})

        def outcome(ref: str | None) -> object:
            try:
                corpus = read(root, ref=ref, order="churn")
            except CorpusError as error:
                return error.message.replace("1 hidden", "").replace("2 hidden", "")[:30]
            skips = {skip for skip in corpus.skips if not skip.path.startswith(".git")}
            return texts_of(corpus), skips

        assert outcome("HEAD") == outcome(None)


def test_a_commit_is_read_without_touching_the_work_tree(repository: Path) -> None:
    """Old contents come from the object store; files, index and refs stay as they are."""
    write(repository, {"a": "changed", "untracked": "x"})
    (repository / "d" / "c").unlink()
    (repository / "d").rmdir()

    def state() -> list[tuple[str, int, bytes]]:
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        return [(str(path), path.stat().st_mtime_ns, path.read_bytes()) for path in files]

    before = state()
    corpus = read(repository, ref="HEAD~1", order="auto")
    assert texts_of(corpus) == {
        "a": "2",
        "b": "2",
        "d/c": "1",
        "e": "1",
    }
    assert paths_of(corpus) == ["d/c", "e", "b", "a"]
    assert paths_of(read(repository, "d", "a", ref="main", order="given")) == ["d/c", "a"]
    assert state() == before


def test_a_path_that_a_link_leads_to_is_read_at_a_commit(repository: Path) -> None:
    """A link that the user names is followed as it leads today, and keeps its name."""
    (repository / "today").symlink_to("d")
    (repository / "file").symlink_to("d/c")
    corpus = read(repository, "today", "file", ref="HEAD", order="given")
    assert texts_of(corpus) == {"file": "2"}
    corpus = read(repository, "today", ref="HEAD~3")
    assert texts_of(corpus) == {"c": "1"}


def test_lists_standard_input_and_output_at_a_commit(repository: Path) -> None:
    """Listed paths that the commit lacks are left out; standard input is what it is; output is not read."""
    later = commit(repository, {"new": "1"})
    corpus = read(
        repository,
        "-",
        listed=("new", "a", "nul\0", "e"),
        ref="HEAD~1",
        order="churn",
        outputs=(repository / "e",),
    )
    assert paths_of(corpus) == ["a", "stdin"]
    assert skips_of(corpus) == {
        "new": (SkipReason.UNREADABLE, "does not exist at HEAD~1"),
        "nul\\x00": (SkipReason.UNREADABLE, "does not exist"),
    }
    assert paths_of(read(repository, "new", ref=later[:12])) == ["new"]


def test_submodules_and_links_of_a_commit_are_left_out(repository: Path, tmp_path: Path) -> None:
    """A commit has no files of its submodules, and its links are not followed; naming one is an error."""
    other = make_repository(tmp_path / "other", {"x": "1"})
    git(repository, "submodule", "--quiet", "add", other.as_uri(), "vendor")
    (repository / "gone").symlink_to("a")
    commit(repository, {})
    corpus = read(repository, ref="HEAD")
    assert skips_of(corpus)["vendor"] == (SkipReason.SPECIAL, "a submodule")
    assert skips_of(corpus)["gone"] == (SkipReason.LINK, "not followed at a commit")
    assert paths_of(read(repository, "vendor", ref="HEAD")) == ["x"]  # checked out, it is a repository itself
    git(repository, "submodule", "--quiet", "deinit", "--force", "vendor")
    (repository / "gone").unlink()
    with pytest.raises(UsageError, match="vendor is a submodule at 'HEAD'"):
        read(repository, "vendor", ref="HEAD")
    with pytest.raises(UsageError, match="gone is a symbolic link at 'HEAD'"):
        read(repository, "gone", ref="HEAD")
    corpus = read(repository, listed=("vendor", "gone"), ref="HEAD")
    assert skips_of(corpus)["gone"][0] is SkipReason.LINK


@pytest.mark.parametrize(
    ("paths", "ref", "words"),
    [
        ((".",), "v9", "'v9' names no commit of the repository at .*/r"),
        ((".",), "--output=x", "'--output=x' names no commit"),
        ((".",), "-", "'-' names no commit"),
        ((".",), "", "'' names no commit"),
        ((".",), "HEAD:d", "'HEAD:d' names no commit"),
        (("..",), "HEAD", r"\.\. is in no git work tree"),
        (("d/lost",), "HEAD", "There is no file or directory d/lost at 'HEAD'"),
        (("a/below",), "HEAD", "There is no file or directory a/below at 'HEAD'"),
        (("later",), "HEAD~1", "There is no file or directory later at 'HEAD~1'"),
        (("untracked",), "HEAD", "There is no file or directory untracked at 'HEAD'"),
        (("nul\0byte",), "HEAD", "There is no file or directory"),
        (("",), "HEAD", "An empty path"),
        ((".git",), "HEAD", "git's own data"),
        (("-",), "HEAD", "Nothing is named that could be read at 'HEAD'"),
    ],
)
def test_what_cannot_be_read_at_a_commit_is_wrong_usage(
    repository: Path, paths: tuple[str, ...], ref: str, words: str
) -> None:
    """The error names the ref or the path, and nothing is written."""
    commit(repository, {"later": "1"})
    write(repository, {"untracked": "1"})
    with pytest.raises(UsageError, match=words) as caught:
        read(repository, *paths, ref=ref)
    assert caught.value.hint
    assert not (repository / "x").exists()


def test_a_large_file_of_a_commit_is_not_read(repository: Path) -> None:
    """The limit holds before a file is in memory; one that the user names has its own."""
    commit(repository, {"large": "x" * 500})
    limits = DocumentLimits(max_bytes=100)
    corpus = read(repository, ref="HEAD", limits=limits)
    assert skips_of(corpus) == {"large": (SkipReason.TOO_LARGE, "500 bytes, the limit is 100")}
    assert "large" in paths_of(read(repository, ".", "large", ref="HEAD", limits=limits))


@pytest.mark.parametrize("limit", ["_BATCH_FILES", "_BATCH_BYTES"])
def test_many_files_of_a_commit_are_read_in_batches(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """However many runs of git it takes, every file has its own content."""
    make_repository(tmp_path / "other", {f"f{n}": f"of other {n}" for n in range(9)})
    expected = read(tmp_path, "r", "other", "-", ref="HEAD")
    monkeypatch.setattr(revision, limit, 2)
    assert read(tmp_path, "r", "other", "-", ref="HEAD") == expected


def test_a_content_that_git_has_lost_is_an_error(repository: Path) -> None:
    """A partial clone or a broken store is said to lack the files of that commit."""
    name = git(repository, "rev-parse", "HEAD:d/c").decode().strip()
    (repository / ".git" / "objects" / name[:2] / name[2:]).unlink()
    with pytest.raises(CorpusError, match=r"The files at .* cannot be read: git"):
        read(repository, ref="HEAD")


def test_a_partial_clone_has_churn_and_no_old_contents(repository: Path, tmp_path: Path) -> None:
    """A clone without old blobs is ordered by its history; old commits cannot be read, nor are fetched."""
    commit(repository, {"e": "of old"})
    commit(repository, {"e": "1"})
    git(repository, "config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--filter=blob:none", repository.as_uri(), str(clone))
    assert paths_of(read(clone, order="auto")) == ["b", "a", "d/c", "e"]
    assert paths_of(read(clone, ref="HEAD", order="auto")) == ["b", "a", "d/c", "e"]
    with pytest.raises(CorpusError, match=r"The files at .* cannot be read: git"):
        read(clone, ref="HEAD~1")


def test_ignore_files_of_a_commit_have_a_limit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ignore file that is too large for one is not applied, which is said."""
    commit(repository, {".m3ignore": "a\n" * 10})
    assert "a" not in paths_of(read(repository, ref="HEAD"))
    monkeypatch.setattr(revision, "IGNORE_FILE_LIMIT", 10)
    corpus = read(repository, ref="HEAD")
    assert "a" in paths_of(corpus)
    assert corpus.notes == ("The ignore rules of .m3ignore were not applied: larger than 10 bytes.",)


@pytest.mark.parametrize("spell", [str, lambda path: f"./{path}/", lambda path: f"{path}/../{path}"])
def test_spellings_of_a_directory_at_a_commit(repository: Path, spell: Callable[[str], str]) -> None:
    """A directory is found however it is spelled, and shown relative to itself."""
    assert paths_of(read(repository, spell("d"), ref="HEAD")) == ["c"]
