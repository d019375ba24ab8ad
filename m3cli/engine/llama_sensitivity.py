"""How much the predictions of a model change when the output of one of its matrices is off by a little.

The callback between two nodes of the graph adds to what a matrix has given the noise that random errors of
its weights would make. For each channel of the output that is a Gaussian over the tokens, whose covariance
follows from their inputs alone: where inputs agree, so do the errors, and attention does not average them
away. Weights are not touched, so one pass over a window of text measures one matrix.
Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine import ggml_tensor
from m3cli.engine.ggml_rows import dequantize
from m3cli.engine.llama import lib, load, make_context
from m3cli.engine.placement import model_params
from m3cli.engine.worker import config_of
from m3cli.errors import MachineError
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor
    from m3cli.engine.worker import Message

_USES = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")  # embeddings are looked up, and often are the output matrix too
_MATRICES = 16  # experts of a tensor that are looked at
_ROWS = 64  # of each
_SEED = 0


class _Probe:
    """A model, a window of text, and what the model says without noise."""

    def __init__(self, config: EngineConfig, ids: Sequence[int]) -> None:
        self._ids = ids
        self._uses: dict[str, dict[str, _Use]] = {}  # by tensor and operation
        self._target = ""
        self._error_energy = 0.0
        self._random = np.random.default_rng(_SEED)
        self._error: BaseException | None = None
        self._callback = lib.ggml_backend_sched_eval_callback(self._called)
        self._model = load(config.model_path, model_params(config, extra_buffers=False))
        self._context = make_context(self._model, config, outputs=len(ids), callback=self._callback)
        self._vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self._reference = self._log_probabilities()

    def divergence(self, tensor: str, error: float) -> float | None:
        """Mean KL divergence, in nats a token, for a relative error of the matrix; None if it is not used."""
        if tensor not in self._uses:
            return None
        self._target, self._error_energy = tensor, error
        self._random = np.random.default_rng(_SEED)
        changed = self._log_probabilities()
        total = 0.0
        for reference, other in zip(self._reference, changed, strict=True):
            total += float(np.exp(reference) @ (reference - other))
        return total / len(changed)

    def _log_probabilities(self) -> NDArray[np.float64]:
        """Of the second half of the window, which has seen the first: [positions, vocabulary]."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        count = len(self._ids)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(self._ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = i >= count // 2
            code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if self._error is not None:
            raise self._error
        if code:
            raise MachineError(f"llama.cpp could not compute a window of {count} tokens: code {code}.")
        half = count - count // 2
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (half, self._vocabulary))
        values = logits.astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
        return values

    def _called(self, address: int, ask: bool, _user_data: object) -> bool:
        """Say whether a node is wanted, or use it; an error ends the pass, and is raised behind it."""
        try:
            node = ggml_tensor.tensor_at(address)
            operation = ggml_tensor.op_name(node.op)
            if operation not in _USES:
                return not ask
            name = node.source(0).text
            if not name.endswith(".weight") or (self._target and name != self._target):
                return not ask
            if not ask:
                uses = self._uses.setdefault(name, {})
                if self._target:
                    self._disturb(node, uses[operation])
                elif operation not in uses:
                    uses[operation] = _Use(node, operation)
        except BaseException as error:  # noqa: BLE001 - raised by whoever called llama.cpp
            self._error = error
            return False
        return True

    def _disturb(self, node: Tensor, use: _Use) -> None:
        outputs = ggml_tensor.values(node)
        flat = outputs.reshape(-1, outputs.shape[-1])
        noise = use.spread @ self._random.standard_normal(flat.shape, np.float32)
        ggml_tensor.store(node, (flat + np.sqrt(self._error_energy) * noise).reshape(outputs.shape))

    def close(self) -> None:
        """Free the context and the weights."""
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)


class _Use:
    """What a tensor does at one place of the graph, as far as errors of its weights are concerned.

    `spread` [tokens, tokens] makes the output's noise, for an error of 1, out of independent numbers.
    """

    def __init__(self, node: Tensor, operation: str) -> None:
        if operation == "GET_ROWS":  # what is looked up is the weights themselves
            inputs = ggml_tensor.values(node).reshape(-1, node.ne[0])
            rows = ggml_tensor.values(node.source(1)).ravel()
            energy = np.square(inputs).mean(axis=1)
            covariance = np.sqrt(np.outer(energy, energy)) * (rows[:, None] == rows)
        else:
            inputs = _inputs(node)
            covariance = inputs @ inputs.T
            # The energy of an error of 1 is that of squared inputs times squared weights.
            total = float((np.square(inputs) @ _column_energy(node.source(0))).sum())
            covariance *= total / np.trace(covariance)
            if operation == "MUL_MAT_ID":
                experts = ggml_tensor.values(node.source(2)).ravel()
                covariance *= experts[:, None] == experts
        values, vectors = np.linalg.eigh(covariance.astype(np.float64))
        self.spread = np.asarray(vectors * np.sqrt(np.maximum(values, 0)), np.float32)


def _inputs(node: Tensor) -> NDArray[np.float32]:
    """Row that each row of a product was multiplied from: [tokens, columns]."""
    inputs = ggml_tensor.values(node.source(1))
    shape = (*node.ne[:0:-1], inputs.shape[-1])  # experts of one token may share its row
    return np.ascontiguousarray(np.broadcast_to(inputs, shape)).reshape(-1, inputs.shape[-1])


def _column_energy(weights: Tensor) -> NDArray[np.float32]:
    """Mean squared weight of each column, of some rows of some matrices: [columns]."""
    columns, rows, matrices = weights.ne[0], weights.ne[1], weights.ne[2]
    places = [
        matrix * weights.nb[2] + row * weights.nb[1]
        for matrix in range(0, matrices, -(-matrices // _MATRICES))
        for row in range(0, rows, -(-rows // _ROWS))
    ]
    data = b"".join(ggml_tensor.read(weights, place, weights.nb[1]) for place in places)
    values = dequantize(weights.type_name, data, len(places) * columns).reshape(-1, columns)
    return np.asarray(np.square(values).mean(axis=0))


_probe: _Probe | None = None
_key: object = None


def sensitivity(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Measure the divergence that an `error` of each of `tensors` makes in the window in the payload.

    The result has a number for each, or None for one that is not used. What is known of the
    window stays for the next message with the same one.
    """
    global _probe, _key
    config = config_of(message)
    key = (config, payload)
    if _probe is None or key != _key:
        if _probe is not None:
            _probe.close()
            _probe = None
        _probe = _Probe(config, unpack_ids(payload))
        _key = key
    return [_probe.divergence(tensor, message["error"]) for tensor in message["tensors"]], b""


OPERATIONS = {"sensitivity": sensitivity}
