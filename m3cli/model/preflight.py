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
    from collections.abc import Collection

    from m3cli.model.header import Header
    from m3cli.model.shape import Indexer

MSA_ARCHITECTURE = "minimax-m3"
# The matrices and norms of the indexer, behind `blk.N.indexer.`, in every sparse layer.
_INDEXER_TENSORS = ("q_proj", "k_proj", "q_norm", "k_norm")
_SHOWN_NAMES = 3
# Architectures of which every layer rotates its keys, and nothing else is done to them by position: read in
# the graphs of llama.cpp 0c1e570, whose shift rotates the keys of all layers.
_ROTATED = frozenset(
    (
        *("gemma", "gemma2", "gemma3", "internlm2", "llama", "minimax-m2", "phi3", "qwen2", "qwen2moe"),
        *("qwen3", "qwen3moe", "seed_oss", "starcoder2"),
    )
)
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024


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
    wrong = shape.indexer and nonsense(
        shape.indexer,
        layers=shape.layers,
        dense_layers=shape.leading_dense_layers,
        heads=shape.heads,
        kv_heads=set(shape.kv_heads[shape.leading_dense_layers :]),
        context_length=shape.context_length,
        rotated=header.get_int(f"{arch}.rope.dimension_count") or shape.head_dim_k,
        experts=shape.experts,
        experts_used=shape.experts_used,
    )
    if not wrong and shape.head_dim_k != shape.head_dim_v:
        wrong = f"keys of {shape.head_dim_k:,} elements and values of {shape.head_dim_v:,}"
    if wrong:
        return ModelError(
            f"{header.path} cannot be run: it has {wrong}.",
            "Choose another file of this model; this one was made wrong.",
        )
    return None


def update_problem(header: Header, kv_type_k: str) -> str:
    """Why a context with keys of this type cannot be updated in place, if it cannot.

    Updates move keys to other positions: llama.cpp rotates them by the difference. Where keys are scaled it
    scales all of them again; quantized ones lose precision, and some crash it.
    """
    architecture = header.architecture
    if architecture == MSA_ARCHITECTURE:
        return "llama.cpp runs its sparse attention for one sequence only, and an update needs two"
    if architecture not in _ROTATED:
        return (
            f"m3 does not know that keys of the architecture {architecture} can be moved to other positions"
        )
    if kv_type_k != "f16":
        return f"keys of type {kv_type_k} cannot be moved without loss; those of --kv-type f16 can"
    scaling = f"{architecture}.rope.scaling"
    factor = header.get_float(f"{scaling}.attn_factor")
    if header.get_str(f"{scaling}.type") == "yarn" or (factor is not None and factor != 1):
        return "its keys are scaled (YaRN), and would be once more each time that they are moved"
    return ""


def dense_attention_error(name: str) -> ModelError:
    """The refusal of settings that would run the sparse attention model `name` densely."""
    return ModelError(
        f"The model {name} needs its sparse attention, but these settings would run it with dense "
        "attention, which gives wrong answers.",
        "Leave flash attention on; --allow-dense runs it all the same.",
    )


def nonsense(
    indexer: Indexer,
    *,
    layers: int,
    dense_layers: int,
    heads: int,
    kv_heads: Collection[int],
    context_length: int,
    rotated: int,
    experts: int,
    experts_used: int,
) -> str:
    """What of a MiniMax-M3 llama.cpp would abort at, or select the wrong blocks with; empty if nothing.

    Source: minimax-m3.cpp, and LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama-hparams.h. `kv_heads` are
    those of the sparse layers, `rotated` the channels of a head that are; sizes are in elements and tokens.
    """
    if not 0 < layers <= _MAX_LAYERS:
        return f"{layers:,} layers; llama.cpp takes {_MAX_LAYERS}"
    if dense_layers >= layers:
        return f"no sparse layer: all {layers:,} are dense"
    if not 0 < experts <= _MAX_EXPERTS or not 0 < experts_used <= experts:
        return f"{experts:,} experts, of which a token would use {experts_used:,}"
    if any(count <= 0 or heads % count for count in kv_heads):
        return f"{heads:,} heads, no multiple of {_numbers(kv_heads)} KV heads"
    if set(kv_heads) - {indexer.head_count}:
        return f"{indexer.head_count:,} indexer heads for {_numbers(kv_heads)} KV heads, and each needs one"
    if not 0 < rotated <= indexer.key_length:
        return f"indexer keys of {indexer.key_length:,} elements, of which {rotated:,} would be rotated"
    if not 0 < indexer.block_size <= context_length or indexer.block_size & (indexer.block_size - 1):
        return f"blocks of {indexer.block_size:,} tokens, which is no power of two within the context"
    if indexer.top_k <= 0:
        return f"{indexer.top_k:,} blocks a query"
    if not 0 <= indexer.local_blocks <= indexer.top_k:
        return f"{indexer.local_blocks:,} local blocks of {indexer.top_k:,} a query"
    return ""


def _numbers(values: Collection[int]) -> str:
    return "/".join(f"{value:,}" for value in sorted(set(values)))


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
