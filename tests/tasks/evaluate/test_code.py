"""Questions about code: one truth each, where they say it is, in haystacks that grow."""

from __future__ import annotations

import gc
import random
import re
import weakref
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
    assert sum(len(trial.questions) for trial in trials) >= 3
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


def test_the_line_of_a_definition_is_the_one_that_the_model_sees(library: Material, measure: Measure) -> None:
    """The number in front of the line that holds the name, under the path that was asked about."""
    (trial,) = trials_of("code_line", library, measure, Scope((4096,), samples=20))
    text = "".join(parts_of(trial.chunks))
    assert len(trial.questions) >= 10
    for question in trial.questions:
        match = re.search(r"the \w+ `(?:\w+\.)*(\w+)` begin in (\S+)\?", question.text)
        assert match is not None
        (file,) = re.findall(rf'<file path="{match[2]}">\n(.*?)</file>\n', text, re.DOTALL)
        assert re.search(rf"^{question.answers[0]}: .*\b{match[1]}\b", file, re.MULTILINE)
        assert question.score(f"It is at {match[2]}:{question.answers[0]}.") == 1


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
        "code_file": [("client.py",)] * 3,  # `serve` is easily guessed
        "code_constant": [("135",), ("64",)],
        "code_caller": [("grow",), ("serve",)],
        "code_signature": [("address", "retries", "mode"), ("port", "host")],
        "code_line": [("15",), ("18",)],  # of one digit, they would be guessed
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
        ("def Pool():\n    pass\n", "code_file", "Pool"),
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


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pool.rb", "class Pool\nend\n"),
        ("pool.rb", "module Pool\nend\n"),
        ("pool.rb", "def self.Pool\nend\n"),
        ("pool.php", "<?php\nclass Pool extends Base\n{\n}\n"),
        ("pool.swift", "protocol Pool where Self == Int {}\n"),
    ],
)
def test_what_no_parser_knows_may_define_a_type(path: str, text: str) -> None:
    """A definition in another language, whatever its word, makes the file of a type doubtful."""
    files = {"client.py": "class Pool:\n    pass\n"}
    assert list(asked(files, "code_file").values()) == [("client.py",)]
    assert not asked({**files, path: text}, "code_file")


LIMIT = "LIMIT = 135\n\n\n"


@pytest.mark.parametrize(
    ("user", "is_asked"),
    [
        ("from limits import LIMIT\n\n\ndef most():\n    return LIMIT\n", True),
        ("from elsewhere import LIMIT\n\n\ndef most():\n    return LIMIT\n", False),
    ],
)
def test_a_constant_of_another_file_has_to_be_imported(user: str, is_asked: bool) -> None:
    """One of the same name in a file that the function's own does not name is a stranger."""
    assert bool(asked({"a.py": user, "limits.py": LIMIT}, "code_hop")) == is_asked


@pytest.mark.parametrize(
    ("path", "constants", "function", "is_asked"),
    [
        ("a.py", "AA = 135\nBB = 246\n", "def most(flag):\n    return BB\n", True),
        ("a.py", "AA = 135\nBB = 246\n", "def most(flag):\n    'They return it.'\n    return BB\n", True),
        (
            "a.py",
            "AA = 135\nBB = 246\n",
            "def most(f):\n    if f:\n        return AA\n    return BB\n",
            False,
        ),
        ("a.js", "const AA = 135, BB = 246;\n", "function most(f) { return BB; }\n", True),
        ("a.js", "const AA = 135, BB = 246;\n", "function most(f) { if (f) return AA; return BB; }\n", False),
        ("a.rs", "const BB: u8 = 246;\n", "fn most(f: bool) -> u8 { BB }\n", True),
        ("a.rs", "const BB: u8 = 246;\n", "fn most(f: bool) -> u8 { if f { return 7; } BB }\n", False),
    ],
)
def test_a_function_that_returns_a_constant_returns_nothing_else(
    path: str, constants: str, function: str, is_asked: bool
) -> None:
    """Whatever else it may return would be as true an answer."""
    found = asked({path: constants + function}, "code_hop")
    assert list(found.values()) == ([("246",)] if is_asked else [])


@pytest.mark.parametrize(
    ("function", "is_asked"),
    [
        ("def most(flag):\n    return LIMIT + 1\n", True),
        ("def most(LIMIT):\n    return LIMIT + 1\n", False),
        ("def most(flag):\n    for LIMIT in flag:\n        print(LIMIT)\n", False),
        ('def most(flag):\n    """Nothing.\n\n    LIMIT is not used.\n    """\n    return flag + 1\n', False),
    ],
)
def test_a_constant_is_used_where_its_own_name_stands_in_code(function: str, is_asked: bool) -> None:
    """A local name like it is another one, and a docstring uses nothing."""
    assert bool(asked({"a.py": LIMIT + function}, "code_hop")) == is_asked


def test_comments_of_several_lines_use_nothing() -> None:
    """A block comment of C is no code, whatever is in it."""
    constant = "const LIMIT = 135;\n"
    assert asked({"a.js": constant + "function most(f) { f(LIMIT + 1); }\n"}, "code_hop")
    assert not asked({"a.js": constant + "function most(f) {\n/* of\n LIMIT */\n f(1); }\n"}, "code_hop")


def test_what_is_easily_guessed_is_not_asked() -> None:
    """Usual defaults, parameters of special methods, and callers that every program has."""
    text = (
        "def read(path, encoding='UTF-8', errors='strict', mode='rb', size=77):\n    pass\n\n\n"
        "class Pool:\n    def __init__(self, first, second):\n        pass\n\n"
        "    def __exit__(self, kind, value, trace):\n        pass\n\n\n"
        "def main():\n    read()\n"
    )
    assert list(asked({"a.py": text}, "code_default").values()) == [("77",)]
    assert ("first", "second") in asked({"a.py": text}, "code_signature").values()
    assert ("kind", "value", "trace") not in asked({"a.py": text}, "code_signature").values()
    assert not asked({"a.py": text}, "code_caller")
    assert asked({"a.py": text.replace("main", "begin")}, "code_caller")


def test_no_answer_is_asked_for_twice() -> None:
    """A trial gives each answer once, wherever in the haystack it is."""
    text = "".join(f"def f{number}(first, size={77 + number % 3}):\n    pass\n\n\n" for number in range(30))
    assert sorted(asked({"a.py": text}, "code_default").values()) == [("77",), ("78",), ("79",)]
    assert list(asked({"a.py": text}, "code_signature").values()) == [("first", "size")]


def test_a_corpus_is_shared_as_long_as_a_task_has_it() -> None:
    """Tasks about the same files parse them once, and no corpus outlives its tasks."""
    material = material_of(FILES)
    tasks = [code_haystack.code_corpus(material, BYTES) for _ in range(2)]
    assert tasks[0] is tasks[1]
    assert code_haystack.code_corpus(material_of(FILES), BYTES) is not tasks[0]
    assert tasks[0].haystack(300).known is tasks[1].haystack(300).known
    corpus = weakref.ref(tasks[0])
    tasks.clear()
    gc.collect()
    assert corpus() is None


def test_a_corpus_that_is_too_short_says_so() -> None:
    """The tokens that there are, or that nothing is left for a haystack."""
    task = TASKS["code_default"](material_of(FILES), BYTES, Scope((100_000,)))
    with pytest.raises(TooShortError, match=r"the corpus has only \d+ tokens"):
        next(iter(task.trials(100_000)))
    with pytest.raises(TooShortError):
        next(iter(task.trials(100)))
    for material in (material_of({}), material_of(FILES)):
        with pytest.raises(TooShortError):
            code_haystack.CodeCorpus(material, BYTES).haystack(-5)
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
