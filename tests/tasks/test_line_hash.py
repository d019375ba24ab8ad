"""Line hashes, against those that GitHub's action for code scanning publishes in its tests."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.tasks.line_hash import line_hashes

ENDS = [
    "e9496ae3ebfced30:1",
    "fb7c023a8b9ccb3f:1",
    "ce8ba1a563dcdaca:1",
    "e20e36e16fcb0cc8:1",
    "b3edc88f2938467e:1",
    "c8e28b0b4002a3a0:1",
    "c129715d7a2bc9a3:1",
]


@pytest.mark.parametrize(
    ("text", "hashes"),
    [
        ("", ["c129715d7a2bc9a3:1"]),
        (
            " a\nb\n  \t\tc\n d",
            ["271789c17abda88f:1", "54703d4cd895b18:1", "180aee12dab6264:1", "a23a3dc5e078b07b:1"],
        ),
        (
            " hello; \t\nworld!!!\n\n\n  \t\tGreetings\n End",
            [
                "8b7cf3e952e7aeb2:1",
                "b1ae1287ec4718d9:1",
                "bff680108adb0fcc:1",
                "c6805c5e1288b612:1",
                "b86d3392aea1be30:1",
                "e6ceba753e1a442:1",
            ],
        ),
        (" hello; \t\nworld!!!\n\n\n  \t\tGreetings\n End\n", ENDS),
        (" hello; \t\nworld!!!\r\r\r  \t\tGreetings\r End\r", ENDS),
        (" hello; \t\r\nworld!!!\r\n\r\n\r\n  \t\tGreetings\r\n End\r\n", ENDS),
        (" hello; \t\nworld!!!\r\n\n\r  \t\tGreetings\r End\r\n", ENDS),
        (
            "Lorem ipsum dolor sit amet.\n" * 10,
            [
                *(f"a7f2ff13bc495cf2:{count}" for count in range(1, 7)),
                "a7f2ff1481e87703:1",
                "a9cf91f7bbf1862b:1",
                "55ec222b86bcae53:1",
                "cc97dc7b1d7d8f7b:1",
                "c129715d7a2bc9a3:1",
            ],
        ),
    ],
)
def test_hashes_are_those_of_the_action(text: str, hashes: list[str]) -> None:
    """The vectors of github/codeql-action, src/fingerprints.test.ts."""
    assert line_hashes(text) == hashes


def slow_hashes(text: str) -> list[str]:
    """The same by definition, one line and one unit after the other."""
    data = text.encode("utf-16-be", "surrogatepass")
    units = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    stream: list[int] = []
    starts = [0]
    for i, unit in enumerate(units):
        if unit in (0x20, 0x09) or (unit == 0x0A and i > 0 and units[i - 1] == 0x0D):
            continue
        stream.append(0x0A if unit == 0x0D else unit)
        if stream[-1] == 0x0A:
            starts.append(len(stream))
    stream += [0xFFFF] + [0] * 100
    counts: dict[int, int] = {}
    hashes = []
    for start in starts:
        value = 0
        for unit in stream[start : start + 100]:
            value = (value * 37 + unit) % 2**64
        counts[value] = counts.get(value, 0) + 1
        hashes.append(f"{value:x}:{counts[value]}")
    return hashes


@given(st.text(st.sampled_from("ab \t\r\n") | st.characters(codec=None), max_size=400))
def test_hashes_are_those_of_the_definition(text: str) -> None:
    """Any text, with characters beyond 16 bits and halves of them, and one hash a line."""
    hashes = line_hashes(text)
    assert hashes == slow_hashes(text)
    assert len(hashes) == len(re.split("\r\n|\r|\n", text))
    assert len(set(hashes)) == len(hashes)


def test_many_lines_are_hashed_in_blocks() -> None:
    """More lines than are hashed at a time, the same ones among them."""
    text = "".join(f"line {i % 5000}\n" for i in range(10_000))
    assert line_hashes(text) == slow_hashes(text)


def test_lines_added_above_change_no_hash() -> None:
    """Which is what the hashes are for."""
    text = "".join(f"value_{i} = {i}\n" for i in range(50))
    assert line_hashes("import os\n\n" + text)[2:] == line_hashes(text)
