"""An evaluation as the JSON object that `eval.schema.json` describes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING, Any

from m3cli.report.eval_parts import comparisons

if TYPE_CHECKING:
    from m3cli.report.eval_parts import Comparison
    from m3cli.tasks.evaluate.results import Bar, Evaluation, Outcome, Run, Score
    from m3cli.tasks.evaluate.trial import Group


def eval_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the object that `m3 eval --json` prints."""
    text = resources.files("m3cli.report").joinpath("eval.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def eval_object(evaluation: Evaluation) -> dict[str, Any]:
    """`evaluation` in plain values, with every answer. Scores are from 0 to 1, lengths in tokens."""
    return {
        "model": {
            "name": evaluation.model,
            "digest": evaluation.digest,
            "description": evaluation.description,
        },
        "haystack": evaluation.haystack,
        "lengths": list(evaluation.lengths),
        "depths": evaluation.depths,
        "samples": evaluation.samples,
        "seed": evaluation.seed,
        "complete": evaluation.complete,
        "runs": [_run(run, evaluation.depths) for run in evaluation.runs],
        "comparisons": [_comparison(comparison) for comparison in comparisons(evaluation)],
        "skipped": [asdict(skipped) for skipped in evaluation.skipped],
        "computed_tokens": evaluation.computed_tokens,
        "known_answers": evaluation.known,
        "seconds": round(evaluation.seconds, 3),
        "warnings": list(evaluation.warnings),
    }


def _run(run: Run, depths: int) -> dict[str, Any]:
    results = run.groups()
    return {
        **_kind(run),
        "partial": run.partial,
        "groups": [
            {
                "group": result.group,
                "absolute": _bar(result.absolute),
                "relative": _bar(result.relative),
                "scores": _by_length(result.scores),
                "cells": _cells(run, depths, result.group),
            }
            for result in results
        ],
        "tasks": [{"task": task, "scores": _by_length(scores)} for task, scores in run.tasks().items()],
        "cells": _cells(run, depths),
        "outcomes": [_outcome(outcome) for outcome in run.outcomes],
    }


def _kind(run: Run) -> dict[str, str]:
    return {"type_k": run.type_k, "type_v": run.type_v, "attention": run.attention, "mode": run.mode}


def _bar(bar: Bar) -> dict[str, Any]:
    return {"score": bar.value, "length": bar.length, "undecided": bar.undecided or None}


def _by_length(scores: dict[int, Score]) -> list[dict[str, Any]]:
    return [{"length": length, **asdict(score)} for length, score in scores.items()]


def _cells(run: Run, depths: int, group: Group | None = None) -> list[dict[str, Any]]:
    return [
        {"length": length, "depth": [row / depths, (row + 1) / depths], **asdict(score)}
        for (length, row), score in run.cells(depths, group).items()
    ]


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """One answer; its mode is that of its run."""
    values = asdict(outcome)
    del values["mode"]
    return {**values, "answers": list(outcome.answers), "seconds": round(outcome.seconds, 4)}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "of": comparison.of,
        "base": next(number for number, row in enumerate(comparison.rows) if row.name == comparison.base),
        "rows": [
            {
                **_kind(row.run),
                "score": row.score and asdict(row.score),
                "difference": row.difference and asdict(row.difference),
                "prompt_tokens": round(row.prompt_tokens, 1),
                "computed_tokens": round(row.computed_tokens, 1),
                "seconds": round(row.seconds, 4),
            }
            for row in comparison.rows
        ],
    }
