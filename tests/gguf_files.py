"""Small synthetic GGUF files for tests, written by the gguf package: not by the code under test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

LLAMA_KEYS: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def write_gguf(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    arch: str = "llama",
) -> Path:
    """Write keys and tensors to `path`.

    A value's type follows Python's: bool, int (uint32), float (float32), str, list; for another
    width pass a tuple `(value, gguf.GGUFValueType)`. Tensors are float32 or float16 arrays, or uint8
    arrays of Q8_0 blocks (34 bytes for 32 weights).
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields or {}).items():
        if isinstance(value, tuple):
            writer.add_key_value(key, value[0], value[1])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data in (tensors or {}).items():
        quantized = gguf.GGMLQuantizationType.Q8_0 if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, **fields: Any) -> Path:
    """Write a tiny model with two tensors: an embedding in float32 and a matrix in Q8_0."""
    tensors = {
        "token_embd.weight": np.zeros((8, 64), np.float32),
        "blk.0.ffn_down.weight": np.zeros((64, 2 * 34), np.uint8),
    }
    return write_gguf(path, {**LLAMA_KEYS, **fields}, tensors)


def write_vocabulary(
    path: Path,
    pre: str,
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
    **fields: Any,
) -> Path:
    """Write a file that holds a byte-level BPE vocabulary and no tensors."""
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.merges": list(merges),
    }
    return write_gguf(path, {**LLAMA_KEYS, **vocabulary, **fields})
