from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from m3cli.errors import ModelError
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from tests.gguf_files import LLAMA_KEYS, write_gguf, write_model
from tests.hugging_face import smollm2_path
from tests.model.test_preflight import INDEXER as INDEXER_PREFIX
from tests.model.test_preflight import write_m3

if TYPE_CHECKING:
    from pathlib import Path

INDEXER = {"head_count": 4, "key_length": 128, "top_k": 16, "block_size": 128, "local_blocks": 1}


def shape_of(path: Path) -> ModelShape:
    return ModelShape.from_header(read_header(path))


def test_facts_of_a_real_model() -> None:
    """The demo model's published facts come out of its header."""
    path = smollm2_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    shape = shape_of(path)
    assert (shape.architecture, shape.file_type, shape.license) == ("llama", "Q4_1", "apache-2.0")
    assert (shape.layers, shape.n_embd, shape.heads, shape.kv_heads) == (30, 576, 9, (3,) * 30)
    assert (shape.context_length, shape.vocab_size) == (8192, 49152)
    assert (shape.tokenizer_model, shape.tokenizer_pre) == ("gpt2", "smollm")
    assert shape.has_chat_template
    assert shape.indexer is None
    assert shape.parameters == 134_515_008
    assert shape.kv_bytes_per_token() == 30 * 3 * (64 + 64) * 2
    assert sum(shape.weight_bytes.values()) < shape.file_bytes == path.stat().st_size


def test_missing_key_is_named(tmp_path: Path) -> None:
    """A model without a key that llama.cpp needs says which."""
    for key in ("llama.block_count", "llama.embedding_length", "llama.context_length"):
        fields = {k: v for k, v in LLAMA_KEYS.items() if k != key}
        path = write_gguf(tmp_path / "lacking.gguf", fields)
        with pytest.raises(ModelError, match=key):
            shape_of(path)


@pytest.mark.parametrize("layers", [0, 1 << 20])
def test_impossible_layer_count_is_refused(tmp_path: Path, layers: int) -> None:
    """A header cannot make m3 build a list of a million layers."""
    with pytest.raises(ModelError, match=r"llama\.block_count"):
        shape_of(write_model(tmp_path / "odd.gguf", **{"llama.block_count": layers}))


def test_kv_heads_may_differ_by_layer(tmp_path: Path) -> None:
    """An array of KV heads gives each layer its own, and the cache is their sum."""
    fields: dict[str, Any] = {
        **LLAMA_KEYS,
        "llama.block_count": 3,
        "llama.attention.head_count_kv": [4, 0, 2],
    }
    shape = shape_of(write_gguf(tmp_path / "uneven.gguf", fields))
    assert shape.kv_heads == (4, 0, 2)
    assert shape.kv_bytes_per_token("f16", "f16") == (4 + 0 + 2) * 16 * 2 * 2
    fields["llama.attention.head_count_kv"] = [4, 2]
    with pytest.raises(ModelError, match="head_count_kv"):
        shape_of(write_gguf(tmp_path / "short.gguf", fields))


def test_quantized_cache_counts_whole_blocks(tmp_path: Path) -> None:
    """q8_0 takes 34 bytes and q4_0 18 bytes for each 32 elements."""
    fields = {**LLAMA_KEYS, "llama.attention.key_length": 128, "llama.attention.value_length": 64}
    shape = shape_of(write_gguf(tmp_path / "wide.gguf", fields))
    assert shape.kv_bytes_per_token("q8_0", "q4_0") == 2 * (2 * 128 // 32 * 34 + 2 * 64 // 32 * 18)
    with pytest.raises(ValueError, match="q9"):
        shape.kv_bytes_per_token("q9", "f16")


def test_minimax_m3_keys(tmp_path: Path) -> None:
    """Experts, indexer and licence of an M3 header come out; without indexer keys there is none."""
    keys = {key.replace("llama", "minimax-m3"): value for key, value in LLAMA_KEYS.items()}
    keys |= {
        "minimax-m3.expert_count": 128,
        "minimax-m3.expert_used_count": 4,
        "general.license": "other",
        "general.license.name": "minimax-community",
        "general.license.link": "https://example.org/LICENSE",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q2_K),
    }
    bare = shape_of(write_gguf(tmp_path / "bare.gguf", keys, arch="minimax-m3"))
    assert (bare.experts, bare.experts_used, bare.indexer) == (128, 4, None)
    assert bare.license == "minimax-community (https://example.org/LICENSE)"
    assert bare.file_type == "Q2_K"
    keys |= {f"minimax-m3.attention.indexer.{key}": value for key, value in INDEXER.items()}
    full = shape_of(write_gguf(tmp_path / "full.gguf", keys, arch="minimax-m3"))
    assert full.indexer is not None
    assert {key: getattr(full.indexer, key) for key in INDEXER} == INDEXER


def test_weights_are_summed_by_class(tmp_path: Path) -> None:
    """Routed experts, embeddings and output are told from what every token uses."""
    tensors = {
        "token_embd.weight": np.zeros((8, 64), np.float32),
        "output.weight": np.zeros((8, 64), np.float16),
        "output_norm.weight": np.zeros(64, np.float32),
        "blk.1.ffn_gate_exps.weight": np.zeros((4, 2, 64), np.float16),
        "blk.1.ffn_gate_shexp.weight": np.zeros((2, 64), np.float16),
        "blk.1.ffn_gate_inp.weight": np.zeros((4, 64), np.float32),
    }
    shape = shape_of(write_gguf(tmp_path / "moe.gguf", LLAMA_KEYS, tensors))
    assert shape.weight_bytes == {
        "dense": 64 * 4 + 2 * 64 * 2 + 4 * 64 * 4,
        "experts": 4 * 2 * 64 * 2,
        "embeddings": 8 * 64 * 4,
        "output": 8 * 64 * 2,
    }
    assert shape.parameters == sum(tensor.size for tensor in tensors.values())


def test_cache_of_the_real_minimax_m3(tmp_path: Path) -> None:
    """A token takes what llama.cpp was measured to allocate: K and V, and the indexer's K and unused V."""
    shape = shape_of(write_m3(tmp_path / "m3.gguf"))
    assert shape.kv_bytes_per_token("f16", "f16") == 152_064
    assert shape.kv_bytes_per_token("q8_0", "q8_0") == 80_784
    assert shape.kv_bytes_per_token("q4_0", "q4_0") == 42_768
    per_million = shape.kv_bytes_per_token("q8_0", "q8_0") << 20
    assert per_million == (65_280 + 15_504) << 20  # MiB, as the log says for 1,048,576 tokens


def test_sparse_layers_are_those_with_an_indexer(tmp_path: Path) -> None:
    """All layers but the leading dense ones are sparse, and a query attends 16 blocks of 128 in each."""
    shape = shape_of(write_m3(tmp_path / "m3.gguf"))
    assert (shape.layers, shape.leading_dense_layers, shape.sparse_layers) == (60, 3, 57)
    assert shape.indexer is not None
    assert shape.indexer.attended_tokens == 16 * 128
    all_sparse = shape_of(write_m3(tmp_path / "all.gguf", {"minimax-m3.leading_dense_block_count": None}))
    assert all_sparse.sparse_layers == 60
    beyond = shape_of(write_m3(tmp_path / "beyond.gguf", {"minimax-m3.leading_dense_block_count": 99}))
    assert (beyond.leading_dense_layers, beyond.sparse_layers) == (60, 0)


def test_without_an_indexer_no_layer_is_sparse(tmp_path: Path) -> None:
    """A key short of an indexer there is none, and only the plain cache is counted."""
    shape = shape_of(write_m3(tmp_path / "old.gguf", {f"{INDEXER_PREFIX}local_blocks": None}))
    assert (shape.indexer, shape.sparse_layers) == (None, 0)
    assert shape.kv_bytes_per_token() == 60 * 4 * (128 + 128) * 2
