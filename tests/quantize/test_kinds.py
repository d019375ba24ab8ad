"""Types of tensors: sizes and rules, compared with the llama.cpp that is installed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.model.ggml_types import FILE_TYPES, TENSOR_TYPES
from m3cli.model.header import read_header
from quantize import kinds

# Mixtures whose default is one type: `llama_ftype_get_default_type`.
DEFAULTS = {
    **{name: name for name in FILE_TYPES.values() if name in kinds.WRITTEN},
    **{f"{kind}_S": kind for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K")},
    **{f"{kind}_M": kind for kind in ("Q3_K", "Q4_K", "Q5_K")},
    "Q3_K_L": "Q3_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
}


def test_what_is_written_is_sorted_and_known() -> None:
    """Types stand by rising bits per weight, each once."""
    assert list(map(kinds.bits, kinds.WRITTEN)) == sorted(map(kinds.bits, kinds.WRITTEN))
    assert len(set(kinds.WRITTEN)) == len(kinds.WRITTEN)
    assert (kinds.bits("Q4_K"), kinds.bits("IQ1_S"), kinds.bits("F32")) == (4.5, 1.5625, 32)


@pytest.mark.parametrize("kind", kinds.WRITTEN)
def test_llama_cpp_writes_it_in_as_many_bytes(kind: str) -> None:
    """The installed build's quantizer takes each type; rows are of the computed size and hold the values."""
    from m3cli.engine.ggml_rows import dequantize
    from m3cli.engine.llama_quantize import encode

    values = np.random.default_rng(1).standard_normal((2, 512), np.float32)
    out = np.empty(2 * kinds.row_bytes(kind, 512), np.uint8)
    encode(kind, values, 512, np.ones(512, np.float32), out)  # raises where sizes differ
    again = dequantize(kind, out.data, values.size).reshape(values.shape)
    assert np.square(again - values).sum() / np.square(values).sum() < 2 ** -(kinds.bits(kind) - 0.5)


@pytest.mark.parametrize("kind", kinds.WRITTEN)
def test_types_that_ggml_aborts_at(kind: str) -> None:
    """Embeddings and output need an importance matrix exactly where ggml asserts that there is one."""
    from m3cli.engine.llama_library import libggml

    requires = libggml.ggml_quantize_requires_imatrix
    requires.restype, requires.argtypes = ctypes.c_bool, [ctypes.c_int]
    for tensor in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        assert kinds.needs_importance(kind, tensor) == requires(kinds.number(kind))


def test_types_that_need_importance() -> None:
    """Other tensors need it for what has fewer than 2.6 bits, IQ3_XXS, and Q2_K in one mixture only."""
    needy = [kind for kind in kinds.WRITTEN if kinds.needs_importance(kind, "blk.0.attn_q.weight")]
    assert needy == ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"]
    assert kinds.needs_importance("Q2_K", "blk.0.attn_q.weight", kinds.file_type("Q2_K_S"))
    assert not kinds.needs_importance("Q2_K", "blk.0.attn_q.weight", kinds.file_type("Q2_K"))
    assert not kinds.needs_importance("Q2_K", "output.weight", kinds.file_type("Q2_K_S"))


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"F16", "BF16", "F32"}))  # not quantized to
def test_fallbacks_are_those_of_llama_cpp(name: str, smollm2: str) -> None:
    """For each mixture, a model with rows of 576 weights gets the types that llama.cpp's quantizer names."""
    from m3cli.engine.llama_quantize import quantized_types

    header = read_header(Path(smollm2))
    message = {
        "path": smollm2,
        "file_type": kinds.file_type(name),
        "importance": True,
        "pure": True,
    }
    chosen, _ = quantized_types(message, b"")
    columns = {tensor.name: tensor.dims[0] for tensor in header.tensors}
    quantized = {tensor: kind for tensor, kind in chosen.items() if kind}
    assert 576 in {columns[tensor] for tensor in quantized}
    assert quantized == {tensor: kinds.fallback(DEFAULTS[name], columns[tensor]) for tensor in quantized}


@pytest.mark.parametrize(
    ("kind", "n_cols", "expected"),
    [
        ("Q4_K", 256, "Q4_K"),
        ("Q4_K", 96, "Q5_0"),
        ("Q4_K", 80, "F16"),
        ("Q8_0", 80, "F16"),
        ("IQ1_S", 33, "F16"),
        ("BF16", 33, "BF16"),
        ("F32", 1, "F32"),
    ],
)
def test_the_last_resort_is_f16(kind: str, n_cols: int, expected: str) -> None:
    """Rows that no block divides are F16; types without blocks always fit."""
    assert kinds.fallback(kind, n_cols) == expected


def test_numbers_and_names() -> None:
    """Names give the numbers of ggml and llama.cpp; for an unknown one, the error says what there is."""
    assert {kinds.number(kind.name): kind for kind in TENSOR_TYPES.values()} == TENSOR_TYPES
    assert {kinds.file_type(name): name for name in FILE_TYPES.values()} == FILE_TYPES
    assert kinds.file_type("q4_k_m") == kinds.file_type("Q4_K") == 15
    with pytest.raises(
        UsageError, match=r"no file type Q4_K_X\. Did you mean Q4_K_[SM]\?.*There are F32, F16"
    ):
        kinds.file_type("Q4_K_X")
    with pytest.raises(UsageError, match=r"no tensor type Q4_K_M\. Did you mean Q4_K\?"):
        kinds.number("Q4_K_M")
