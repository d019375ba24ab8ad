"""Outcomes that are kept, and what is made of them for questions to come."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.errors import MachineError
from m3cli.tasks.evaluate.effective import effective_context
from m3cli.tasks.evaluate.results import Outcome, Run, Score
from m3cli.tasks.evaluate.store import Outcomes, Variant, outcome_key, recall, remember

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.tasks.evaluate.trial import Group

VARIANT = Variant("d" * 16, "f16", "q8_0", "full")
OUTCOME = Outcome(
    "niah_single_1", "retrieval", "whole", 512, "q", 0.25, 1.0, "say \u2028 \udcff", 500, 400, 9, 1.5
)


def groups(scores: dict[int, list[float]], group: Group = "code") -> Run:
    outcomes = [
        replace(OUTCOME, group=group, length=length, question=str(i), score=score)
        for length, values in scores.items()
        for i, score in enumerate(values)
    ]
    return Run("f16", "q8_0", "full", "whole", tuple(outcomes))


def test_an_outcome_is_there_in_the_next_process(tmp_path: Path) -> None:
    """What was added is found again by its key, and by no other; another variant knows nothing of it."""
    Outcomes(tmp_path, VARIANT).add("k", OUTCOME)
    kept = Outcomes(tmp_path, VARIANT)
    assert kept.get("k") == replace(OUTCOME, reply="say \u2028 ?")
    assert kept.get("other") is None
    assert Outcomes(tmp_path, replace(VARIANT, type_v="f16")).get("k") is None


@given(st.integers(0, 400), st.binary(max_size=40))
def test_a_damaged_file_costs_only_the_damaged_lines(cut: int, rubbish: bytes) -> None:
    """Whatever stands in the middle or is cut off at the end, whole lines count and new ones can be added."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        Outcomes(Path(directory), VARIANT).add("first", OUTCOME)
        path = VARIANT.file(Path(directory), "jsonl")
        line = path.read_bytes()
        path.write_bytes(line + rubbish.replace(b"\n", b"") + b"\n" + line[: min(cut, len(line) - 1)])
        again = Outcomes(Path(directory), VARIANT)
        assert again.get("first") is not None
        again.add("second", OUTCOME)
        last = Outcomes(Path(directory), VARIANT)
        assert last.get("first") is not None
        assert last.get("second") is not None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Where a file stands in the way of the directory, the error names it."""
    (tmp_path / "eval").write_text("in the way")
    with pytest.raises(MachineError, match="eval"):
        Outcomes(tmp_path, VARIANT).add("k", OUTCOME)


def test_keys_tell_prompts_modes_and_limits_apart() -> None:
    """Any difference that can change an answer is another key."""
    keys = {
        outcome_key("whole", [1, 2], 9),
        outcome_key("whole", [1, 3], 9),
        outcome_key("whole", [1, 2], 8),
        outcome_key("recap", [1, 2], 9),
        outcome_key("whole", [1, 2], 9, "512"),
    }
    assert len(keys) == 5


def test_the_effective_context_is_that_of_the_group_most_like_a_question(tmp_path: Path) -> None:
    """Of several groups, code counts; another run of one group leaves the others as they were."""
    code = groups({512: [1.0] * 50, 1024: [1.0] * 50, 2048: [0.0] * 50})
    needles = groups({512: [1.0] * 50, 1024: [0.0] * 50}, "retrieval")
    remember(tmp_path, VARIANT, needles.groups(), {"whole": Score.of([1.0])})
    found = effective_context(tmp_path, VARIANT)
    assert found is not None
    assert (found.length, found.longest, found.group) == (512, 1024, "retrieval")
    remember(tmp_path, VARIANT, code.groups(), {"whole": Score.of([1.0])})
    found = effective_context(tmp_path, VARIANT)
    assert found is not None
    assert (found.length, found.longest, found.group, found.sweeps) == (1024, 2048, "code", False)
    known = recall(tmp_path, VARIANT)
    assert known is not None
    assert set(known.groups) == {"code", "retrieval"}


def test_a_sweep_is_preferred_only_where_it_is_surely_better(tmp_path: Path) -> None:
    """Its interval has to lie above the score of a selection."""
    code = groups({512: [1.0] * 50, 1024: [0.0] * 50}).groups()
    for sweep, better in (([1.0] * 40, True), ([1.0] * 25 + [0.0] * 15, False)):
        remember(
            tmp_path, VARIANT, code, {"sweep": Score.of(sweep), "select": Score.of([1.0] * 24 + [0.0] * 16)}
        )
        found = effective_context(tmp_path, VARIANT)
        assert found is not None
        assert found.sweeps is better


def test_what_tells_nothing_is_taken_for_nothing(tmp_path: Path) -> None:
    """No file, too few samples at the shortest length, or a damaged file: nothing is known."""
    assert effective_context(tmp_path, VARIANT) is None
    remember(tmp_path, VARIANT, groups({512: [1.0] * 3}).groups(), {})
    assert effective_context(tmp_path, VARIANT) is None
    for damage in (
        "",
        "[]",
        '{"groups": [], "modes": {}}',
        '{"groups": {"code": {"relative": 1}}, "modes": {}}',
    ):
        VARIANT.file(tmp_path, "json").write_text(damage)
        assert effective_context(tmp_path, VARIANT) is None
