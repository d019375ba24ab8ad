"""How much the predictions of a model change when the output of one of its matrices is off by a little.

The callback between two nodes of the graph adds noise to what a matrix has given, with the energy that an
error of its weights would have: for each channel of the output, that of the squared weights times the
mean squared input. Weights are not touched, so one pass over a window of text measures one matrix.
Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import math
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
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor
    from m3cli.engine.worker import Message

_USES = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")  # embeddings are looked up, and often are the output matrix too
_EXPERTS = 16  # that are looked at in a tensor
_ROWS = 64  # of a matrix, to compare the energy of its output with what its weights and input explain
_SEED = 0


class _Probe:
    """A model, a window of text, and what the model says without noise."""

    def __init__(self, config: EngineConfig, ids: Sequence[int]) -> None:
        self._ids = ids
        self._uses: dict[str, dict[str, NDArray[np.float32]]] = {}  # tensor → operation → deviations
        self._target = ""
        self._scale = 0.0
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
        self._target, self._scale = tensor, math.sqrt(error)
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
                    uses[operation] = _deviations(node, operation)
        except BaseException as error:  # noqa: BLE001 - raised by whoever called llama.cpp
            self._error = error
            return False
        return True

    def _disturb(self, node: Tensor, deviations: NDArray[np.float32]) -> None:
        values = ggml_tensor.values(node)
        noise = self._random.standard_normal(values.shape, np.float32)
        ggml_tensor.store(node, values + noise * (deviations * self._scale))

    def close(self) -> None:
        """Free the context and the weights."""
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)


def _deviations(node: Tensor, operation: str) -> NDArray[np.float32]:
    """Of each channel of a product, for weights whose relative error is 1: [channels].

    Errors of weights have nothing to do with each other, so their energy in the output is what squared
    weights and squared input make; the weights themselves may add up to more, or cancel out. What was
    computed is corrected by the ratio of both, which is taken from a few rows.
    """
    outputs = ggml_tensor.values(node)
    energy = np.square(outputs, dtype=np.float64).mean(axis=(0, 1, 2))
    if operation == "GET_ROWS":
        return np.asarray(np.sqrt(energy), np.float32)
    weights, inputs = node.source(0), ggml_tensor.values(node.source(1))[0]
    ids = ggml_tensor.values(node.source(2))[0, 0] if node.src[2] else None
    computed = explained = 0.0
    for matrix, rows in _inputs_of(inputs, ids):
        sample = _sample(weights, matrix, _ROWS if ids is None else _ROWS // 4)
        computed += float(np.square(rows @ sample.T).sum())
        explained += float((np.square(rows) @ np.square(sample).T).sum())
    outputs = ggml_tensor.values(node)
    energy = np.square(outputs, dtype=np.float64).mean(axis=(0, 1, 2))
    deviations: NDArray[np.float32] = np.sqrt(energy * (explained / computed if computed else 0)).astype(
        np.float32
    )
    return deviations


def _inputs_of(
    inputs: NDArray[np.float32], ids: NDArray[np.int32] | None
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(matrix, rows that are multiplied with it): all of the one matrix, or one row each of some experts."""
    if ids is None:
        yield 0, inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
        return
    tokens, used = ids.shape
    for token in range(0, tokens, max(1, tokens // _EXPERTS)):
        row = inputs[token, 0 if inputs.shape[1] == 1 else token % used]
        yield int(ids[token, token % used]), row[None].astype(np.float64)


def _sample(weights: Tensor, matrix: int, most: int) -> NDArray[np.float64]:
    """At most `most` rows of a matrix, evenly spread: [rows, columns]."""
    columns, rows = weights.ne[0], weights.ne[1]
    chosen = range(0, rows, -(-rows // most))
    data = b"".join(
        ggml_tensor.read(weights, matrix * weights.nb[2] + row * weights.nb[1], weights.nb[1])
        for row in chosen
    )
    return dequantize(weights.type_name, data, len(chosen) * columns).reshape(-1, columns).astype(np.float64)


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
