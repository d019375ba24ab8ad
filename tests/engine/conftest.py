from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import m3cli
from m3cli.engine.events import EngineConfig
from m3cli.engine.local import LocalTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that a machine with the AMX trap falls into it once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def chat_prompt(smollm2: str) -> Callable[[str], list[int]]:
    """Make the token ids of one user turn, ready for the answer."""
    tokenizer = LocalTokenizer(smollm2)

    def prompt(question: str) -> list[int]:
        return [
            *tokenizer.encode_template("<|im_start|>user\n"),
            *tokenizer.encode(question),
            *tokenizer.encode_template("<|im_end|>\n<|im_start|>assistant\n"),
        ]

    return prompt


@pytest.fixture
def config(smollm2: str) -> EngineConfig:
    # One thread: llama.cpp's threads wait for each other by spinning, which is slow on a busy machine.
    return EngineConfig(smollm2, n_ctx=512, threads=1)


@pytest.fixture
def worker_script(tmp_path: Path) -> Callable[[str], list[str]]:
    """Make a command for a worker in which some Python runs before it serves."""

    def command(code: str) -> list[str]:
        script = tmp_path / "worker_script.py"
        root = str(Path(m3cli.__file__).parent.parent)
        script.write_text(
            f"import os, signal, sys\nsys.path.insert(0, {root!r})\n"
            f"{code}\nfrom m3cli.engine.worker import main\nmain()\n",
            encoding="utf-8",
        )
        return [sys.executable, str(script)]

    return command


def _alive_children(parent: int) -> set[int]:
    children = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
        except OSError:  # it ended while we looked
            continue
        if int(ppid) == parent and state != "Z":
            children.add(int(entry.name))
    return children


@pytest.fixture
def new_children() -> Callable[[], set[int]]:
    """List the living child processes that were started since the test began."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    before = _alive_children(os.getpid())
    return lambda: _alive_children(os.getpid()) - before
