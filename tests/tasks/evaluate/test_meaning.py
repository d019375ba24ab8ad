"""Needles without a word of their questions: the sentences themselves, and haystacks that grow."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from m3cli.corpus.search import terms
from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from m3cli.model.tokens import ByteTokenizer
from m3cli.tasks.evaluate.meaning import LANGUAGES, MAX_TOKENS, OPENING, TASKS, MeaningTask, names, pairs
from m3cli.tasks.evaluate.trial import Material, Scope, TooShortError
from tests.tasks.evaluate.measures import PlainMeasure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.tasks.evaluate.meaning import Language, Pair
    from m3cli.tasks.evaluate.trial import Measure, Question, Trial

PROSE = "".join(
    f"Line {number} says that the river rose again. Nobody in the valley was surprised by that at all.\n"
    f"    if level > {number}:  # and then the gates were opened\n        gates.open(level={number})\n\n"
    for number in range(4000)
)
MATERIALS = {
    "prose and code": PROSE,
    "one line": PROSE.replace("\n", " "),
    "Chinese": "河水又涨了，山谷里没有人感到惊讶。于是他们打开了闸门" * 500,
    "no ends at all": "x1" * 40_000,
    "short": "Twenty characters ok",
    "empty": " \n",
}
SCRIPTS = {
    "en": ("LATIN",),
    "es": ("LATIN",),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ar": ("ARABIC",),
    "ru": ("CYRILLIC",),
    "hi": ("DEVANAGARI",),
}
BYTES = PlainMeasure(ByteTokenizer())


@pytest.fixture(scope="session")
def smollm2_measure(smollm2: str) -> PlainMeasure:
    tokenizer = load_tokenizer(read_header(Path(smollm2)))
    assert tokenizer is not None
    return PlainMeasure(tokenizer)


def task_of(
    scope: Scope, measure: Measure = BYTES, text: str = PROSE, language: Language = "en"
) -> MeaningTask:
    return MeaningTask(language, Material(text, (), "made up", own=True), measure, scope)


def row_of(question: Question, depths: int) -> int:
    assert question.depth is not None
    return int(question.depth * depths)


def needle_in(part: str, language: Language = "en") -> tuple[str, str] | None:
    """The topic and the name, if the part is a needle."""
    for pair in pairs():
        before, after = pair.needles[language].split("{name}")
        line = part.strip("\n")
        if line.startswith(before) and line.endswith(after):
            name = line[len(before) : len(line) - len(after)]
            if name in names():
                return pair.topic, name
    return None


def check_trial(trial: Trial, measure: PlainMeasure, scope: Scope, language: Language = "en") -> None:
    """Length, needles and depths of a trial are as its docstrings say."""
    longest = max(measure.count([question.text]) for question in trial.questions)
    used = measure.count(trial.parts) + longest + measure.frame + MAX_TOKENS
    assert trial.length * 0.98 <= used <= trial.length

    assert trial.parts[0] == OPENING
    haystack = trial.parts[1:]
    total = measure.count(haystack)
    found = {}
    tokens = 0
    for number, part in enumerate(haystack):
        if needle := needle_in(part, language):
            assert needle not in found
            assert part.startswith("\n") or trial.parts[number].endswith("\n")
            assert part.endswith("\n")
            found[needle] = tokens / total
        tokens += measure.count([part])
    assert len({topic for topic, _ in found}) == len({name for _, name in found}) == len(found)
    by_question = {pair.question: pair.topic for pair in pairs()}
    for question in trial.questions:
        topic = next(topic for asked, topic in by_question.items() if asked in question.text)
        assert question.depth == found[topic, question.answers[0]]


class TestPairs:
    @pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.topic)
    def test_needle_and_question_share_no_word(self, pair: Pair) -> None:
        """Neither a term, nor the first five letters of one: only who understands both sees the link."""
        needle = set(terms(pair.needles["en"].replace("{name}", "")))
        question = set(terms(pair.question)) - {"who", "whom"}
        assert needle
        assert question
        assert not needle & question
        assert not {term[:5] for term in needle} & {term[:5] for term in question}

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_each_needle_is_in_the_script_of_its_language(self, language: Language) -> None:
        """Only the name, and the symbol of a chemical element, is Latin everywhere."""
        for pair in pairs():
            needle = pair.needles[language]
            assert needle.count("{name}") == 1
            assert needle.count("{") == needle.count("}") == 1
            letters = [
                letter for letter in needle.replace("{name}", "").replace("Au", "") if letter.isalpha()
            ]
            assert len(letters) >= 5
            assert {unicodedata.name(letter).split()[0] for letter in letters} <= set(SCRIPTS[language]), (
                needle
            )
            assert unicodedata.normalize("NFC", needle) == needle
            assert needle[-1] in ".。।"

    def test_japanese_needles_have_kana(self) -> None:
        """They are not Chinese ones."""
        for pair in pairs():
            assert any("HIRAGANA" in unicodedata.name(letter) for letter in pair.needles["ja"]), pair.topic

    def test_nothing_comes_twice(self) -> None:
        """Topics, questions and needles are all different, so that a question has one answer."""
        assert len(pairs()) >= 24
        assert len({pair.topic.casefold() for pair in pairs()}) == len(pairs())
        assert len({pair.question for pair in pairs()}) == len(pairs())
        for language in LANGUAGES:
            assert len({pair.needles[language] for pair in pairs()}) == len(pairs())

    def test_a_question_asks_for_what_no_other_asks_for(self) -> None:
        """What a question is about, its words beside the everyday ones, is in no other question."""
        everyday = set(
            "spent time earn money take exercise visited travelled met know set foot went holiday been live "
            "must could work things play skilled practise home one only born year".split()
        )
        counts = Counter(
            term for pair in pairs() for term in set(terms(pair.question)) - everyday if term not in everyday
        )
        for pair in pairs():
            assert any(counts[term] == 1 for term in terms(pair.question)), pair.question

    def test_names_cannot_be_mistaken(self) -> None:
        """They are enough, plain Latin, and none is a part of another one or of a sentence."""
        folded = [name.casefold() for name in names()]
        assert len(set(folded)) == len(folded) >= max(60, len(pairs()))
        assert all(name.isascii() and name.isalpha() and name.istitle() for name in names())
        assert not [(a, b) for a in folded for b in folded if a != b and a in b]
        sentences = [text for pair in pairs() for text in (pair.question, *pair.needles.values())]
        assert not [name for name in folded if any(name in text.casefold() for text in sentences)]


class TestTrials:
    @given(
        lengths=st.lists(st.integers(512, 16_384), min_size=1, max_size=5, unique=True).map(sorted),
        depths=st.integers(1, 6),
        samples=st.integers(1, 5),
        seed=st.integers(0, 99),
        material=st.sampled_from(sorted(MATERIALS)),
    )
    @examples(max_examples=60)
    def test_laws_of_bytes(
        self, lengths: list[int], depths: int, samples: int, seed: int, material: str
    ) -> None:
        """Whatever the text, prompts fill their length, and each row has its questions at their depths."""
        scope = Scope(tuple(lengths), depths, samples, seed)
        task = task_of(scope, text=MATERIALS[material])
        earlier: list[tuple[str, ...]] = []
        for length in lengths:
            try:
                trials = list(task.trials(length))
            except TooShortError:
                assert not earlier
                # A needle is up to 90 bytes long, and what is around a haystack takes up to 250. Where there
                # are longer ones, their rows have the ends and needles of shorter ones in them, too.
                later = lengths[lengths.index(length) :]
                close = any(longer - shorter < 100 for shorter, longer in pairwise(later))
                assert length < 250 + 2 * 90 * depths * (3 if len(later) > 1 else 1) or close
                continue
            rows = Counter(row_of(question, depths) for trial in trials for question in trial.questions)
            assert rows == dict.fromkeys(range(depths), samples)
            ids = [question.id for trial in trials for question in trial.questions]
            assert len(set(ids)) == len(ids)
            for trial in trials:
                check_trial(trial, BYTES, scope)
            parts = [trial.parts for trial in trials]
            if earlier:
                assert all(a == b[: len(a)] for a, b in zip(earlier, parts, strict=True))
            earlier = parts

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("material", MATERIALS)
    def test_laws_of_a_real_vocabulary(self, smollm2_measure: PlainMeasure, material: str, seed: int) -> None:
        """The same from 512 to 16k tokens, in the usual steps, with nothing too short."""
        scope = Scope((512, 1024, 2048, 4096, 8192, 16_384), 5, 2, seed)
        task = task_of(scope, smollm2_measure, MATERIALS[material])
        for length in scope.lengths:
            trials = list(task.trials(length))
            rows = Counter(row_of(question, 5) for trial in trials for question in trial.questions)
            assert rows == dict.fromkeys(range(5), 2)
            for trial in trials:
                check_trial(trial, smollm2_measure, scope)

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_laws_of_languages(self, smollm2_measure: PlainMeasure, language: Language) -> None:
        """Needles of other languages take more tokens; the laws are the same."""
        scope = Scope((4096, 8192), 5, 3)
        task = TASKS["meaning" if language == "en" else f"meaning_{language}"](
            Material(PROSE, (), "made up", own=True), smollm2_measure, scope
        )
        for length in scope.lengths:
            trials = list(task.trials(length))
            assert {trial.task for trial in trials} == {task.name}
            for trial in trials:
                assert trial.nested
                check_trial(trial, smollm2_measure, scope, language)

    @pytest.mark.parametrize("material", ["prose and code", "one line", "Chinese", "no ends at all"])
    def test_needles_are_near_their_aims(self, material: str) -> None:
        """Each is within 1 % of where it was meant to be, and as near where lines are short."""
        scope = Scope((4000, 8000, 16_000), seed=7)
        task = task_of(scope, text=MATERIALS[material])
        for length in scope.lengths:
            for plan, trial in zip(task.plans, task.trials(length), strict=True):
                total = BYTES.count(trial.parts[1:])
                for asked, question in zip(plan.asked[length], trial.questions, strict=True):
                    assert question.answers == (asked.spot.name,)
                    assert question.depth == pytest.approx(asked.spot.aim / total, abs=0.01)

    def test_needles_go_to_the_ends_of_sentences(self) -> None:
        """No word of the text is torn where a line or sentence ends near enough."""
        (trial,) = task_of(Scope((16_000,), 5, 2)).trials(16_000)
        before = [a for a, b in zip(trial.parts, trial.parts[1:], strict=False) if needle_in(b)]
        assert len(before) == 10
        assert all(part.endswith((".", "\n")) for part in before)

    def test_one_haystack_serves_all_questions(self) -> None:
        """While there are enough pairs, all questions are about one text."""
        scope = Scope((8000, 16_000, 32_000), 5, 5)
        task = task_of(scope)
        assert [len(list(task.trials(length))) for length in scope.lengths] == [1, 1, 1]

    def test_many_questions_take_several_haystacks(self) -> None:
        """When there are not, each of several has no pair twice, and the questions are spread over them."""
        scope = Scope((32_000, 64_000), 5, 20)
        task = task_of(scope)
        for length in scope.lengths:
            trials = list(task.trials(length))
            assert len(trials) > 100 / len(pairs())
            sizes = [len(trial.questions) for trial in trials]
            assert sum(sizes) == 100
            assert max(sizes) - min(sizes) <= 1
            for trial in trials:
                check_trial(trial, BYTES, scope)

    def test_each_question_is_measured_once(self) -> None:
        """However many lengths and haystacks are planned."""
        measured: list[str] = []

        class Counting(PlainMeasure):
            def room(
                self, length: int, max_tokens: int, questions: Sequence[Question], system: str = ""
            ) -> int:
                measured.extend(question.text for question in questions)
                return super().room(length, max_tokens, questions, system)

        scope = Scope((32_000, 48_000, 64_000), 5, 20)
        assert len(task_of(scope, Counting(ByteTokenizer())).plans) > 1
        assert len(measured) == len(set(measured)) == len(pairs())

    def test_lengths_come_in_any_order(self) -> None:
        """What a trial is does not depend on which were made before it."""
        scope = Scope((2000, 4000, 8000), 3, 2)
        task = task_of(scope)
        backwards = {length: list(task.trials(length)) for length in reversed(scope.lengths)}
        assert backwards == {length: list(task_of(scope).trials(length)) for length in scope.lengths}

    def test_seeds_tell_trials_apart(self) -> None:
        """The same seed gives the same trials, another one other needles, and so does another language."""

        def trials(seed: int, language: Language = "en") -> list[Trial]:
            return list(task_of(Scope((9000,), seed=seed), language=language).trials(9000))

        assert trials(1) == trials(1)
        answers = [
            tuple(question.answers for trial in made for question in trial.questions)
            for made in (trials(1), trials(2), trials(1, "es"))
        ]
        assert len(set(answers)) == 3

    def test_global_randomness_is_left_alone(self) -> None:
        """Neither used nor changed."""
        random.seed(3)
        state = random.getstate()
        first = list(task_of(Scope((9000,))).trials(9000))
        assert random.getstate() == state
        random.seed(4)
        assert list(task_of(Scope((9000,))).trials(9000)) == first

    @pytest.mark.parametrize("length", [1, 300, 600])
    def test_a_length_that_is_too_short(self, length: int) -> None:
        """It raises, and the longer lengths are asked all the same."""
        task = task_of(Scope((length, 9000)))
        with pytest.raises(TooShortError, match="half"):
            task.trials(length)
        assert len(list(task.trials(9000))) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_who_knows_the_needles_answers_everything(language: Language) -> None:
    """An oracle that reads the haystack, and has a table of what the needles mean, scores 1."""
    by_question = {pair.question: pair.topic for pair in pairs()}
    count = 0
    for trial in task_of(Scope((16_000, 32_000)), language=language).trials(32_000):
        table = dict(needle for part in trial.parts if (needle := needle_in(part, language)))
        for question in trial.questions:
            topic = next(topic for asked, topic in by_question.items() if asked in question.text)
            assert question.score(f"{table[topic]}.") == 1.0
            others = [name for name in table.values() if name != table[topic]]
            assert question.score(" ".join(others)) == 0.0
            count += 1
    assert count == 25
