"""What a source file says of its functions, constants and types: values that pass between processes.

Rows are lines counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter and the text of its literal default, empty without one. A pattern has no name."""

    name: str
    default: str
    row: int


@dataclass(frozen=True, slots=True)
class Function:
    """A function or method from `row` to `end`, included. `owner` are the types it is in, joined by points.

    `nested` functions are inside another function. `returns` is the name that the last statement returns,
    `returns_own` says that this is an attribute of the object itself.
    """

    name: str
    owner: str
    row: int
    end: int
    nested: bool
    parameters: tuple[Parameter, ...]
    returns: str
    returns_own: bool


@dataclass(frozen=True, slots=True)
class Constant:
    """A name outside of functions that is bound, or unbound; `value` is the literal's text, if it is one."""

    name: str
    owner: str
    value: str
    row: int


@dataclass(frozen=True, slots=True)
class TypeName:
    """A type that is defined."""

    name: str
    row: int


@dataclass(frozen=True, slots=True)
class Call:
    """A call by the last part of the callee's name. `function` is the index of the innermost one, or -1.

    `receiver` is what stands before that part, empty if nothing does, and a question mark if it is no name.
    """

    name: str
    row: int
    function: int
    receiver: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a file, each in the order of the text.

    The literals leave out what is easily guessed: 0, 1, an empty string, and what has escapes, or digits
    that `_` groups. Strings are without their quotes.
    """

    functions: tuple[Function, ...]
    constants: tuple[Constant, ...]
    types: tuple[TypeName, ...]
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, answer: Sequence[Sequence[Any]]) -> Facts:
        """From rows of values, as JSON has them."""
        functions, constants, types, calls = answer
        return cls(
            tuple(
                Function(name, owner, row, end, nested, tuple(Parameter(*p) for p in parameters), *returned)
                for name, owner, row, end, nested, parameters, *returned in functions
            ),
            tuple(Constant(*constant) for constant in constants),
            tuple(TypeName(*kind) for kind in types),
            tuple(Call(*call) for call in calls),
        )
