"""What m3 plans for MiniMax-M3 on six machines, as a person has read and agreed to it."""

from __future__ import annotations

from tests.plan.golden import FILE, plans


def test_plans_are_those_that_were_read() -> None:
    """A change of any choice, number or sentence shows; tests/plan/golden.py says how to accept it."""
    assert plans().splitlines() == FILE.read_text("utf-8").splitlines()
