"""Rows of weights in one of llama.cpp's types → in another; and which types its quantizer would choose.

Runs in the worker process, as all that uses llama.cpp does. The numbers come from `ggml_quantize_chunk`, of
which `llama_model_quantize` is a loop: a loop of m3's own can stop anywhere and go on there.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.ggml_rows import dequantize
from m3cli.engine.llama_library import lib, libggml, logged, physical_cores
from m3cli.errors import ModelError
from m3cli.model.ggml_types import TENSOR_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from m3cli.engine.worker import Message

_NUMBERS = {each.name: number for number, each in TENSOR_TYPES.items()}
_TYPE_SIZES = {each.name: (each.block, each.nbytes) for each in TENSOR_TYPES.values()}

# Lines of a dry run: `[ 1/ 2] NAME - [ 64, 2, 1, 1], type = bf16, size = 1.0 MiB -> 0.2 MiB (q4_K)`
_LINE = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(\S+) +- \[.*?\], type = +\w+, size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)

_quantize = libggml.ggml_quantize_chunk
_quantize.restype = ctypes.c_size_t
_quantize.argtypes = [
    ctypes.c_int,  # type
    ctypes.c_void_p,  # float32 values
    ctypes.c_void_p,  # what is made of them
    ctypes.c_int64,  # the first of the values
    ctypes.c_int64,  # rows
    ctypes.c_int64,  # columns
    ctypes.c_void_p,  # float32 importance of each column, or NULL
]
_is_valid = libggml.ggml_validate_row_data
_is_valid.restype, _is_valid.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


class _TensorType(ctypes.Structure):
    """`llama_model_tensor_override` of llama.h, with fields that the bindings leave out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def quantized_types(message: Message, _payload: bytes) -> tuple[Any, bytes]:
    """Ask llama.cpp's quantizer which type it would give each tensor of the model at `path`.

    `file_type` is the number of its mixture; with `pure`, all tensors that it quantizes get the same type.
    `importance` says whether there is an importance matrix, which changes some choices. `types` are
    (regular expression, type) that come first. `output` and `embeddings` are types of these two, or None.
    """
    params = lib.llama_model_quantize_default_params()
    params.ftype = message["file_type"]
    params.dry_run = params.allow_requantize = True
    params.pure = message.get("pure", False)
    pairs = message.get("types", ())
    overrides = (_TensorType * (len(pairs) + 1))()  # the last, empty one ends the list
    for entry, (pattern, kind) in zip(overrides, pairs, strict=False):
        entry.pattern, entry.type = pattern.encode(), _NUMBERS[kind]
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    importance = (lib.llama_model_imatrix_data * 2)()  # that there is one makes the choice; not what is in it
    importance[0].name, importance[0].size = b"none", 1
    importance[0].data = (ctypes.c_float * 1)(1.0)
    if message["importance"]:
        params.imatrix = importance
    if message.get("output"):
        params.output_tensor_type = _NUMBERS[message["output"]]
    if message.get("embeddings"):
        params.token_embedding_type = _NUMBERS[message["embeddings"]]
    with logged() as lines:
        code = lib.llama_model_quantize(os.fsencode(message["path"]), b"unused", ctypes.byref(params))
    log = "".join(lines)
    if code:
        reason = log.rpartition("failed to quantize: ")[2].strip().rstrip(".")
        raise ModelError(
            f"llama.cpp's quantizer does not take {message['path']}: {reason}.",
            "Check that the file is a complete model of an architecture that this llama.cpp knows.",
        )
    return {match[1]: match[2] and match[2].upper() for match in _LINE.finditer(log)}, b""


def quantize_rows(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Read `rows` rows of `columns` weights at `offset` of the file `path`, and return them as type `to`.

    The payload is the importance of the columns, float32, or empty. Raises ModelError for a NaN or infinity.
    """
    path, kind, to = message["path"], message["type"], message["to"]
    rows, columns, threads = message["rows"], message["columns"], message["threads"] or physical_cores()
    importance = np.frombuffer(payload, np.float32) if payload else None
    row_in, row_out = _row_bytes(kind, columns), _row_bytes(to, columns)
    out = np.empty(rows * row_out, np.uint8)
    per_thread = -(-rows // threads)

    def work(first: int) -> None:
        count = min(per_thread, rows - first)
        data = _read(path, message["offset"] + first * row_in, count * row_in)
        if kind == to:
            out[first * row_out :][: count * row_out] = data
            return
        values = _values(message, data, count * columns)
        encode(to, values, columns, importance, out[first * row_out :][: count * row_out])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, rows, per_thread)))
    return None, out.tobytes()


def row_errors(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Quantize a sample of a tensor's rows to each of the types `to`, and sum up what that changes.

    `pieces` are (offset in `path`, rows, matrix); the payload has the importance of the columns of each
    matrix that occurs, float32 [matrices, columns], or is empty. The result is the sum of importance times
    squared weight, and for each type that of importance times squared error, infinite if the type cannot
    hold the weights. Raises ModelError for a NaN or infinity.
    """
    path, kind, columns = message["path"], message["type"], message["columns"]
    importance = np.frombuffer(payload, np.float32).reshape(-1, columns) if payload else None
    row_in = _row_bytes(kind, columns)
    blocks: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]] = []
    for offset, rows, matrix in message["pieces"]:
        data = _read(path, offset, rows * row_in)
        values = _values(message, data, rows * columns).reshape(rows, columns)
        blocks.append((values, None if importance is None else importance[matrix]))

    def energy(values: NDArray[np.float32], weights: NDArray[np.float32] | None) -> float:
        squares = np.square(values, dtype=np.float64).sum(axis=0)
        return float(squares.sum() if weights is None else squares @ weights)

    def error(to: str) -> float:
        total = 0.0
        for values, weights in blocks:
            out = np.empty(len(values) * _row_bytes(to, columns), np.uint8)
            try:
                encode(to, values, columns, weights, out)
            except ModelError:  # such as F16 of what is larger than its largest number
                return math.inf
            changed = dequantize(to, out.data, values.size).reshape(values.shape)
            total += energy(values - changed, weights)
        return total

    total = sum(energy(*block) for block in blocks)
    if not total:  # a file without data
        return {"energy": 0.0, "errors": [0.0 for _ in message["to"]]}, b""
    with ThreadPoolExecutor(message["threads"] or physical_cores()) as pool:
        errors = list(pool.map(error, message["to"]))
    return {"energy": total, "errors": errors}, b""


def _read(path: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes of a file. Raises ModelError when they cannot be read."""
    try:
        data = np.fromfile(path, np.uint8, nbytes, offset=offset)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path and its disk."
        ) from error
    if data.size != nbytes:
        raise ModelError(f"{path} became shorter while it was read.", "Run the command again.")
    return data


def _values(message: Message, data: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    """`count` weights of the tensor that `message` is about. Raises ModelError when some are no numbers."""
    values = dequantize(message["type"], data.data, count)
    if not np.isfinite(values).all():
        raise ModelError(
            f"The tensor {message['tensor']} of {message['path']} holds a NaN or an infinity.",
            "Download or convert the model again.",
        )
    return values


def encode(
    kind: str,
    values: NDArray[np.float32],
    columns: int,
    importance: NDArray[np.float32] | None,
    out: NDArray[np.uint8],
) -> None:
    """Quantize rows of contiguous float32 into `out`. Raises ModelError if the result is invalid."""
    number = _NUMBERS[kind]
    weights = None if importance is None else importance.ctypes.data
    size = _quantize(number, values.ctypes.data, out.ctypes.data, 0, values.size // columns, columns, weights)
    if size != out.nbytes or not _is_valid(number, out.ctypes.data, size):
        raise ModelError(
            f"llama.cpp made invalid data of type {kind} out of these weights.",
            "Choose another type; weights or importances of extreme size may be the reason.",
        )


def _row_bytes(kind: str, columns: int) -> int:
    block, nbytes = _TYPE_SIZES[kind]
    return columns // block * nbytes


OPERATIONS = {
    "quantized_types": quantized_types,
    "quantize_rows": quantize_rows,
    "row_errors": row_errors,
}
