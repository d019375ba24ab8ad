"""Rank chunks for a question: BM25 over code-aware terms."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.corpus.types import Chunk

_WORD = re.compile(r"[^\W_](?:\w*[^\W_])?")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+")
# Scripts that are written without spaces: Han, kana, Hangul, Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
# Words that say nothing about where an answer stands; BM25's idf alone is too weak on small trees.
_STOP = frozenset(
    "a an and are as at be by can do does for from has have how i if in is it its me my of on or our "
    "shall should that the their there these this to was we were what when where which who why will "
    "with would you your".split()
)


def terms(text: str) -> list[str]:
    """Search terms of `text`: lower-case words, identifiers, and the parts of identifiers.

    `parseHttpURL` gives itself and parse, http, url; `max_retries` itself and max, retry (a
    plural `s` is dropped); text in a script without spaces gives its character pairs.
    """
    found: list[str] = []
    for word in _WORD.findall(text):
        parts = _PART.findall(word)
        for part in parts:
            if unspaced := _UNSPACED.match(part):
                run = unspaced.group()
                found.extend(run[i : i + 2] for i in range(max(1, len(run) - 1)))
            else:
                found.append(_singular(part.lower()))
        if len(parts) > 1:
            found.append(word.lower())
    return [term for term in found if term not in _STOP]


def rank(chunks: Sequence[Chunk], question: str) -> list[int]:
    """Indices of all `chunks`, best match for `question` first, ties in the given order.

    The parts of a chunk's path count as terms of the chunk.
    """
    import bm25s
    import numpy as np

    asked = {term: term for term in terms(question)}
    # Of the other terms only the number matters, so all of them are one: a large corpus has millions.
    documents = [
        [asked.get(term, "") for term in chain(terms(chunk.path), terms(chunk.text))] for chunk in chunks
    ]
    query = [term for term in asked if any(term in document for document in documents)]
    if not query:
        return list(range(len(chunks)))
    index = bm25s.BM25(method="lucene")
    index.index(documents, show_progress=False)
    scores = index.get_scores(query)
    return [int(i) for i in np.argsort(-scores, kind="stable")]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
