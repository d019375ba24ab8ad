"""How much better one way of asking is than another, at the questions that both answered."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.results import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.tasks.evaluate.results import Outcome


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better outcomes are than others at the `count` questions of both, with an interval of 95 %."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> Difference | None:
        """That of the mean scores; None without a question in both.

        The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 1998, p. 2635, method
        10): Wilson's of both, and how much the two agree.
        """
        before = {_key(outcome): outcome.score for outcome in base}
        pairs = [(outcome.score, before[_key(outcome)]) for outcome in outcomes if _key(outcome) in before]
        if not pairs:
            return None
        new, old = Score.of(a for a, _ in pairs), Score.of(b for _, b in pairs)
        value, agreement = new.mean - old.mean, _agreement(pairs, new.mean, old.mean)

        def reach(below: float, above: float) -> float:
            return sqrt(max(below**2 - 2 * agreement * below * above + above**2, 0.0))

        return cls(
            value,
            value - reach(new.mean - new.low, old.high - old.mean),
            value + reach(new.high - new.mean, old.mean - old.low),
            len(pairs),
        )


def _agreement(pairs: Sequence[tuple[float, float]], new: float, old: float) -> float:
    """Newcombe's φ: the correlation, less a correction for continuity where it is positive."""
    count = len(pairs)
    spread = sqrt(sum((a - new) ** 2 for a, _ in pairs) * sum((b - old) ** 2 for _, b in pairs)) / count
    if not spread:
        return 0.0
    covariance = sum((a - new) * (b - old) for a, b in pairs) / count
    if covariance > 0:
        covariance = max(covariance - 1 / (2 * count), 0.0)
    return covariance / spread


def _key(outcome: Outcome) -> tuple[str, int, str]:
    return outcome.task, outcome.length, outcome.question
