"""An evaluation as programs read it, and as its schema describes it."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from jsonschema import Draft202012Validator, ValidationError

from m3cli.engine.events import Attention, KVType
from m3cli.report.eval_json import eval_object, eval_schema
from m3cli.tasks.evaluate.results import MODES, Score, Skipped
from m3cli.tasks.evaluate.trial import GROUPS
from tests.report.evaluations import HOSTILE, evaluation_of, outcome, run_of, varied

SCHEMA = Draft202012Validator(eval_schema())


def test_the_schema_is_one_and_knows_all_names() -> None:
    """It is valid itself, and its lists of names are those of the code."""
    Draft202012Validator.check_schema(eval_schema())
    names = {name: set(eval_schema()["$defs"][name]["enum"]) for name in ("kv", "attention", "mode", "group")}
    assert names == {
        "kv": set(get_args(KVType)),
        "attention": set(get_args(Attention)),
        "mode": set(MODES),
        "group": set(GROUPS),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_object_is_as_the_schema_says(seed: int) -> None:
    """Whatever was found, or not: several runs, an empty one, no depth, texts that are no UTF-8."""
    odd = run_of(
        *(
            outcome(0, depth=None, reply=text, task=text, question=text, text=text, answers=(text, text))
            for text in HOSTILE
        ),
        partial=4096,
    )
    several = (
        varied(seed),
        varied(seed, mode="select"),
        varied(seed, kv=("q8_0", "q4_0")),
        run_of(mode="end"),
    )
    skipped = (Skipped(HOSTILE[0], 512, HOSTILE[1]),)
    for runs in ((), (run_of(),), (odd,), several):
        found = eval_object(evaluation_of(*runs, model=HOSTILE[seed], skipped=skipped, complete=False))
        SCHEMA.validate(json.loads(json.dumps(found)))


def test_numbers_are_those_of_the_results() -> None:
    """Effective contexts, cells, comparisons and answers can be computed again from the object."""
    run, other = varied(1), varied(1, mode="select", decline=0.02)
    found = eval_object(evaluation_of(run, other))
    first = found["runs"][0]
    assert len(first["outcomes"]) == len(run.outcomes)
    assert first["partial"] == 0
    asked = first["outcomes"][0]
    assert (asked["text"], asked["answers"]) == ("\nWhat is it?", ["7"])
    for result, written in zip(run.groups(), first["groups"], strict=True):
        assert written["absolute"]["length"] == result.absolute.length
        assert written["relative"]["undecided"] == (result.relative.undecided or None)
        for row in written["scores"]:
            again = [
                answer["score"]
                for answer in first["outcomes"]
                if (answer["group"], answer["length"]) == (written["group"], row["length"])
            ]
            assert Score.of(again) == Score(row["mean"], row["low"], row["high"], row["count"])
    for cell in first["cells"]:
        low, high = cell["depth"]
        again = [
            answer["score"]
            for answer in first["outcomes"]
            if answer["depth"] is not None
            and low <= answer["depth"] < high
            and answer["length"] == cell["length"]
        ]
        assert cell["mean"] == pytest.approx(sum(again) / len(again))
        assert cell["count"] == len(again)
    (compared,) = found["comparisons"]
    assert (compared["of"], compared["base"]) == ("modes", 0)
    whole, select = compared["rows"]
    assert whole["difference"] is None
    gain = select["difference"]
    assert gain["value"] == pytest.approx(select["score"]["mean"] - whole["score"]["mean"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert gain["count"] == 360


@pytest.mark.parametrize("change", [{"seed": None}, {"more": 1}, {"lengths": [0]}, {"runs": [{}]}])
def test_the_schema_refuses_what_is_wrong(change: dict[str, object]) -> None:
    """Wrong types, keys that it does not know or that are missing, and impossible numbers are seen."""
    found = eval_object(evaluation_of(varied(1)))
    SCHEMA.validate(json.loads(json.dumps(found)))
    with pytest.raises(ValidationError):
        SCHEMA.validate({**found, **change})
