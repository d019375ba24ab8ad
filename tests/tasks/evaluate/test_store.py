"""Outcomes that are kept, and what is made of them for questions to come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.events import EngineConfig
from m3cli.errors import MachineError
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from m3cli.tasks.evaluate.difference import Difference
from m3cli.tasks.evaluate.effective import Effective, effective_context, variants_of
from m3cli.tasks.evaluate.results import Outcome, Run
from m3cli.tasks.evaluate.store import Outcomes, Variant, outcome_key, recall, remember

if TYPE_CHECKING:
    from m3cli.tasks.evaluate.trial import Group

VARIANT = Variant("d" * 16, "f16", "q8_0", "full")
OUTCOME = Outcome(
    "niah_single_1",
    "retrieval",
    "whole",
    512,
    "q",
    "?",
    ("x",),
    0.25,
    1.0,
    "say \u2028 \udcff",
    500,
    400,
    9,
    1.5,
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
    """Where a file stands in the way of the directory, the error names it, before anything is asked."""
    (tmp_path / "eval").write_text("in the way")
    with pytest.raises(MachineError, match="eval"):
        Outcomes(tmp_path, VARIANT)


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
    remember(tmp_path, VARIANT, needles.groups(), {})
    assert effective_context(tmp_path, VARIANT) == Effective(512, 1024, "retrieval", sweeps=False)
    remember(tmp_path, VARIANT, code.groups(), {})
    assert effective_context(tmp_path, VARIANT) == Effective(1024, 2048, "code", sweeps=False)
    assert set(recall(tmp_path, VARIANT).scores) == {"code", "retrieval"}


def test_what_was_measured_well_outlives_what_was_measured_less(tmp_path: Path) -> None:
    """A run of fewer lengths or samples takes nothing away; one of as many replaces what it measured."""
    remember(tmp_path, VARIANT, groups({512: [1.0] * 50, 1024: [0.0] * 50}).groups(), {})
    for less in ({512: [1.0] * 50}, {512: [0.0] * 3}, {1024: [1.0] * 3}):
        remember(tmp_path, VARIANT, groups(less).groups(), {})
        assert effective_context(tmp_path, VARIANT) == Effective(512, 1024, "code", sweeps=False)
    remember(tmp_path, VARIANT, groups({2048: [1.0] * 50, 1024: [1.0] * 60}).groups(), {})
    assert effective_context(tmp_path, VARIANT) == Effective(2048, 2048, "code", sweeps=False)


def test_a_sweep_is_preferred_only_where_it_is_surely_better(tmp_path: Path) -> None:
    """Its gain over a selection, on the same questions, has to have an interval above zero."""
    code = groups({512: [1.0] * 50, 1024: [0.0] * 50}).groups()
    for low, better in ((0.01, True), (-0.01, False)):
        remember(tmp_path, VARIANT, code, {"sweep": Difference(0.1, low, 0.2, 40)})
        found = effective_context(tmp_path, VARIANT)
        assert found is not None
        assert found.sweeps is better


def test_what_tells_nothing_is_taken_for_nothing(tmp_path: Path) -> None:
    """No file, a damaged one, too few samples at the shortest length, no right answer: nothing is known."""
    assert effective_context(tmp_path, VARIANT) is None
    for scores in ([1.0] * 3, [0.0] * 50):
        remember(tmp_path, VARIANT, groups({512: scores}).groups(), {})
        assert effective_context(tmp_path, VARIANT) is None
    for damage in (
        "",
        "[]",
        '{"scores": [], "gains": {}}',
        '{"scores": {"code": {"512": 1}}, "gains": {}}',
        '{"scores": {"code": {"long": {}}}, "gains": {}}',
    ):
        VARIANT.file(tmp_path, "json").write_text(damage)
        assert effective_context(tmp_path, VARIANT) is None


def test_a_smaller_kv_cache_that_m3_may_choose_is_found(tmp_path: Path, smollm2: str) -> None:
    """Where the user names no type, results with any of them count, the one that is expected first."""
    header = read_header(Path(smollm2))
    shape = ModelShape.from_header(header)
    config = EngineConfig(smollm2, 512)
    assert [v.type_k for v in variants_of("d", shape, config, named=False)] == ["f16", "q8_0", "q4_0"]
    assert [v.type_k for v in variants_of("d", shape, config, named=True)] == ["f16"]
