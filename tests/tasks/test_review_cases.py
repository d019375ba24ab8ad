"""The measuring set of `m3 review` is well formed: each bug stands where its case says."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from m3cli.tasks.findings import RULES
from tests.git_repositories import commit, git, head, make_repository
from tests.review_cases import SOURCES, Case, changes, load_cases, make_case_repository

if TYPE_CHECKING:
    from pathlib import Path

CASES = load_cases()
BUGS = [case for case in CASES if not case.clean]
CLEAN = [case for case in CASES if case.clean]

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
all_bugs = pytest.mark.parametrize("case", BUGS, ids=lambda case: case.id)


def test_the_set_is_large_and_varied() -> None:
    """At least 40 bugs and 20 clean changes, of four languages and nearly all rules."""
    assert len(BUGS) >= 40
    assert len(CLEAN) >= 20
    for cases in (BUGS, CLEAN):
        assert {case.language for case in cases} == {"c", "go", "javascript", "python"}
    assert len({case.rule for case in BUGS}) >= 8
    assert max(Counter(case.kind for case in BUGS).values()) <= len(BUGS) / 8


def test_ids_are_unique() -> None:
    assert [case for case, count in Counter(case.id for case in CASES).items() if count > 1] == []


def test_every_source_is_used() -> None:
    """Files that no case changes are there only because their language's tools want them."""
    there = {(file.parent.name, file.name) for file in SOURCES.glob("*/*") if file.is_file()}
    unused = there - {(case.language, case.path) for case in CASES}
    assert unused == {("go", "go.mod"), ("javascript", "package.json")}


@all_cases
def test_a_case_is_a_change_of_some_lines(case: Case) -> None:
    """A bug is one of several changed lines, and the change is small enough to read."""
    assert case.head != case.base
    diff = changes(case.base, case.head)
    assert 5 <= len(diff.added) + diff.removed <= 40
    assert case.head.endswith("\n")


@all_cases
def test_a_note_is_a_sentence(case: Case) -> None:
    assert case.note.endswith(".")
    assert "\n" not in case.note
    assert len(case.note.split()) >= 5


@all_bugs
def test_the_bug_is_in_the_diff(case: Case) -> None:
    """Every oracle line was added or stands where lines were taken away; others were added besides."""
    diff = changes(case.base, case.head)
    assert case.lines
    assert case.lines <= diff.added | diff.gaps
    assert diff.added - case.lines
    assert case.rule in RULES
    assert case.kind


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.id)
def test_a_clean_change_has_no_oracle(case: Case) -> None:
    assert (case.lines, case.rule, case.kind) == (frozenset(), "", "")


@pytest.mark.parametrize("case", [c for c in CASES if c.language == "python"], ids=lambda case: case.id)
def test_python_compiles_before_and_after(case: Case) -> None:
    for text in (case.base, case.head):
        compile(text, case.path, "exec", dont_inherit=True)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.id)
def test_a_case_becomes_a_repository_of_two_commits(case: Case, tmp_path: Path) -> None:
    """The second commit changes the file of the case and nothing else."""
    first, second = make_case_repository(tmp_path, case)
    assert git(tmp_path, "rev-parse", "HEAD", "HEAD^").decode().split() == [second, first]
    assert git(tmp_path, "diff", "--name-only", first, second).decode().split() == [case.path]
    assert git(tmp_path, "show", f"{second}:{case.path}").decode() == case.head
    assert git(tmp_path, "show", f"{first}:{case.path}").decode() == case.base


def test_git_sees_the_bugs_in_its_diff_too(tmp_path: Path) -> None:
    """What is reviewed is git's diff, which may align lines in another way than difflib."""
    repository = make_repository(tmp_path, {f"{case.id}/{case.path}": case.base for case in BUGS})
    base = head(repository)
    commit(repository, {f"{case.id}/{case.path}": case.head for case in BUGS})
    touched: dict[str, set[int]] = {}
    current = ""
    for line in git(repository, "diff", "--unified=0", base, "HEAD").decode().splitlines():
        if line.startswith("+++ b/"):
            current = line.removeprefix("+++ b/")
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, count = int(hunk[1]), int(hunk[2] or 1)
            lines = range(start, start + count) if count else (start, start + 1)
            touched.setdefault(current, set()).update(lines)
    outside = {case.id: case.lines - touched[f"{case.id}/{case.path}"] for case in BUGS}
    assert {name: lines for name, lines in outside.items() if lines} == {}
