"""Ways to show a model a corpus with a question: all of it, and what m3 does about long contexts."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from m3cli.corpus.chunks import refine
from m3cli.corpus.order import by_relevance
from m3cli.corpus.search import score_documents
from m3cli.prompt.pack import pack_chunks
from m3cli.prompt.recap import RECAP_TOKENS, recap
from m3cli.tasks.context import QUOTE_FIRST
from m3cli.tasks.sweep import PassageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.prompt.pack import CountBatch
    from m3cli.tasks.evaluate.prompting import Prompter
    from m3cli.tasks.evaluate.results import Mode
    from m3cli.tasks.evaluate.trial import Question, Trial
    from m3cli.tasks.prompts import Prompt

QUOTE_TOKENS = 160  # of a reply that quotes first, more than of one that does not
_SHARE = 4  # what is selected, and a window of a sweep, is a fourth of the trial's length
_LEAST = 1024  # tokens of these, unless it is half of the trial


class Shown:
    """A trial, ready to be asked in several modes; what they share is made once."""

    def __init__(self, trial: Trial, prompter: Prompter) -> None:
        self.trial = trial
        self._prompter = prompter

    def prompt(self, mode: Mode, question: Question) -> Prompt:
        """The prompt for a question; the whole haystack for `sweep`, which is asked in windows of it.

        Raises DoesNotFitError when a selection does not fit.
        """
        trial, text = self.trial, question.text
        parts = self.parts
        again: tuple[str, ...] = ()
        if mode == "recap":
            repeated = recap(trial.chunks, text, self._count, RECAP_TOKENS)
            again = repeated.parts if repeated is not None else ()
        elif mode == "quote":
            text += f"\n{QUOTE_FIRST}"
        elif mode == "end":
            parts = pack_chunks(self._by_relevance(text), self._count).parts
        elif mode == "select":
            selected = pack_chunks(
                self._refined, self._count, budget=self.window, strategy="select", question=text
            )
            parts = selected.parts
        return self._prompter.prompt(parts, text, system=trial.system, lead=question.lead, recap=again)

    def prompt_of(self, parts: Sequence[str], question: str) -> Prompt:
        """A prompt for what a sweep asks about a window of the haystack."""
        return self._prompter.prompt(parts, f"\n{question}", system=self.trial.system)

    def prompt_about(self, passages: Sequence[Chunk], question: Question) -> Prompt:
        """The prompt for a question with what a sweep has found; without anything, with a selection."""
        if not passages:
            return self.prompt("select", question)
        pack = pack_chunks(
            passages,
            self._count,
            budget=self.window,
            strategy="select",
            question=question.text,
            layout=PassageLayout(),
        )
        return self._prompter.prompt(pack.parts, question.text, system=self.trial.system, lead=question.lead)

    def max_tokens(self, mode: Mode) -> int:
        """Tokens of a reply."""
        return self.trial.max_tokens + (QUOTE_TOKENS if mode == "quote" else 0)

    def score(self, mode: Mode, question: Question, reply: str) -> float:
        """How well a question was answered; quotes before the answer do not count."""
        if mode == "quote":
            reply = reply.rpartition("Answer:")[2] if "Answer:" in reply else ""
        return question.score(reply)

    @property
    def window(self) -> int:
        """Tokens of a selection, and of a window of a sweep."""
        length = self.trial.length
        return max(length // _SHARE, min(_LEAST, length // 2))

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The whole haystack."""
        if self.trial.chunks:
            return pack_chunks(self.trial.chunks, self._count).parts
        return self.trial.parts

    @cached_property
    def _refined(self) -> list[Chunk]:
        return list(refine(self.trial.chunks))

    def _by_relevance(self, question: str) -> list[Chunk]:
        """The chunks, those of documents that match the question best last."""
        scores = score_documents(self.trial.chunks, question)
        documents = [list(group) for _, group in groupby(self.trial.chunks, key=lambda chunk: chunk.path)]
        order = by_relevance([scores[document[0].path] for document in documents])
        return [chunk for i in order for chunk in documents[i]]

    @property
    def _count(self) -> CountBatch:
        return self._prompter.model.tokenizer.count_batch
