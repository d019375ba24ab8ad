"""How much the predictions of a model change when the output of one of its matrices is off by a little.

Between two nodes of the graph, what a matrix has given gets the noise that random errors of its weights would
make. For each channel of the output that is a Gaussian over the tokens, whose covariance follows from their
inputs alone: where inputs agree, so do the errors, and attention does not average them away. Weights are not
touched, so one pass over a window of text measures one matrix. The whole window is computed as one, as its
noise belongs together.

On a CPU, llama.cpp rounds what it multiplies with weights of less than 32 bits to about their precision, and
any change, however small, makes it round all that comes behind another way. What that makes is in every
result: in SmolLM2, up to 4e-6 nats a token with weights in F16, 1.4e-4 in BF16, 4e-3 in Q8_0.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.ggml_rows import dequantize
from m3cli.engine.ggml_tensor import op_name, read, store, values, weight_name
from m3cli.engine.llama_library import physical_cores
from m3cli.engine.llama_windows import Watcher, WindowModel, log_softmax
from m3cli.engine.worker import config_of
from m3cli.errors import ModelError, UsageError
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor
    from m3cli.engine.worker import Message

_USES = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")  # embeddings are looked up, and often are the output matrix too
_MATRICES = 16  # experts of a tensor that are looked at
_ROWS = 64  # of each
_SEED = 0
_LOGITS_BYTES = 256 << 20  # of the reference's logits, and of those that llama.cpp holds


class _Noise(Watcher):
    """Notes which tensors the graph uses, or adds the noise of errors to what one of them gives."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self._target: str | None = None
        self._energy = 0.0
        self._chance = np.random.default_rng(_SEED)

    def begin(self, target: str, energy: float) -> None:
        """From now on, disturb `target` by errors of this relative energy; the same ones after each call."""
        self._target, self._energy = target, energy
        self._chance = np.random.default_rng(_SEED)

    def wants(self, node: Tensor) -> bool:
        """Whether a node uses the tensor to be disturbed."""
        if op_name(node.op) not in _USES:
            return False
        name = weight_name(node.source(0))
        if self._target is None:
            self.used.add(name)
        return name == self._target

    def see(self, node: Tensor) -> None:
        """Add the noise. A tensor that is used at two places has other errors at each."""
        noise = (_lookup_noise if op_name(node.op) == "GET_ROWS" else _product_noise)(node, self._chance)
        outputs = values(node)
        store(node, outputs + np.float32(self._energy**0.5) * noise.reshape(outputs.shape))


def _lookup_noise(node: Tensor, chance: np.random.Generator) -> NDArray[np.float32]:
    """Noise of an error of 1 in rows that were looked up, the same wherever a row is: [rows, columns]."""
    rows = values(node).reshape(-1, node.ne[0])
    _, which = np.unique(values(node.source(1)).ravel(), return_inverse=True)
    drawn = chance.standard_normal((which.max() + 1, rows.shape[1]), np.float32)
    noise: NDArray[np.float32] = np.sqrt(np.square(rows).mean(axis=1, keepdims=True)) * drawn[which]
    return noise


def _product_noise(node: Tensor, chance: np.random.Generator) -> NDArray[np.float32]:
    """Noise of an error of 1 in a product, of each of the tensor's matrices its own: [rows, outputs].

    The energy of an error of 1 is that of squared inputs times squared weights; it is spread evenly over the
    weights.
    """
    inputs, matrices = _inputs(node), _matrices(node)
    activity = np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
    there = np.unique(matrices)
    energy = activity @ _column_energy(node.source(0), there) / (activity.sum() or 1.0)
    noise = np.empty((len(inputs), node.ne[0]), np.float32)
    for matrix in there:
        rows = matrices == matrix
        # R of X = (QR)ᵀ has XXᵀ = RᵀR, so Rᵀ makes the covariance out of independent numbers.
        spread: Any = np.linalg.qr(inputs[rows].T, mode="r")
        noise[rows] = spread.T @ chance.standard_normal((len(spread), node.ne[0]), np.float32)
    noise *= np.float32(energy**0.5)
    return noise


def _inputs(node: Tensor) -> NDArray[np.float32]:
    """Row that each row of a product was multiplied from: [rows, columns]. Raises ModelError."""
    inputs = values(node.source(1))
    shape = (*node.ne[:0:-1], inputs.shape[-1])
    try:
        whole = np.broadcast_to(inputs, shape)  # experts of one token may share its row
    except ValueError:
        raise ModelError(
            f"{weight_name(node.source(0))} is used in a way that m3 does not know: rows {inputs.shape} give "
            f"{shape[:-1]}.",
            "No sensitivities can be measured for this model.",
        ) from None
    return np.ascontiguousarray(whole).reshape(-1, inputs.shape[-1])


def _matrices(node: Tensor) -> NDArray[np.int64]:
    """Which of the tensor's matrices each row of a product is from: [rows]."""
    if op_name(node.op) == "MUL_MAT_ID":
        return values(node.source(2)).astype(np.int64).ravel()
    weights = node.source(0)
    outer, inner, rows = node.ne[:0:-1]
    n2, n3 = weights.ne[2], weights.ne[3]  # each for as many of the outer dimensions, by ggml_mul_mat
    number = (np.arange(outer) // (outer // n3) * n2)[:, None] + np.arange(inner) // (inner // n2)
    return np.repeat(number.ravel(), rows)


def _column_energy(weights: Tensor, there: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean squared weight of each column, of some rows of some of the matrices that are `there`: [columns].

    Others may hold anything where a scheduler copied the tensor for this one product.
    """
    columns, rows = weights.ne[0], weights.ne[1]
    places = [
        matrix // weights.ne[2] * weights.nb[3] + matrix % weights.ne[2] * weights.nb[2] + row * weights.nb[1]
        for matrix in there[:: -(-len(there) // _MATRICES)].tolist()
        for row in range(0, rows, -(-rows // _ROWS))
    ]
    data = b"".join(read(weights, place, weights.nb[1]) for place in places)
    sample = dequantize(weights.type_name, data, len(places) * columns).reshape(-1, columns)
    energy: NDArray[np.float64] = np.einsum("ij,ij->j", sample, sample, dtype=np.float64) / len(sample)
    return energy


class _Probe:
    """A model, a window of text, and what the model says without noise.

    Of the second half of the window, which has seen the first, all positions count; with a large vocabulary,
    every second, third and so on, as memory allows.
    """

    def __init__(self, config: EngineConfig, ids: array[int]) -> None:
        count = len(ids)
        if count < 2:
            raise UsageError(
                f"A window of {count:,} tokens is too short to measure sensitivities on.",
                "Ask for a window of 512 tokens, as is usual.",
            )
        self._ids, self._threads = ids, config.threads or physical_cores()
        self._noise = _Noise()
        self._model = WindowModel(replace(config, n_ctx=max(config.n_ctx, count)), self._noise)
        most = max(1, _LOGITS_BYTES // (self._model.n_vocab * 4))
        half = range(count // 2, count)
        self._wanted = half[:: -(-len(half) // most)]
        self._model.open(count, count, len(self._wanted))
        try:
            self._reference = self._logits().copy()
        except BaseException:
            self.close()
            raise

    def divergence(self, tensor: str, error: float) -> float | None:
        """Mean KL divergence, in nats a token, for a relative error of the matrix; None if it is not used.

        Raises ModelError when logits are no numbers, EngineCrashError.
        """
        if tensor not in self._noise.used:
            return None
        self._noise.begin(tensor, error)
        with ThreadPoolExecutor(self._threads) as pool:
            each = list(pool.map(_divergence, self._reference, self._logits()))
        return sum(each) / len(each)

    def _logits(self) -> NDArray[np.float32]:
        """Logits of the positions that count: [positions, vocabulary]; gone with the next ones."""
        (logits,) = self._model.logits(self._ids, self._wanted)
        return logits

    def close(self) -> None:
        """Free everything; may be called twice."""
        self._model.close()


def _divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """KL divergence of the predictions of one position from those of the reference, in nats."""
    before, before_total, _ = log_softmax(reference)
    after, after_total, _ = log_softmax(other)
    shares = np.exp(before - before_total)
    return float(shares @ (before - after)) + after_total - before_total


_probe: _Probe | None = None
_key: object = None


def sensitivity(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Measure the divergence that an `error` of each of `tensors` makes in the window in the payload.

    The result has a number for each, in nats a token, or None for one that is not used. What is known of the
    window stays for the next message with the same one. Batches are as long as the window, whatever `config`
    says. Raises ModelError or MachineError when the model cannot be loaded or run or predicts no numbers.
    """
    global _probe, _key
    config = config_of(message)
    key = (config, payload)
    if _probe is None or key != _key:
        if _probe is not None:
            _probe.close()
            _probe = None
        _probe, _key = _Probe(config, unpack_ids(payload)), key
    return [_probe.divergence(tensor, message["error"]) for tensor in message["tensors"]], b""


OPERATIONS = {"sensitivity": sensitivity}
