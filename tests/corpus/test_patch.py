"""Diffs as git, diff and mail write them: what is read from them, and what is refused."""

from __future__ import annotations

import difflib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from m3cli.corpus import syntax
from m3cli.corpus.patch import FileChange, Hunk, applied, misfit, parse_diff, parse_raw, split_lines
from m3cli.corpus.touched import LONGEST, changed_symbols, enclosing
from m3cli.errors import CorpusError
from tests.git_repositories import commit, git, make_repository, write

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "diff --git a/x b/x\n--- a/x\n+++ b/x\n"


def only(data: bytes | str) -> FileChange:
    """The one file of a diff."""
    (change,) = parse_diff(data if isinstance(data, bytes) else data.encode())
    return change


def change_of(path: str, base: str, head: str) -> FileChange:
    """The change from one text to another, with both known."""
    diff = difflib.unified_diff(base.splitlines(True), head.splitlines(True), f"a/{path}", f"b/{path}")
    (change,) = parse_diff("".join(diff).encode())
    return FileChange(path, path, "modified", change.hunks, base, head, "")


def test_a_hunk_is_read_with_its_numbers_and_written_as_it_was() -> None:
    """Line numbers, sides and section are those of the diff, and `diff` gives it back."""
    text = (
        "--- a/x\n+++ b/x\n@@ -3,4 +3,5 @@ def f():\n 3\n-four\n+4\n+4.5\n 5\n 6\n"
        "@@ -20,2 +21 @@\n 20\n-21\n\\ No newline at end of file\n"
    )
    change = only("diff --git a/x b/x\nindex 1234567..89abcde 100644\n" + text)
    first, second = change.hunks
    assert first == Hunk(3, 4, 3, 5, (" 3", "-four", "+4", "+4.5", " 5", " 6"), "def f():")
    assert (second.old_start, second.old_length, second.start, second.length) == (20, 2, 21, 1)
    assert (second.old_open, second.open) == (True, False)
    assert change.added == {4, 5}
    assert change.diff == text
    assert change.head is None
    assert change.head_lines() == {3: "3", 4: "4", 5: "4.5", 6: "5", 7: "6", 21: "20"}
    assert first.side(new=False) == ["3\n", "four\n", "5\n", "6\n"]
    assert second.side(new=False) == ["20\n", "21"]


def everything(directory: Path) -> Path:
    """A repository in which every kind of change was made and is staged."""
    repository = make_repository(
        directory,
        {
            "changed file": "1\n2\n3\n",
            "deleted": "gone\n",
            "old name": "".join(f"line {number}\n" for number in range(30)),
            "moved": "same\n" * 20,
            "mode": "x\n",
            "both": "x\n",
            "binary": b"\0one",
            "link b/link": "was a file\n",
            "ends": "a\nb",
            "crlf": "a\r\nb\r\n",
        },
    )
    write(
        repository,
        {
            "changed file": "1\ntwo\n3\n",
            "binary": b"\0two",
            "new": "n\nm\n",
            "empty": "",
            'quote"d\tnäme\\': "x\n",
            "-- a": "-- a\n++ b\n",
            "ends": "a\nb\n",
            "crlf": "a\r\nc\r\n",
            "both": "y\n",
            "a/b b/a": "twice\n",
        },
    )
    (repository / "deleted").unlink()
    (repository / "old name").rename(repository / "new name")
    write(repository, {"new name": (repository / "new name").read_text().replace("line 7\n", "seven\n")})
    (repository / "moved").rename(repository / "to here")
    (repository / "mode").chmod(0o755)
    (repository / "both").chmod(0o755)
    (repository / "link b/link").unlink()
    (repository / "link b/link").symlink_to("x")
    (repository / os.fsdecode(b"\xff\xfe")).write_bytes(b"caf\xe9 cr\xe8me, d\xe9j\xe0 vu\n")
    git(repository, "add", "--all")
    return repository


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-prefix",),
        ("--binary",),
        ("--color=always",),
        ("--src-prefix=x/", "--dst-prefix=y/"),
        ("-U0",),
    ],
    ids=str,
)
def test_every_kind_of_change_as_git_writes_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Names, kinds and reasons are right under any prefix, with colours, and with binary patches."""
    data = git(everything(tmp_path), "diff", "--cached", "--find-renames", *options)
    found = {change.path: (change.status, change.old_path, change.reason) for change in parse_diff(data)}
    assert found == {
        "changed file": ("modified", "changed file", ""),
        "deleted": ("deleted", "deleted", "deleted"),
        "new name": ("renamed", "old name", ""),
        "to here": ("renamed", "moved", "only renamed"),
        "mode": ("mode", "mode", "only its mode changed"),
        "both": ("modified", "both", ""),
        "binary": ("modified", "binary", "binary"),
        "link b/link": ("added", "link b/link", "a link"),
        "ends": ("modified", "ends", ""),
        "crlf": ("modified", "crlf", ""),
        "new": ("added", "new", ""),
        "empty": ("added", "empty", "empty"),
        'quote"d\\tnäme\\': ("added", 'quote"d\\tnäme\\', ""),
        "-- a": ("added", "-- a", ""),
        "a/b b/a": ("added", "a/b b/a", ""),
        "\\xff\\xfe": ("added", "\\xff\\xfe", ""),
    }
    by_path = {change.path: change for change in parse_diff(data)}
    assert by_path["\\xff\\xfe"].raw_path == b"\xff\xfe"
    assert by_path["\\xff\\xfe"].head == "café crème, déjà vu\n"
    assert by_path["-- a"].head == "-- a\n++ b\n"
    assert by_path["deleted"].hunks[0].lines == ("-gone",)
    assert by_path["crlf"].head_lines()[2] == "c"
    (hunk,) = by_path["ends"].hunks
    assert (hunk.old_open, hunk.open) == (True, False)


def test_mails_and_logs_have_headers_in_front(tmp_path: Path) -> None:
    """A diff is found behind what format-patch and show write, and before a mail's signature."""
    repository = make_repository(tmp_path, {"x": "1\n"})
    message = "Subject\n\n- a list\n+ of\n--- words\n\\ and more\n"
    commit(repository, {"x": "2\n"}, message)
    for command in (["format-patch", "--stdout", "-1"], ["show"], ["log", "-p", "-1"]):
        change = only(git(repository, *command))
        assert (change.path, change.hunks[0].lines) == ("x", ("-1", "+2"))
    commit(repository, {}, "nothing")
    assert parse_diff(git(repository, "show")) == []
    commit(repository, {"x": "3\n"})
    series = git(repository, "format-patch", "--stdout", "-3")
    with pytest.raises(CorpusError, match=r"changes x twice, the second time at line \d+\. Make one diff"):
        parse_diff(series)


def test_what_diff_writes(tmp_path: Path) -> None:
    """Times behind names, directories before them, and files that are only on one side are understood."""
    write(tmp_path, {"old/d/x": "1\n2\n", "new/d/x": "1\n3", "old/gone": "g\n", "new/come": "c\n"})
    write(tmp_path, {"old/b": b"\0a", "new/b": b"\0b", "old/with blank": "1\n", "new/with blank": "2\n"})
    done = subprocess.run(
        ["diff", "-ruN", "old", "new"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        env={"TZ": "Asia/Tokyo"},
    )
    found = {change.path: (change.status, change.reason) for change in parse_diff(done.stdout)}
    assert found == {
        "b": ("modified", "binary"),
        "come": ("added", ""),
        "d/x": ("modified", ""),
        "gone": ("deleted", "deleted"),
        "with blank": ("modified", ""),
    }
    change = only(
        "--- x.orig\t2020-01-01\n+++ ./x\t2020-01-02\n@@ -1 +1 @@\n-a\n+b\n\\ Kein Zeilenumbruch am Ende\n"
    )
    assert (change.path, change.hunks[0].open) == ("x", True)


def test_line_ends_of_a_diff_that_went_through_windows() -> None:
    """Carriage returns in the headers too are not of the files."""
    text = HEADER + "@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    assert only(text.replace("\n", "\r\n")).hunks == only(text).hunks


def test_lines_end_at_line_feeds_only() -> None:
    """Other characters that some programs end lines at are in the line, as they are for git."""
    line = "a\r\x0b\x0c\x1c\x85\u2028b"
    change = only(HEADER + f"@@ -1 +1,2 @@\n+{line}\n c\n")
    assert change.hunks[0].lines == ("+" + line, " c")
    assert change.added == {1}


def test_bytes_of_other_encodings_are_decoded_as_documents_are() -> None:
    """A legacy encoding is recognised from the lines; what has none is not reviewed, and shown escaped."""
    assert only(HEADER.encode() + b"@@ -1 +1 @@\n-caf\xe9 cr\xe8me\n+caf\xe9 br\xfbl\xe9\n").hunks[
        0
    ].lines == (
        "-café crème",
        "+café brûlé",
    )
    change = only(HEADER.encode() + b"@@ -1 +1 @@\n-a\n+\x01\xff\xfe\n")
    assert change.reason.startswith("undecodable")
    assert change.hunks[0].lines == ("-a", "+\x01\\xff\\xfe")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEADER + "@@ -1,2 +1,2 @@\n a\n", 5),
        (HEADER + "@@ -1 +1 @@\n a\n@@ -x\n@@ -1,x +2\n", 7),
        (HEADER + "@@ -1,2 +1,2 @@\nno line of a diff\n", 5),
        (HEADER + "@@ -1 +1 @@\n a\n+b\n", 6),
        (HEADER + "@@ -1,99999999999 +1 @@\n a\n", 4),
        (HEADER + "@@ -5 +5 @@\n-a\n+b\n@@ -2 +2 @@\n-c\n+d\n", 8),
        (HEADER + "@@ -1,2 +1 @@\n-a\n\\ No newline at end of file\n-b\n+c\n", 7),
        ("@@ -1 +1 @@\n-a\n+b\n", 1),
        ("+++ x\n", 1),
        ("diff --git one two three\n", 1),
        ("diff --git a/../x b/../x\n--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-a\n+b\n", 1),
        ("--- /etc/passwd\n+++ /etc/passwd\n@@ -1 +1 @@\n-a\n+b\n", 2),
        ("--- a/.git/config\n+++ b/.git/config\n@@ -1 +1 @@\n-a\n+b\n", 2),
        ('diff --git "a/x\\000y" "b/x\\000y"\nnew file mode 100644\n', 1),
        ("diff --cc x\nindex 1,2..3\n--- a/x\n+++ b/x\n@@@ -1,1 -1,1 +1,1 @@@\n--a\n++b\n", 1),
    ],
)
def test_broken_and_hostile_diffs_are_refused(text: str, line: int) -> None:
    """The error names the line, and nothing is lost without a word."""
    with pytest.raises(CorpusError, match=rf"\bat line {line}\b"):
        parse_diff(text.encode())


def test_no_diff_at_all() -> None:
    """Nothing is an empty diff; text without a change is an error."""
    assert parse_diff(b"") == []
    assert parse_diff(b"\n \n") == []
    with pytest.raises(CorpusError, match="no change to a file"):
        parse_diff(b"<html>404</html>\n")


pieces = st.sampled_from(
    [
        *("diff --git a/x b/x", "--- a/x", "+++ b/x", "--- /dev/null", "@@ -1 +1 @@", "@@ -0,0 +1,2 @@ f"),
        *("@@ -1,3 +1,3 @@", "-a", "+b", " c", "", "\\ No newline at end of file", "rename from x", "@@ -1"),
        *(
            "rename to y",
            "new file mode 100644",
            "deleted file mode 100644",
            "GIT binary patch",
            "-- ",
            "From ",
        ),
        *("Binary files a/x and b/x differ", "index 1..2 100644", "\r", '--- "a/\\', "diff --cc x", "@@@ -1"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.lists(pieces, max_size=14).map(lambda lines: "\n".join(lines).encode()), st.binary(max_size=200)
    )
)
def test_nothing_crashes_the_reader(data: bytes) -> None:
    """Whatever is given, there are changes or an error that was meant."""
    try:
        changes = parse_diff(data)
    except CorpusError:
        return
    for change in changes:
        assert change.diff.endswith("\n")
        assert change.added <= change.head_lines().keys()
        enclosing(change)
        changed_symbols(change)


texts = st.lists(
    st.sampled_from(["a", "b", "-- x", "++ y", "", "\r", "ü\u2028", "\\ c", "@@ -1 +1 @@"]), max_size=12
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts, st.booleans(), st.booleans(), st.integers(0, 3))
@example(["a"], ["a", "b"], True, False, 0)
def test_hunks_make_one_version_of_the_other(
    tmp_path: Path, old: list[str], new: list[str], old_ends: bool, new_ends: bool, context: int
) -> None:
    """Applied to git's own old text they give its new text, and back; `added` is what git says."""
    base = "\n".join(old) + "\n" * old_ends
    head = "\n".join(new) + "\n" * new_ends
    if base == head or not base or not head:
        return
    write(tmp_path, {"a/x": base, "b/x": head})
    done = subprocess.run(
        ["git", "diff", "--no-index", "--no-prefix", f"-U{context}", "a/x", "b/x"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    (change,) = parse_raw(done.stdout)
    hunks = change.hunks
    before, after = split_lines(base), split_lines(head)
    assert misfit(before, hunks, new=False) is None
    assert misfit(after, hunks, new=True) is None
    assert applied(before, hunks) == after
    assert applied(after, hunks, new=False) == before
    plus = {number: line for hunk in hunks for number, line in hunk.numbered() if line[0] == "+"}
    assert change.added == plus.keys()
    assert {n: line[1:] for n, line in plus.items()} == {n: after[n - 1].removesuffix("\n") for n in plus}
    kept = [line for n, line in enumerate(after, 1) if n not in plus]
    assert len(kept) == len(before) - sum(line[0] == "-" for hunk in hunks for line in hunk.lines)


PYTHON = '''import os


class Store:
    """Keeps things."""

    def first(self):
        return 1

    def load_items(self, path):
        # read_everything is not a name here
        with open(path) as file:
            return parse_json(file.read(), "quoted_name")


def last():
    return 2
'''


@pytest.mark.skipif(not syntax.is_available(), reason="needs the parsers of the code extra")
def test_a_change_stands_in_its_function() -> None:
    """The whole function around a changed line is shown, and no other; a long one only near the change."""
    change = change_of("x.py", PYTHON, PYTHON.replace("file.read()", "file.readlines()"))
    assert enclosing(change) == [(10, 13)]
    assert changed_symbols(change)[:3] == ["load_items", "Store", "parse_json"]
    symbols = set(changed_symbols(change))
    assert not symbols & {"quoted_name", "read_everything", "return", "last", "first"}
    long = "def f():\n" + "".join(f"    x = {number}\n" for number in range(LONGEST + 100))
    lines = long.splitlines(True)
    lines[150] = "    y = 1\n"
    assert enclosing(change_of("x.py", long, "".join(lines))) == [(131, 171)]


def test_without_a_parser_the_lines_near_the_change_are_taken() -> None:
    """Some lines before and after, within the file, joined where they meet."""
    base = "".join(f"{number}\n" for number in range(1, 101))
    change = change_of(
        "x.txt", base, base.replace("\n5\n", "\nfive\n").replace("\n24\n", "\n").replace("\n90\n", "\n")
    )
    assert enclosing(change) == [(1, 34), (78, 98)]
    alone = FileChange("x.txt", "x.txt", "modified", change.hunks, None, None, "")
    assert enclosing(alone) == [(hunk.start, hunk.start + hunk.length - 1) for hunk in change.hunks]


def test_symbols_of_a_diff_alone() -> None:
    """Without the file the hunk's section names the function, and comments and strings do not count."""
    change = only(
        HEADER.replace("x", "x.go") + "@@ -8,2 +8,3 @@ func (s *Server) HandleRequest(w Writer) {\n"
        ' \ta := 1\n-\toldCall(a)\n+\tnewClient.fetchAll(a, "some words") // and more words\n+\t// nothing\n'
    )
    symbols = changed_symbols(change)
    assert symbols[0] == "HandleRequest"
    assert set(symbols[1:3]) == {"fetchAll", "oldCall"}
    assert "newClient" in symbols
    assert not {"words", "nothing", "func"} & set(symbols)
    prose = only(HEADER + "@@ -1 +1 @@\n-all the words\n+call parse_it or MaxRetries for more words\n")
    assert set(changed_symbols(prose)) == {"parse_it", "MaxRetries"}
