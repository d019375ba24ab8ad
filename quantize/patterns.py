"""Regular expressions from recipes, looked for in names of tensors: none of them can hold m3 up."""

from __future__ import annotations

import difflib
import re
import time
import warnings
from typing import TYPE_CHECKING

from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import regex

_LONGEST = 1000  # characters; enough to name every second layer
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_LAYER = re.compile(r"blk\.\d+\.")


def check(pattern: str, where: str) -> None:
    """Raise UsageError for what is no regular expression or not a simple one; `where` says whose it is."""
    _compile(pattern, where)


def find(pattern: str, names: Iterable[str], where: str, deadline: float) -> list[str]:
    """Return those of `names` that `pattern` is found in, anywhere, as `re.search` does.

    Raises UsageError for a pattern that `check` refuses, and at `deadline`, a time of `time.monotonic`.
    """
    search = _compile(pattern, where).search
    try:
        return [name for name in names if search(name, timeout=max(deadline - time.monotonic(), 0.001))]
    except TimeoutError as error:
        raise UsageError(
            f"{where} has a pattern that takes too long to look for.",
            "Write a simpler one, with fewer parts that may be left out or repeated.",
        ) from error


def alike(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names`, most like `pattern` first; of those that differ by their layer, the first."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_LAYER.sub("blk.N.", name), name)
    words = re.sub(r"\\|[^\w.]", "", pattern)
    return [first[each] for each in difflib.get_close_matches(words, first, 3, 0)]


def _compile(pattern: str, where: str) -> regex.Pattern[str]:
    """Compile with a library that can be told when to stop; by itself `re` never does.

    What only that library would understand is refused by `re`. It in turn takes exponential time and memory
    to compile groups that are repeated within each other, so that none may be repeated.
    """
    import regex

    if len(pattern) > _LONGEST:
        raise UsageError(
            f"{where} has a pattern of {len(pattern):,} characters; {_LONGEST:,} are the most.",
            "Write several rules instead of one.",
        )
    if _REPEATED_GROUP.search(_ESCAPE_OR_CLASS.sub("x", pattern)):
        raise UsageError(
            f"{where} repeats a group, which m3 does not allow, because it can take for ever.",
            "Repeat single characters or classes, such as [0-9]+.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what would mean something else in a later Python
            re.compile(pattern)
            return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, Warning) as error:
        raise UsageError(
            f"{where} has a pattern that is no regular expression: {error}.",
            r"Write it as Python does, such as blk\.[0-9]\.ffn_down, a dot of a name as \.",
        ) from error
