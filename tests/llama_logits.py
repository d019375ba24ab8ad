"""Logits of every position, straight from llama.cpp: what the parity tests compare with transformers'."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.llama_library import lib

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from m3cli.engine.llama import Model


def llama_logits(
    path: Path, tokens: Sequence[int], batches: Sequence[int], *, flash_attention: bool = True
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Feed `tokens` in batches of the given sizes; return logits of shape [tokens, vocabulary]."""
    assert sum(batches) == len(tokens)
    model_params = lib.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx = len(tokens) + 64
    params.n_batch = params.n_ubatch = params.n_outputs_max = max(batches)
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.n_seq_max, params.kv_unified = 1, False
    params.n_threads = params.n_threads_batch = 2
    params.flash_attn_type = (
        lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    context = lib.llama_init_from_model(model, params)
    assert context
    result = np.empty((len(tokens), vocabulary), np.float32)
    batch = lib.llama_batch_init(max(batches), 0, 1)
    try:
        done = 0
        for size in batches:
            batch.n_tokens = size
            for i in range(size):
                batch.token[i], batch.pos[i] = tokens[done + i], done + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            assert lib.llama_decode(context, batch) == 0
            row = lib.llama_get_logits(context)
            result[done : done + size] = np.ctypeslib.as_array(
                ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (size, vocabulary)
            )
            done += size
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
    return result


def last_logits(model: Model) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Those of the token that was computed last."""
    row = lib.llama_get_logits_ith(model._context, -1)
    return np.array(np.ctypeslib.as_array(row, (model.n_vocab,)))


def log_softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log probabilities in float64, over the last axis."""
    below = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
    return result
