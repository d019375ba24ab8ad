"""What fault drills begin with: files to read, a model, and what an undisturbed command makes of them."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.faults.drills import FINE, check, run
from tests.faults.tiny_llama import write_tiny_llama
from tests.serve.servers import environ_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.drills import Done

TEXT = "".join(f"line {number} of a text\n" for number in range(30))  # enough for a snapshot


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie that all drills share, and none changes."""
    directory = tmp_path_factory.mktemp("faults")
    (directory / "corpus").mkdir()
    (directory / "corpus" / "text.txt").write_text(TEXT)
    return directory


@pytest.fixture(scope="session")
def tiny(place: Path) -> str:
    """Path of a model that computes at once."""
    return str(write_tiny_llama(place / "tiny.gguf"))


@pytest.fixture(scope="session")
def ask(place: Path, tiny: str) -> tuple[str, ...]:
    """Arguments of a question, whose answer depends on every token of the prompt."""
    chosen = ("--model", tiny, "--temperature", "1", "--seed", "7", "--max-tokens", "8")
    return ("ask", str(place / "corpus"), "What is it?", *chosen)


@pytest.fixture(scope="session")
def cold(place: Path, ask: tuple[str, ...]) -> str:
    """The answer to it when nothing was kept."""
    environ = environ_of(place / "cold")
    answer = check(run(*ask, "--no-cache", environ=environ, cwd=place), *FINE).stdout
    assert len(answer) > 8
    return answer


@pytest.fixture(scope="session")
def warm_cache(place: Path, ask: tuple[str, ...], cold: str) -> Path:
    """A cache directory with what the question leaves there; to be copied."""
    environ = environ_of(place / "warm")
    assert check(run(*ask, environ=environ, cwd=place), *FINE).stdout == cold
    return place / "warm" / "cache"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment with a cache of its own, empty at first."""
    return environ_of(tmp_path / "home")


@pytest.fixture
def warmed(environ: dict[str, str], warm_cache: Path) -> dict[str, str]:
    """The same, with what the question has left in an earlier run."""
    shutil.copytree(warm_cache, environ["M3_CACHE_DIR"])
    return environ


@pytest.fixture
def m3(environ: dict[str, str], tmp_path: Path) -> Callable[..., Done]:
    """`m3(*arguments, stdin=…, limits=…)`: a command in this environment."""
    return partial(run, environ=environ, cwd=tmp_path)
