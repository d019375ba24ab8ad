"""Running the real command in its own process, as a person does."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

# The installed command, not `python -m`, which would put the current directory on the module path.
M3 = str(Path(sysconfig.get_path("scripts")) / "m3")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment without the developer's settings, with a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("M3_", "GIT_", "HF_"))}
    home = tmp_path / "home"
    home.mkdir()
    return {
        **kept,
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "M3_CONFIG": str(home / "config.toml"),
        "M3_CACHE_DIR": str(home / "cache"),
        "PYTHONWARNINGS": "error",
    }


@pytest.fixture
def m3(environ: dict[str, str], tmp_path: Path) -> Run:
    """`m3(*arguments, stdin=…, cwd=…, **environment)`: run to its end, output captured as text."""

    def run(
        *arguments: str, stdin: str | bytes = b"", cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [M3, *arguments],
            input=data,
            capture_output=True,
            cwd=cwd or tmp_path,
            env={**environ, **more},
            timeout=240,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        )

    return run
