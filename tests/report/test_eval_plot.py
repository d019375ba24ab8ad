"""The picture of an evaluation."""

from __future__ import annotations

import re

import pytest

from m3cli.report.eval_parts import colours, step
from m3cli.report.eval_plot import plot
from tests.report.evaluations import HOSTILE, evaluation_of, outcome, run_of, varied


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".PNG", b"\x89PNG")])
def test_the_same_bytes_each_time(suffix: str, start: bytes) -> None:
    """Two pictures of one evaluation are one; another evaluation has another."""
    evaluation = evaluation_of(varied(1), varied(1, kv=("q8_0", "q8_0")))
    picture = plot(evaluation, suffix)
    assert picture.startswith(start)
    assert picture == plot(evaluation, suffix)
    assert picture != plot(evaluation_of(varied(2)), suffix)
    assert b"<dc:date>" not in picture


def test_cells_have_their_numbers_and_colours() -> None:
    """A square of its score's colour for each cell, and none where nothing was asked."""
    run = run_of(
        outcome(1, length=512, depth=0.1),
        outcome(0.25, length=4096, depth=0.9),
        outcome(0, length=4096, depth=None, task="vt", group="tracing"),
    )
    svg = plot(evaluation_of(run, depths=2), ".svg").decode()
    for score, times in ((1, 2), (0.25, 2), (0, 1)):
        back, _ = colours(step(score))
        # The bar of colours is an image; all that is filled so is a cell, by group or by depth.
        assert len(re.findall(rf"fill: {back}; stroke: #ffffff", svg)) == times
    for words in ("4k", "retrieval", "tracing", "50–100 %", "100", "25"):
        assert re.search(rf"<!-- ([^>]*\n *)?{words}\s", svg)  # texts are paths, with what they say before


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_anything_can_be_drawn(suffix: str) -> None:
    """Nothing answered, no depth, one length, many of them, and names that mean something to matplotlib."""
    several = (
        evaluation_of(),
        evaluation_of(run_of()),
        evaluation_of(run_of(outcome(1, depth=None))),
        evaluation_of(run_of(outcome(1), partial=4096)),
        evaluation_of(run_of(outcome(1)), run_of(outcome(1, depth=None), mode="end"), depths=1),
        evaluation_of(varied(1, lengths=tuple(range(1000, 41_000, 1000))), depths=30),
        *(evaluation_of(run_of(outcome(1, task=text)), model=text) for text in HOSTILE),
    )
    for evaluation in several:
        assert len(plot(evaluation, suffix)) > 1000
