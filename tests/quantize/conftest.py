from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantize.convert import convert
from quantize.events import Converted, ConvertRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def converted() -> Callable[[ConvertRequest], tuple[Path, ...]]:
    """Convert, and return the files that were made."""

    def run(request: ConvertRequest) -> tuple[Path, ...]:
        *_, last = convert(request)
        assert isinstance(last, Converted)
        return last.files

    return run
