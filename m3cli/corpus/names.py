"""How paths are shown to people and models: printable, unique, the same in every locale."""

from __future__ import annotations

import os
import re

# What could move a cursor, end a line, reorder text or hide in it, and bytes that are no UTF-8.
# A fixed list, so that a path looks the same under every version of the Unicode tables.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Escape what must not reach a terminal or a prompt: `\n`, `\x1b`, `\u202e`, `\xff`.

    `\xNN` from 80 up is a byte that is not UTF-8; a backslash is left as it is.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0], f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(path: bytes) -> str:
    """A path as people and models see it: the same in every locale, so not os.fsdecode."""
    return printable(path.decode("utf-8", "surrogateescape"))


def suffix_of(path: str) -> str:
    """The suffix of a file's name in lower case, with its dot; empty if it has none."""
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - pathlib takes ten times as long


def unused(path: str, used: set[str], numbers: dict[str, int]) -> str:
    """Return `path`, or with `~2`, `~3`, … before its extension if that is taken.

    `numbers` remembers the last number that each path was given.
    """
    if path not in used:
        return path
    stem, extension = os.path.splitext(path)  # noqa: PTH122 - pathlib would tidy the path up
    number, candidate = numbers.get(path, 1), path
    while candidate in used:
        number += 1
        candidate = f"{stem}~{number}{extension}"
    numbers[path] = number
    return candidate
