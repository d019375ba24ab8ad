"""Rank chunks for a question: BM25 over code-aware terms."""

from __future__ import annotations

import re
from itertools import chain, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from m3cli.corpus.types import Chunk

_WORD = re.compile(r"[^\W_](?:\w*[^\W_])?")
_RUN = re.compile(r"\w+")  # holds one word, or none if it is underscores
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+")
# Scripts that are written without spaces: Han, kana, Hangul, Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
# Words that say nothing about where an answer stands; BM25's idf alone is too weak on small trees.
_STOP = frozenset(
    "a an and are as at be by can do does for from has have how i if in is it its me my of on or our "
    "shall should that the their there these this to was we were what when where which who why will "
    "with would you your".split()
)

_KEPT_WORDS = 1 << 20


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
    return _ranked(_scores(chunks, question))


def best_matches(chunks: Sequence[Chunk], question: str, most: int) -> list[int]:
    """Indices of at most so many chunks that match `question` at all, best match first."""
    scores = _scores(chunks, question)
    return [i for i in _ranked(scores)[:most] if scores[i] > 0]


def score_documents(chunks: Sequence[Chunk], question: str) -> dict[str, float]:
    """Path → how well its best chunk matches `question`, from 0; scores compare within one call only.

    A document counts as its best chunk, since a long one is not about more questions because it is long.
    """
    best: dict[str, float] = {}
    for chunk, score in zip(chunks, _scores(chunks, question).tolist(), strict=True):
        best[chunk.path] = max(score, best.get(chunk.path, 0.0))
    return best


def _ranked(scores: NDArray[np.float32]) -> list[int]:
    import numpy as np

    return [int(i) for i in np.argsort(-scores, kind="stable")]


def _scores(chunks: Sequence[Chunk], question: str) -> NDArray[np.float32]:
    import bm25s
    import numpy as np

    asked = {term: number for number, term in enumerate(dict.fromkeys(terms(question)), 1)}
    words = _Words(asked)
    documents: list[list[int]] = []
    query: set[int] = set()
    for chunk in chunks if asked else ():
        if len(words) > _KEPT_WORDS:
            words.clear()
        text = [*_RUN.findall(chunk.path), *_RUN.findall(chunk.text)]
        count = sum(map(words.__getitem__, text))
        hits = filter(words.asked.__contains__, text)
        found = list(chain.from_iterable(map(words.asked.__getitem__, hits)))
        query.update(found)
        # Of the other terms only the number matters, so all of them are one, number 0.
        documents.append([*repeat(0, count - len(found)), *found])
    if not query:
        return np.zeros(len(chunks), np.float32)
    index = bm25s.BM25(method="lucene")
    index.index((documents, {"": 0} | asked), show_progress=False)
    return np.asarray(index.get_scores(sorted(query)), np.float32)


class _Words(dict[str, int]):
    """Word → the number of its terms; `asked` has the words with terms that are asked for, and these.

    A corpus repeats its words, so most of them are only looked up.
    """

    def __init__(self, asked: Mapping[str, int]) -> None:
        super().__init__()
        self.asked: dict[str, list[int]] = {}
        self._numbers = asked

    def __missing__(self, word: str) -> int:
        found = terms(word)
        if asked := [self._numbers[term] for term in found if term in self._numbers]:
            self.asked[word] = asked
        self[word] = len(found)
        return len(found)

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self.asked.clear()


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
