from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.model.header import read_header
from m3cli.model.preflight import problem
from m3cli.model.shape import ModelShape
from m3cli.model.tokenizer import load_tokenizer
from scripts.make_shape_gguf import write_shape

if TYPE_CHECKING:
    from pathlib import Path

GB = 10**9

# Published sizes in GB; all but BF16 as people report them.
MINIMAX_M3 = {
    "IQ1_S": 90.5,
    "IQ1_M": 100.7,
    "IQ2_XXS": 116.6,
    "Q2_K_L": 153.1,
    "IQ3_XXS": 180.0,
    "IQ4_XS": 229.7,
    "Q4_K_M": 261.0,
    "Q5_K_S": 295.0,
    "Q8_0": 454.0,
    "BF16": 852.9,
}


@pytest.mark.parametrize(("quant", "published"), MINIMAX_M3.items())
def test_a_quant_of_minimax_m3_has_its_published_size_and_takes_no_room(
    quant: str, published: float, tmp_path: Path
) -> None:
    """The size is within 2 % of the published one, and the file is a hole."""
    path = tmp_path / "m3.gguf"
    size = write_shape("minimax-m3", quant, path, vocabulary=False)
    assert size == path.stat().st_size == pytest.approx(published * GB, rel=0.02)
    assert path.stat().st_blocks * 512 < 1_000_000
    shape = ModelShape.from_header(read_header(path))
    assert shape.parameters == pytest.approx(426e9, rel=0.005)
    assert shape.file_type == quant.removesuffix("_L")


@pytest.mark.parametrize(
    ("model", "published"), [("llama-3.1-70b", 42.5), ("qwen3-30b-a3b", 18.6), ("qwen3-235b-a22b", 142.2)]
)
def test_other_models_have_their_published_size(model: str, published: float, tmp_path: Path) -> None:
    """At Q4_K_M, which is llama.cpp's own choice of types."""
    size = write_shape(model, "Q4_K_M", tmp_path / "model.gguf", vocabulary=False)
    assert size == pytest.approx(published * GB, rel=0.005)
    with DryRun(str(tmp_path / "model.gguf")) as dry_run:
        need = dry_run.need(EngineConfig("", n_ctx=8192))
    assert sum(need.weights.values()) == pytest.approx(size, rel=0.001)


def test_a_file_with_a_vocabulary_is_a_whole_model(tmp_path: Path) -> None:
    """What m3 reads of a model before it runs is all there: shape, indexer, tokenizer, template."""
    path = tmp_path / "m3.gguf"
    write_shape("minimax-m3", "IQ1_S", path)
    assert path.stat().st_blocks * 512 < 10_000_000
    header = read_header(path)
    shape = ModelShape.from_header(header)
    assert (shape.vocab_size, shape.context_length, shape.sparse_layers) == (200_064, 1_048_576, 57)
    assert shape.indexer is not None
    assert shape.indexer.attended_tokens == 2048
    assert shape.has_chat_template
    assert problem(header, shape) is None
    tokenizer = load_tokenizer(header)
    assert tokenizer is not None
    assert len(tokenizer.encode("A whole model. ]~b]")) > 5
