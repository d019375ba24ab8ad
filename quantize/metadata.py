"""What a GGUF file says of its model beside the weights: shape, origin, licence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf

from m3cli.errors import ModelError
from quantize.hparams import ARCHITECTURE

if TYPE_CHECKING:
    from pathlib import Path

    from quantize.hparams import HParams


def add_hparams(writer: gguf.GGUFWriter, h: HParams) -> None:
    """Write what llama.cpp's minimax-m3.cpp reads in `load_arch_hparams`, and what every model has."""
    writer.add_vocab_size(h.vocab_size)
    writer.add_context_length(h.context_length)
    writer.add_block_count(h.layers)
    writer.add_leading_dense_block_count(h.dense_layers)
    writer.add_embedding_length(h.hidden)
    writer.add_feed_forward_length(h.dense_ff)
    writer.add_layer_norm_rms_eps(h.rms_eps)
    writer.add_head_count(h.heads)
    writer.add_head_count_kv(h.kv_heads)
    writer.add_key_length(h.head_dim)
    writer.add_value_length(h.head_dim)
    writer.add_rope_dimension_count(h.rotary_dim)
    writer.add_rope_freq_base(h.rope_theta)
    writer.add_expert_count(h.experts)
    writer.add_expert_used_count(h.experts_used)
    writer.add_expert_shared_count(h.shared_experts)
    writer.add_expert_feed_forward_length(h.expert_ff)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(h.expert_scale)
    indexer = f"{ARCHITECTURE}.attention.indexer"
    writer.add_uint32(f"{indexer}.head_count", h.index_heads)
    writer.add_uint32(f"{indexer}.key_length", h.index_dim)
    writer.add_uint32(f"{indexer}.top_k", h.index_top_k)
    writer.add_uint32(f"{indexer}.block_size", h.index_block)
    writer.add_uint32(f"{indexer}.local_blocks", h.index_local)


def add_metadata(writer: gguf.GGUFWriter, source: Path) -> tuple[str | None, list[str]]:
    """Write name, authors and licence, out of the model card (README.md) and the directory's name.

    Returns the licence, and notes for the user. Raises ModelError when the card cannot be read.
    """
    try:
        metadata = gguf.Metadata.load(model_path=source.resolve())
    except Exception as error:  # whatever YAML and the library's guesses may raise
        raise ModelError(
            f"The model card in {source} cannot be read: {error}.",
            "Take README.md from the published checkpoint.",
        ) from error
    writer.add_type(gguf.GGUFType.MODEL)
    if not metadata.license and (source / "LICENSE").is_file():
        text = (source / "LICENSE").read_bytes()[:4096].decode("utf-8", "replace")
        metadata.license = "other"
        metadata.license_name = next((line.strip() for line in text.splitlines() if line.strip()), "LICENSE")
    metadata.set_gguf_meta_model(writer)
    if metadata.license:
        return metadata.license_name or metadata.license, []
    note = (
        f"{source} holds no licence, neither in README.md nor in LICENSE, so the file will not state one; "
        "MiniMax-M3's has commercial conditions."
    )
    return None, [note]
