"""The only module that imports llama_cpp: load, prefill, sample, and what this build is.

It is meant to run in the worker process, where a native crash is an error and not a dead shell.
Only the low-level bindings are used. llama.cpp's log goes to a short memory of its last
warnings, from which the errors quote; nothing is printed.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import re
import time
from array import array
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.engine.events import THINK_TAGS, Finished, Loaded, LoadProgress, Prefilled, Token
from m3cli.errors import DoesNotFitError, EngineCrashError, MachineError, ModelError, UsageError
from m3cli.model.preflight import MSA_ARCHITECTURE, dense_attention_error

try:
    import llama_cpp.llama_cpp
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    raise MachineError(
        f"The library llama-cpp-python cannot be loaded: {str(error).strip().rstrip('.')}.",
        "Reinstall it with 'pip install --force-reinstall --no-cache-dir llama-cpp-python'; building it "
        "needs a C++ compiler.",
    ) from error

lib: Any = llama_cpp.llama_cpp  # the low-level bindings; llama_cpp.Llama is not used

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.engine.events import Attention, EngineConfig, Event, Request, Sampling

_KV_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}

_SHOWN = {*THINK_TAGS, *THINK_TAGS.values()}

_FIRST_BATCH = 32  # tokens
_PENALTY_WINDOW = 64  # tokens, llama.cpp's default

_OUT_OF_MEMORY = re.compile(r"allocat|out of memory|not enough memory|mlock|mmap failed", re.IGNORECASE)

_LOG_WARNING, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5  # enum ggml_log_level of ggml.h


class _Log:
    """The last warnings and errors that llama.cpp logged; its chatter would push them out."""

    def __init__(self, lines: int = 200) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=lines)
        self._kept = False  # whether the line that may be continued is one of ours
        self._callback = lib.llama_log_callback(self._add)  # ctypes keeps no reference to it
        lib.llama_log_set(self._callback, ctypes.c_void_p(None))

    def _add(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level != _LOG_CONTINUED:
            self._kept = level in (_LOG_WARNING, _LOG_ERROR)
            if self._kept:
                self._lines.append((level, line))
        elif self._kept and self._lines:
            level, begun = self._lines.pop()
            self._lines.append((level, begun + line))

    def clear(self) -> None:
        self._lines.clear()

    def __contains__(self, words: str) -> bool:
        return any(words in line for _, line in self._lines)

    def reason(self, otherwise: str) -> str:
        """Say what went wrong in llama.cpp's words, without its function names and the full stop."""
        errors = [re.sub(r"^\w+: ", "", line.strip()) for level, line in self._lines if level == _LOG_ERROR]
        for line in errors:
            words = line.partition("error loading model: ")[2].rstrip(".")
            if words and "failed to load model from" not in words:
                return words
        return errors[0].rstrip(".") if errors else otherwise


_LOG = _Log()
# Architectures that fell back to dense attention for a reason that m3 does not foresee. llama.cpp warns
# of it once a process, and a worker loads more than one model.
_FELL_BACK: set[str] = set()
lib.llama_backend_init()


def version() -> str:
    """Version of the bindings and of the llama.cpp in them."""
    return f"llama-cpp-python {llama_cpp.__version__} (llama.cpp {lib.llama_version().decode()})"


def physical_cores() -> int:
    """Cores that this process may run on, hyper-threads counted once."""
    try:
        allowed = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(cpu)).read_text(encoding="ascii") for cpu in allowed})
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def load(path: str, params: Any) -> Any:
    """Load a `llama_model`. Raises ModelError, or MachineError when memory is what lacks."""
    _LOG.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        return model
    reason = _LOG.reason("llama.cpp gave no reason")
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
        raise MachineError(
            f"The weights of {name} do not fit in memory: {reason}.",
            "Take a smaller quant of the model or put fewer layers on the GPU.",
        )
    raise ModelError(
        f"The model {name} cannot be loaded: {reason}.",
        "The file may be incomplete or made for another version of llama.cpp; download it again or "
        "upgrade llama-cpp-python.",
    )


class Model:
    """A loaded model and its context: one sequence, one prompt at a time.

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
        self._context = None
        self._model = self._load_weights(config, extra_buffers, progress)
        self._vocab = lib.llama_model_get_vocab(self._model)
        try:
            self._context = self._make_context(config)
            self.attention = self._attention(config)
            if self.attention == "dense" and not config.allow_dense:
                raise dense_attention_error(Path(config.model_path).name)
            self._refuse_what_cannot_generate(Path(config.model_path).name)
        except BaseException:
            self.close()
            raise
        self._memory = lib.llama_get_memory(self._context)
        self.n_ctx = int(lib.llama_n_ctx(self._context))
        self._n_batch = int(lib.llama_n_batch(self._context))
        self._n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        description = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, description, len(description))
        self.description = description.value.decode("utf-8", "replace")
        self.load_seconds = time.monotonic() - begin

    @staticmethod
    def _load_weights(
        config: EngineConfig, extra_buffers: bool, progress: Callable[[LoadProgress], None] | None
    ) -> Any:
        percent = -1

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def on_progress(fraction: float, _user_data: object) -> bool:
            nonlocal percent
            if progress is not None and int(fraction * 100) > percent:
                percent = int(fraction * 100)
                progress(LoadProgress(fraction))
            return True

        params = lib.llama_model_default_params()
        params.n_gpu_layers = config.gpu_layers  # negative: all of them
        params.use_extra_bufts = extra_buffers
        params.progress_callback = on_progress
        return load(config.model_path, params)

    def _make_context(self, config: EngineConfig) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = config.n_ctx
        params.n_seq_max = 1  # with more, MSA needs a cache that is not unified
        params.kv_unified = False
        params.n_batch = config.n_batch
        params.n_ubatch = config.n_ubatch
        params.n_outputs_max = 1  # logits of one position: a large vocabulary times n_batch is 400 MB
        params.n_threads = params.n_threads_batch = config.threads or physical_cores()
        params.type_k = _KV_TYPES[config.kv_type_k]
        params.type_v = _KV_TYPES[config.kv_type_v]
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if config.flash_attention
            else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        _LOG.clear()
        context = lib.llama_init_from_model(self._model, params)
        if context:
            return context
        reason = _LOG.reason("llama.cpp gave no reason")
        asked = (
            f"A context of {config.n_ctx:,} tokens (K {config.kv_type_k}, V {config.kv_type_v}, "
            f"ubatch {config.n_ubatch:,}) could not be made: {reason}."
        )
        if _OUT_OF_MEMORY.search(reason):
            raise MachineError(asked, "Ask for a smaller context, a smaller ubatch or a smaller KV type.")
        raise MachineError(asked, "Try KV type f16 with flash attention on.")

    def _attention(self, config: EngineConfig) -> Attention:
        """Which attention this context computes; called when the context was just made."""
        value = ctypes.create_string_buffer(128)
        lib.llama_model_meta_val_str(self._model, b"general.architecture", value, len(value))
        architecture = value.value.decode("utf-8", "replace")
        has_msa = architecture == MSA_ARCHITECTURE
        if has_msa and not config.flash_attention:  # MSA is written for flash attention alone
            return "dense"
        if "running DENSE attention" in _LOG:
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

    def generate(self, request: Request) -> Iterator[Event]:
        """Continue the prompt: `Loaded Prefilled+ Token* Finished`. Starts from an empty KV cache.

        The token that ends the generation is streamed and counted too; its text is empty or what
        was left of a broken character. Generation also ends, as `length`, when the context is full.
        Raises DoesNotFitError when the prompt is longer than the context, UsageError when it is
        empty, ModelError when it holds ids that the vocabulary does not have.
        """
        yield Loaded(self.load_seconds, self.n_ctx, self.description, self.attention)
        self.load_seconds = 0.0  # the next request finds it loaded

        # 1. Refuse what cannot work, before hours of prefill.
        tokens = array("i", request.tokens)
        self._check(tokens)

        # 2. Prefill, one logical batch at a time; only the last token's logits are computed. The
        #    first batch is small: if llama.cpp crashes on this CPU, it does so at once.
        lib.llama_memory_clear(self._memory, False)
        total = len(tokens)
        begin = time.monotonic()
        yield Prefilled(0, total, 0.0)
        done = 0
        while done < total:
            count = min(self._n_batch if done else _FIRST_BATCH, self._n_batch, total - done)
            self._decode(tokens, done, count)
            done += count
            yield Prefilled(done, total, time.monotonic() - begin)
        prefill_seconds = time.monotonic() - begin

        # 3. Decode, one token at a time. The last one is sampled but needs no place in the cache.
        begin = time.monotonic()
        limit = min(request.max_tokens, self.n_ctx - total + 1)
        reason: Any = "length"
        generated = 0
        text = codecs.getincrementaldecoder("utf-8")("replace")
        sampler = _sampler(request.sampling, self._n_vocab)
        try:
            while generated < limit:
                token = lib.llama_sampler_sample(sampler, self._context, -1)
                generated += 1
                if lib.llama_vocab_is_eog(self._vocab, token):
                    reason = "stop"
                    yield Token(token, text.decode(b"", final=True))
                    break
                yield Token(token, text.decode(self._piece(token), final=generated == limit))
                if generated < limit:
                    self._decode(array("i", [token]), 0, 1)
        finally:
            lib.llama_sampler_free(sampler)
        yield Finished(reason, total, generated, prefill_seconds, time.monotonic() - begin)

    def _check(self, tokens: array[int]) -> None:
        if not tokens:
            raise UsageError("The prompt is empty.", "Give a question or files that hold text.")
        if len(tokens) > self.n_ctx:
            raise DoesNotFitError(
                f"The prompt has {len(tokens):,} tokens, but the context holds {self.n_ctx:,}.",
                "Ask for a larger context or give fewer files.",
            )
        if min(tokens) < 0 or max(tokens) >= self._n_vocab:
            raise ModelError(
                f"The prompt holds token ids beyond the {self._n_vocab:,} of the model's vocabulary.",
                "The prompt was made with the tokenizer of another model; use the model's own.",
            )

    def _decode(self, tokens: array[int], start: int, count: int) -> None:
        """Put `count` tokens from `start` on into the KV cache, behind what is there."""
        view = (lib.llama_token * count).from_buffer(tokens, start * tokens.itemsize)
        code = lib.llama_decode(self._context, lib.llama_batch_get_one(view, count))
        if code == 1:
            raise DoesNotFitError(
                f"The KV cache has no room for {count:,} more tokens.", "Ask for a larger context."
            )
        if code != 0:
            raise EngineCrashError(
                f"llama.cpp could not compute a batch of {count:,} tokens (code {code}): "
                f"{_LOG.reason('it gave no reason')}.",
                "Ask for a smaller context or a smaller ubatch if memory is short; otherwise report this.",
            )

    def _piece(self, token: int) -> bytes:
        text = lib.llama_vocab_get_text(self._vocab, token)
        shown = text.decode("utf-8", "replace") in _SHOWN
        buffer = ctypes.create_string_buffer(max(64, len(text)))
        size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, shown)
        return buffer.raw[: max(size, 0)]

    def close(self) -> None:
        """Free the context and the weights; may be called twice."""
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


def _sampler(sampling: Sampling, n_vocab: int) -> Any:
    """Make a sampler chain in llama.cpp's usual order; the caller frees it."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if sampling.repeat_penalty != 1:
        penalties = lib.llama_sampler_init_penalties(
            n_vocab, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
        )
        lib.llama_sampler_chain_add(chain, penalties)
    if sampling.temperature <= 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
    # llama.cpp takes its default seed for "random".
    seed = sampling.seed % lib.LLAMA_DEFAULT_SEED
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    return chain


def system_facts() -> dict[str, Any]:
    """Describe this build of llama.cpp and what it sees.

    `version`, `system_info`, `gpu_offload`, `cores`, and `devices`: a list of `name`,
    `description`, `free` and `total` memory in bytes.
    """
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    for function in (libggml.ggml_backend_dev_name, libggml.ggml_backend_dev_description):
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_char_p
    libggml.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    libggml.ggml_backend_dev_memory.restype = None
    devices = []
    for index in range(libggml.ggml_backend_dev_count()):
        device = libggml.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        devices.append(
            {
                "name": libggml.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                "description": libggml.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                "free": free.value,
                "total": total.value,
            }
        )
    return {
        "version": version(),
        "system_info": lib.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
        "gpu_offload": bool(lib.llama_supports_gpu_offload()),
        "cores": physical_cores(),
        "devices": devices,
    }
