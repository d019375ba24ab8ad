"""Less memory than was planned with: one step down, told, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from m3cli.engine.events import CacheConfig, EngineConfig, Finished, Notice, Request
from m3cli.engine.local import LocalEngine
from m3cli.engine.process import worker_command
from m3cli.errors import OutOfMemoryError
from m3cli.tasks.configure import RunOptions, stepped_down
from m3cli.tasks.stepping import SteppingEngine

REQUEST = Request([1, 2, 3, 4], 2)


def peak(config: EngineConfig, state_dir: Path) -> int:
    """Address space, in KiB, that the worker of `config` takes."""
    with LocalEngine(config, state_dir=state_dir) as engine:
        list(engine.generate(REQUEST))
        assert engine._worker is not None
        status = Path(f"/proc/{engine._worker.pid}/status").read_text("ascii")
    facts = dict(line.split(":", 1) for line in status.splitlines())
    return int(facts["VmPeak"].split()[0])


def limited(config: EngineConfig, kibibytes: int, state_dir: Path) -> SteppingEngine:
    """An engine whose workers may take so much, which nobody told the planner."""
    command = ["bash", "-c", f'ulimit -v {kibibytes}; exec "$@"', "limited", *worker_command()]

    def open_engine(config: EngineConfig, cache: CacheConfig | None) -> LocalEngine:
        return LocalEngine(config, state_dir=state_dir, cache=cache, worker_command=command)

    return SteppingEngine(open_engine, config, None, stepped_down(config, RunOptions()))


def test_memory_that_is_not_there(smollm2: str, tmp_path: Path) -> None:
    """A real allocation that fails, in a real worker, is followed by one that does not."""
    config = EngineConfig(smollm2, n_ctx=8192, threads=1)
    smaller = stepped_down(config, RunOptions())
    assert smaller is not None
    enough, too_little = peak(config, tmp_path), peak(smaller, tmp_path)
    assert enough - too_little > 50_000
    with limited(config, (enough + too_little) // 2, tmp_path) as engine:
        events = list(engine.generate(REQUEST))
        assert engine.config == smaller
        again = list(engine.generate(REQUEST))
    told = [event.text for event in events if isinstance(event, Notice)]
    assert len(told) == 1
    assert "KV cache of q8_0" in told[0]
    assert isinstance(events[-1], Finished)
    assert not [event for event in again if isinstance(event, Notice)]


def test_not_even_the_smaller_one_fits(smollm2: str, tmp_path: Path) -> None:
    """The second failure is the last: an error with what was asked for, and not a crash."""
    config = EngineConfig(smollm2, n_ctx=8192, threads=1)
    smaller = replace(config, kv_type_k="q8_0", kv_type_v="q8_0", n_ubatch=128)
    with (
        limited(config, peak(smaller, tmp_path) - 100_000, tmp_path) as engine,
        pytest.raises(OutOfMemoryError, match=r"8,192 tokens \(K q8_0"),
    ):
        list(engine.generate(REQUEST))


def test_the_choice_of_the_user_stays() -> None:
    """What was asked for is not made smaller; when all of it was, there is no step."""
    config = EngineConfig("x", 4096)
    assert stepped_down(config, RunOptions(type_k="f16", type_v="f16", n_ubatch=512)) is None
    kept = stepped_down(config, RunOptions(type_k="f16", type_v="f16"))
    assert kept == replace(config, n_ubatch=128)
    values = stepped_down(config, RunOptions(type_v="f16", n_ubatch=512))
    assert values == replace(config, kv_type_k="q8_0")
