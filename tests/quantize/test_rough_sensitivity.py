"""Sensitivities of a model that is quantized already."""

from __future__ import annotations

from array import array

from m3cli.engine.events import EngineConfig
from m3cli.engine.process import WorkerClient
from quantize.sensitivity import measure_sensitivities

WINDOW = array("i", [(7 * i * i + 3 * i) % 900 for i in range(96)])


def test_a_quantized_model_takes_two_passes(smollm2: str) -> None:
    """What rounding alone does is taken off, and is far more than what a small error does."""
    name = "blk.3.attn_q.weight"
    config = EngineConfig(smollm2, len(WINDOW), len(WINDOW), len(WINDOW))
    with WorkerClient("measuring") as worker:
        (plain,) = measure_sensitivities(worker, config, WINDOW, [name])
        (rough,) = measure_sensitivities(worker, config, WINDOW, [name], quantized=True)
    assert plain.value is not None
    assert rough.value is not None
    assert 0 <= rough.value < plain.value / 3
