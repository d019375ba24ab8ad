"""Which tasks, and at which lengths."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from m3cli.errors import DoesNotFitError, UsageError
from m3cli.tasks.evaluate import aggregation, code, coreference, meaning, niah, tracing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.tasks.evaluate.trial import MakeTask

_BY_GROUP: Mapping[str, Mapping[str, MakeTask]] = {
    "code": code.TASKS,
    "meaning": meaning.TASKS,
    "retrieval": niah.TASKS,
    "tracing": tracing.TASKS,
    "aggregation": aggregation.TASKS,
    "coreference": coreference.TASKS,
}
TASKS: dict[str, MakeTask] = {name: make for tasks in _BY_GROUP.values() for name, make in tasks.items()}
CODE = tuple(code.TASKS)
_RULER = ("retrieval", "tracing", "aggregation")
DEFAULT = ("code", "meaning")

_FIRST = 4096  # tokens: the shortest length, if the window has room for several longer ones
_LENGTHS = 5  # of a small window
_SHORTEST = 512


def chosen(words: Sequence[str]) -> list[str]:
    """Names of tasks for `words`: tasks, groups, `ruler`, `all`, or globs. Raises UsageError.

    Without words, the tasks of the repository's questions and of needles without words in common: they are
    nearest to what people ask, and each haystack is computed once.
    """
    names: dict[str, None] = {}
    for word in words or DEFAULT:
        if word == "ruler":
            found = [name for group in _RULER for name in _BY_GROUP[group]]
        elif word in ("code", "retrieval", "tracing", "aggregation", "coreference"):
            found = list(_BY_GROUP[word])
        elif word == "all":
            found = list(TASKS)
        else:
            found = [name for name in TASKS if fnmatchcase(name, word)]
        if not found:
            groups = [group for group in _BY_GROUP if group != "meaning"]
            raise UsageError(
                f"There is no task {word}.",
                f"The tasks are {', '.join(TASKS)}; {', '.join((*groups, 'ruler', 'all'))} name several.",
            )
        names.update(dict.fromkeys(found))
    return list(names)


def check_comparison(names: Sequence[str]) -> None:
    """Raise UsageError for tasks that cannot be shown in several modes."""
    if other := [name for name in names if name not in CODE]:
        raise UsageError(
            f"The task {other[0]} has a text that can only be shown whole.",
            "Compare modes on tasks about a corpus: --tasks code.",
        )


def lengths_for(window: int, asked: Sequence[int]) -> tuple[int, ...]:
    """The lengths that were asked for, each once and rising; without, doubling ones up to the `window`.

    One of them is short: scores are held against that of a short context. Raises DoesNotFitError for one that
    is larger than the window, both in tokens.
    """
    if asked:
        longest = max(asked)
        if longest > window:
            raise DoesNotFitError(
                f"A length of {longest:,} tokens was asked for, and the model has a context of {window:,}.",
                "Ask for shorter --lengths, or use a model with a longer context.",
            )
        short = {_FIRST} if min(asked) > _FIRST else set()
        return tuple(sorted({*asked, *short}))
    length = _FIRST if window >= _FIRST << 3 else max(_SHORTEST, window >> (_LENGTHS - 1))
    found = []
    while length <= window:
        found.append(length)
        length *= 2
    return tuple(found or (window,))
