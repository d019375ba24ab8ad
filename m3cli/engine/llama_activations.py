"""Squared activations at the input of every weight matrix, summed over tokens while llama.cpp computes.

Which tensors count, and what is summed, is what llama.cpp's tools/imatrix/imatrix.cpp defines. Runs in the
worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.ggml_tensor import op_name, tensor_at, values
from m3cli.engine.llama import lib, load, logged, make_context
from m3cli.engine.placement import model_params
from m3cli.engine.worker import config_of
from m3cli.errors import EngineCrashError, ModelError
from m3cli.model.preflight import dense_attention_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor
    from m3cli.engine.worker import Message

_FEWEST_ROWS = 16  # llama.cpp passes over smaller batches


class _Sums:
    """Of one tensor with `n_mat` matrices: squares of each column's activations, and rows, summed up."""

    def __init__(self, n_mat: int, n_cols: int) -> None:
        self.squares = np.zeros((n_mat, n_cols))
        self.counts = np.zeros(n_mat, np.int64)


_OUTPUTS = ("output.weight", "token_embd.weight")  # the second where embeddings are the output matrix too


class _Collector:
    """What the callback adds up. An error within it is kept in `error`: none may pass through llama.cpp."""

    def __init__(self, output_tensor: bool) -> None:
        self.sums: dict[str, _Sums] = {}
        self.error: BaseException | None = None
        self._output_tensor = output_tensor
        self.callback = lib.ggml_backend_sched_eval_callback(self._called)  # ctypes keeps no reference to it
        # Asked between any two nodes of the graph, so it is native: the length of a string that is empty
        # until an error writes into it.
        self.aborted = ctypes.create_string_buffer(2)

    def _called(self, address: int, ask: bool, _user_data: object) -> bool:
        """Before a node is computed: whether it is wanted. When it is computed: whether to go on."""
        if self.error is not None:
            return False
        try:
            tensor = tensor_at(address)
            if ask:
                return self._is_wanted(tensor)
            self._add(tensor)
        except BaseException as error:  # noqa: BLE001 - raised by whoever called llama.cpp
            self.error = error
            self.aborted[0] = b"\x01"
            return False
        return True

    def _is_wanted(self, tensor: Tensor) -> bool:
        operation = op_name(tensor.op)
        if operation != "MUL_MAT":
            return operation == "MUL_MAT_ID"
        rows = tensor.source(1)
        if rows.ne[1] < _FEWEST_ROWS or rows.type_name != "F32":
            return False
        name = weight_name(tensor.source(0).text)
        return name.startswith("blk.") or (self._output_tensor and name in _OUTPUTS)

    def _add(self, tensor: Tensor) -> None:
        weights = tensor.source(0)
        name = weight_name(weights.text)
        rows = values(tensor.source(1))
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
        if op_name(tensor.op) == "MUL_MAT_ID":
            _add_experts(sums, rows, values(tensor.source(2))[0, 0], name)
        else:
            _add_dense(sums, rows, weights.ne[2], weights.ne[3])
        if not np.isfinite(sums.squares).all():
            raise ModelError(
                f"The activations that {name} is multiplied with hold a NaN or an infinity.",
                "The model or its file is broken; download or convert it again.",
            )

    def take_error(self) -> None:
        """Raise what went wrong within the callback, if anything did."""
        error, self.error = self.error, None
        self.aborted[0] = b"\0"
        if error is not None:
            raise error


def weight_name(text: str) -> str:
    """Name of a tensor without what a scheduler put round it: `CUDA0#blk.0.attn_k.weight#0`."""
    return text.split("#")[1] if "#" in text else text


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
        self._model = self._context = self._batch = None
        self.collector = _Collector(output_tensor)
        name = Path(config.model_path).name
        try:
            self._model = load(config.model_path, model_params(config, extra_buffers=False))
            if lib.llama_model_has_encoder(self._model) or lib.llama_model_is_diffusion(self._model):
                raise _cannot_generate(name)
            with logged() as lines:
                self._context = make_context(
                    self._model, config, outputs=config.n_batch, callback=self.collector.callback
                )
            if any("running DENSE attention" in line for line in lines) and not config.allow_dense:
                raise dense_attention_error(name)
            if not lib.llama_get_memory(self._context):
                raise _cannot_generate(name)
            self._batch = lib.llama_batch_init(config.n_batch, 0, 1)
        except BaseException:
            self.close()
            raise
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(self._context, callback, ctypes.addressof(self.collector.aborted))

    def add(self, window: NDArray[np.int32]) -> None:
        """Compute a window from an empty context. Raises ModelError, EngineCrashError."""
        if window.size and not 0 <= window.min() <= window.max() < self._vocabulary:
            raise ModelError(
                f"The text has a token id of {window.max():,}, and the model knows {self._vocabulary:,} "
                "tokens.",
                "The vocabulary in the model's file does not fit its weights; choose another file.",
            )
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch: Any = self._batch
        batch.n_tokens = len(window)
        for i, token in enumerate(window.tolist()):
            batch.token[i], batch.pos[i] = token, i
            # With an output wanted of every token, the last layer computes them all.
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        with logged() as lines:
            code = lib.llama_decode(self._context, batch)
        self.collector.take_error()
        if code:
            raise EngineCrashError(
                f"llama.cpp could not compute a window of {len(window):,} tokens (code {code}): "
                f"{_reason(lines)}.",
                "Ask for a shorter --window if memory is short; otherwise report this.",
            )

    def close(self) -> None:
        """Free the batch, the context and the weights; may be called twice."""
        if self._batch is not None:
            lib.llama_batch_free(self._batch)
            self._batch = None
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


def _cannot_generate(name: str) -> ModelError:
    return ModelError(
        f"The model {name} does not continue text: it is an embedding, encoder or diffusion model.",
        "Choose a model that was made for chat.",
    )


def _reason(lines: list[str]) -> str:
    """The last line that was logged, without the function's name in front."""
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1].rpartition(": ")[2].rstrip(".") if spoken else "it gave no reason"


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
    ids = np.frombuffer(payload, "<i4")
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
