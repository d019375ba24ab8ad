"""Measures of trials without a chat template around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.model.tokens import Tokenizer
    from m3cli.tasks.evaluate.trial import Question


@dataclass(frozen=True)
class PlainMeasure:
    """A Measure of prompts that have `frame` tokens around haystack and question."""

    tokenizer: Tokenizer
    frame: int = 40

    def count(self, parts: Sequence[str]) -> int:
        return sum(self.tokenizer.count_batch(parts))

    def room(self, length: int, max_tokens: int, questions: Sequence[Question], system: str = "") -> int:
        longest = max(self.count([question.text, question.lead]) for question in questions)
        return length - max_tokens - self.frame - longest - self.count([system])
