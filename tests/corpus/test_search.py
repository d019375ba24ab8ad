"""Ranking chunks for a question."""

from __future__ import annotations

from itertools import chain

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus import search
from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.search import rank, score_documents, terms
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


def test_a_document_counts_as_its_best_chunk() -> None:
    """Each path has the score of the chunk that answers best, and 0 without a match."""
    text = "def other():\n    pass\n\n\n" * 200 + "def retry():\n    return backoff\n"
    chunks = [
        *chunk_document(Document("a.py", text, "utf-8")),
        chunk("b.py", "retry\n"),
        chunk("c.py", "x\n"),
    ]
    assert len(chunks) > 3
    scores = score_documents(chunks, "retry backoff")
    assert list(scores) == ["a.py", "b.py", "c.py"]
    assert scores["a.py"] > scores["b.py"] > scores["c.py"] == 0
    assert score_documents([], "retry") == {}


def plain_scores(chunks: list[Chunk], question: str) -> list[float]:
    """All terms of all chunks, each given to the index: what the fast way must not differ from."""
    asked = {term: term for term in terms(question)}
    documents = [[asked.get(term, "") for term in chain(terms(c.path), terms(c.text))] for c in chunks]
    query = [term for term in asked if any(term in document for document in documents)]
    if not query:
        return [0.0] * len(chunks)
    index = bm25s.BM25(method="lucene")
    index.index(documents, show_progress=False)
    return [float(score) for score in index.get_scores(query)]


PIECES = st.sampled_from(
    [
        *("retry", "max_retries", "_retry_", "__", "parseHTTPUrl", "the", "iN", "is_the", "class", "classes"),
        *("utf8", "再試行の回数", "a再é試", "é再", "Größe", "İ", "ß", "٣", "\u0301", "x1y2", "\ud800", "2"),
        *(" ", "\n", "-", ".", "'", "\x00", "\u2028"),
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=12).map("".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6), TEXTS)
def test_scores_are_those_of_an_index_of_all_terms(files: list[tuple[str, str]], question: str) -> None:
    """Counting words instead of listing terms changes no score and no rank, to the last bit."""
    chunks = [Chunk(path, 1, 1, text) for path, text in files]
    expected = plain_scores(chunks, question)
    assert rank(chunks, question) == [int(i) for i in np.argsort([-s for s in expected], kind="stable")]
    best: dict[str, float] = {}
    for item, score in zip(chunks, expected, strict=True):
        best[item.path] = max(score, best.get(item.path, 0.0))
    assert score_documents(chunks, question) == best


def test_scores_do_not_depend_on_how_many_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus with more distinct words than are kept is ranked alike."""
    chunks = [chunk(f"{n}.py", f"retry_{n} " * (n % 5) + f"word{n}\n") for n in range(50)]
    expected = score_documents(chunks, "retry 7")
    monkeypatch.setattr(search, "_KEPT_WORDS", 3)
    assert score_documents(chunks, "retry 7") == expected
