"""How far the weights of a tensor are from those of the same tensor in another file.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from m3cli.engine.ggml_rows import dequantize, has_values
from m3cli.engine.llama_library import physical_cores
from m3cli.errors import ModelError
from m3cli.model.ggml_types import TENSOR_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from m3cli.engine.worker import Message

_LAYOUTS = {each.name: each for each in TENSOR_TYPES.values()}
_PIECE_ELEMENTS = 1 << 20  # weights that a thread has in memory at once: 4 MiB in f32, for each file


def tensor_errors(message: Message, _payload: bytes) -> tuple[Any, bytes]:
    """Compare `rows` rows of `columns` weights of the tensor `name` in two files, or a `sample` of them.

    `reference` and `new` have the `path`, the `type` and the `offset` of the first row. The sample is one row
    at random of each of `sample` equal parts of the tensor, the same ones in every run; all rows if there are
    no more. The result is `energy`, the sum of the reference's squared weights, `error`, that of the squared
    differences, and the number of `rows` that were looked at; None where a type has no values to compare.
    Raises ModelError for a NaN or an infinity.
    """
    sides = (message["reference"], message["new"])
    if not all(has_values(side["type"]) for side in sides):
        return None, b""
    columns = message["columns"]
    rows = sampled_rows(message["rows"], message["sample"])
    step = max(1, _PIECE_ELEMENTS // columns)

    def compare(first: int) -> tuple[float, float]:
        some = rows[first : first + step]
        reference, new = (_values(side, some, columns, message["name"]) for side in sides)
        return _sum_of_squares(reference), _sum_of_squares(reference - new)

    with ThreadPoolExecutor(message["threads"] or physical_cores()) as pool:
        sums = list(pool.map(compare, range(0, len(rows), step)))
    energy, error = (sum(each) for each in zip(*sums, strict=True))
    return {"energy": energy, "error": error, "rows": len(rows)}, b""


def sampled_rows(rows: int, sample: int) -> NDArray[np.int64]:
    """Numbers of a sample of rows, rising; all of them where `sample` is not less than `rows`.

    At random within equal parts: what repeats in a matrix, as heads do, is not always hit at the same place.
    """
    if sample >= rows:
        return np.arange(rows)
    edges = np.arange(sample + 1, dtype=np.int64) * rows // sample
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _values(side: Message, rows: NDArray[np.int64], columns: int, name: str) -> NDArray[np.float32]:
    layout = _LAYOUTS[side["type"]]
    row_bytes = columns // layout.block * layout.nbytes
    with Path(side["path"]).open("rb", buffering=0) as file:
        data = b"".join(_read(file, side, start, count, row_bytes) for start, count in _runs(rows))
    values = dequantize(side["type"], data, len(rows) * columns)
    if not np.isfinite(values).all():
        raise ModelError(
            f"The tensor {name} of {side['path']} holds a NaN or an infinity.",
            "Download or make this file again; as it is, its answers mean nothing.",
        )
    return values


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each run of neighbours."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(run[0]), len(run)


def _read(file: BinaryIO, side: Message, start: int, count: int, row_bytes: int) -> bytes:
    file.seek(side["offset"] + start * row_bytes)
    data = file.read(count * row_bytes)
    if len(data) != count * row_bytes:
        raise ModelError(f"{side['path']} became shorter while it was read.", "Run the command again.")
    return data


def _sum_of_squares(values: NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


OPERATIONS = {"tensor_errors": tensor_errors}
