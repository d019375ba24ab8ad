"""What would go wrong with a model in llama.cpp, told from its header alone.

MiniMax-M3 needs its sparse attention (MSA). Quants made before llama.cpp supported it, such as those
first published by unsloth, hold no indexer and cannot be loaded; an indexer that contradicts itself
would end in a failed assertion, which kills the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.errors import ModelError
from m3cli.model.shape import INDEXER_KEYS, ModelShape

if TYPE_CHECKING:
    from m3cli.model.header import Header
    from m3cli.model.shape import Indexer

MSA_ARCHITECTURE = "minimax-m3"
# The matrices and norms of the indexer, behind `blk.N.indexer.`, in every sparse layer.
_INDEXER_TENSORS = ("q_proj", "k_proj", "q_norm", "k_norm")
_SHOWN_NAMES = 3


def problem(header: Header, shape: ModelShape) -> ModelError | None:
    """Why llama.cpp would not run this model as it was made; None if nothing is known against it."""
    arch = shape.architecture
    if arch != MSA_ARCHITECTURE:
        return None
    keys = [f"{arch}.attention.indexer.{name}" for name in INDEXER_KEYS]
    tensors = [
        f"blk.{layer}.indexer.{name}.weight"
        for layer in range(shape.leading_dense_layers, shape.layers)
        for name in _INDEXER_TENSORS
    ]
    there = {tensor.name for tensor in header.tensors}
    missing = [key for key in keys if key not in header.fields]
    missing += [tensor for tensor in tensors if tensor not in there]
    if missing:
        return ModelError(
            f"{header.path} cannot be run: it lacks {_listing(missing)}, because it was made before "
            "llama.cpp supported MiniMax Sparse Attention.",
            "Download a quant that was made later, such as bartowski's or AesSedai's, or make one from the "
            "published checkpoint with m3 quantize convert.",
        )
    rotated = header.get_int(f"{arch}.rope.dimension_count") or shape.head_dim_k
    nonsense = _nonsense(shape.indexer, shape, rotated) if shape.indexer else ""
    if nonsense:
        return ModelError(
            f"{header.path} cannot be run: its sparse attention has {nonsense}.",
            "Choose another file of this model; this one was made wrong.",
        )
    return None


def dense_attention_error(name: str) -> ModelError:
    """The refusal of settings that would run the sparse attention model `name` densely."""
    return ModelError(
        f"The model {name} needs its sparse attention, but these settings would run it with dense "
        "attention, which gives wrong answers.",
        "Leave flash attention on; --allow-dense runs it all the same.",
    )


def _nonsense(indexer: Indexer, shape: ModelShape, rotated: int) -> str:
    """What llama.cpp's minimax-m3.cpp asserts or divides by, and what would select nothing."""
    if not 0 < indexer.block_size <= shape.context_length or indexer.block_size & (indexer.block_size - 1):
        return f"blocks of {indexer.block_size:,} tokens, which is no power of two within the context"
    if indexer.top_k <= 0:
        return f"{indexer.top_k:,} blocks a query"
    if not 0 <= indexer.local_blocks <= indexer.top_k:
        return f"{indexer.local_blocks:,} local blocks of {indexer.top_k:,} a query"
    if not 0 < rotated <= indexer.key_length:
        return f"indexer keys of {indexer.key_length:,} elements, of which {rotated:,} would be rotated"
    if shape.head_dim_k != shape.head_dim_v:
        return f"keys of {shape.head_dim_k:,} elements and values of {shape.head_dim_v:,}"
    if not shape.sparse_layers:
        return f"no layer: all {shape.layers:,} are dense"
    sparse_heads = set(shape.kv_heads[shape.leading_dense_layers :])
    if sparse_heads - {indexer.head_count}:
        return (
            f"{indexer.head_count:,} indexer heads for {'/'.join(map(str, sorted(sparse_heads)))} KV heads, "
            "and each needs one"
        )
    return ""


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
