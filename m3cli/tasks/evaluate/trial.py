"""What is asked in an evaluation: texts of a wanted length, and questions about them with known answers.

A trial is one text, the haystack, with all questions about it. Its tokens come first in every prompt, so
they are computed once for all of its questions; and where the haystack of a longer trial begins with that of
a shorter one, only the difference is computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

from m3cli.tasks.citations import without_citations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from m3cli.corpus.types import Chunk

# retrieval, tracing and aggregation are RULER's categories; coreference is MRCR's.
Group = Literal["retrieval", "tracing", "aggregation", "coreference", "meaning", "code"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a haystack. `id` tells it from the others of its task at its length.

    A reply scores the share of `answers` in it: anywhere, case aside, as RULER scores (`contains`), as whole
    words outside of citations (`words`), or as whole words anywhere (`lines`). `depth` is the share of the
    haystack's tokens that stand before what is asked for, None if that is all over it. `lead` begins the
    model's turn, so that it completes a sentence.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    depth: float | None = None
    lead: str = ""
    scoring: Literal["contains", "words", "lines"] = "contains"

    def score(self, reply: str) -> float:
        """Share of the answers that are in `reply`, 0 to 1."""
        if self.scoring == "words":
            reply = without_citations(reply)
        if self.scoring == "contains":
            found = [answer.casefold() in reply.casefold() for answer in self.answers]
        else:
            found = [_has_words(reply, answer) for answer in self.answers]
        return sum(found) / len(found)


def _has_words(reply: str, answer: str) -> bool:
    """Whether `answer` is in `reply` and is not the middle of a longer word, number or name."""
    signed = r"(?<![-+])(?<!\d,)" if answer[:1].isdigit() else ""
    pattern = rf"(?<!\w)(?<!\d\.)(?<!\w-){signed}{re.escape(answer)}(?!\w|[.-]\w|,\d)"
    return re.search(pattern, reply, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class Trial:
    """One haystack with its questions, for prompts of at most `length` tokens with the reply.

    `opening` and `parts` are the haystack's text in pieces that are tokenized each on its own. Where it is
    made of `chunks` in m3's own layout, they are given, and `parts` is empty: then it can be packed in other
    ways, too. `system` is the system message, if any. `nested` says that the next longer trial of its task
    begins with this haystack.
    """

    task: str
    group: Group
    length: int
    max_tokens: int
    questions: tuple[Question, ...]
    parts: tuple[str, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    system: str = ""
    nested: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """What haystacks are made of: `text` to read on in, again from its beginning when it ends, and `chunks`.

    `own` says that it is the user's, not what ships with Python.
    """

    text: str
    chunks: tuple[Chunk, ...]
    label: str
    own: bool


class Measure(Protocol):
    """Sizes in the tokens of the model that is evaluated."""

    def count(self, parts: Sequence[str]) -> int:
        """Tokens of texts that are tokenized each on its own."""
        ...

    def room(self, length: int, max_tokens: int, questions: Sequence[Question], system: str = "") -> int:
        """Tokens for a haystack, so that the prompt of the longest question and its reply take `length`.

        It may be negative.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is asked: `samples` at each of so many `depths`, at each of the `lengths`, which rise."""

    lengths: tuple[int, ...]
    depths: int = 5
    samples: int = 5
    seed: int = 0


class Task(Protocol):
    """A kind of question, made for one run."""

    name: str
    group: Group

    def trials(self, length: int) -> Iterator[Trial]:
        """The trials of one of the scope's lengths. Raises TooShort when a haystack cannot be that small."""
        ...


MakeTask: TypeAlias = "Callable[[Material, Measure, Scope], Task]"


class TooShortError(Exception):
    """No haystack of a task is so short; the text says why, without a full stop."""
