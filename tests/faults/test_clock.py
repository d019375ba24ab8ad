"""The clock is set a year back or forward: nothing is lost, nothing stays for ever, no time is negative."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from m3cli import memo
from m3cli.engine import process
from m3cli.engine.snapshots import SnapshotStore
from m3cli.memo import Memo
from tests.faults.drills import FINE, check, run_here
from tests.serve.servers import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.drills import Done

YEAR = 365 * 86_400
JUMPS = pytest.mark.parametrize("jump", [-YEAR, YEAR], ids=["back", "forward"])
# A clock that is set again whenever somebody looks at it.
WILD = """
import itertools, time
def wild(clock=time.time, jumps=itertools.cycle((0, {year}, -{year}, 3, -3))):
    return clock() + next(jumps)
time.time = wild
"""


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, (int, float)):
        yield value


@JUMPS
def test_what_was_kept_by_another_clock(
    m3: Callable[..., Done], warmed: dict[str, str], ask: tuple[str, ...], cold: str, jump: int
) -> None:
    """It serves as if it had been kept today, is shown without a time in the future, and can be evicted."""
    cache = Path(warmed["M3_CACHE_DIR"])
    with sqlite3.connect(cache / "memo.sqlite") as database:
        database.execute("UPDATE memo SET used = used + ?", (jump // 86_400,))
    database.close()
    for path in [*cache.rglob("*"), cache]:
        os.utime(path, (time.time() + jump,) * 2)
    assert " ago" in check(m3("cache", "list"), 0).stdout
    answer = json.loads(check(m3(*ask, "--json"), *FINE).stdout)
    assert answer["answer"] == cold.strip()
    assert answer["usage"]["restored_tokens"] > 0
    assert min(numbers(answer)) >= 0
    pruned = check(m3("cache", "prune", "--max-size", "1K"), 0)
    assert "removed 1 saved context" in pruned.stderr


def test_a_clock_that_jumps_all_the_time(
    environ: dict[str, str], ask: tuple[str, ...], cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In m3 and in the model process: the answer is the same, cold and restored, and no time is negative."""
    code = WILD.format(year=YEAR)
    bootstrap = process._BOOTSTRAP.replace("\nmain()", f"\n{code}main()")
    monkeypatch.setattr(process, "_BOOTSTRAP", bootstrap)
    jumps, clock = cycle((0, YEAR, -YEAR, 3, -3)), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    restored = []
    for _ in range(2):
        answer = json.loads(check(run_here(*ask, "--json", environ=environ), *FINE).stdout)
        assert answer["answer"] == cold.strip()
        assert min(numbers(answer)) >= 0
        restored.append(answer["usage"]["restored_tokens"])
    assert restored[0] == 0 < restored[1]


def test_a_server_that_started_by_another_clock(
    environ: dict[str, str], ask: tuple[str, ...], cold: str, tiny: str
) -> None:
    """It is found as long as it lives, and forgotten when it has died."""
    with serving("-m", tiny, environ=environ) as server:
        announced = json.loads(server.file.read_text())
        for jump in (-YEAR, YEAR):
            server.file.write_text(json.dumps({**announced, "started": announced["started"] + jump}))
            found = check(run_here(*ask, environ=environ), *FINE)
            assert f"the m3 server at {server.root} answers" in found.stderr
            assert found.stdout == cold
        server.process.kill()
        server.process.wait()
        assert check(run_here(*ask, environ=environ), *FINE).stdout == cold
        assert not server.file.exists()


@JUMPS
def test_contexts_are_evicted_whatever_time_they_bear(
    tmp_path: Path, jump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit holds, and a new context has its place, although all others seem older or younger."""
    store = SnapshotStore(tmp_path, "key", max_bytes=10_000)

    def save(number: int) -> None:
        def write(path: Path) -> int:
            return path.write_bytes(bytes(1000))

        entry = store.save(
            [number, *range(100)], 1000, write, label=f"{number}", model="m", tokens_per_second=1.0
        )
        assert entry is not None
        os.utime(entry.directory / "manifest.json", (time.time(),) * 2)  # the file system's clock jumps too

    clock = time.time
    for number in range(20):
        if number == 10:
            monkeypatch.setattr(time, "time", lambda: clock() + jump)
        save(number)
        entries = store.entries()
        assert sum(entry.nbytes for entry in entries) <= 10_000
        assert f"{number}" in [entry.manifest.label for entry in entries]


@JUMPS
def test_the_memo_forgets_whatever_time_its_rows_bear(
    tmp_path: Path, jump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put last is what stays, and the file does not grow much beyond its limit."""
    monkeypatch.setattr(memo, "_LARGEST", 200_000)
    clock = time.time
    for number in range(40):
        if number == 20:
            monkeypatch.setattr(time, "time", lambda: clock() + jump)
        with Memo.of(tmp_path) as kept:
            kept.put((f"{number} {each}".encode(), bytes(1000)) for each in range(20))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600_000
    with Memo.of(tmp_path) as kept:
        before, after = (
            len(kept.get(f"{number} {each}".encode() for number in numbers for each in range(20)))
            for numbers in (range(20), range(20, 40))
        )
    assert after > before
