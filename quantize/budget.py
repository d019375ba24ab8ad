"""Which type each tensor should get so that the model fits and loses least: a multiple-choice knapsack.

Each tensor has options, one a type, with bytes and a cost; one is taken of each tensor. Without the ones that
others beat, the options of a tensor are the corners of a convex line of cost over bytes. Walking along all
lines at once, always where the cost falls most for a byte, is the solution of the Lagrangian; what the
walk leaves of the budget is then filled with whatever single change gains most. (Sinha and Zoltners, The
Multiple-Choice Knapsack Problem, 1979.)
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class Option(NamedTuple):
    """A type that a tensor may get, the bytes that it then takes, and what it then costs."""

    type: str
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen option of each tensor.

    No choice within the budget costs less than `bound`. `price` is what the cost falls by for another byte
    of budget, 0 when nothing can fall any more.
    """

    chosen: Mapping[str, Option]
    nbytes: int
    cost: float
    bound: float
    price: float


def smallest(options: Mapping[str, Sequence[Option]]) -> int:
    """The least bytes that any choice takes."""
    return sum(min(option.nbytes for option in each) for each in options.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """Choose an option for each tensor, within `budget` bytes. Raises ValueError when none fits."""
    lines = {name: _convex(each) for name, each in options.items()}
    chosen = {name: line[0] for name, line in lines.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise ValueError(f"{-left} bytes too few")
    bound = sum(option.cost for option in chosen.values())
    # 1. Along the lines, steepest step first. The bound is where the budget ends within a step.
    price = 0.0
    for slope, name, option in _steps(lines):
        more = option.nbytes - chosen[name].nbytes
        if not price:
            if more <= left:
                bound -= chosen[name].cost - option.cost
            else:
                bound -= slope * left
                price = slope
        if more <= left and (not price or chosen[name] == _before(lines[name], option)):
            chosen[name] = option
            left -= more
    # 2. Fill what is left, also with options that are on no line.
    while best := _best_change(options, chosen, left):
        name, option = best
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
    cost = sum(option.cost for option in chosen.values())
    return Allocation(chosen, budget - left, cost, max(0.0, min(bound, cost)), price)


def _convex(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of cost over bytes, with falling cost, smallest first."""
    line: list[Option] = []
    for option in sorted(options, key=lambda each: (each.nbytes, each.cost)):
        if line and option.cost >= line[-1].cost:
            continue
        while len(line) > 1 and _slope(line[-2], line[-1]) <= _slope(line[-2], option):
            line.pop()
        line.append(option)
    return line


def _slope(smaller: Option, larger: Option) -> float:
    """What the cost falls by for a byte."""
    return (smaller.cost - larger.cost) / (larger.nbytes - smaller.nbytes)


def _steps(lines: Mapping[str, Sequence[Option]]) -> Iterator[tuple[float, str, Option]]:
    """All steps along all lines, steepest first: slope, tensor, and the option that the step ends at."""

    def along(name: str, line: Sequence[Option]) -> Iterator[tuple[float, str, Option]]:
        for smaller, larger in itertools.pairwise(line):
            yield _slope(smaller, larger), name, larger

    return heapq.merge(
        *(along(name, line) for name, line in lines.items()), key=lambda step: step[0], reverse=True
    )


def _before(line: Sequence[Option], option: Option) -> Option:
    return line[line.index(option) - 1]


def _best_change(
    options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], left: int
) -> tuple[str, Option] | None:
    """The single change that lowers the cost most and fits into what is left."""
    best, gain = None, 0.0
    for name, each in options.items():
        now = chosen[name]
        for option in each:
            if option.nbytes - now.nbytes <= left and now.cost - option.cost > gain:
                best, gain = (name, option), now.cost - option.cost
    return best
