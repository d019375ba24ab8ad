"""How fast this machine is: measured once in a second, and then by every run; kept in the cache directory."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from m3cli.engine.local import system_facts
from m3cli.memo import Memo
from m3cli.plan.machine import this_machine
from m3cli.plan.planner import Measured

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.plan.machine import Machine

_COPY_BYTES = 64 << 20
_DISK_BYTES = 128 << 20
_MATRIX = 1024


def machine_here(cache_dir: Path) -> Machine:
    """This machine with its GPUs, for which a worker looks where llama.cpp can use some."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = f"build {version('llama-cpp-python')} {sys.prefix} {cores}"
    build = _read(cache_dir, key)
    if not isinstance(build.get("cores"), int) or build.get("gpu_offload") is not False:
        facts = system_facts()
        _write(cache_dir, key, {name: facts[name] for name in ("gpu_offload", "cores")})
        return this_machine(facts["devices"], facts["cores"])
    return this_machine([], build["cores"])


def with_measured_rates(machine: Machine, cache_dir: Path, model: Path) -> Machine:
    """`machine` with the rates of its RAM, its cores and the disk of `model`, measured if need be.

    Where there is no memory to measure with, `machine` as it is.
    """
    rates = _read(cache_dir, f"machine {machine.cores}")
    if rates.keys() != {"ram_bandwidth", "compute"}:
        try:
            rates = {"ram_bandwidth": _copy_rate(machine), "compute": _compute_rate()}
        except (MemoryError, RuntimeError):  # the latter for a thread that cannot be started
            return machine
        _write(cache_dir, f"machine {machine.cores}", rates)
    key = f"disk {model.stat().st_dev}"
    disk = _read(cache_dir, key)
    if disk.keys() != {"read"}:
        disk = {"read": _disk_rate(model)}
        _write(cache_dir, key, disk)
    return replace(machine, **rates, disk_read=disk["read"], estimated=())


def known_speed(cache_dir: Path, digest: str) -> Measured | None:
    """What the last run of the model with this digest took."""
    try:
        return Measured(**_read(cache_dir, f"speed {digest}"))
    except TypeError:
        return None


def remember_speed(cache_dir: Path, digest: str, speed: Measured) -> None:
    """Keep what a run took, for the next plan; a cache that cannot be written is done without."""
    _write(cache_dir, f"speed {digest}", asdict(speed))


def _read(cache_dir: Path, name: str) -> dict[str, Any]:
    """A fact that was kept; empty if it was not."""
    key = f"rates {name}".encode()
    with Memo.of(cache_dir) as memo:
        value = memo.get([key]).get(key, b"{}")
    try:
        known = json.loads(value)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache_dir: Path, name: str, fact: object) -> None:
    with Memo.of(cache_dir) as memo:
        memo.put([(f"rates {name}".encode(), json.dumps(fact).encode())])


def _copy_rate(machine: Machine) -> float:
    """Bytes a second that are read from RAM while all cores copy, in a small share of it."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    cores = max(machine.cores, 1)
    size = min(_COPY_BYTES, machine.ram_available // (16 * cores))
    arrays = [np.ones(size // 8) for _ in range(cores)]
    targets = [np.empty_like(array) for array in arrays]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(np.copyto, targets, arrays))
        start = time.perf_counter()
        list(pool.map(np.copyto, targets, arrays))
        return 2 * cores * size / (time.perf_counter() - start)


def _compute_rate() -> float:
    """Operations a second of a product of matrices."""
    import numpy as np

    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    matrix @ matrix
    start = time.perf_counter()
    matrix @ matrix
    return float(2 * _MATRIX**3 / (time.perf_counter() - start))


def _disk_rate(file: Path) -> float:
    """Bytes a second that are read of `file` in one go, from the disk and not from the system's cache."""
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, _DISK_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        read = 0
        while read < _DISK_BYTES and (piece := stream.read(8 << 20)):
            read += len(piece)
        return max(read, 1) / (time.perf_counter() - start)
