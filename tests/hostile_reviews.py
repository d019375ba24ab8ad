"""Reviews for the tests of their formats: a plain one, and ones with what hostile code could bring in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from m3cli.tasks.findings import RULES, SEVERITIES, Finding, Review, Unreviewed

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PIECES = (
    "\n",
    "\r\n",
    "\r",
    "\t",
    '"',
    "'",
    "\\",
    "\x00",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u2028",
    "\u202e",
    "\udcff",
    "\ud800",
    "é漢𐐀",
    "::error file=a::b",
    "\n::stop-commands::x",
    "##[error]x",
    "##vso[task.setvariable variable=a]b",
    "%0A",
    "%25",
    "%",
    "]]>",
    "`",
    "```",
    "\n```\n",
    "~~~",
    "<!-- m3 review -->",
    "-->",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</details>",
    "@octocat",
    "\\@octocat",
    "`@octocat`",
    "&#64;octocat",
    "#123",
    "GH-123",
    "owner/name#7",
    "!45",
    "[click](https://example.com)",
    "[click][1]",
    "\n[1]: https://example.com\n",
    "![x](https://example.com/x.png)",
    "https://example.com/",
    "www.example.com",
    "\n# Heading\n",
    "\n/merge\n",
    "\n> quote",
    "\n- item",
    "\n1. item",
    "\n===\n",
    "\n---\n",
    "|a|b|",
    "$x$",
    "*b* _i_ ~~s~~",
    "{0}",
    "a:b,c=d;e",
    " ",
    "",
)


def finding(**changes: object) -> Finding:
    """A finding of an ordinary kind, with `changes`."""
    plain = Finding(
        rule="security",
        severity="error",
        confidence=0.9,
        path="src/db.py",
        start_line=11,
        end_line=12,
        start_column=5,
        end_column=9,
        message="The name is put into the text of the query. `execute` takes it as a parameter.",
        fingerprint="f0" * 16,
        line_hash="39fa2ee980eb94b0:1",
        frame=((10, "def find(name):"), (11, "    query = text + name"), (12, "    go()"), (13, "")),
        replacement="    query = text\n    go(name)\n",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def review(*findings: Finding, **changes: object) -> Review:
    """A review with `findings` and `changes`."""
    plain = Review(
        findings=findings,
        files=("src/db.py", "src/app.py"),
        unreviewed=(),
        dropped={},
        base="a" * 40,
        head="b" * 40,
        model="demo",
        context="diff",
        complete=True,
        prompt_tokens=1000,
        restored_tokens=0,
        generated_tokens=200,
        seconds=12.5,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def texts(max_pieces: int = 8) -> SearchStrategy[str]:
    """Pieces of PIECES and any other text, put together."""
    pieces = st.sampled_from(PIECES) | st.text(st.characters(codec=None), max_size=12)
    return st.lists(pieces, max_size=max_pieces).map("".join)


def lines() -> SearchStrategy[str]:
    """Lines of a file without their ends, some of them very long."""
    short = texts(4).map(lambda text: text.replace("\n", "").replace("\r", ""))
    return short | st.builds(lambda text, count: (text * count)[:100_000], short, st.just(20_000))


@st.composite
def findings(draw: st.DrawFn) -> Finding:
    """Findings that keep the promises of Finding, with texts that promise nothing."""
    first = draw(st.integers(1, 10_000))
    frame = tuple((first + i, text) for i, text in enumerate(draw(st.lists(lines(), min_size=1, max_size=5))))
    start = draw(st.integers(0, len(frame) - 1))
    end = draw(st.integers(start, len(frame) - 1))
    start_column = draw(st.integers(1, len(frame[start][1]) + 1))
    end_column = draw(st.integers(start_column if start == end else 1, len(frame[end][1]) + 1))
    return Finding(
        rule=draw(st.sampled_from(list(RULES))),
        severity=draw(st.sampled_from(SEVERITIES)),
        confidence=draw(st.floats(0, 1)),
        path=draw(texts(3).filter(bool)),
        start_line=frame[start][0],
        end_line=frame[end][0],
        start_column=start_column,
        end_column=end_column,
        message=draw(texts() | texts().map(lambda text: (text * 20_000)[:100_000])),
        fingerprint=draw(st.text("0123456789abcdef", min_size=32, max_size=32)),
        line_hash=draw(st.text("0123456789abcdef", min_size=1, max_size=16)) + ":1",
        frame=draw(st.sampled_from([frame, ()])),
        replacement=draw(st.none() | texts()),
    )


def reviews() -> SearchStrategy[Review]:
    """Reviews with such findings."""
    return st.builds(
        review,
        findings=st.lists(findings(), max_size=4, unique_by=lambda f: f.fingerprint).map(tuple),
        files=st.lists(texts(2), max_size=3).map(tuple),
        unreviewed=st.lists(st.builds(Unreviewed, texts(3).filter(bool), texts(3)), max_size=3).map(tuple),
        dropped=st.dictionaries(st.sampled_from(["unverified", "refuted", "excess"]), st.integers(0, 9)),
        model=texts(2),
        context=st.sampled_from(["diff", "related", "repo"]),
        complete=st.booleans(),
        warnings=st.lists(texts(3), max_size=2).map(tuple),
    )
