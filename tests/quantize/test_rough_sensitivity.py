"""Sensitivities of a model that is quantized already."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest

from m3cli.engine.events import EngineConfig
from m3cli.engine.process import WorkerClient
from quantize.convert import convert
from quantize.events import ConvertRequest
from quantize.sensitivity import measure_sensitivities

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = array("i", [(7 * i * i + 3 * i) % 900 for i in range(96)])


def test_a_quantized_model_takes_two_passes(smollm2: str) -> None:
    """What rounding alone does is taken off, and is far more than what a small error does."""
    name = "blk.3.attn_q.weight"
    config = EngineConfig(smollm2, len(WINDOW), len(WINDOW), len(WINDOW))
    with WorkerClient("measuring") as worker:
        (plain,) = measure_sensitivities(worker, config, WINDOW, [name])
        (rough,) = measure_sensitivities(worker, config, WINDOW, [name], types=["Q4_1"])
    assert plain.value is not None
    assert rough.value is not None
    assert 0 <= rough.value < plain.value / 3


def test_bf16_says_what_f32_says(tiny_m3: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """The same weights have the same sensitivity, although llama.cpp rounds more beside BF16 ones."""
    bf16 = tmp_path / "bf16.gguf"
    for _ in convert(ConvertRequest(tiny_m3, bf16, "bf16")):
        pass
    found = []
    for path, kind in ((tiny_gguf, "F32"), (bf16, "BF16")):
        config = EngineConfig(str(path), len(WINDOW), len(WINDOW), len(WINDOW), threads=1)
        with WorkerClient("measuring") as worker:
            (each,) = measure_sensitivities(worker, config, WINDOW, ["output.weight"], types=[kind])
        found.append(each.value)
    assert found[1] == pytest.approx(found[0], rel=0.2)
