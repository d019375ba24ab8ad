"""The recap before the question: relevant, within its budget, told apart from the corpus."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Chunk, Document
from m3cli.model.tokens import ByteTokenizer
from m3cli.prompt.recap import RecapLayout, recap

COUNT = ByteTokenizer().count_batch


def chunks_of(**files: str) -> list[Chunk]:
    documents = [Document(f"{name}.py", text, "utf-8") for name, text in files.items()]
    return [chunk for document in documents for chunk in chunk_document(document)]


def test_the_best_excerpt_is_repeated_under_its_path() -> None:
    """What matches the question stands there with its path and line numbers; the rest does not."""
    filler = "".join(f"value_{i} = {i}\n" for i in range(200))
    retry = "def retry(call):\n    return call()\n"
    chunks = chunks_of(a=filler, b=retry, c=filler.replace("value", "other"))
    again = recap(chunks, "where is the retry logic?", COUNT, 400)
    assert again is not None
    text = "".join(again.parts)
    assert text.startswith(RecapLayout.opening)
    assert '<file path="b.py">\n1: def retry(call):\n2:     return call()\n</file>' in text
    assert "<tree>" not in text


@given(st.integers(0, 3000), st.text(max_size=20))
def test_a_recap_keeps_to_its_budget(budget: int, question: str) -> None:
    """Whatever is asked, it never takes more; where nothing fits there is none."""
    chunks = chunks_of(a="x = 1\n" * 300, b="def f():\n    pass\n" * 100)
    again = recap(chunks, question, COUNT, budget)
    assert again is None or again.tokens == sum(COUNT(again.parts)) <= budget


def test_where_nothing_matches_there_is_no_recap() -> None:
    """An empty corpus, or one without any word of the question, has nothing worth repeating."""
    assert recap([], "what?", COUNT, 1000) is None
    assert recap(chunks_of(a="x = 1\n"), "where is the retry logic?", COUNT, 1000) is None
