"""How fast this machine is: measured once in a second, and then by every run; kept in the cache directory."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from m3cli.memo import Memo
from m3cli.plan.planner import Measured

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.plan.machine import Machine

_KEY = b"rates"  # in the memo
_COPY_BYTES = 64 << 20
_DISK_BYTES = 128 << 20
_MATRIX = 1024


def with_measured_rates(machine: Machine, cache_dir: Path, model: Path) -> Machine:
    """`machine` with the rates of its RAM, its cores and the disk of `model`, measured if need be."""
    known = _read(cache_dir)
    rates = known.setdefault("machine", {})
    before = dict(rates)
    device = f"disk {model.stat().st_dev}"
    if "ram_bandwidth" not in rates or rates.get("cores") != machine.cores:
        rates.update(ram_bandwidth=_copy_rate(), compute=_compute_rate(), cores=machine.cores)
    if device not in rates:
        rates[device] = _disk_rate(model)
    if rates != before:
        _write(cache_dir, known)
    return replace(
        machine,
        ram_bandwidth=rates["ram_bandwidth"],
        compute=rates["compute"],
        disk_read=rates[device],
        estimated=(),
    )


def offloads(cache_dir: Path) -> bool:
    """Whether the installed llama.cpp can use a GPU; asked once for each version of it."""
    from importlib.metadata import version

    from m3cli.engine.local import system_facts

    known = _read(cache_dir)
    builds = known.setdefault("gpu_offload", {})
    name = f"{version('llama-cpp-python')} {sys.prefix}"
    if not isinstance(builds.get(name), bool):
        builds[name] = bool(system_facts()["gpu_offload"])
        _write(cache_dir, known)
    return bool(builds[name])


def known_speed(cache_dir: Path, digest: str) -> Measured | None:
    """What the last run of the model with this digest took."""
    try:
        return Measured(**_read(cache_dir).get("models", {})[digest])
    except (KeyError, TypeError):
        return None


def remember_speed(cache_dir: Path, digest: str, speed: Measured) -> None:
    """Keep what a run took, for the next plan; a cache that cannot be written is done without."""
    known = _read(cache_dir)
    known.setdefault("models", {})[digest] = asdict(speed)
    _write(cache_dir, known)


def _read(cache_dir: Path) -> dict[str, Any]:
    with Memo.of(cache_dir) as memo:
        value = memo.get([_KEY]).get(_KEY, b"{}")
    try:
        known = json.loads(value)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache_dir: Path, known: object) -> None:
    with Memo.of(cache_dir) as memo:
        memo.put([(_KEY, json.dumps(known).encode())])


def _copy_rate() -> float:
    """Bytes a second that are read from RAM while all cores copy."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    cores = os.cpu_count() or 1
    arrays = [np.ones(_COPY_BYTES // 8) for _ in range(cores)]
    targets = [np.empty_like(array) for array in arrays]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(np.copyto, targets, arrays))
        start = time.perf_counter()
        list(pool.map(np.copyto, targets, arrays))
        return 2 * cores * _COPY_BYTES / (time.perf_counter() - start)


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
