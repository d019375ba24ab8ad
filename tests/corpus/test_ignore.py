"""The ignore rules against git itself, and the limits that git does not have."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from m3cli.corpus.ignore import IGNORE_FILE_LIMIT, IgnoreRules, pattern_lines, read_rules
from m3cli.corpus.sources import WalkOptions, collect

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("M3_TEST_EXAMPLES", "200"))
SEEDED = "M3_TEST_EXAMPLES" not in os.environ
quick = settings(
    max_examples=EXAMPLES,
    derandomize=SEEDED,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# Names that patterns can hit, miss, and trip over; all of them bytes, since that is what git sees.
NAMES = [
    *(b"a", b"b", b"ab", b"ba", b"A", b"a.c", b"b.c", b".h", b"build", b"a b", b"a ", b"!a", b"#a", b"\\a"),
    *(
        b"[a]",
        b"*",
        b"a-",
        b"]",
        b"a\nb",
        b"\xc3\xa9",
        b"\xff",
        b"a\t",
        b"a**b",
        b"aab",
        b"abab",
        b"a\r",
        b"^a",
    ),
]
PIECES = [
    *(
        b"a",
        b"b",
        b"ab",
        b".c",
        b".h",
        b"build",
        b"*",
        b"*",
        b"*",
        b"**",
        b"**",
        b"***",
        b"?",
        b"?",
        b"-",
        b" ",
    ),
    *(b"[a-c]", b"[!a]", b"[^b]", b"[]a]", b"[!]a]", b"[a-]", b"[-a]", b"[a", b"[", b"]", b"[]", b"[c-a]"),
    *(b"[\\]]", b"[\\\\]", b"[a/b]", b"[[:alpha:]]", b"[[:upper:][:space:]]", b"[[:bogus:]]", b"[[:alpha]"),
    *(b"[![:alnum:]]", b"[[:]", b"[a-\\c]", b"[%--]", b"[[-a]", b"[\xc3]", b"\\*", b"\\!", b"\\#", b"\\ "),
    *(b"\\a", b"\\", b"\\\\", b"\\[", b"\xc3\xa9", b"\xff", b"!", b"#", b"\t", b"A", b"\\/", b"^", b"\x0b"),
]

segments = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(b"".join) | st.sampled_from(NAMES)
# git before 2.53 takes these asterisks for `**/`, later versions for ordinary ones, as the manual says.
VERSION_DEPENDENT = re.compile(rb"!?/?[^*?\[\\]*[^*?\[\\/]\*\*")


@st.composite
def patterns(draw: st.DrawFn) -> bytes:
    """One line of an ignore file."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(
            st.sampled_from([b"", b"# a", b" ", b"/", b"//", b"!", b"!/", b"**", b"**/", b"/**", b"*/"])
        )
    body = b"/".join(draw(st.lists(st.just(b"**") | segments | segments, min_size=1, max_size=3)))
    line = draw(st.sampled_from([b"", b"", b"", b"!", b"!", b"/", b"!/", b"**/"])) + body
    line += draw(
        st.sampled_from([b"", b"", b"", b"/", b"/", b"/*", b"/**", b" ", b"  ", b"\\ ", b"\\  ", b"\t"])
    )
    if VERSION_DEPENDENT.match(line) and b"/" in line.removeprefix(b"!"):
        return b"a"
    return line


@st.composite
def ignore_file_contents(draw: st.DrawFn) -> bytes:
    """An ignore file with either kind of line end, some with a mark, some without a last line end."""
    lines = draw(st.lists(patterns(), max_size=5))
    text = b"".join(line + draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n"])) for line in lines)
    if draw(st.booleans()):
        text = text.removesuffix(b"\n")
    return draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"])) + text


ignore_files = ignore_file_contents()
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(b"/".join)


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """A home directory of its own, so that no git configuration of this machine counts."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        directory = Path(name)
        for variable in [key for key in os.environ if key.startswith("GIT_")]:
            patch.delenv(variable)
        patch.setenv("HOME", name)
        patch.setenv("XDG_CONFIG_HOME", str(directory / "xdg"))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("GIT_CONFIG_GLOBAL", str(directory / "gitconfig"))
        (directory / "xdg" / "git").mkdir(parents=True)
        (directory / "gitconfig").write_text("[user]\nname = t\nemail = t@example.org\n")
        yield directory


def git(directory: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], input=stdin, capture_output=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def make_repository(root: Path, config: str = "") -> None:
    """Do what `git init` does, without the time it takes."""
    for part in ("objects", "refs", "info"):
        (root / ".git" / part).mkdir(parents=True)
    (root / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (root / ".git" / "config").write_text("[core]\nrepositoryformatversion = 0\nbare = false\n" + config)


def ours(root: Path, options: WalkOptions | None = None) -> set[bytes]:
    found = collect([str(root)], options or WalkOptions(hidden=True), stdin=lambda: b"", cwd=root)
    assert not found.notes
    prefix = os.fsencode(root) + b"/"
    return {os.fsencode(source.file).removeprefix(prefix) for source in found.sources if source.file}


def theirs(root: Path) -> set[bytes]:
    listing = git(root, "ls-files", "--others", "--cached", "--exclude-standard", "-z")
    return set(listing.split(b"\0")) - {b""}


def write(root: Path, path: bytes, data: bytes = b"x\n") -> bool:
    """Write a file unless its path needs a directory where a file is, or the reverse."""
    place = root / os.fsdecode(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return False
    return True


@quick
@given(
    files=st.lists(st.tuples(paths, st.integers(0, 4)), min_size=1, max_size=12),
    ignores=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), ignore_files), min_size=1, max_size=4),
    info=ignore_files,
    everywhere=ignore_files,
    configured=st.booleans(),
    ignore_case=st.booleans(),
)
def test_a_tree_is_ignored_as_git_ignores_it(
    home: Path,
    files: list[tuple[bytes, int]],
    ignores: list[tuple[int, int, bytes]],
    info: bytes,
    everywhere: bytes,
    configured: bool,
    ignore_case: bool,
) -> None:
    """Exactly the files that `git ls-files` calls tracked or not ignored are found."""
    with TemporaryDirectory() as name:
        root = Path(name).resolve()
        # To a git that ignores case, files that differ in nothing else are one.
        ignore_case = ignore_case and not any(b"A" in path for path, _ in files)
        make_repository(
            root, "excludesFile = ~/excludes\n" * configured + "ignorecase = true\n" * ignore_case
        )
        tracked = []
        for path, number in files:
            if write(root, path) and number == 0:
                tracked.append(path)
        for number, depth, text in ignores:
            directories = files[number % len(files)][0].split(b"/")[:-1]
            write(root, b"/".join([*directories[:depth], b".gitignore"]), text)
        (root / ".git" / "info" / "exclude").write_bytes(info)
        for place, used in (("xdg/git/ignore", not configured), ("excludes", configured)):
            (home / place).write_bytes(everywhere if used else b"*")
        if tracked:
            git(root, "update-index", "--add", "-z", "--stdin", stdin=b"\0".join(tracked))
        assert ours(root) == theirs(root)


@quick
@given(text=ignore_files, names=st.lists(paths, min_size=10, max_size=40))
@example(text=b"*a*a*a*b\n", names=[b"a" * 12 + b"b", b"a" * 12])
@example(text=b"**/a*b/**/c*\n", names=[b"ab/c", b"x/axb/y/z/cc", b"ab", b"ab/d", b"ax/ab/c"])
@example(text=b"a[/]b\na[%-0]c\n", names=[b"a/b", b"a/c", b"a.c"])
@example(text=b"[[:punct:]]\n", names=[bytes([code]) for code in range(1, 256) if code not in b"/.:"])
def test_each_path_is_decided_by_the_pattern_that_git_names(
    home: Path, text: bytes, names: list[bytes]
) -> None:
    """`git check-ignore -v` and the rules name the same last matching pattern, or none."""
    (home / "xdg" / "git" / "ignore").write_bytes(b"")
    with TemporaryDirectory() as name:
        root = Path(name).resolve()
        make_repository(root)
        (root / ".gitignore").write_bytes(text)
        answer = git(
            root, "check-ignore", "-v", "-n", "-z", "--no-index", "--stdin", stdin=b"\0".join(names) + b"\0"
        ).split(b"\0")
        expected = dict(zip(answer[3::4], answer[2::4], strict=False))
        rules = IgnoreRules(pattern_lines(text), 0, ".gitignore")
        assert {path: _decide(rules, path) for path in names} == expected


def _decide(rules: IgnoreRules, path: bytes) -> bytes:
    """Text of the pattern that ignores `path` or a directory above it, or that last matches it."""
    components = path.split(b"/")
    for depth in range(1, len(components) + 1):
        above, last = b"/".join(components[:depth]), depth == len(components)
        pattern = rules.match(above, components[depth - 1], not last)
        if pattern is not None and (last or not pattern.negated):
            return pattern.raw
    return b""


def test_what_git_tracks_stays_in(home: Path, tmp_path: Path) -> None:
    """A committed or staged file is found although it is ignored; its untracked neighbours are not."""
    (home / "xdg" / "git" / "ignore").write_bytes(b"")
    git(tmp_path, "init", "-q")
    for path in (b"build/committed.c", b"build/deep/staged.c", b"build/loose.c", b"src/a.c"):
        write(tmp_path, path)
    write(tmp_path, b".gitignore", b"build/\n")
    git(tmp_path, "add", "-f", "build/committed.c")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "add", "-f", "build/deep/staged.c")
    expected = {b".gitignore", b"build/committed.c", b"build/deep/staged.c", b"src/a.c"}
    assert ours(tmp_path) == theirs(tmp_path) == expected


def test_info_exclude_is_stronger_than_the_global_file_and_weaker_than_gitignore(
    home: Path, tmp_path: Path
) -> None:
    """Of git's three places the one nearest to the file decides."""
    make_repository(tmp_path)
    (home / "xdg" / "git" / "ignore").write_text("*.a\n*.b\n!*.c\n")
    (tmp_path / ".git" / "info" / "exclude").write_text("!*.b\n*.c\n*.d\n")
    write(tmp_path, b".gitignore", b"!*.d\n")
    for name in (b"x.a", b"x.b", b"x.c", b"x.d"):
        write(tmp_path, name)
    assert ours(tmp_path) == theirs(tmp_path) == {b".gitignore", b"x.b", b"x.d"}
    (home / "xdg" / "git" / "ignore").write_bytes(b"")


def test_m3ignore_is_stronger_and_holds_for_tracked_files(tmp_path: Path) -> None:
    """A .m3ignore overrules the .gitignore beside it, leaves tracked files out, and can let others in."""
    git(tmp_path, "init", "-q")
    for path in (b"a.log", b"b.log", b"kept/a.txt", b"kept/b.txt", b"out/tracked", b"out/gone"):
        write(tmp_path, path)
    write(tmp_path, b".gitignore", b"*.log\nout/\n")
    write(tmp_path, b".m3ignore", b"!a.log\n")
    write(tmp_path, b"kept/.m3ignore", b"/b.txt\n")
    write(tmp_path, b"out/.m3ignore", b"gone\n")
    git(tmp_path, "add", "-f", "kept", "out")
    assert ours(tmp_path, WalkOptions()) == {b"a.log", b"kept/a.txt", b"out/tracked"}


def test_a_directory_inside_a_work_tree_obeys_the_rules_above_it(tmp_path: Path) -> None:
    """Patterns of the ancestors' .gitignore files and of info/exclude apply below a directory named."""
    make_repository(tmp_path)
    (tmp_path / ".git" / "info" / "exclude").write_text("*.bak\n")
    write(tmp_path, b".gitignore", b"*.log\n/pkg/sub/only\n!keep.bak\n")
    write(tmp_path, b"pkg/.gitignore", b"!b.log\n")
    for name in (b"a.log", b"b.log", b"a.bak", b"keep.bak", b"only", b"a.c"):
        write(tmp_path, b"pkg/sub/" + name)
    assert ours(tmp_path / "pkg" / "sub", WalkOptions()) == {b"b.log", b"keep.bak", b"a.c"}


def test_rules_hold_without_git(tmp_path: Path) -> None:
    """In a tree that is no repository .gitignore files count, and an empty .git changes nothing."""
    write(tmp_path, b".gitignore", b"*.log\n")
    write(tmp_path, b"a/x.log")
    write(tmp_path, b"a/x.c")
    (tmp_path / "a" / ".git").mkdir()
    assert ours(tmp_path, WalkOptions()) == {b"a/x.c"}


def test_a_nested_repository_has_rules_of_its_own(tmp_path: Path) -> None:
    """Below a nested work tree its own exclude files count and the outer patterns end."""
    make_repository(tmp_path)
    write(tmp_path, b".gitignore", b"*.log\n")
    make_repository(tmp_path / "inner")
    (tmp_path / "inner" / ".git" / "info" / "exclude").write_text("*.tmp\n")
    write(tmp_path, b"inner/.m3ignore", b"secret\n")
    for path in (b"a.log", b"a.tmp", b"inner/a.log", b"inner/a.tmp", b"inner/secret"):
        write(tmp_path, path)
    assert ours(tmp_path, WalkOptions()) == {b"a.tmp", b"inner/a.log"}


def test_a_linked_work_tree_uses_the_exclude_file_of_its_repository(tmp_path: Path) -> None:
    """Where .git is a file, info/exclude and the index are found through it."""
    main, linked = tmp_path / "main", tmp_path / "linked"
    main.mkdir()
    git(main, "init", "-q")
    git(main, "commit", "-q", "--allow-empty", "-m", "first")
    git(main, "worktree", "add", "-q", str(linked))
    (main / ".git" / "info").mkdir(exist_ok=True)
    (main / ".git" / "info" / "exclude").write_text("*.tmp\n")
    for name in (b"a.tmp", b"b.tmp", b"a.c"):
        write(linked, name)
    git(linked, "add", "-f", "b.tmp")
    assert ours(linked) == theirs(linked) == {b"a.c", b"b.tmp"}


def test_a_hostile_repository_runs_nothing(tmp_path: Path) -> None:
    """Programs that a repository's configuration names are not run."""
    ran = tmp_path / "ran"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    hook.chmod(0o755)
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    write(root, b"a.log")
    git(root, "add", "-f", "a.log")
    write(root, b".gitignore", b"*.log\n")
    with (root / ".git" / "config").open("a") as file:
        file.write(
            f"[core]\nfsmonitor = {hook}\nsshCommand = {hook}\npager = {hook}\nhooksPath = {tmp_path}\n"
        )
    assert ours(root, WalkOptions()) == {b"a.log"}
    assert not ran.exists()


def test_a_broken_repository_is_told(tmp_path: Path) -> None:
    """When git cannot read its index, the walk goes on and a note says what may be missing."""
    make_repository(tmp_path)
    (tmp_path / ".git" / "index").write_bytes(b"no index")
    write(tmp_path, b".gitignore", b"*.log\n")
    write(tmp_path, b"a.log")
    write(tmp_path, b"a.c")
    found = collect([str(tmp_path)], WalkOptions(), stdin=lambda: b"", cwd=tmp_path)
    assert [source.path for source in found.sources] == ["a.c"]
    assert found.notes[0].startswith("Tracked files that match an ignore rule may be left out: git failed (")


def test_without_git_the_walk_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the git program is missing, ignore files still count and a note says what may be missing."""
    make_repository(tmp_path)
    write(tmp_path, b".gitignore", b"*.log\n")
    write(tmp_path, b"a.log")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = collect([str(tmp_path)], WalkOptions(), stdin=lambda: b"", cwd=tmp_path)
    assert found.sources == ()
    assert any("git is not installed" in note for note in found.notes)


def test_an_ignore_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO or a link called .gitignore is no ignore file, as for git."""
    os.mkfifo(tmp_path / ".gitignore")
    (tmp_path / "sub").mkdir()
    write(tmp_path, b"rules", b"*\n")
    (tmp_path / "sub" / ".gitignore").symlink_to(tmp_path / "rules")
    write(tmp_path, b"sub/a.c")
    assert ours(tmp_path, WalkOptions()) == {b"rules", b"sub/a.c"}


def test_an_ignore_file_without_end_is_refused(tmp_path: Path) -> None:
    """A file larger than the limit is not applied, and not read whole."""
    huge = tmp_path / "rules"
    with huge.open("wb") as file:
        file.truncate(IGNORE_FILE_LIMIT + 1)
    with pytest.raises(OSError, match="larger than"):
        read_rules(os.fsencode(huge), 0, "rules", follow=False)


@pytest.mark.parametrize("glob", ["*a*a*a*a*a*a*a*a*a*b", "**/a*/**/a*/**/a*/**/a*/**/b", "*/" * 30 + "b"])
def test_a_hostile_pattern_does_not_stall(glob: str) -> None:
    """Patterns that explode under naive backtracking are decided in a fraction of a second."""
    rules = IgnoreRules([glob.encode()], 0, "")
    started = time.perf_counter()
    for path in (b"a" * 255, b"a/" * 400 + b"a", (b"a" * 200 + b"/") * 18 + b"c"):
        assert rules.match(path, path.split(b"/")[-1], False) is None
    assert time.perf_counter() - started < 30  # backtracking would take years
