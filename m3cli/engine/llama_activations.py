"""Squared activations at the input of every weight matrix, summed over tokens while llama.cpp computes.

Which tensors count, and what is summed, is what llama.cpp's tools/imatrix/imatrix.cpp defines. Runs in the
worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.ggml_tensor import op_name, values, weight_name
from m3cli.engine.llama_windows import Watcher, WindowModel
from m3cli.engine.worker import config_of
from m3cli.errors import ModelError
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor
    from m3cli.engine.worker import Message

_FEWEST_ROWS = 16  # llama.cpp passes over smaller batches
_OUTPUTS = ("output.weight", "token_embd.weight")  # the second where embeddings are the output matrix too


class _Sums:
    """Of one tensor with `n_mat` matrices: squares of each column's activations, and rows, summed up."""

    def __init__(self, n_mat: int, n_cols: int) -> None:
        self.squares = np.zeros((n_mat, n_cols))
        self.counts = np.zeros(n_mat, np.int64)


class _Collector(Watcher):
    """Adds up what matrices are multiplied with."""

    def __init__(self, output_tensor: bool) -> None:
        super().__init__()
        self.sums: dict[str, _Sums] = {}
        self._output_tensor = output_tensor

    def wants(self, node: Tensor) -> bool:
        """Whether a node is a product that counts."""
        operation = op_name(node.op)
        if operation != "MUL_MAT":
            return operation == "MUL_MAT_ID"
        rows = node.source(1)
        if rows.ne[1] < _FEWEST_ROWS or rows.type_name != "F32":
            return False
        name = weight_name(node.source(0))
        return name.startswith("blk.") or (self._output_tensor and name in _OUTPUTS)

    def see(self, node: Tensor) -> None:
        """Add up the rows that its weights were multiplied with. Raises ModelError."""
        weights = node.source(0)
        name = weight_name(weights)
        rows = values(node.source(1))
        sums = self.sums.get(name)
        n_mat, n_cols = weights.ne[2] * weights.ne[3], rows.shape[-1]
        if sums is None:
            sums = self.sums[name] = _Sums(n_mat, n_cols)
        if sums.squares.shape != (n_mat, n_cols):
            raise ModelError(
                f"The rows that {name} is multiplied with have {n_cols:,} columns, and others had "
                f"{sums.squares.shape[1]:,}.",
                "No importance matrix can be computed for this model.",
            )
        if op_name(node.op) == "MUL_MAT_ID":
            _add_experts(sums, rows, values(node.source(2))[0, 0], name)
        else:
            _add_dense(sums, rows, weights.ne[2], weights.ne[3])
        if not np.isfinite(sums.squares).all():
            raise ModelError(
                f"The activations that {name} is multiplied with hold a NaN or an infinity.",
                "The model or its file is broken; download or convert it again.",
            )


def _add_dense(sums: _Sums, rows: NDArray[np.float32], n2: int, n3: int) -> None:
    """`rows` are [i3, i2, i1, columns]; the weights have `n3` times `n2` matrices, which repeat over them."""
    for i3, outer in enumerate(rows):
        for i2, inner in enumerate(outer):
            sums.squares[(i3 % n3) * n2 + i2 % n2] += np.square(inner, dtype=np.float64).sum(axis=0)
    sums.counts += rows[..., 0].size // (n2 * n3)


def _add_experts(sums: _Sums, rows: NDArray[np.float32], ids: NDArray[np.int32], name: str) -> None:
    """`rows` are [1, tokens, 1 or used, columns], and `ids` [tokens, used] the experts of each token."""
    n_mat = len(sums.counts)
    if len(rows) != 1 or rows.shape[1] != len(ids) or ids.min() < 0 or ids.max() >= n_mat:
        raise ModelError(
            f"The experts of {name} are chosen in a way that m3 does not know: rows {rows.shape}, choices "
            f"{ids.shape} from {ids.min()} to {ids.max()}.",
            "No importance matrix can be computed for this model.",
        )
    used = rows.shape[2]
    chosen = ids.ravel()
    order = chosen.argsort(kind="stable")
    experts, starts = np.unique(chosen[order], return_index=True)
    for expert, places in zip(experts, np.split(order, starts[1:]), strict=True):
        token, rank = np.divmod(places, ids.shape[1])
        sums.squares[expert] += np.square(rows[0, token, rank % used], dtype=np.float64).sum(axis=0)
        sums.counts[expert] += len(places)


class _Run:
    """A loaded model, and what was added up since then."""

    def __init__(self, config: EngineConfig, output_tensor: bool) -> None:
        self.collector = _Collector(output_tensor)
        self._model = WindowModel(config, self.collector)
        self._model.open(config.n_batch, config.n_ubatch, outputs=config.n_batch)

    def add(self, window: array[int]) -> None:
        """Compute a window from an empty context. Raises ModelError, EngineCrashError."""
        # With an output wanted of every token, the last layer computes them all.
        for _ in self._model.logits(window, range(len(window))):
            pass

    def close(self) -> None:
        """Free everything; may be called twice."""
        self._model.close()


_run: _Run | None = None
_key: object = None


def activations(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Compute the windows in the payload, int32 ids in pieces of `config.n_ctx`, and add up what they show.

    Sums go on from message to message while `config` and `output_tensor` stay the same. With `totals`, the
    result has `names`, and for each name `n_mat`, `n_cols` and a list of `n_mat` `counts`; the payload their
    sums as float64 [n_mat, n_cols], behind one another. Without, it is None.
    """
    global _run, _key
    config = config_of(message)
    key = (config, message["output_tensor"])
    if _run is None or key != _key:
        if _run is not None:
            _run.close()
            _run = None
        _run, _key = _Run(*key), key
    ids = unpack_ids(payload)
    for start in range(0, len(ids), config.n_ctx):
        _run.add(ids[start : start + config.n_ctx])
    if not message["totals"]:
        return None, b""
    names = sorted(_run.collector.sums)
    each = [_run.collector.sums[name] for name in names]
    result = {
        "names": names,
        "n_mat": [len(sums.counts) for sums in each],
        "n_cols": [sums.squares.shape[1] for sums in each],
        "counts": [sums.counts.tolist() for sums in each],
    }
    return result, b"".join(sums.squares.data for sums in each)


OPERATIONS = {"activations": activations}
