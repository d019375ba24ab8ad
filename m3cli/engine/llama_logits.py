"""How far the predictions of a model are from those of another one, over the whole vocabulary.

Runs in the worker process, as all that uses llama.cpp does. The models run one after the other. In between,
the logits of the first lie in a file without a name, which vanishes with this process however it ends. They
are kept as 16-bit steps below the largest of their position: steps of 1/1024, which adds less than 1e-7 to a
divergence, down to 64, below which not even a whole vocabulary has a share that changes a float64.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3cli.engine.llama_library import physical_cores
from m3cli.engine.llama_windows import WindowModel, log_softmax
from m3cli.engine.worker import config_of
from m3cli.errors import MachineError
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.worker import Message

_STEPS = 1024  # of a nat
_LAST = np.iinfo(np.uint16).max
_LOGITS_BYTES = 256 << 20  # of the logits that llama.cpp holds at once


class _Scorer:
    """A loaded model that is asked for the logits of many positions of windows of `config.n_ctx` tokens."""

    def __init__(self, config: EngineConfig, first: int) -> None:
        self._wanted = range(first, config.n_ctx - 1)  # of the last, nobody knows what follows
        self._model = WindowModel(config)
        self.n_vocab = self._model.n_vocab
        size = config.n_batch
        while size > 1 and self._outputs(size) * self.n_vocab * 4 > _LOGITS_BYTES:
            size //= 2
        self._model.open(size, config.n_ubatch, self._outputs(size))

    def _outputs(self, size: int) -> int:
        return min(size, len(self._wanted))

    def logits(self, ids: array[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of the positions from `first` to the last but one, as they come: [positions, vocabulary].

        Each piece is gone when the next is asked for. Raises ModelError, EngineCrashError.
        """
        return self._model.logits(ids, self._wanted)

    def close(self) -> None:
        """Free everything; may be called twice."""
        self._model.close()


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


def _encode(logits: NDArray[np.float32], actual: int) -> _Prediction:
    """Keep what a position predicts, of which `actual` came true."""
    below, total, top = log_softmax(logits)
    codes = np.minimum(np.rint(below * -_STEPS), _LAST).astype(np.uint16)
    return _Prediction(codes, top, total - float(below[actual]))


def _compare(logits: NDArray[np.float32], actual: int, kept: _Prediction) -> tuple[float, ...]:
    """KL divergence from what was kept, the loss of `actual` by both, and whether both tops are one."""
    below, total, top = log_softmax(logits)
    reference = kept.codes / -_STEPS
    weights = np.exp(reference)
    sum_of_weights = float(weights.sum())
    reference -= below
    divergence = float(weights @ reference) / sum_of_weights - float(np.log(sum_of_weights)) + total
    return max(divergence, 0.0), kept.loss, total - float(below[actual]), float(top == kept.top)


OPERATIONS = {"logits": logits}
