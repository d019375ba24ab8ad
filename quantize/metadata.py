"""What a GGUF file says of its model beside the weights: shape, origin, licence."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

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
    """Write name, authors and licence, out of the model card (README.md).

    Returns the licence, and notes for the user. Raises ModelError when a file cannot be read, or the
    licence in it is no text; what else is of a wrong type is left out.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    written = writer.kv_data[0]
    try:
        metadata = gguf.Metadata.load(model_path=source)
        # What the library guesses from the name of a directory, which may be a commit's in a hub cache.
        metadata.name = _model_name(source)
        metadata.finetune = metadata.basename = metadata.size_label = None
        if not metadata.license and (source / "LICENSE").is_file():
            text = (source / "LICENSE").read_bytes()[:4096].decode("utf-8", "replace")
            first = next((line.strip() for line in text.splitlines() if line.strip()), "LICENSE")
            metadata.license, metadata.license_name = "other", metadata.license_name or first
        metadata.set_gguf_meta_model(writer)
        _drop_odd_types(written)
    except Exception as error:  # whatever YAML and the library's guesses may raise
        raise ModelError(
            f"Name and licence of {source} cannot be read: {error}.",
            "Take README.md and LICENSE from the published checkpoint.",
        ) from error
    for key in (gguf.Keys.General.LICENSE_NAME, gguf.Keys.General.LICENSE):
        if key in written:
            written[key].value = " ".join(str(written[key].value).split())
            return written[key].value, []
    note = (
        f"{source} holds no licence, neither in README.md nor in LICENSE, so the file will not state one; "
        "MiniMax-M3's has commercial conditions."
    )
    return None, [note]


def _model_name(source: Path) -> str:
    """The published name: that of the card, or of the repository in a hub cache, or of the model."""
    card = gguf.Metadata.load_model_card(source)
    for key in ("name", "model_name"):
        if isinstance(card.get(key), str) and card[key].strip():
            return str(card[key])
    repository = source.resolve().parent.parent.name if source.resolve().parent.name == "snapshots" else ""
    if repository.startswith("models--"):
        return repository.rpartition("--")[2].replace("-", " ")
    return "MiniMax M3"


def _drop_odd_types(entries: dict[str, gguf.GGUFValue]) -> None:
    """Drop what GGUF cannot store: the library passes on whatever type stands in YAML or JSON."""
    for key, entry in list(entries.items()):
        entry.value = _storable(entry.value, entry.type)
        if entry.value is None:
            if key.startswith(gguf.Keys.General.LICENSE):
                raise ValueError("the licence in README.md is no text")
            del entries[key]


def _storable(value: Any, kind: gguf.GGUFValueType) -> Any:
    """Return `value` as GGUF can store it, or None."""
    if kind == gguf.GGUFValueType.ARRAY:
        texts = (_storable(entry, gguf.GGUFValueType.STRING) for entry in value)
        return [text for text in texts if text is not None] or None
    if kind == gguf.GGUFValueType.STRING:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, date)):
            return None
        return str(value).encode("utf-8", "replace").decode()  # YAML's `version: 1.0` is a number
    if kind == gguf.GGUFValueType.FLOAT32:
        return value if type(value) in (int, float) and abs(value) < 1e30 else None
    if kind == gguf.GGUFValueType.INT32:
        return value if type(value) is int and abs(value) < 1 << 31 else None
    return value
