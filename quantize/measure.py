"""What each type would do to each tensor, measured on a sample of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantize import kinds
from quantize.quantizer import matrices_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from m3cli.model.header import Header, Tensor
    from quantize.importance import Importance
    from quantize.native import Native

# Relative errors under an importance matrix, by scripts/bench/quant_facts.py. A float type makes none that
# matters.
_TYPICAL_ERRORS = {
    "IQ1_S": 0.26,
    "IQ1_M": 0.19,
    "IQ2_XXS": 0.12,
    "IQ2_XS": 0.088,
    "IQ2_S": 0.072,
    "Q2_K": 0.071,
    "IQ3_XXS": 0.03,
    "Q3_K": 0.026,
    "IQ3_S": 0.02,
    "IQ4_XS": 0.0071,
    "MXFP4": 0.016,
    "Q4_0": 0.01,
    "Q4_K": 0.0059,
    "IQ4_NL": 0.0069,
    "Q4_1": 0.0056,
    "Q5_0": 0.0026,
    "Q5_K": 0.0015,
    "Q5_1": 0.0013,
    "Q6_K": 0.00041,
    "Q8_0": 5e-05,
    "attn_k": 0.034,
    "attn_output": 0.023,
    "attn_q": 0.013,
    "attn_v": 0.031,
    "ffn_down": 0.058,
    "ffn_gate": 0.049,
    "ffn_up": 0.062,
    "token_embd": 0.092,
}
_ROWS = 64  # of a tensor, evenly spread over its matrices and their rows
_MATRICES = 16  # experts of a tensor that rows are taken from, at most


@dataclass(frozen=True, slots=True)
class Measured:
    """The relative error that each type makes in the output of a tensor: error energy by energy.

    With an importance matrix the energies are those of what the tensor gives for typical input; without,
    those of its weights. If not `measured`, the weights are all zero, because the file holds no data, and
    the errors are what each type typically makes.
    """

    tensor: Tensor
    errors: Mapping[str, float]
    measured: bool


def measure(
    native: Native,
    header: Header,
    names: Collection[str],
    candidates: Sequence[str],
    importance: Importance | None,
) -> Iterator[Measured]:
    """Measure the tensors called `names`, in the order of the file. Raises what Native.errors raises.

    A candidate that needs an importance matrix is left out where there is none, and one that does not
    divide the rows is replaced by what llama.cpp would take for it. The type that a tensor has makes no
    error.
    """
    for tensor in header.tensors:
        if tensor.name in names:
            weights = None
            if importance is not None:
                weights = _weights(tensor, importance)
            own, *others = possible_types(tensor, candidates, with_importance=weights is not None)
            pieces, weights = _sample(tensor, weights)
            path = header.files[tensor.file]
            energy, errors = native.errors(tensor, path, pieces, others, weights)
            if energy:
                relative = {kind: error / energy for kind, error in errors.items() if math.isfinite(error)}
                yield Measured(tensor, {own: 0.0, **relative}, measured=True)
            else:
                yield typical(tensor, [own, *others])


def typical(tensor: Tensor, kinds_of_it: Sequence[str]) -> Measured:
    """What types make of other models' tensors, where nothing was measured."""
    errors = {kind: _TYPICAL_ERRORS.get(kind, 0.0) for kind in kinds_of_it}
    return Measured(tensor, {**errors, tensor.type: 0.0}, measured=False)


def possible_types(tensor: Tensor, candidates: Sequence[str], *, with_importance: bool) -> list[str]:
    """The type that this tensor has, then the others that it can have, each once."""
    there = [kinds.fallback(kind, tensor.dims[0]) for kind in candidates]
    return [
        kind
        for kind in dict.fromkeys([tensor.type, *there])
        if kind == tensor.type or with_importance or not kinds.needs_importance(kind, tensor.name)
    ]


def _weights(tensor: Tensor, importance: Importance) -> NDArray[np.float32] | None:
    """Importance of the columns of each matrix; of experts also by how often they are used."""
    columns, _, matrices = matrices_of(tensor)
    weights = importance.weights(tensor.name, columns, matrices)
    if weights is None or matrices == 1:
        return weights
    counts = importance.entries[tensor.name].counts.astype(np.float32)
    if len(counts) != matrices or not counts.any():
        return weights
    # An expert that was never hit may be hit one day, and then with what the others got.
    hit = counts > 0
    filled = np.where(hit[:, None], weights, weights[hit].mean(axis=0))
    counts = np.maximum(counts, 1)
    scaled: NDArray[np.float32] = (filled * (counts / counts.mean())[:, None]).astype(np.float32)
    return scaled


def _sample(
    tensor: Tensor, weights: NDArray[np.float32] | None
) -> tuple[list[tuple[int, int, int]], NDArray[np.float32] | None]:
    """(offset, rows, row of the importance) of each piece, and the importance of the matrices they are of."""
    columns, rows, matrices = matrices_of(tensor)
    row_bytes = kinds.row_bytes(tensor.type, columns)
    chosen = _spread(matrices, _MATRICES)
    pieces = [
        (tensor.offset + (matrix * rows + row) * row_bytes, 1, index)
        for index, matrix in enumerate(chosen)
        for row in _spread(rows, max(1, _ROWS // len(chosen)))
    ]
    return pieces, None if weights is None else np.ascontiguousarray(weights[chosen])


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    if count <= most:
        return list(range(count))
    return [int((i + 0.5) * count / most) for i in range(most)]
