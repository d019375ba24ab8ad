from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantize.convert import convert
from quantize.events import Converted, ConvertRequest
from scripts.make_tiny_m3 import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny checkpoint in the published form, in bfloat16."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-m3"
    make(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gguf(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, converted to f32, which changes no weight."""
    return run_convert(ConvertRequest(tiny_m3, tmp_path_factory.mktemp("gguf") / "tiny-m3.gguf", "f32"))[0]


def run_convert(request: ConvertRequest) -> tuple[Path, ...]:
    *_, last = convert(request)
    assert isinstance(last, Converted)
    return last.files


@pytest.fixture(scope="session")
def converted() -> Callable[[ConvertRequest], tuple[Path, ...]]:
    """Convert, and return the files that were made."""
    return run_convert
