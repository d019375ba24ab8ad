"""Hashes of lines that stay the same when lines are added above them, as GitHub's code scanning has them."""

from __future__ import annotations

from collections import Counter

_BLOCK = 100  # characters that are hashed, from the start of the line on
_BASE = 37
_SPACE, _TAB, _LF, _CR = (ord(character) for character in " \t\n\r")
_END = 0xFFFF  # stands once behind the last character
_ROWS = 4096  # lines at a time, 3 MB


def line_hashes(text: str) -> list[str]:
    r"""The hash of every line of `text`, `1f3a…:1`; one more line than line ends.

    Lines end at `\n`, `\r\n` and `\r`. The hash of a line is that of the 100 UTF-16 units from its start
    on, over line ends and without spaces and tabs, as a polynomial of base 37 modulo 2**64. Behind the
    colon stands how many lines up to this one have this hash. Two programs agree if they read the same
    text: UTF-8 with U+FFFD for what is none, and a byte order mark counts as a character.

    Source: `primaryLocationLineHash` of github/codeql-action, src/fingerprints.ts.
    """
    import numpy as np

    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.dtype("<u2"))
    dropped = (units == _SPACE) | (units == _TAB)
    dropped[1:] |= (units[1:] == _LF) & (units[:-1] == _CR)
    kept = units[~dropped]
    count = len(kept)
    stream = np.zeros(count + 1 + _BLOCK, np.uint16)
    stream[:count] = np.where(kept == _CR, _LF, kept)
    stream[count] = _END
    starts = np.concatenate(([0], np.flatnonzero(stream[:count] == _LF) + 1))
    weights = np.array([pow(_BASE, _BLOCK - 1 - i, 1 << 64) for i in range(_BLOCK)], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(stream, _BLOCK)
    seen: Counter[int] = Counter()
    hashes = []
    for row in range(0, len(starts), _ROWS):
        block = windows[starts[row : row + _ROWS]].astype(np.uint64)
        for value in (block * weights).sum(axis=1, dtype=np.uint64).tolist():
            seen[value] += 1
            hashes.append(f"{value:x}:{seen[value]}")
    return hashes
