"""Reading a JSON request whose sender may have made any mistake: each is told by the name of its field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from m3cli.engine.endpoint import clean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RequestError(Exception):
    """A request that cannot be answered, as OpenAI's API says it. `status` is of HTTP."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


def parse_object(data: bytes) -> Fields:
    """The JSON object that a body holds. Raises RequestError."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError("The body has to be a JSON object.")
    return Fields(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """The members of a JSON object; null counts as absent. `path` is what errors call the object."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, key: str) -> str:
        """What errors call a member."""
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether there is such a member, and it is not null."""
        return self._values.get(key) is not None

    def wrong(self, key: str, wanted: str) -> RequestError:
        """The error about a member."""
        return RequestError(f"'{self.name(key)}' has to be {wanted}.", self.name(key))

    def raw(self, key: str) -> Any:
        """The value as it is; None if absent."""
        return self._values.get(key)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a `default`, it has to be there. Raises RequestError."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return clean(value)

    def flag(self, key: str) -> bool:
        """A boolean, false if absent. Raises RequestError."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def number(self, key: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`; None if absent. Raises RequestError."""
        value = self._values.get(key)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # which NaN and infinity are not
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`; None if absent. Raises RequestError."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def one_of(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of some strings. Raises RequestError."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def member(self, key: str) -> Fields | None:
        """A member that is an object; None if absent. Raises RequestError."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, self.name(key))

    def members(self, key: str) -> list[Fields]:
        """A member that is a list of objects, and not empty. Raises RequestError."""
        value = self._values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self.wrong(key, "a list of objects that is not empty")
        return [Fields(each, f"{self.name(key)}[{place}]") for place, each in enumerate(value)]

    def refuse(self, key: str, *harmless: object) -> None:
        """Raise RequestError when a member asks for something that this server does not do."""
        value = self._values.get(key)
        if value is not None and value not in harmless:
            raise RequestError(
                f"'{self.name(key)}' is not supported by this server.",
                self.name(key),
                code="unsupported_value",
            )
