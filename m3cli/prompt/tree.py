"""A compact tree of the files of a corpus, as deep as a budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_DEEPEST = 64


def compact_tree(paths: Sequence[str], fits: Callable[[str], bool]) -> str:
    """The deepest tree of `paths` that `fits`, or the empty string if none does.

    One entry a line, indented by a space a level. Directories below the depth shown are one
    entry with the number of files in them: `tests/ (41 files)`.
    """
    deepest = min(max((path.count("/") for path in paths), default=0), _DEEPEST)
    for depth in range(deepest + 1, 0, -1):
        text = "".join(f"{line}\n" for line in _lines([path.split("/") for path in paths], depth))
        if fits(text):
            return text
    return ""


def _lines(entries: Iterable[list[str]], depth: int, level: int = 0) -> list[str]:
    directories: dict[str, list[list[str]]] = {}
    files: list[str] = []
    for first, *rest in entries:
        if rest:
            directories.setdefault(first, []).append(rest)
        else:
            files.append(first)
    indent = " " * level
    lines = [f"{indent}{name}" for name in files]
    for name, below in directories.items():
        if level + 1 < depth:
            lines.append(f"{indent}{name}/")
            lines.extend(_lines(below, depth, level + 1))
        else:
            lines.append(f"{indent}{name}/ ({len(below)} {'file' if len(below) == 1 else 'files'})")
    return lines
