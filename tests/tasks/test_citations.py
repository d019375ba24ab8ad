"""Citations are found as models write them, and believed only when the pack bears them out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.types import Chunk
from m3cli.tasks.citations import check_citations

CHUNKS = [
    Chunk("m3cli/errors.py", 1, 60, ""),
    Chunk("m3cli/errors.py", 61, 94, ""),
    Chunk("src/app.py", 10, 20, ""),
    Chunk("src/app.py", 40, 50, ""),
    Chunk("lib/app.py", 1, 9, ""),
    Chunk("docs/my notes.md", 1, 5, ""),
    Chunk("Makefile", 1, 30, ""),
    Chunk("文書/メモ.txt", 1, 3, ""),
]


def found(answer: str) -> list[tuple[str, int, int, bool]]:
    return [(c.path, c.start_line, c.end_line, c.verified) for c in check_citations(answer, CHUNKS)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("See m3cli/errors.py:33-40.", [("m3cli/errors.py", 33, 40, True)]),
        ("See `m3cli/errors.py:33`.", [("m3cli/errors.py", 33, 33, True)]),
        ("(m3cli/errors.py#L33-L40)", [("m3cli/errors.py", 33, 40, True)]),
        ("`m3cli/errors.py`, lines 3 to 5", [("m3cli/errors.py", 3, 5, True)]),
        ("Source: m3cli/errors.py, line: 7", [("m3cli/errors.py", 7, 7, True)]),
        ("in m3cli/errors.py (line 7)", [("m3cli/errors.py", 7, 7, True)]),
        ("errors.py:33–40", [("m3cli/errors.py", 33, 40, True)]),
        ("./m3cli/errors.py:1", [("m3cli/errors.py", 1, 1, True)]),
        ("elsewhere/m3cli/errors.py:1", [("elsewhere/m3cli/errors.py", 1, 1, False)]),
        ("**m3cli/errors.py**:2", [("m3cli/errors.py", 2, 2, True)]),
        ("errors.py:2-3, 5-6", [("m3cli/errors.py", 2, 3, True), ("m3cli/errors.py", 5, 6, True)]),
        ("docs/my notes.md:2-3 says", [("docs/my notes.md", 2, 3, True)]),
        ("Makefile:12", [("Makefile", 12, 12, True)]),
        ("文書/メモ.txt:2", [("文書/メモ.txt", 2, 2, True)]),
        ("spans two chunks m3cli/errors.py:55-70", [("m3cli/errors.py", 55, 70, True)]),
        ("m3cli/errors.py:90-95", [("m3cli/errors.py", 90, 95, False)]),
        ("m3cli/errors.py:0", [("m3cli/errors.py", 0, 0, False)]),
        ("m3cli/errors.py:9-3", [("m3cli/errors.py", 9, 3, False)]),
        ("src/app.py:15-45", [("src/app.py", 15, 45, False)]),
        ("app.py:15", [("app.py", 15, 15, False)]),
        ("other/file.rs:3", [("other/file.rs", 3, 3, False)]),
        ("notMakefile:12", []),
        ("at 12:30, on localhost:8080, note:3, https://example.org/a.py:80/x", []),
        ("version 1.2:3", []),
        ("on line 12 of it", []),
        ("", []),
    ],
)
def test_citations_are_found_and_checked(answer: str, expected: list[tuple[str, int, int, bool]]) -> None:
    """Each usual way of citing is read; only shown lines of packed files are verified."""
    assert found(answer) == expected


def test_a_place_is_listed_once_in_the_order_of_the_answer() -> None:
    """Repeated citations of one place are one."""
    assert found("src/app.py:12 and Makefile:1 and src/app.py:12") == [
        ("src/app.py", 12, 12, True),
        ("Makefile", 1, 1, True),
    ]


def test_an_unverified_citation_says_why() -> None:
    """The problem names what is wrong with the citation."""
    problems = [c.problem for c in check_citations("x/y.c:1 m3cli/errors.py:95 src/app.py:30", CHUNKS)]
    assert problems == [
        "x/y.c is not in the pack",
        "lines up to 94 were shown",
        "not all of these lines were shown",
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="am3cli/errors.py:#L0123456789-–`() \n", max_size=200))
def test_no_answer_breaks_the_check(answer: str) -> None:
    """Whatever an answer looks like, verified citations lie within what was shown."""
    for citation in check_citations(answer, CHUNKS):
        assert citation.verified == (citation.problem == "")
        if citation.verified:
            assert any(c.path == citation.path and c.end_line >= citation.end_line for c in CHUNKS)
