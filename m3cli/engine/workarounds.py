"""What m3 learned about llama.cpp on this machine, so that it does not crash twice.

Some virtual machines offer AMX and fault on its first instruction. llama.cpp then dies in the
first computation; without its extra weight buffers it works. Which of the two it is can only be
tried, and the outcome is kept in a file, by CPU model and llama.cpp build.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

_FILE = "llama-workarounds.json"


def extra_buffers_crash(state_dir: Path) -> bool:
    """Whether this CPU and this build are known to crash with extra buffers.

    A file that is missing, unreadable or corrupt means no.
    """
    return _read(state_dir).get(_key()) == "no extra buffers"


def remember_extra_buffers_crash(state_dir: Path) -> None:
    """Note that extra buffers crash here. What cannot be written is forgotten: it only costs time."""
    notes = {**_read(state_dir), _key(): "no extra buffers"}
    with suppress(OSError):
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_FILE, dir=state_dir)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(notes, file, indent=1, sort_keys=True)
            Path(name).replace(state_dir / _FILE)
        except OSError:
            Path(name).unlink()
            raise


def _read(state_dir: Path) -> dict[str, str]:
    try:
        notes = json.loads((state_dir / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _key() -> str:
    return f"{_cpu_model()} / llama-cpp-python {_build()}"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _build() -> str:
    """Version and a digest of the libraries' sizes: a rebuild with other flags is another build."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    spec = importlib.util.find_spec("llama_cpp")  # locates the package without importing it
    if spec is None or spec.origin is None:
        return version
    libraries = sorted((Path(spec.origin).parent / "lib").glob("*"))
    sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in libraries)
    return f"{version} {hashlib.sha256(sizes.encode()).hexdigest()[:12]}"
