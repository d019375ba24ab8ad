"""Ranking chunks for a question."""

from __future__ import annotations

import pytest

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.search import rank, terms
from m3cli.corpus.types import Chunk, Document


def chunk(path: str, text: str) -> Chunk:
    return chunk_document(Document(path, text, "utf-8"))[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parseHTTPUrl", {"parse", "http", "url", "parsehttpurl"}),
        ("max_retries", {"max", "retry", "max_retries"}),
        ("Connections", {"connection"}),
        ("class", {"class"}),
        ("utf8Decode2", {"utf", "8", "decode", "2", "utf8decode2"}),
        ("where is the bus", {"bus"}),
        ("再試行の回数", {"再試", "試行", "行の", "の回", "回数"}),
        ("Größe_Überlauf", {"größe_überlauf"}),
        ("", set()),
    ],
)
def test_terms_see_into_identifiers(text: str, expected: set[str]) -> None:
    """Identifiers are found by their parts, plurals by their singular, CJK text by pairs."""
    assert expected <= set(terms(text))


def test_the_chunk_that_answers_comes_first() -> None:
    """The chunk that shares the question's rare terms is ranked before those that share common ones."""
    chunks = [
        chunk("src/a.py", "def load(path):\n    return open(path)\n"),
        chunk("src/b.py", "def retry_request(request):\n    backoff = 2\n"),
        chunk("src/c.py", "def request(url):\n    return url\n"),
    ]
    assert rank(chunks, "Where is the retry logic of a request?")[0] == 1


def test_a_path_counts_as_text() -> None:
    """A file is found by its name even if its text never says it."""
    chunks = [chunk("src/a.py", "x = 1\n"), chunk("src/tokenizer.py", "y = 2\n")]
    assert rank(chunks, "what does the tokenizer do?") == [1, 0]


def test_ties_and_unknown_words_keep_the_given_order() -> None:
    """Every chunk is in the ranking once; without a match the order is the corpus's."""
    chunks = [chunk(f"{i}.py", "same text\n") for i in range(5)]
    assert rank(chunks, "zzz") == [0, 1, 2, 3, 4]
    assert rank(chunks, "same") == [0, 1, 2, 3, 4]
    assert rank([], "same") == []
