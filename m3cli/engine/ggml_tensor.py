"""Tensors of a graph that llama.cpp computes, as the callback between two of its nodes sees them.

The bindings leave `struct ggml_tensor` out, so its layout is written down here, and compared with what the
library itself builds before the first use. Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.llama_library import libggml, version
from m3cli.errors import MachineError
from m3cli.model.ggml_types import TENSOR_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_DIMS, _MAX_SRC, _MAX_OP_PARAMS, _MAX_NAME = 4, 10, 64, 64  # ggml.h

_NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I32": np.int32, "I64": np.int64}


class Tensor(ctypes.Structure):
    """`ggml_tensor` of ggml.h. `ne` are elements and `nb` strides in bytes, the fastest dimension first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * (_MAX_OP_PARAMS // 4)),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    def source(self, index: int) -> Tensor:
        """The tensor that is the operation's operand number `index`, which must exist."""
        return Tensor.from_address(self.src[index])

    @property
    def type_name(self) -> str:
        """Type of the elements, as in m3cli.model.ggml_types; empty for one that is not known there."""
        return TENSOR_TYPES[self.type].name if self.type in TENSOR_TYPES else ""

    @property
    def text(self) -> str:
        """The name as text."""
        return str(self.name.decode("utf-8", "replace"))


def weight_name(tensor: Tensor) -> str:
    """Name of weights without what a scheduler put round it in a copy: `CUDA0#blk.0.attn_k.weight#0`."""
    text = tensor.text
    return text.split("#")[1] if "#" in text else text


class _InitParams(ctypes.Structure):
    """`ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t

# ggml.h and ggml-backend.h: function → type of its result and of its arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_op_name": (ctypes.c_char_p, ctypes.c_int),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_init": (_POINTER, _InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_4d": (_POINTER, _POINTER, ctypes.c_int, _INT64, _INT64, _INT64, _INT64),
    "ggml_view_1d": (_POINTER, _POINTER, _POINTER, _INT64, _SIZE),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_mul_mat_id": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_set_name": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, _POINTER),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
}


@cache
def _ggml() -> Any:
    """The library, with the types of the functions above. Raises MachineError if `Tensor` is not its own."""
    try:
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(libggml, name)
            function.restype, function.argtypes = result, arguments
        agrees = _layout_agrees(libggml)
    except AttributeError:  # a function is not there
        agrees = False
    if not agrees:
        raise MachineError(
            f"The tensors of {version()} are laid out in another way than m3 knows.",
            "Install the version of llama-cpp-python that this version of m3 was made for, or upgrade m3.",
        )
    return libggml


def _layout_agrees(ggml: Any) -> bool:
    """Whether tensors that the library makes have in every field of `Tensor` what was asked for."""
    size = ctypes.sizeof(Tensor)
    overhead = ggml.ggml_tensor_overhead()  # of a tensor and the `ggml_object` before it
    if overhead != size + 32:
        return False
    context = ggml.ggml_init(_InitParams(16 * overhead + (1 << 16), None, False))
    try:
        addresses = [
            ggml.ggml_new_tensor_4d(context, kind, *dims)
            for kind, dims in ((1, (32, 6, 5, 1)), (0, (32, 4, 7, 1)), (26, (4, 7, 1, 1)))  # F16, F32, I32
        ]
        product = Tensor.from_address(ggml.ggml_mul_mat_id(context, *addresses))
        weights, rows, ids = map(Tensor.from_address, addresses)
        view = Tensor.from_address(ggml.ggml_view_1d(context, addresses[1], 8, 64))
        ggml.ggml_set_name(addresses[0], b"blk.0.weight")
        return (
            [weights.type, rows.type, ids.type, product.type] == [1, 0, 26, 0]
            and list(weights.ne) == [32, 6, 5, 1]
            and list(rows.nb) == [4, 128, 512, 3584]
            and list(product.ne) == [6, 4, 7, 1]
            and ggml.ggml_op_name(product.op) == b"MUL_MAT_ID"
            and list(product.src) == addresses + [None] * (_MAX_SRC - 3)
            and weights.name == b"blk.0.weight"
            and weights.data == ggml.ggml_get_data(addresses[0])
            and (view.view_src, view.view_offs, view.data) == (addresses[1], 64, rows.data + 64)
            and not any(each.buffer or each.extra or each.flags for each in (weights, rows, ids, product))
        )
    finally:
        ggml.ggml_free(context)


def tensor_at(address: int) -> Tensor:
    """The tensor at an address that llama.cpp gave. Raises MachineError when its layout is not known."""
    _ggml()
    return Tensor.from_address(address)


@cache
def op_name(op: int) -> str:
    """Name of a tensor's operation, e.g. `MUL_MAT`."""
    return str(_ggml().ggml_op_name(op).decode("utf-8", "replace"))


def values(tensor: Tensor) -> NDArray[Any]:
    """The elements of a tensor of plain numbers, the slowest of its dimensions first.

    In main memory this is the tensor itself, in place: writing into it changes what llama.cpp computes
    next, and it is gone when the graph goes on. Elsewhere it is a copy. Raises KeyError for a quantized
    type.
    """
    ggml = _ggml()
    kind = np.dtype(_NUMPY[tensor.type_name])
    buffer = Tensor.from_address(tensor.view_src).buffer if tensor.view_src else tensor.buffer
    size = ggml.ggml_nbytes(ctypes.addressof(tensor))  # from the first element to the last, gaps included
    if ggml.ggml_backend_buffer_is_host(buffer):
        data = (ctypes.c_uint8 * size).from_address(tensor.data)
    else:
        data = (ctypes.c_uint8 * size)()
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), data, 0, size)
    elements: NDArray[Any] = np.ndarray(tuple(tensor.ne[::-1]), kind, data, strides=tuple(tensor.nb[::-1]))
    return elements


def read(tensor: Tensor, offset: int, nbytes: int) -> bytes:
    """`nbytes` of the data of a tensor that is no view, of whatever type, from the byte `offset` on."""
    data = ctypes.create_string_buffer(nbytes)
    _ggml().ggml_backend_tensor_get(ctypes.addressof(tensor), data, offset, nbytes)
    return data.raw


def store(tensor: Tensor, elements: NDArray[np.float32]) -> None:
    """Put other elements, of the same shape, into a contiguous F32 tensor that is no view."""
    data = np.ascontiguousarray(elements, np.float32)
    _ggml().ggml_backend_tensor_set(ctypes.addressof(tensor), data.ctypes.data, 0, data.nbytes)
