"""Chunks: the laws that everything above relies on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.chunks import BYTES_PER_TOKEN, chunk_document
from m3cli.corpus.types import Document

SOURCES = sorted(Path(__file__).parents[2].joinpath("m3cli").rglob("*.py"))
LINES = st.lists(
    st.one_of(
        st.sampled_from(
            ["", "\n", "\r\n", "def f():\n", "    return 1\n", "\t\n", "# é\n", "漢字" * 30, "x" * 400]
        ),
        st.text(max_size=60),
    ),
    max_size=60,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(LINES, st.integers(1, 40))
def test_chunks_rejoin_to_the_document(text: str, target: int) -> None:
    """The texts of a document's chunks, joined, are the document, whatever it holds."""
    assert "".join(chunk.text for chunk in chunk_document(Document("a", text, "utf-8"), target)) == text


@settings(max_examples=300, deadline=None)
@given(LINES, st.integers(1, 40))
def test_line_numbers_are_those_of_the_document(text: str, target: int) -> None:
    """Every chunk's text stands in the document at the lines that the chunk claims."""
    lines = text.split("\n")
    for chunk in chunk_document(Document("a", text, "utf-8"), target):
        claimed = "\n".join(lines[chunk.start_line - 1 : chunk.end_line]) + "\n"
        if chunk.start_line == chunk.end_line:
            assert chunk.text in claimed  # a long line may be cut
        else:
            assert chunk.text in (claimed, claimed[:-1])


@settings(max_examples=200, deadline=None)
@given(LINES, st.integers(2, 40))
def test_no_chunk_is_larger_than_its_target(text: str, target: int) -> None:
    """A chunk never takes more bytes than the target allows, not even for one long line."""
    for chunk in chunk_document(Document("a", text, "utf-8"), target):
        assert 0 < len(chunk.text.encode()) <= target * BYTES_PER_TOKEN


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_real_sources_are_cut_between_definitions(path: Path) -> None:
    """In m3's own source, chunks that are cut begin at a line that could open a block."""
    chunks = chunk_document(Document("a", path.read_text("utf-8"), "utf-8"))
    starts = [chunk.text.split("\n")[0] for chunk in chunks[1:]]
    assert all(start.strip() for start in starts)


def test_a_cut_prefers_a_top_level_line_after_a_blank_one() -> None:
    """Two functions that do not fit into one chunk are cut apart between them, not inside one."""
    function = "def {}():\n" + "    value = 1\n" * 12 + "\n\n"
    text = function.format("first") + function.format("second")
    chunks = chunk_document(Document("a", text, "utf-8"), target_tokens=60)
    assert [chunk.text.split("(")[0] for chunk in chunks] == ["def first", "def second"]
    assert (chunks[1].start_line, chunks[1].end_line) == (16, 30)


def test_the_digest_is_of_the_content_alone() -> None:
    """Equal text has an equal digest wherever it stands; other text another."""
    first = chunk_document(Document("a", "x = 1\n", "utf-8"))[0]
    second = chunk_document(Document("b", "x = 1\n", "utf-16"))[0]
    other = chunk_document(Document("a", "x = 2\n", "utf-8"))[0]
    assert first.digest == second.digest != other.digest


def test_a_huge_line_is_cut_in_linear_time() -> None:
    """A minified file of one 4 MB line becomes chunks without delay and without loss."""
    text = "var a=1;" * 500_000
    chunks = chunk_document(Document("a", text, "utf-8"))
    assert "".join(chunk.text for chunk in chunks) == text
    assert {(chunk.start_line, chunk.end_line) for chunk in chunks} == {(1, 1)}
