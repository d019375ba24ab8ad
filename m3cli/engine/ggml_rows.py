"""Weights in one of ggml's types → the float32 values that llama.cpp computes with.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from m3cli.engine.llama_library import libggml
from m3cli.errors import ModelError
from m3cli.model.ggml_types import TENSOR_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_TYPES = {each.name: (number, each) for number, each in TENSOR_TYPES.items()}


class _Traits(ctypes.Structure):
    """`ggml_type_traits` of ggml.h, up to the field that is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


_traits = libggml.ggml_get_type_traits
_traits.restype, _traits.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]


def has_values(kind: str) -> bool:
    """Whether llama.cpp turns weights of type `kind` into floats; not integers, nor types of activations."""
    return kind == "F32" or (kind in _TYPES and bool(_traits(_TYPES[kind][0]).contents.to_float))


def dequantize(kind: str, data: bytes | memoryview, n_elements: int) -> NDArray[np.float32]:
    """Values of `n_elements` weights of type `kind`, which `data` holds in whole blocks; float32, flat.

    For F32 this is a view of `data`. Other threads run meanwhile. Raises ModelError for a type whose
    weights have no float values, ValueError when `data` is not as long as it has to be.
    """
    if not has_values(kind):
        raise ModelError(
            f"This build of llama.cpp has no float values for weights of type {kind}.",
            "Choose a model whose weights are of another type.",
        )
    number, layout = _TYPES[kind]
    packed = np.frombuffer(data, np.uint8)
    if n_elements % layout.block or packed.nbytes != n_elements // layout.block * layout.nbytes:
        raise ValueError(f"{packed.nbytes} bytes are not {n_elements} weights of type {kind}")
    if kind == "F32":
        return packed.view(np.float32)
    values = np.empty(n_elements, np.float32)
    _traits(number).contents.to_float(packed.ctypes.data, values.ctypes.data, n_elements)
    return values
