"""Running text is cut to the token, and needles are where they were aimed at."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.evaluate.placing import (
    NOISE,
    Filler,
    Needle,
    batches,
    bury,
    draw_aims,
    needle_size,
    rows_of,
)
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from tests.tasks.evaluate.measures import PlainMeasure
from tests.tasks.evaluate.tasks import BYTES, CODE, MATERIALS, real_measure

TEXTS = ["<first needle>", "<second, which is longer than the others>", "<third>"]


@settings(max_examples=200)
@given(
    text=st.sampled_from(sorted(MATERIALS.values())) | st.text(max_size=300),
    room=st.integers(600, 20_000),
    number=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_needles_are_where_they_were_aimed_at(text: str, room: int, number: int, seed: int) -> None:
    """Within 1 % of the aim and within 1 % of the room, whatever the text is; and nothing of it is lost."""
    check_bury(text, room, number, seed, BYTES)


@settings(max_examples=30)
@given(kind=st.sampled_from(sorted(MATERIALS)), room=st.integers(300, 8000), seed=st.integers(0, 99))
def test_with_a_real_tokenizer(smollm2: str, kind: str, room: int, seed: int) -> None:
    """The same with a real vocabulary."""
    check_bury(MATERIALS[kind], room, 3, seed, real_measure(smollm2))


def check_bury(text: str, room: int, number: int, seed: int, measure: PlainMeasure) -> None:
    filler = Filler(text, measure)
    texts = TEXTS[:number]
    sizes = [needle_size(needle, measure) for needle in texts]
    aims = draw_aims(random.Random(seed), [(0.0, 1.0)] * number, sizes, room)
    haystack = bury(filler, [Needle(t, aim) for t, aim in zip(texts, aims, strict=True)], room, measure)
    assert 0.99 * room <= measure.count(haystack.parts) <= room
    joined = "".join(haystack.parts)
    for needle, aim, depth in zip(texts, aims, haystack.depths, strict=True):
        index = next(i for i, part in enumerate(haystack.parts) if needle in part)
        real = measure.count(haystack.parts[:index]) / measure.count(haystack.parts)
        assert real == pytest.approx(depth)
        assert abs(depth - aim) <= 0.01
    bare = joined
    for needle in texts:
        assert bare.count(needle) == 1
        bare = bare.replace(needle, "")
    # Blanks that set a needle off are not the text's.
    assert filler.text.translate(BLANKS).startswith(bare.translate(BLANKS))


BLANKS = {ord(blank): None for blank in " \n"}


def test_needles_stand_between_sentences() -> None:
    """A line end or sentence end that is near enough is taken; a needle after a line has its own."""
    filler = Filler("One two three four. Five six seven eight!\nNine ten eleven.\n" * 40, BYTES)
    for aim in (0.0, 0.11, 0.33, 0.52, 0.77, 0.9):
        parts = bury(filler, [Needle("NEEDLE.", aim)], 2000, BYTES).parts
        index = next(i for i, part in enumerate(parts) if "NEEDLE" in part)
        before = "".join(parts[:index])
        assert parts[index] == ("NEEDLE.\n" if before[-1:] in ("", "\n") else " NEEDLE.")
        assert before[-1:] in ("", "\n", ".", "!")


def test_without_sentences_needles_stand_between_words() -> None:
    """A giant line has only words to end."""
    parts = bury(Filler("word " * 5000, BYTES), [Needle("NEEDLE.", 0.4321)], 9000, BYTES).parts
    assert "word NEEDLE. word" in "".join(parts)
    assert "".join(parts).endswith(" word")


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_blank_material_is_noise(text: str) -> None:
    """Nothing to read on in gives the noise sentences."""
    assert Filler(text, BYTES).unit == NOISE + "\n"


@given(start=st.integers(0, 30_000), size=st.integers(0, 30_000))
def test_filler_counts(start: int, size: int) -> None:
    """Tokens between two places are those of the pieces, and `after` is where they are used up."""
    filler = Filler("A line of text.\n" * 99, BYTES)
    filler.grow(60_000)
    pieces = filler.pieces(start, start + size)
    assert "".join(pieces) == filler.text[start : start + size]
    assert filler.count(start, start + size) == BYTES.count(pieces)
    assert filler.after(start, size) == start + size


def test_blocks_are_counted_once() -> None:
    """A second haystack of the same text needs few counts, however long it is."""
    counted = 0

    class Counting(PlainMeasure):
        def count(self, parts):  # type: ignore[no-untyped-def]
            nonlocal counted
            counted += sum(map(len, parts))
            return super().count(parts)

    measure = Counting(BYTES.tokenizer)
    filler = Filler(CODE, measure)
    bury(filler, [Needle("NEEDLE.", 0.3)], 3_000_000, measure)
    first, counted = counted, 0
    bury(filler, [Needle("NEEDLE.", 0.8)], 3_000_000, measure)
    assert counted < first / 10


def test_rows_and_batches() -> None:
    """Rows cover all depths; batches hold each (row, sample) once, each of different rows."""
    scope = Scope((1,), depths=5, samples=3)
    assert rows_of(scope)[0] == (0.0, 0.2)
    assert rows_of(scope)[-1] == (0.8, 1.0)
    found = batches(scope, 4)
    assert sorted(pair for batch in found for pair in batch) == [(r, s) for r in range(5) for s in range(3)]
    assert all(len({row for row, _ in batch}) == len(batch) for batch in found)


def test_needles_that_do_not_fit() -> None:
    """Needles longer than the room, or than their rows, are refused."""
    with pytest.raises(TooShortError):
        bury(Filler("", BYTES), [Needle("x" * 100, 0.1)], 90, BYTES)
    with pytest.raises(TooShortError):
        draw_aims(random.Random(0), [(0.9, 1.0)], [20], 100)
    with pytest.raises(TooShortError):
        draw_aims(random.Random(0), [(0.0, 1.0)], [20], -5)
