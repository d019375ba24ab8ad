"""What a user's paths stand for: names, order, links, special files, options."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.sources import Collected, WalkOptions, collect, printable, read_path_list
from m3cli.corpus.types import SkipReason
from m3cli.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that nothing of this machine's git configuration reaches."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    root = tmp_path / "tree"
    root.mkdir()
    return root


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n", errors="surrogateescape")


def run(root: Path, *paths: str, options: WalkOptions | None = None) -> Collected:
    return collect(paths or ["."], options or WalkOptions(), stdin=lambda: b"piped\n", cwd=root)


def paths_of(collected: Collected) -> list[str]:
    return [source.path for source in collected.sources]


def skips_of(collected: Collected) -> dict[str, tuple[SkipReason, str]]:
    assert len({skip.path for skip in collected.skips}) == len(collected.skips)
    return {skip.path: (skip.reason, skip.detail) for skip in collected.skips}


def test_one_directory_is_shown_relative_to_itself(tree: Path) -> None:
    """The same tree gives the same paths, wherever it stands and however it is named."""
    make(tree, "src/a.py", "b.py")
    for place, name in ((tree, "."), (tree.parent, "tree"), (Path("/"), str(tree)), (tree / "src", "..")):
        assert paths_of(run(place, name)) == ["b.py", "src/a.py"]


def test_several_paths_are_shown_as_typed(tree: Path) -> None:
    """Among several paths those inside the current directory keep their place, others their last name."""
    make(tree, "work/src/a.py", "work/doc/x.md", "other/src/a.py", "other/notes.md", "work/notes.md")
    found = run(
        tree / "work", "./src/", "doc/../doc", "../other/src", str(tree / "other/notes.md"), "notes.md", "-"
    )
    assert paths_of(found) == ["doc/x.md", "notes.md", "notes~2.md", "src/a.py", "src~2/a.py", "stdin"]
    assert [source.explicit for source in found.sources] == [False, True, True, False, False, True]
    by_path = {source.path: source for source in found.sources}
    assert by_path["notes~2.md"].file == tree / "other/notes.md"
    assert by_path["stdin"].data == b"piped\n"
    assert by_path["stdin"].file is None


def test_standard_input_does_not_change_the_names_in_a_directory(tree: Path) -> None:
    """One directory beside standard input is shown relative to itself; names stay unique."""
    make(tree, "sub/stdin", "sub/a")
    assert paths_of(run(tree, "sub", "-")) == ["a", "stdin", "stdin~2"]


def test_what_is_reached_twice_is_in_once(tree: Path) -> None:
    """A file named beside its directory, a directory in a directory, and other spellings count once."""
    make(tree, "src/a.py", "src/b.py", "src/deep/c.py")
    found = run(tree, ".", "src/a.py", "./src/a.py", "src/deep", str(tree / "src"))
    assert paths_of(found) == ["src/a.py", "src/b.py", "src/deep/c.py"]
    assert [source.path for source in found.sources if source.explicit] == ["src/a.py"]


def test_what_is_named_is_not_ignored(tree: Path) -> None:
    """Ignored, hidden and excluded paths are read when the user names them."""
    make(tree, "build/a.c", ".env", "build/b.log")
    (tree / ".gitignore").write_text("build/\n*.log\n")
    found = run(tree, ".", "build", ".env", "build/b.log", options=WalkOptions(exclude=("*.log",)))
    assert paths_of(found) == [".env", "build/a.c", "build/b.log"]


def test_missing_and_repeated_paths_are_usage_errors(tree: Path) -> None:
    """A path that does not exist, an empty one, and a second `-` are told as wrong usage."""
    (tree / "dangling").symlink_to("nowhere")
    make(tree, "file")
    for path in ("no\x1bthing", "dangling", "file/below", "x" * 5000, "nul\0byte"):
        with pytest.raises(UsageError, match="There is no file or directory"):
            run(tree, path)
    with pytest.raises(UsageError, match="empty path"):
        run(tree, "")
    with pytest.raises(UsageError, match="more than once"):
        run(tree, "-", "-")
    with pytest.raises(UsageError, match=r"no\\x1bthing"):
        run(tree, "no\x1bthing")


def test_named_special_files_are_refused(tree: Path) -> None:
    """A FIFO, a device and a loop of links that the user names are errors, and never opened."""
    os.mkfifo(tree / "fifo")
    (tree / "loop").symlink_to("loop")
    for path in ("fifo", "/dev/null"):
        with pytest.raises(CorpusError, match="neither a file nor a directory"):
            run(tree, path)
    with pytest.raises(CorpusError, match="cannot be read"):
        run(tree, "loop")


def test_links_are_not_followed_in_a_walk(tree: Path) -> None:
    """No link leads out of the tree, into a loop or to a file twice; each is listed with its reason."""
    make(tree, "in/a.py")
    make(tree.parent, "outside/secret.txt")
    (tree / "up").symlink_to(".")
    (tree / "in" / "twice.py").symlink_to("a.py")
    (tree / "out").symlink_to("../outside")
    (tree / "out.txt").symlink_to(tree.parent / "outside" / "secret.txt")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "loop").symlink_to("loop")
    found = run(tree)
    assert paths_of(found) == ["in/a.py"]
    assert skips_of(found) == {
        "dangling": (SkipReason.LINK, "dangling"),
        "in/twice.py": (SkipReason.LINK, "its target in the tree stands for itself"),
        "loop": (SkipReason.LINK, "in a loop"),
        "out": (SkipReason.LINK, "leads out of the tree"),
        "out.txt": (SkipReason.LINK, "leads out of the tree"),
        "up": (SkipReason.LINK, "its target in the tree stands for itself"),
    }


def test_a_link_that_the_user_names_is_followed(tree: Path) -> None:
    """A named link to a directory or file is read under the name that was typed."""
    make(tree, "real/a.py", "real/b.py")
    (tree / "link").symlink_to("real")
    (tree / "b").symlink_to("real/b.py")
    assert paths_of(run(tree, "link")) == ["a.py", "b.py"]
    found = run(tree, ".", "b")
    assert paths_of(found) == ["b", "real/a.py"]
    assert "b" not in skips_of(found)


def test_special_files_are_listed_and_not_opened(tree: Path) -> None:
    """A FIFO in the tree is left out as no regular file, without waiting for a writer."""
    os.mkfifo(tree / "fifo")
    make(tree, "a")
    found = run(tree)
    assert paths_of(found) == ["a"]
    assert skips_of(found) == {"fifo": (SkipReason.SPECIAL, "")}


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A directory, and the effective rights of a user whom permissions bind, as root is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(was)
            for path in Path(name).rglob("*"):
                path.chmod(0o777)


def test_an_unreadable_directory_is_listed(ordinary_user: Path) -> None:
    """A directory without permission is a skip in a walk and an error when the user names it."""
    make(ordinary_user, "locked/a", "b")
    (ordinary_user / "locked").chmod(0)
    found = run(ordinary_user)
    assert paths_of(found) == ["b"]
    assert skips_of(found) == {"locked/": (SkipReason.UNREADABLE, "Permission denied")}
    with pytest.raises(CorpusError, match="The directory locked cannot be read: Permission denied"):
        run(ordinary_user, "locked")


def test_hidden_names_stay_out_and_git_never_comes_in(tree: Path) -> None:
    """Names with a dot are skipped unless wanted; .git is never entered, as directory or as file."""
    make(tree, ".git/config", ".hidden/a", ".env", "sub/.GIT/config", "a")
    make(tree, "module/b")
    (tree / "module" / ".git").write_text("gitdir: ../.git/modules/module\n")
    assert paths_of(run(tree)) == ["a", "module/b"]
    found = run(tree, options=WalkOptions(hidden=True))
    assert paths_of(found) == [".env", ".hidden/a", "a", "module/b"]
    assert sorted(skips_of(found)) == [".git/", "module/.git", "sub/.GIT/"]
    assert paths_of(run(tree, options=WalkOptions(use_ignore_files=False)))[0] == "a"


def test_ignored_directories_are_one_skip_with_the_rule(tree: Path) -> None:
    """An ignored directory is one entry that names the pattern; --no-ignore lets it in."""
    make(tree, "pkg/out/a", "pkg/out/b", "c")
    (tree / "pkg" / ".gitignore").write_text("/out/\n")
    found = run(tree)
    assert paths_of(found) == ["c"]
    assert skips_of(found)["pkg/out/"] == (SkipReason.IGNORED, "/out/ in pkg/.gitignore")
    assert paths_of(run(tree, options=WalkOptions(use_ignore_files=False))) == ["c", "pkg/out/a", "pkg/out/b"]


def test_include_and_exclude(tree: Path) -> None:
    """Only what --include matches stays, --exclude is stronger, and ignored files stay ignored."""
    make(tree, "src/a.py", "src/a.md", "src/gen/b.py", "top.py", "doc/x.md", "ignored.py")
    (tree / ".gitignore").write_text("ignored.py\n")
    options = WalkOptions(include=("src/", "!*.md", "*.py"), exclude=("gen/",))
    found = run(tree, options=options)
    assert paths_of(found) == ["src/a.py", "top.py"]
    assert skips_of(found) == {
        ".gitignore": (SkipReason.HIDDEN, ""),
        "doc/x.md": (SkipReason.NOT_INCLUDED, ""),
        "ignored.py": (SkipReason.IGNORED, "ignored.py in .gitignore"),
        "src/a.md": (SkipReason.NOT_INCLUDED, ""),
        "src/gen/": (SkipReason.IGNORED, "--exclude gen/"),
    }
    assert paths_of(run(tree, options=WalkOptions(include=("/src/**",)))) == [
        "src/a.md",
        "src/a.py",
        "src/gen/b.py",
    ]


def test_order_is_by_components_and_not_by_creation(tree: Path) -> None:
    """Paths are sorted by their components as bytes, whatever order they were created in."""
    names = ["a/z", "a-b/c", "a.b", "B", "b", "é", "z", "a/B/c", "e\u0301"]
    orders = []
    for seed in range(4):
        root = tree / str(seed)
        make(root, *random.Random(seed).sample(names, len(names)))
        orders.append(paths_of(run(root)))
    assert orders == [sorted(names, key=lambda name: name.encode().split(b"/"))] * 4


def test_odd_names_are_shown_escaped_and_unique(tree: Path) -> None:
    r"""Names with line ends, controls, direction marks and stray bytes are readable and unique."""
    names = [
        "n\nl",
        "e\x1b[0m",
        "r\u202etxt",
        "l\u2028s",
        "bad\udcff",
        "bad\\xff",
        "back\\slash",
        "文件",
        "c\x85",
    ]
    make(tree, *names)
    found = run(tree)
    shown = paths_of(found)
    assert set(shown) == {
        *("n\\nl", "e\\x1b[0m", "r\\u202etxt", "l\\u2028s", "bad\\xff", "bad\\xff~2"),
        *("back\\slash", "文件", "c\\u0085"),
    }
    assert len(shown) == len(names)
    assert {os.fspath(source.file) for source in found.sources if source.file} == {
        os.fspath(tree / name) for name in names
    }


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=20))
def test_printable_leaves_nothing_that_ends_a_line_or_moves(text: str) -> None:
    """Escaped text is valid UTF-8 on one line, and escaping it again changes nothing."""
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    assert shown.encode("utf-8").decode("utf-8") == shown


def test_path_lists() -> None:
    """A list of paths is split at line ends or NUL bytes, without blank lines, bytes kept."""
    assert read_path_list(b"a\r\n\n  \nb c\n-\nx\xff", nul=False) == ["a", "b c", "./-", "x\udcff"]
    assert read_path_list(b"a\nb\0\0 \0", nul=True) == ["a\nb", " "]
    assert read_path_list(b"", nul=True) == []


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["!", "a\\"])
def test_a_malformed_glob_is_refused(tree: Path, option: str, glob: str) -> None:
    """An option that could never match is an error that names it, not a silent nothing."""
    with pytest.raises(UsageError, match=f"--{option} .* is not a glob"):
        run(tree, options=WalkOptions(**{option: ("ok", glob)}))
