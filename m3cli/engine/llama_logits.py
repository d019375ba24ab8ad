"""How far the predictions of a model are from those of another one, over the whole vocabulary.

Runs in the worker process, as all that uses llama.cpp does. The models run one after the other. In between,
the logits of the first lie in a file without a name, which vanishes with this process however it ends. They
are kept as 16-bit steps below the largest of their position: steps of 1/1024, which adds less than 1e-7 to a
divergence, down to 64, below which not even a whole vocabulary has a share that changes a float64.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3cli.engine.llama import lib, load, logged, make_context, physical_cores
from m3cli.engine.placement import model_params
from m3cli.engine.worker import config_of
from m3cli.errors import EngineCrashError, MachineError, ModelError
from m3cli.model.preflight import dense_attention_error
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.worker import Message

_STEPS = 1024  # of a nat
_LAST = np.iinfo(np.uint16).max
_LOWEST = -1e4  # below the largest logit; a model may rule tokens out with minus infinity
_LOGITS_BYTES = 256 << 20  # of the logits that llama.cpp holds at once


class _Scorer:
    """A loaded model that is asked for the logits of many positions of windows of `config.n_ctx` tokens."""

    def __init__(self, config: EngineConfig, first: int) -> None:
        self._context = self._batch = None
        name = Path(config.model_path).name
        self._model = load(config.model_path, model_params(config, extra_buffers=False))
        try:
            self.n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
            self._first, self._last = first, config.n_ctx - 1  # of the last, nobody knows what follows
            self._size = config.n_batch
            while self._size > 1 and self._outputs(self._size) * self.n_vocab * 4 > _LOGITS_BYTES:
                self._size //= 2
            config = replace(config, n_batch=self._size, n_ubatch=min(self._size, config.n_ubatch))
            with logged() as lines:
                self._context = make_context(self._model, config, outputs=self._outputs(self._size))
            if any("running DENSE attention" in line for line in lines):
                raise dense_attention_error(name)
            self._memory = lib.llama_get_memory(self._context)
            if lib.llama_model_has_encoder(self._model) or not self._memory:
                raise ModelError(
                    f"The model {name} does not continue text: it is an embedding or encoder model.",
                    "Compare the weights alone, without --text.",
                )
            self._batch = lib.llama_batch_init(self._size, 0, 1)
        except BaseException:
            self.close()
            raise

    def _outputs(self, size: int) -> int:
        return min(size, self._last - self._first)

    def logits(self, ids: array[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of the positions from `first` to the last but one, as they come: [positions, vocabulary].

        Each piece is gone when the next is asked for. Raises EngineCrashError.
        """
        lib.llama_memory_clear(self._memory, True)
        batch: Any = self._batch
        for start in range(0, len(ids), self._size):
            size = min(self._size, len(ids) - start)
            batch.n_tokens = size
            for i in range(size):
                batch.token[i], batch.pos[i] = ids[start + i], start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = self._first <= start + i < self._last
            code = lib.llama_decode(self._context, batch)
            if code:
                raise EngineCrashError(
                    f"llama.cpp could not compute a batch of {size:,} tokens (code {code}).",
                    "Ask for shorter windows if memory is short; otherwise report this.",
                )
            outputs = min(start + size, self._last) - max(start, self._first)
            if outputs > 0:
                row = ctypes.cast(lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
                yield np.ctypeslib.as_array(row, (outputs, self.n_vocab))

    def close(self) -> None:
        """Free everything; may be called twice."""
        if self._batch is not None:
            lib.llama_batch_free(self._batch)
            self._batch = None
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


class _Prediction(NamedTuple):
    """Codes of the logits of one position, the most likely token, and how unlikely the actual one was."""

    codes: NDArray[np.uint16]
    top: int
    loss: float


class _Predictions:
    """What the reference predicted at all positions: its codes in a file, the rest in memory."""

    def __init__(self, directory: str, vocabulary: int) -> None:
        self._directory, self._vocabulary = directory, vocabulary
        self._exact: list[tuple[int, float]] = []
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as this
        except OSError as error:
            raise self._not_kept(error) from error

    def append(self, predictions: list[_Prediction]) -> None:
        """Add the next positions. Raises MachineError."""
        try:
            self._file.seek(0, os.SEEK_END)
            for prediction in predictions:
                self._file.write(prediction.codes.data)
            self._file.flush()
        except OSError as error:
            raise self._not_kept(error) from error
        self._exact += [(prediction.top, prediction.loss) for prediction in predictions]

    def read(self, start: int, count: int) -> list[_Prediction]:
        """Return `count` positions from `start` on."""
        self._file.seek(start * self._vocabulary * 2)
        codes = np.frombuffer(self._file.read(count * self._vocabulary * 2), np.uint16)
        rows = codes.reshape(count, self._vocabulary)
        exact = self._exact[start : start + count]
        return [_Prediction(row, top, loss) for row, (top, loss) in zip(rows, exact, strict=True)]

    def close(self) -> None:
        """Give the file's room back; may be called twice."""
        self._file.close()

    def _not_kept(self, error: OSError) -> MachineError:
        return MachineError(
            f"The predictions of the reference cannot be kept in {self._directory}: {error.strerror}.",
            "Make room, ask for fewer --tokens, or point TMPDIR at a directory with more.",
        )


_model: _Scorer | None = None
_model_key: object = None
_predictions: _Predictions | None = None


def logits(message: Message, payload: bytes) -> tuple[Any, bytes]:
    """Run the window of token ids in the payload through the model of `config`; keep or compare its logits.

    Those of the positions from `first` to the last but one count. `position` says how many did before, of
    other windows of the same model. With `keep`, they are kept in a file in `directory`. Without, they are
    compared with those kept, and the payload of the reply is float64 [4, positions]: KL divergence from the
    kept predictions in nats, negative log-likelihood of the token that follows by the kept ones and by this
    model, and 1 where both predict the same token.

    Raises ModelError or MachineError when the model cannot be loaded or run or predicts no numbers, and when
    the file cannot be written.
    """
    global _predictions
    ids, first, position = unpack_ids(payload), message["first"], message["position"]
    model = _load(message)
    if _predictions is None or (message["keep"] and not position):
        if _predictions is not None:
            _predictions.close()
        _predictions = _Predictions(message["directory"], model.n_vocab)
    scores: list[tuple[float, ...]] = []
    following = first + 1
    with ThreadPoolExecutor(message["config"]["threads"] or physical_cores()) as pool:
        for some in model.logits(ids):
            actual = ids[following : following + len(some)]
            if message["keep"]:
                _predictions.append(list(pool.map(_encode, some, actual)))
            else:
                start = position + following - first - 1
                scores += pool.map(_compare, some, actual, _predictions.read(start, len(some)))
            following += len(some)
    return None, np.array(scores, np.float64).T.tobytes()


def _load(message: Message) -> _Scorer:
    global _model, _model_key
    config, first = config_of(message), message["first"]
    if _model is None or (config, first) != _model_key:
        if _model is not None:
            _model.close()  # the other model may need its memory
            _model = None
        _model = _Scorer(config, first)
        _model_key = (config, first)
    return _model


def _log_softmax(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, int]:
    """Logits less the largest, the logarithm of the sum of their exponentials, and where the largest is."""
    top = int(logits.argmax())
    below = logits.astype(np.float64)
    below -= below[top]
    np.maximum(below, _LOWEST, out=below)
    total = float(np.log(np.exp(below).sum()))
    if not np.isfinite(total):
        raise ModelError(
            "The model predicts no numbers: there is a NaN or an infinity among its logits.",
            "One of the two files is broken, or this build of llama.cpp computes it wrong.",
        )
    return below, total, top


def _encode(logits: NDArray[np.float32], actual: int) -> _Prediction:
    """Keep what a position predicts, of which `actual` came true."""
    below, total, top = _log_softmax(logits)
    codes = np.minimum(np.rint(below * -_STEPS), _LAST).astype(np.uint16)
    return _Prediction(codes, top, total - float(below[actual]))


def _compare(logits: NDArray[np.float32], actual: int, kept: _Prediction) -> tuple[float, ...]:
    """KL divergence from what was kept, the loss of `actual` by both, and whether both tops are one."""
    below, total, top = _log_softmax(logits)
    reference = kept.codes / -_STEPS
    weights = np.exp(reference)
    sum_of_weights = float(weights.sum())
    reference -= below
    divergence = float(weights @ reference) / sum_of_weights - float(np.log(sum_of_weights)) + total
    return max(divergence, 0.0), kept.loss, total - float(below[actual]), float(top == kept.top)


OPERATIONS = {"logits": logits}
