"""A model that llama.cpp runs: load, prefill, sample, save and restore its KV cache.

It is meant to run in the worker process, where a native crash is an error and not a dead shell.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.engine.adapters import check_adapters
from m3cli.engine.events import THINK_TAGS, LoadProgress
from m3cli.engine.llama_library import LOG, lib, logged, physical_cores, version
from m3cli.errors import DoesNotFitError, EngineCrashError, MachineError, ModelError, OutOfMemoryError
from m3cli.model.header import read_header
from m3cli.model.preflight import MSA_ARCHITECTURE, dense_attention_error, update_problem

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from m3cli.engine.events import Attention, EngineConfig, Sampling
    from m3cli.engine.form import Form
    from m3cli.engine.sampling import Sampler

_KV_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}

_SHOWN = {*THINK_TAGS, *THINK_TAGS.values()}

_OUT_OF_MEMORY = re.compile(
    r"allocat|bad_alloc|out of memory|not enough memory|mlock|mmap failed", re.IGNORECASE
)
# Architectures that fell back to dense attention for a reason that m3 does not foresee. llama.cpp warns
# of it once a process, and a worker loads more than one model.
_FELL_BACK: set[str] = set()


def load(path: str, params: Any) -> Any:
    """Load a `llama_model`. Raises ModelError, or MachineError when memory is what lacks."""
    LOG.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        return model
    reason = LOG.reason("llama.cpp gave no reason")
    name = Path(path).name
    if not Path(path).is_file():
        raise ModelError(
            f"The model file {path} does not exist.", "Check the path, or list the models you have."
        )
    unknown = re.search(r"unknown model architecture: '(.*)'", reason)
    if unknown:
        raise ModelError(
            f"The architecture {unknown[1]} of {name} is not known to {version()}.",
            "Upgrade with 'pip install --upgrade llama-cpp-python'; if that does not help, "
            "llama.cpp does not support this model yet.",
        )
    if _OUT_OF_MEMORY.search(reason):
        raise OutOfMemoryError(
            f"The weights of {name} ({_gigabytes(path)}) do not fit in memory: {reason}.",
            "Take a smaller quant of the model or put fewer layers on the GPU.",
        )
    raise ModelError(
        f"The model {name} cannot be loaded: {reason}.",
        "The file may be incomplete or made for another version of llama.cpp; download it again or "
        "upgrade llama-cpp-python.",
    )


def _gigabytes(path: str) -> str:
    """Size of a model file, of all its parts if it was split."""
    file = Path(path)
    parts = file.parent.glob(re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-?????-of-\1.gguf", file.name))
    return f"{sum(part.stat().st_size for part in parts) / 1e9:.2f} GB"


def make_context(
    model: Any, config: EngineConfig, *, outputs: int = 1, sequences: int = 1, callback: Any = None
) -> Any:
    """Make a `llama_context` that is shared by so many sequences. Raises MachineError.

    `outputs` is how many positions of a batch may have logits. `callback` is called for the nodes of the
    graph, as `ggml_backend_sched_eval_callback` of ggml-backend.h, and has to outlive the context.
    """
    params = lib.llama_context_default_params()
    params.n_ctx = config.n_ctx
    params.swa_full = True  # a window alone could not be cut back to a shared prefix
    params.n_seq_max = sequences
    params.kv_unified = sequences > 1  # they share what they hold; MSA would run densely
    params.n_batch = config.n_batch
    params.n_ubatch = config.n_ubatch
    params.n_outputs_max = max(outputs, sequences)  # a large vocabulary times n_batch is 400 MB
    if callback is not None:
        params.cb_eval = callback
    params.n_threads = params.n_threads_batch = config.threads or physical_cores()
    params.op_offload = config.op_offload
    params.type_k = _KV_TYPES[config.kv_type_k]
    params.type_v = _KV_TYPES[config.kv_type_v]
    params.flash_attn_type = (
        lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if config.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    LOG.clear()
    context = lib.llama_init_from_model(model, params)
    if context:
        return context
    reason = LOG.reason("llama.cpp gave no reason")
    asked = (
        f"A context of {config.n_ctx:,} tokens (K {config.kv_type_k}, V {config.kv_type_v}, "
        f"ubatch {config.n_ubatch:,}) could not be made: {reason}."
    )
    if _OUT_OF_MEMORY.search(reason):
        raise OutOfMemoryError(asked, "Ask for a smaller context, a smaller ubatch or a smaller KV type.")
    raise MachineError(asked, "Try KV type f16 with flash attention on.")


def load_adapter(model: Any, path: str, model_name: str) -> Any:
    """Load a `llama_adapter_lora`, which is freed with its model. Raises ModelError, OutOfMemoryError."""
    LOG.clear()
    adapter = lib.llama_adapter_lora_init(model, os.fsencode(path))
    if adapter:
        return adapter
    reason = LOG.reason("llama.cpp gave no reason").removeprefix("failed to apply lora adapter: ")
    if _OUT_OF_MEMORY.search(reason):
        raise OutOfMemoryError(
            f"The adapter {path} does not fit in memory: {reason}.", "Take a smaller quant of the model."
        )
    reason = re.sub(r" \(hint: .*\)$", "", reason)
    raise ModelError(
        f"The adapter {path} cannot be used with {model_name}: {reason}.",
        "Take an adapter that was made for this model, or the model that it was made for.",
    )


class Model:
    """A loaded model with its adapters, and its context: one sequence, and those that help it.

    In models with a sliding window, `guard` is one that holds all the first one does: llama.cpp lets new
    tokens take the place of those that have left the window of the only sequence that they are in. `helper`
    is for m3cli.engine.llama_update, if the configuration asks for it.

    `progress` is called with the share of the weights that is loaded. `extra_buffers` lets
    llama.cpp repack weights for this CPU (AMX and the like), which is faster and crashes on some
    machines.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        extra_buffers: bool = True,
        progress: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        begin = time.monotonic()
        check_adapters(config)
        self._context = None
        self._form_tokenizer: Any = None  # takes a second to make, so for the first schema
        self._model = self._load_weights(config, extra_buffers, progress)
        self._vocab = lib.llama_model_get_vocab(self._model)
        try:
            name = Path(config.model_path).name
            # Before the context, whose graph has room for the adapters that it finds.
            adapters = [load_adapter(self._model, path, name) for path, _ in config.lora]
            windowed = lib.llama_model_n_swa(self._model) > 0
            sequences = 1 + config.in_place + windowed
            self.guard = 1 if windowed else None  # always the same number, as states on the disk have it
            self.helper = sequences - 1
            with logged() as lines:
                self._context = make_context(self._model, config, sequences=sequences)
            self.attention = self._attention(config)
            if self.attention == "dense" and not config.allow_dense:
                raise dense_attention_error(name)
            self._refuse_what_cannot_generate(name)
            self._apply(adapters, [scale for _, scale in config.lora])
        except BaseException:
            self.close()
            raise
        self.memory = lib.llama_get_memory(self._context)
        self.n_ctx = int(lib.llama_n_ctx(self._context))
        self.n_batch = int(lib.llama_n_batch(self._context))
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        # State of a recurrent model is one step, which cannot be taken back.
        self.can_truncate = not (
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )
        self.update_problem = self._update_problem(config, lines)
        # Asked between any two nodes of the graph, so it is native: the length of a string that is empty
        # until `abort` writes into it.
        self._aborted = ctypes.create_string_buffer(2)
        callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(self._context, callback, ctypes.addressof(self._aborted))
        description = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, description, len(description))
        self.description = description.value.decode("utf-8", "replace")
        self.load_seconds = time.monotonic() - begin

    @staticmethod
    def _load_weights(
        config: EngineConfig, extra_buffers: bool, progress: Callable[[LoadProgress], None] | None
    ) -> Any:
        from m3cli.engine.placement import model_params

        percent = -1

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def on_progress(fraction: float, _user_data: object) -> bool:
            nonlocal percent
            if progress is not None and int(fraction * 100) > percent:
                percent = int(fraction * 100)
                progress(LoadProgress(fraction))
            return True

        params = model_params(config, extra_buffers)
        params.progress_callback = on_progress
        return load(config.model_path, params)

    def _apply(self, adapters: list[Any], scales: list[float]) -> None:
        count = len(adapters)
        lib.llama_set_adapters_lora(
            self._context,
            (lib.llama_adapter_lora_p_ctypes * count)(*adapters),
            count,
            (ctypes.c_float * count)(*scales),
        )

    def _attention(self, config: EngineConfig) -> Attention:
        """Which attention this context computes; called when the context was just made."""
        value = ctypes.create_string_buffer(128)
        lib.llama_model_meta_val_str(self._model, b"general.architecture", value, len(value))
        architecture = value.value.decode("utf-8", "replace")
        has_msa = architecture == MSA_ARCHITECTURE
        # MSA is written for flash attention alone, and for one sequence.
        if has_msa and (config.in_place or not config.flash_attention):
            return "dense"
        if "running DENSE attention" in LOG:
            _FELL_BACK.add(architecture)
        if architecture in _FELL_BACK:
            return "dense"
        return "sparse" if has_msa else "full"

    def _refuse_what_cannot_generate(self, name: str) -> None:
        if (
            lib.llama_model_has_encoder(self._model)
            or lib.llama_model_is_diffusion(self._model)
            or not lib.llama_get_memory(self._context)
        ):
            raise ModelError(
                f"The model {name} does not continue text: it is an embedding, encoder or diffusion model.",
                "Choose a model that was made for chat.",
            )

    def _update_problem(self, config: EngineConfig, lines: list[str]) -> str:
        """Why this context cannot be updated in place, if it cannot; `lines` are what was logged of it."""
        if not config.in_place:
            return "it was loaded to be updated exactly"
        # One half of a cache with windows may be empty, and llama.cpp does not survive its shift.
        empty = any(re.search(r"cells, +0 layers", line) for line in lines)
        if empty or not self.can_truncate or not lib.llama_memory_can_shift(self.memory):
            return "llama.cpp cannot move what it holds"
        return update_problem(read_header(Path(config.model_path)), config.kv_type_k)

    def decode(self, tokens: array[int], start: int, count: int) -> bool:
        """Put `count` tokens from `start` on into the KV cache, behind what is there.

        Returns whether that was done: not if `abort` was called meanwhile. The logits of the last token
        are computed. Raises DoesNotFitError, EngineCrashError.
        """
        view = (lib.llama_token * count).from_buffer(tokens, start * tokens.itemsize)
        done = lib.llama_memory_seq_pos_max(self.memory, 0) + 1
        computed = self.compute(lib.llama_batch_get_one(view, count), count)
        if computed and self.guard is not None:
            lib.llama_memory_seq_cp(self.memory, 0, self.guard, done, -1)
        return computed

    def compute(self, batch: Any, count: int) -> bool:
        """Compute a `llama_batch` of `count` tokens; see `decode`."""
        code = lib.llama_decode(self._context, batch)
        if code == 2:
            return False
        if code == 1:
            raise DoesNotFitError(
                f"The KV cache has no room for {count:,} more tokens.", "Ask for a larger context."
            )
        if code != 0:
            raise EngineCrashError(
                f"llama.cpp could not compute a batch of {count:,} tokens (code {code}): "
                f"{LOG.reason('it gave no reason')}.",
                "Ask for a smaller context or a smaller ubatch if memory is short; otherwise report this.",
            )
        return True

    def abort(self) -> None:
        """Have a computation that runs in another thread end early, and every later one at once."""
        self._aborted[0] = b"\x01"

    def go_on(self) -> None:
        """Take `abort` back."""
        self._aborted[0] = b"\0"

    def truncate(self, count: int) -> bool:
        """Keep the first `count` tokens of the KV cache; False if this model cannot, which empties it."""
        if count and self.remove(count, -1):
            return True
        lib.llama_memory_clear(self.memory, False)
        return not count

    def remove(self, start: int, end: int) -> bool:
        """Remove tokens `start` to `end` from the KV cache, to its end if that is −1; False if it fails."""
        sequence = 0 if self.guard is None else -1  # any
        return bool(lib.llama_memory_seq_rm(self.memory, sequence, start, end))

    def state_bytes(self) -> int:
        """Size of the state of all tokens in the KV cache."""
        if self.guard is not None:
            return int(lib.llama_state_get_size(self._context))
        return int(lib.llama_state_seq_get_size(self._context, 0))

    def save_state(self, path: Path, tokens: array[int]) -> int:
        """Write the KV cache, which holds `tokens`, into a file; its size in bytes, 0 on failure."""
        view = (lib.llama_token * len(tokens)).from_buffer(tokens)
        file = os.fsencode(path)
        if self.guard is None:
            return int(lib.llama_state_seq_save_file(self._context, file, 0, view, len(tokens)))
        # Of one sequence, llama.cpp would save the last window only.
        saved = lib.llama_state_save_file(self._context, file, view, len(tokens))
        return path.stat().st_size if saved else 0

    def load_state(self, path: Path, count: int) -> bool:
        """Replace the KV cache by that of a file with `count` tokens; empty if that fails.

        llama.cpp aborts on a file that is cut short and believes one with other numbers in it: whoever
        calls this has compared it with a checksum.
        """
        lib.llama_memory_clear(self.memory, False)
        tokens = (lib.llama_token * count)()
        found = ctypes.c_size_t()
        file, size = os.fsencode(path), ctypes.byref(found)
        if self.guard is None:
            loaded = lib.llama_state_seq_load_file(self._context, file, 0, tokens, count, size)
        else:
            loaded = lib.llama_state_load_file(self._context, file, tokens, count, size)
        if loaded and found.value == count:
            return True
        lib.llama_memory_clear(self.memory, False)
        return False

    def sampler(self, sampling: Sampling, schema: str = "") -> Sampler:
        """Choose tokens by `sampling`, of JSON that `schema` describes if there is one; to be closed."""
        from m3cli.engine.sampling import Sampler

        return Sampler(self._context, self._vocab, sampling, self._form(schema) if schema else None)

    def _form(self, schema: str) -> Form:
        from m3cli.engine.form import Form, tokenizer_of

        if self._form_tokenizer is None:
            self._form_tokenizer = tokenizer_of(self._vocab)
        return Form(self._form_tokenizer, schema)

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """Bytes that a token adds to an answer; a control token none, unless it opens or ends thinking."""
        text = lib.llama_vocab_get_text(self._vocab, token)
        shown = text.decode("utf-8", "replace") in _SHOWN
        buffer = ctypes.create_string_buffer(max(64, len(text)))
        size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, shown)
        return buffer.raw[: max(size, 0)]

    def close(self) -> None:
        """Free the context, the weights and the adapters; may be called twice."""
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None
