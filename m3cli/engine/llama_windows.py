"""Windows of text through a model: the logits that are wanted, and the nodes of the graph meanwhile.

What measures a model computes one window after the other, each from an empty context. Runs in the worker
process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.ggml_tensor import tensor_at
from m3cli.engine.llama import load, make_context
from m3cli.engine.llama_library import lib, logged
from m3cli.engine.placement import model_params
from m3cli.errors import EngineCrashError, ModelError
from m3cli.model.preflight import MSA_ARCHITECTURE, dense_attention_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.ggml_tensor import Tensor

_LOWEST = -1e4  # below the largest logit; a model may rule tokens out with minus infinity


class Watcher(ABC):
    """Sees nodes of the graph, each when it has been computed and before anything uses it.

    An error while it looks is kept in `error`, as none may pass through llama.cpp. It ends the computation,
    and WindowModel raises it.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.callback = lib.ggml_backend_sched_eval_callback(self._called)  # ctypes keeps no reference to it
        # Asked between any two nodes of the graph, so it is native: the length of a string that is empty
        # until an error writes into it.
        self.aborted = ctypes.create_string_buffer(2)

    @abstractmethod
    def wants(self, node: Tensor) -> bool:
        """Whether to see a node; its operands may not be computed yet. Each that is wanted takes time."""

    @abstractmethod
    def see(self, node: Tensor) -> None:
        """Look at a node that was wanted, or change it."""

    def take_error(self) -> None:
        """Raise what went wrong, if anything did, and be ready for the next computation."""
        error, self.error = self.error, None
        self.aborted[0] = b"\0"
        if error is not None:
            raise error

    def _called(self, address: int, ask: bool, _user_data: object) -> bool:
        """Before a node is computed: whether it is wanted. When it is computed: whether to go on."""
        if self.error is not None:
            return False
        try:
            node = tensor_at(address)
            if ask:
                return self.wants(node)
            self.see(node)
        except BaseException as error:  # noqa: BLE001 - raised by whoever called llama.cpp
            self.error = error
            self.aborted[0] = b"\x01"
            return False
        return True


class WindowModel:
    """A loaded model, to be opened before windows go through it. Raises ModelError, MachineError.

    `watcher` sees the nodes of all that is computed. Weights are never repacked for this CPU, which would
    keep them from being read.
    """

    def __init__(self, config: EngineConfig, watcher: Watcher | None = None) -> None:
        self._config, self._watcher = config, watcher
        self._context: Any = None
        self._batch: Any = None
        self._model = load(config.model_path, model_params(config, extra_buffers=False))
        self.n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))

    def open(self, batch: int, ubatch: int, outputs: int) -> None:
        """Make the context, for batches of `batch` tokens of which `outputs` have logits.

        Raises ModelError for a model that does not continue text or would do so with another attention than
        it was made with, MachineError when the context cannot be made. All is freed then.
        """
        config = replace(self._config, n_batch=batch, n_ubatch=min(batch, ubatch))
        name = Path(config.model_path).name
        try:
            # Before the context: llama.cpp counts the outputs of an encoder in another way.
            if lib.llama_model_has_encoder(self._model) or lib.llama_model_is_diffusion(self._model):
                raise _cannot_generate(name)
            with logged() as lines:
                self._context = make_context(
                    self._model, config, outputs=outputs, callback=self._watcher and self._watcher.callback
                )
            if not lib.llama_get_memory(self._context):
                raise _cannot_generate(name)
            if self._is_dense(lines) and not config.allow_dense:
                raise dense_attention_error(name)
            self._batch = lib.llama_batch_init(batch, 0, 1)
        except BaseException:
            self.close()
            raise
        self._size = batch
        if self._watcher is not None:
            callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
            lib.llama_set_abort_callback(self._context, callback, ctypes.addressof(self._watcher.aborted))

    def _is_dense(self, lines: list[str]) -> bool:
        """Whether a model made for sparse attention runs without; `lines` are of when the context was made.

        llama.cpp says so once a process, hence the other condition, the only one that is known to lead to it.
        """
        value = ctypes.create_string_buffer(128)
        lib.llama_model_meta_val_str(self._model, b"general.architecture", value, len(value))
        return (value.value == MSA_ARCHITECTURE.encode() and not self._config.flash_attention) or any(
            "running DENSE attention" in line for line in lines
        )

    def logits(self, ids: Sequence[int], wanted: range) -> Iterator[NDArray[np.float32]]:
        """Compute a window from an empty context, a batch at a time.

        Gives the logits of each batch with positions that are `wanted`, which rise: [positions, vocabulary].
        They are gone when the next are asked for. Raises ModelError for ids that the model does not have,
        EngineCrashError, and what the watcher raised.
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            wrong = next(token for token in ids if not 0 <= token < self.n_vocab)
            raise ModelError(
                f"The text has a token id of {wrong:,}, and the model knows {self.n_vocab:,} tokens.",
                "The vocabulary in the model's file does not fit its weights; choose another file.",
            )
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._size):
            outputs = self._decode(ids[start : start + self._size], start, wanted)
            if outputs:
                first = ctypes.cast(lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
                yield np.ctypeslib.as_array(first, (outputs, self.n_vocab))

    def _decode(self, ids: Sequence[int], start: int, wanted: range) -> int:
        """Compute one batch, the first token of which is at position `start`; how many were wanted."""
        batch = self._batch
        batch.n_tokens = len(ids)
        outputs = 0
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = start + i in wanted
            outputs += start + i in wanted
        with logged() as lines:
            code = lib.llama_decode(self._context, batch)
        if self._watcher is not None:
            self._watcher.take_error()
        if code:
            raise EngineCrashError(
                f"llama.cpp could not compute a batch of {len(ids):,} tokens (code {code}): "
                f"{_reason(lines)}.",
                "Ask for shorter windows if memory is short; otherwise report this.",
            )
        return outputs

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


def log_softmax(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, int]:
    """Logits of one position less the largest, and where that is; between them the normalizer.

    The normalizer is the logarithm of the sum of the exponentials of what is returned: less it, the
    logits are log probabilities. Raises ModelError when logits are no numbers.
    """
    top = int(logits.argmax())
    below = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # told below
        below -= below[top]
    np.maximum(below, _LOWEST, out=below)
    total = float(np.log(np.exp(below).sum()))
    if not np.isfinite(total):
        raise ModelError(
            "The model predicts no numbers: there is a NaN or an infinity among its logits.",
            "Its file is broken, or this build of llama.cpp computes it wrong.",
        )
    return below, total, top
