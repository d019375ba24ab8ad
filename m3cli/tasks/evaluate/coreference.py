"""Multi-round coreference: which of several replies to the same request is meant.

It follows OpenAI's MRCR (2025, after Vodrahalli et al. 2024, "Michelangelo: Long Context Evaluations Beyond
Haystacks via Latent Structure Queries"): a long conversation of writing requests and their replies, among
them the same request several times, and the i-th of its replies is wanted. The other requests share its form
or its topic by chance, so a search for either does not find the answer; only order tells.

It differs in what is to be given back: a code that stands in the reply, instead of the whole reply, so that
an answer can be scored by containment and not by its likeness. The replies are made of templates and
common words, and the conversation is one text instead of a chat's messages, as models without a chat template
have to read it, too. All replies to a request are asked for in turn over the same conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.placing import ANYWHERE, batches, draw_aims, random_of, rows_of
from m3cli.tasks.evaluate.trial import Question, TooShortError, Trial
from m3cli.tasks.evaluate.words import Names, words

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping, Sequence

    from m3cli.tasks.evaluate.trial import Group, MakeTask, Material, Measure, Scope, Task

SAME = 4  # replies to the request that is asked for
_MAX_TOKENS = 48
_ORDINALS = ("first", "second", "third", "fourth")
FORMS = ("poem", "song", "story", "letter", "speech", "riddle", "review", "blog post", "news item", "scene")
_OPENING = (
    "Below is a conversation between a user and an assistant. Some requests are made more than once, and "
    "each reply has a code of its own. Remember which code is in which reply. I will ask you for a code "
    "afterwards.\n\n"
)
_SENTENCES = (
    "Nobody had asked the {n1} to {v1}, yet it was {a1}.",
    "The {a1} {n1} would {v1} with the {n2} before it could {v2}.",
    "When the {n1} began to {v1}, every {n2} turned {a1}.",
    "There was no {n1} so {a1} that it could {v1} the {n2}.",
    "Under the {a1} {n1} they used to {v1} and {v2}.",
    "Let the {n1} {v1}, said the {a1} {n2}.",
    "It takes a {a2} {n1} to {v1} like the {a1} {n2}.",
    "Once more the {n1} was {a1} and the {n2} was {a2}.",
)
_TOLERANCE = 0.01
_DRAWS = 100  # of aims, until replies as long as they are fit between them
_SIZED = 40  # exchanges of which the size of one is known well enough
_LONGEST = 60  # sentences of an exchange that fills a gap


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and the body of its reply, with a code."""

    form: str
    topic: str
    body: str
    code: str

    @property
    def text(self) -> str:
        """How it stands in the conversation."""
        return (
            f"User: Write a {self.form} about the {self.topic}.\n\n"
            f"Assistant: {self.body} Its code is {self.code}.\n\n"
        )


def _code(rng: random.Random) -> str:
    """Eight hexadecimal digits, some of them letters, so that no number is taken for one."""
    while (code := f"{rng.getrandbits(32):08x}").isdigit():
        pass
    return code


def _sentence(rng: random.Random) -> str:
    adjectives, nouns, verbs = words("adjectives"), words("nouns"), words("verbs")
    text = rng.choice(_SENTENCES)
    if "{a2}" in text:
        # After `a`, a word that begins with a vowel reads wrongly.
        second = rng.choice(adjectives)
        while second[0] in "aeiouh":
            second = rng.choice(adjectives)
    else:
        second = ""
    return text.format(
        a1=rng.choice(adjectives),
        a2=second,
        n1=rng.choice(nouns),
        n2=rng.choice(nouns),
        v1=rng.choice(verbs),
        v2=rng.choice(verbs),
    )


class _Writer:
    """Writes exchanges, none of them for the request that is asked for unless told so."""

    def __init__(self, rng: random.Random, measure: Measure) -> None:
        self._rng = rng
        self._measure = measure
        self._names = Names(rng)
        self.form, self.topic = rng.choice(FORMS), rng.choice(words("nouns"))

    def same(self) -> Exchange:
        """A reply to the request that is asked for."""
        return self._reply(self.form, self.topic, self._rng.randint(3, 5))

    def other(self, sentences: int = 0) -> Exchange:
        """A reply of so many sentences to any other request."""
        while True:
            form, topic = self._rng.choice(FORMS), self._rng.choice(words("nouns"))
            if (form, topic) != (self.form, self.topic):
                return self._reply(form, topic, sentences or self._rng.randint(3, 5))

    def _reply(self, form: str, topic: str, sentences: int) -> Exchange:
        body = " ".join(_sentence(self._rng) for _ in range(sentences))
        return Exchange(form, topic, body, self._names.new(_code))

    def fill(self, room: int, typical: int) -> list[str]:
        """Exchanges of at most so many tokens together, and not much fewer; none if there is no room for one.

        `typical` is the usual size of one. The last one is longer or shorter than usual, to the word.
        """
        texts = [self.other().text for _ in range(max(0, room // typical - 1))]
        while texts and self._measure.count(texts) + typical > room:
            over = self._measure.count(texts) + typical - room
            del texts[-(over // typical + 1) :]
        rest = room - self._measure.count(texts)
        while rest > 3 * typical:
            texts += (self.other().text for _ in range(rest // typical - 2))
            rest = room - self._measure.count(texts)
        last = self._of_size(rest)
        return [*texts, last] if last else texts

    def _of_size(self, room: int) -> str:
        """An exchange of at most so many tokens, cut to the word, or nothing."""
        longest = self.other(_LONGEST)
        body = longest.body.split(" ")

        def text(number: int) -> str:
            cut = " ".join(body[:number]).rstrip(".,") + "."
            return Exchange(longest.form, longest.topic, cut, longest.code).text

        if self._measure.count([text(1)]) > room:
            return ""
        low, high = 1, len(body) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._measure.count([text(middle)]) <= room:
                low = middle
            else:
                high = middle
        return text(low)


class _Coreference:
    name = "mrcr"
    group: Group = "coreference"

    def __init__(self, _material: Material, measure: Measure, scope: Scope) -> None:
        self._measure = measure
        self._scope = scope

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial for every four of the wanted (depth, sample)."""
        return iter([self._trial(length, batch) for batch in batches(self._scope, SAME)])

    def _trial(self, length: int, batch: Sequence[tuple[int, int]]) -> Trial:
        row, sample = batch[0]
        rng = random_of(self._scope, self.name, length, f"{row}.{sample}")
        writer = _Writer(rng, self._measure)
        same = [writer.same() for _ in range(SAME)]
        sizes = [self._measure.count([exchange.text]) for exchange in same]
        typical = self._measure.count([writer.other().text for _ in range(_SIZED)]) // _SIZED
        asked = [self._question("", writer, ordinal, "") for ordinal in range(SAME)]
        room = self._measure.room(length, _MAX_TOKENS, asked) - self._measure.count([_OPENING])
        rows = [rows_of(self._scope)[row] for row, _ in batch] + [ANYWHERE] * (SAME - len(batch))
        for _ in range(_DRAWS):
            aims = draw_aims(rng, rows, sizes, room)
            order = sorted(range(SAME), key=lambda index: aims[index])
            parts, depths = self._conversation(
                writer, [same[index].text for index in order], [aims[index] for index in order], room, typical
            )
            if all(
                abs(depth - aims[index]) <= _TOLERANCE and rows[index][0] <= depth < rows[index][1]
                for depth, index in zip(depths, order, strict=True)
            ):
                break
        else:
            raise TooShortError("whole replies do not fit between those that are asked for")
        # The i-th needle of the batch is asked for as what it is in the conversation.
        questions = []
        for index, (row, sample) in enumerate(batch):
            ordinal = order.index(index)
            code = same[index].code
            questions.append(self._question(f"{row}.{sample}", writer, ordinal, code, depths[ordinal]))
        return Trial(self.name, self.group, length, _MAX_TOKENS, tuple(questions), (_OPENING, *parts))

    def _conversation(
        self, writer: _Writer, same: Sequence[str], aims: Sequence[float], room: int, typical: int
    ) -> tuple[list[str], list[float]]:
        """Exchanges with the same request at the aims, which rise, and the depths it really has."""
        parts: list[str] = []
        tokens = 0
        before = []
        for text, aim in zip(same, aims, strict=True):
            gap = writer.fill(max(0, int(aim * room) - tokens), typical)
            tokens += self._measure.count(gap)
            before.append(tokens)
            tokens += self._measure.count([text])
            parts += [*gap, text]
        rest = writer.fill(max(0, room - tokens), typical)
        total = tokens + self._measure.count(rest)
        # Too much, or too little: no reply fits into what is left.
        if not room * (1 - _TOLERANCE) <= total <= room:
            return parts, [-1.0] * len(before)
        return parts + rest, [count / total for count in before]

    def _question(
        self, name: str, writer: _Writer, ordinal: int, code: str, depth: float | None = None
    ) -> Question:
        subject = f"the {_ORDINALS[ordinal]} {writer.form} about the {writer.topic}"
        return Question(
            name, f"What is the code of {subject}?", (code,), depth, lead=f"The code of {subject} is"
        )


def _make(material: Material, measure: Measure, scope: Scope) -> Task:
    return _Coreference(material, measure, scope)


TASKS: Mapping[str, MakeTask] = {"mrcr": _make}
