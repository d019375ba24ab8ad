"""Questions about code: one truth each, where they say it is, in haystacks that grow."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Document
from m3cli.errors import MachineError
from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from m3cli.model.tokens import ByteTokenizer
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.context import INSTRUCTIONS
from m3cli.tasks.evaluate import code_haystack
from m3cli.tasks.evaluate.code import MAX_TOKENS, TASKS
from m3cli.tasks.evaluate.haystack import python_material
from m3cli.tasks.evaluate.trial import Material, Scope, TooShortError
from tests.tasks.evaluate.measures import PlainMeasure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.tasks.evaluate.trial import Measure, Question, Trial

LENGTHS = (2048, 8192, 65536, 262144)
BYTES = PlainMeasure(ByteTokenizer())


def material_of(files: dict[str, str]) -> Material:
    chunks = [
        chunk for path, text in files.items() for chunk in chunk_document(Document(path, text, "utf-8"))
    ]
    return Material("", tuple(chunks), "files", own=True)


class Exact(PlainMeasure):
    """One whose haystacks have the length itself."""

    def room(self, length: int, max_tokens: int, questions: Sequence[Question], system: str = "") -> int:
        assert max_tokens + len(questions) + len(system) < 1000
        return length


def asked(files: dict[str, str], name: str) -> dict[str, tuple[str, ...]]:
    """Answers by question of all that a task asks of some files as a whole."""
    material, measure = material_of(files), Exact(ByteTokenizer())
    size = measure.count(parts_of(material.chunks))
    try:
        (trial,) = TASKS[name](material, measure, Scope((size,), depths=1, samples=100)).trials(size)
    except TooShortError:
        return {}
    assert trial.chunks == material.chunks
    return {question.text: question.answers for question in trial.questions}


@pytest.fixture(scope="module")
def library() -> Material:
    return python_material(max(LENGTHS))


@pytest.fixture(scope="module")
def measure(smollm2: str) -> Measure:
    tokenizer = load_tokenizer(read_header(Path(smollm2)))
    assert tokenizer is not None
    return PlainMeasure(tokenizer)


def parts_of(chunks: tuple[Chunk, ...]) -> tuple[str, ...]:
    return pack_chunks(chunks, lambda texts: [0 for _ in texts], strategy="whole").parts


def trials_of(name: str, material: Material, measure: Measure, scope: Scope) -> list[Trial]:
    task = TASKS[name](material, measure, scope)
    found: list[Trial] = []
    for length in scope.lengths:
        with suppress(TooShortError):  # it may hold nothing to ask about
            found += task.trials(length)
    return found


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_where_their_questions_say(name: str, library: Material, measure: Measure) -> None:
    """The line at the depth holds the answer, or what was asked of; the question does not give it away."""
    trials = trials_of(name, library, measure, Scope(LENGTHS))
    assert sum(len(trial.questions) for trial in trials) >= 5
    for trial in trials:
        parts = parts_of(trial.chunks)
        counts = [measure.count([part]) for part in parts]
        for question in trial.questions:
            assert question.text.startswith("\nQuestion: ")
            assert question.score(question.text) == 0
            assert question.score(" and ".join(question.answers)) == 1
            assert all(2 <= len(answer) <= 80 and "\n" not in answer for answer in question.answers)
            around = near(parts, counts, question, measure)
            sought = (
                re.findall(r"`([^`]+)`", question.text)
                if name in ("code_file", "code_caller")
                else question.answers
            )
            assert sought[0].rpartition(".")[2] in around or sought[0] in around, (question, around)


def near(parts: tuple[str, ...], counts: list[int], question: Question, measure: Measure) -> str:
    """The lines of a haystack within 1 % of the depth."""
    assert question.depth is not None
    total = sum(counts)
    lines: list[str] = []
    before = 0
    for part, count in zip(parts, counts, strict=True):
        if abs((before + count / 2) / total - question.depth) <= 0.01 + count / total:
            position = before
            for line in part.splitlines(keepends=True):
                if abs(position / total - question.depth) <= 0.01:
                    lines.append(line)
                position += measure.count([line])
        before += count
    return "".join(lines)


def test_haystacks_are_the_same_for_all_tasks_and_fill_their_lengths(
    library: Material, measure: Measure
) -> None:
    """Prompts with the longest question are never longer than said, and the haystack leaves 2 % at most."""
    seen: dict[int, tuple[Chunk, ...]] = {}
    for name in TASKS:
        for trial in trials_of(name, library, measure, Scope(LENGTHS)):
            tokens = measure.count(parts_of(trial.chunks))
            room = measure.room(trial.length, trial.max_tokens, trial.questions, trial.system)
            assert tokens <= room
            assert tokens >= 0.98 * (room - 64)  # there is room for longer questions, too
            assert trial.nested
            assert (trial.system, trial.max_tokens, trial.parts) == (INSTRUCTIONS, MAX_TOKENS, ())
            assert seen.setdefault(trial.length, trial.chunks) == trial.chunks
    assert set(seen) == set(LENGTHS)


def test_a_longer_haystack_begins_with_a_shorter_one(library: Material, measure: Measure) -> None:
    """Up to the text of the chunk that was cut, the longer one has the same pieces."""
    shorter: tuple[str, ...] = ()
    for trial in trials_of("code_signature", library, measure, Scope(LENGTHS)):
        parts = parts_of(trial.chunks)
        if shorter:
            cut = len(shorter) - 2  # the last body, and the footer behind it
            assert parts[:cut] == shorter[:cut]
            assert parts[cut].startswith(shorter[cut].rstrip("\n"))
        shorter = parts


@pytest.mark.parametrize("length", [600, 700, 801, 1024, 1500, 3000])
def test_short_haystacks_end_within_a_line_where_they_must(
    length: int, library: Material, measure: Measure
) -> None:
    """Every length is filled to 2 %, of a few hundred tokens, too."""
    corpus = code_haystack.CodeCorpus(library, measure)
    haystack = corpus.haystack(length)
    tokens = measure.count(parts_of(haystack.chunks))
    assert tokens == haystack.tokens
    assert 0.98 * length - 1 <= tokens <= length


def test_one_long_line_is_cut_between_words() -> None:
    """A file without line ends is no obstacle, and its line is no place for a truth."""
    material = material_of({"a.py": "x = [" + "some_name, " * 3000 + "]\n"})
    haystack = code_haystack.CodeCorpus(material, BYTES).haystack(5000)
    assert 4900 <= haystack.tokens <= 5000
    assert haystack.chunks[-1].text.endswith(" ")
    assert [rows for _, rows in haystack.files] == [0]


def test_the_same_seed_asks_the_same_and_others_do_not(library: Material, measure: Measure) -> None:
    """Questions depend on the seed alone, have ids of their own, and many of them stay at the next length."""
    one, again, other = (
        trials_of("code_signature", library, measure, Scope(LENGTHS, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    for trial in one:
        assert len({question.id for question in trial.questions}) == len(trial.questions)
        assert len(trial.questions) <= 25
        rows = [int((question.depth or 0) * 5) for question in trial.questions]
        assert all(rows.count(row) <= 5 for row in rows)


FILES = {
    "client.py": (
        "TIMEOUT_SECONDS = 135\n\n\ndef fetch(address, retries=77, mode='binary'):\n"
        "    return opened(address)\n\n\n"
        "def limit():\n    return TIMEOUT_SECONDS\n\n\nclass Pool:\n    SIZE = 64\n\n"
        "    def grow(self, step=19):\n        self.shrink()\n\n    def shrink(self):\n        pass\n"
    ),
    "lib/server.py": "from client import fetch\n\n\ndef serve(port, host='localhost'):\n    fetch(host)\n",
}


def test_what_is_asked_of_two_small_files() -> None:
    """All that has one truth is asked, each task in its words."""
    answers = {name: sorted(asked(FILES, name).values()) for name in TASKS}
    assert answers == {
        "code_default": [("19",), ("77",), ("binary",), ("localhost",)],
        "code_file": [("client.py",), ("client.py",), ("client.py",)],  # `serve` is easily guessed
        "code_constant": [("135",), ("64",)],
        "code_caller": [("grow",), ("serve",)],
        "code_signature": [("address", "retries", "mode"), ("port", "host")],
        "code_hop": [("135",)],
    }
    text = "What is the default value of the parameter `retries` of the function `fetch` in client.py?"
    assert asked(FILES, "code_default")[f"\nQuestion: {text} Answer with the value alone."] == ("77",)


@pytest.mark.parametrize(
    ("more", "task", "gone"),
    [
        ("def fetch(a, retries=88):\n    pass\n", "code_default", "retries"),
        ("if fetch:\n    TIMEOUT_SECONDS = 140\n", "code_constant", "TIMEOUT_SECONDS"),
        ("def other():\n    global TIMEOUT_SECONDS\n    TIMEOUT_SECONDS = 9\n", "code_hop", "limit"),
        ("def again():\n    fetch(1)\n", "code_caller", "fetch"),
        ("fetch(2)\n", "code_caller", "fetch"),
        ("class fetch:\n    pass\n", "code_file", "fetch"),
        ("def fetch(a, b):\n    pass\n", "code_signature", "fetch"),
    ],
)
def test_what_has_two_truths_is_not_asked(more: str, task: str, gone: str) -> None:
    """A second definition, value or call takes a question away, and no other."""
    before = asked(FILES, task)
    after = asked({**FILES, "client.py": FILES["client.py"] + more}, task)
    assert any(f"`{gone}`" in text for text in before)
    assert not any(f"`{gone}`" in text for text in after)


def test_what_no_parser_knows_may_call_and_define() -> None:
    """A text in another language that may call a function leaves its caller in doubt."""
    assert ("serve",) in asked(FILES, "code_caller").values()
    assert ("serve",) not in asked({**FILES, "run.rb": "fetch(3)\n"}, "code_caller").values()


def test_a_corpus_that_is_too_short_says_so() -> None:
    """The tokens that there are, or that nothing is left for a haystack."""
    task = TASKS["code_default"](material_of(FILES), BYTES, Scope((100_000,)))
    with pytest.raises(TooShortError, match=r"the corpus has only \d+ tokens"):
        next(iter(task.trials(100_000)))
    with pytest.raises(TooShortError):
        next(iter(task.trials(100)))
    with pytest.raises(TooShortError):
        next(iter(TASKS["code_default"](material_of({}), BYTES, Scope((4096,))).trials(4096)))


def test_without_parsers_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of code need the extra."""
    monkeypatch.setattr(code_haystack, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"m3cli\[code\]"):
        TASKS["code_hop"](material_of(FILES), BYTES, Scope((4096,)))


def test_hostile_files_are_survived() -> None:
    """Files of odd characters, without line ends, or of nothing but brackets, are haystacks all the same."""
    rng = random.Random(5)
    files = {
        f"{number}.py": "".join(
            rng.choices(["(", "\n", "def f(a=12):\n", "\ud800", "\u2028", "\x00", "é", " "], k=400)
        )
        for number in range(40)
    }
    haystack = code_haystack.CodeCorpus(material_of(files), BYTES).haystack(9000)
    assert 8820 <= haystack.tokens <= 9000
    for name in TASKS:
        trials_of(name, material_of(files), BYTES, Scope((9000,)))
