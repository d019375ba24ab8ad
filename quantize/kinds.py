"""Types that tensors are quantized to: their size, and what llama.cpp's quantizer asks of them.

Names are those of TENSOR_TYPES; a mixture of types for a whole file, such as Q4_K_M, is one of FILE_TYPES.
Rules are those of llama-quant.cpp and ggml.c.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from m3cli.errors import UsageError
from m3cli.model.ggml_types import FILE_TYPES, TENSOR_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

# What ggml_quantize_chunk writes and both the CPU and the CUDA backend multiply with by kernels of their own
# (ggml-cpu.c, mmvq.cu), by rising bits per weight. Left out: TQ1_0 and TQ2_0, which CUDA does not compute;
# Q1_0, like them for weights that were trained to have two or three values; NVFP4, whose embeddings CUDA does
# not look up. IQ1_M is the only one of these without CUDA's kernels for large batches (mmq.cu): CUDA
# dequantizes it first.
WRITTEN = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "Q3_K",
    "IQ3_S",
    "IQ4_XS",
    "MXFP4",
    "Q4_0",
    "Q4_K",
    "IQ4_NL",
    "Q4_1",
    "Q5_0",
    "Q5_K",
    "Q5_1",
    "Q6_K",
    "Q8_0",
    "F16",
    "BF16",
    "F32",
)

_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}
_FILE_TYPES = {name: number for number, name in FILE_TYPES.items()}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize takes them

# Type → the type of smaller blocks in its place.
_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

_NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_ABORT_WITHOUT = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # ggml_quantize_requires_imatrix
_RARELY_COVERED = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


def number(kind: str) -> int:
    """Return the `ggml_type` of a tensor type. Raises UsageError for a name that there is not."""
    if kind not in _NUMBERS:
        raise UsageError(f"There is no tensor type {kind}.", closest(kind, WRITTEN))
    return _NUMBERS[kind]


def bits(kind: str) -> float:
    """Bits per weight, with the scales of the blocks. Raises UsageError for a name that there is not."""
    layout = TENSOR_TYPES[number(kind)]
    return 8 * layout.nbytes / layout.block


def row_bytes(kind: str, n_cols: int) -> int:
    """Bytes of a row of `n_cols` weights, a multiple of the block. Raises UsageError for an unknown name."""
    layout = TENSOR_TYPES[number(kind)]
    return n_cols // layout.block * layout.nbytes


def fallback(kind: str, n_cols: int) -> str:
    """Return `kind`, or what llama.cpp takes in its place where blocks of it do not divide rows of `n_cols`.

    That is a type of smaller blocks and no fewer bits, and F16 where these do not divide the rows either
    (`tensor_type_fallback`). Raises UsageError for a name that there is not.
    """
    for each in (kind, _FALLBACKS.get(kind, kind)):
        if n_cols % TENSOR_TYPES[number(each)].block == 0:
            return each
    return "F16"


def needs_importance(kind: str, tensor: str, file_type: int | None = None) -> bool:
    """Whether the tensor of that name should not be quantized to `kind` without an importance matrix.

    As `tensor_requires_imatrix`, but that embeddings and output need one for the types that ggml aborts at
    without: llama.cpp's mixtures never give them these types, a recipe may. Importance matrices rarely
    cover the two: llama-imatrix leaves out the output unless told otherwise, and embeddings are looked up,
    not multiplied with. `file_type` is the number of the mixture that is made, if it is one.
    """
    if tensor in _RARELY_COVERED:
        return kind in _ABORT_WITHOUT
    if kind == "Q2_K":
        return file_type == _FILE_TYPES["Q2_K_S"]
    return kind in _NEED_IMPORTANCE


def file_type(name: str) -> int:
    """Return the number of a mixture (`llama_ftype`), such as 15 for "Q4_K_M"; case does not matter.

    Q3_K, Q4_K and Q5_K stand for their _M. Raises UsageError naming what there is.
    """
    upper = name.upper()
    upper = _ALIASES.get(upper, upper)
    if upper not in _FILE_TYPES:
        raise UsageError(f"There is no file type {name}.", closest(name, tuple(_FILE_TYPES)))
    return _FILE_TYPES[upper]


def closest(name: str, known: Sequence[str]) -> str:
    """A hint: the names most like `name`, and all of them."""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name[:100].lower(), spelled, 1)
    return f"{f'Did you mean {spelled[near[0]]}? ' if near else ''}There are {', '.join(known)}."
