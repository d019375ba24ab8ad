"""Choosing the next token, by its likelihood and by the form that the answer has to have.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.llama_library import lib

if TYPE_CHECKING:
    from m3cli.engine.events import Sampling
    from m3cli.engine.form import Form

_PENALTY_WINDOW = 64  # tokens, llama.cpp's default
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """Chooses the next token from the logits that the last computation left in `context`.

    With a `form`, only tokens that it allows.
    """

    def __init__(self, context: Any, vocab: Any, sampling: Sampling, form: Form | None = None) -> None:
        self._context = context
        self._size = int(lib.llama_vocab_n_tokens(vocab))
        self._form = form
        self._chain = _chain(sampling, self._size)

    def sample(self) -> int:
        """Choose, and remember the choice for the repeat penalty and the form."""
        if self._form is None:
            return int(lib.llama_sampler_sample(self._chain, self._context, -1))
        candidates = np.zeros(self._size, _CANDIDATE)
        candidates["id"] = np.arange(self._size, dtype=np.int32)
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (self._size,))
        candidates["logit"] = np.where(self._form.allowed()[: self._size], logits, -np.inf)
        data = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(data, self._size, -1, False)
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        lib.llama_sampler_accept(self._chain, token)
        self._form.accept(token)
        return token

    def close(self) -> None:
        """Free it; may be called twice."""
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None


def _chain(sampling: Sampling, n_vocab: int) -> Any:
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
