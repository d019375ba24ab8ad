"""The most relevant excerpts of a corpus once more, just before the question.

What stands in the middle of a long context is used least, and what stands last is used best. The recap comes
after the corpus, so the corpus' KV cache serves every question as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.corpus.chunks import refine
from m3cli.corpus.search import best_matches
from m3cli.errors import DoesNotFitError
from m3cli.prompt.layout import PromptLayout
from m3cli.prompt.pack import pack_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.prompt.pack import CountBatch, Pack

RECAP_TOKENS = 1536  # two or three excerpts
RECAP_FROM = 8192  # tokens of a prompt from which a recap is made unless told; models use less than that well
_CANDIDATES = 8  # chunks, whose documents are parsed for better edges


class RecapLayout(PromptLayout):
    """Excerpts as in the corpus, behind a line that says what they are."""

    opening = "\nThe excerpts that match the question best, once more:\n"

    def tree(self, text: str) -> str:  # noqa: ARG002 - the contract's argument
        """Nothing: the corpus is above."""
        return ""


def recap(chunks: Sequence[Chunk], question: str, count: CountBatch, budget: int) -> Pack | None:
    """The excerpts of `chunks` that match `question` best, in corpus order; None if none fits or matches."""
    paths = {chunks[i].path for i in best_matches(chunks, question, _CANDIDATES)}
    if not paths:
        return None
    candidates = list(refine(chunk for chunk in chunks if chunk.path in paths))
    try:
        return pack_chunks(
            candidates, count, budget=budget, strategy="select", question=question, layout=RecapLayout()
        )
    except DoesNotFitError:
        return None
