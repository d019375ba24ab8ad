"""The table of tensors covers a checkpoint exactly, and says what llama.cpp expects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open

from quantize.hparams import HParams, read_hparams
from quantize.names import mappings, skipped_kind, text_name

if TYPE_CHECKING:
    from pathlib import Path

# No two dimensions of tensors are the same, so that none can be taken for another.
SMALL = HParams(
    layers=3,
    dense_layers=1,
    hidden=32,
    vocab_size=44,
    context_length=512,
    rms_eps=1e-6,
    heads=4,
    kv_heads=2,
    head_dim=10,
    rotary_dim=4,
    rope_theta=5e6,
    dense_ff=48,
    experts=5,
    experts_used=2,
    expert_ff=24,
    shared_experts=1,
    expert_scale=2.0,
    index_heads=2,
    index_dim=6,
    index_top_k=4,
    index_block=16,
    index_local=1,
)
TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "hidden_size": 32,
    "vocab_size": 44,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.4},
    "dense_intermediate_size": 48,
    "intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_topk_blocks": 4,
    "index_block_size": 16,
    "index_local_blocks": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION_CONFIG = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}

# A layer as llama.cpp's minimax-m3.cpp creates it in `load_arch_tensors`, under llama-arch.cpp's names:
# name → shape (which there stands the other way round) and role.
ATTENTION = {
    "attn_norm.weight": ((32,), "norm"),
    "attn_q.weight": ((40, 32), "matrix"),
    "attn_k.weight": ((20, 32), "matrix"),
    "attn_v.weight": ((20, 32), "matrix"),
    "attn_output.weight": ((32, 40), "matrix"),
    "attn_q_norm.weight": ((10,), "norm"),
    "attn_k_norm.weight": ((10,), "norm"),
    "ffn_norm.weight": ((32,), "norm"),
}
DENSE_LAYER = ATTENTION | {
    "ffn_gate.weight": ((48, 32), "matrix"),
    "ffn_up.weight": ((48, 32), "matrix"),
    "ffn_down.weight": ((32, 48), "matrix"),
}
SPARSE_LAYER = ATTENTION | {
    "indexer.q_proj.weight": ((12, 32), "exact"),
    "indexer.k_proj.weight": ((6, 32), "exact"),
    "indexer.q_norm.weight": ((6,), "norm"),
    "indexer.k_norm.weight": ((6,), "norm"),
    "ffn_gate_inp.weight": ((5, 32), "exact"),
    "exp_probs_b.bias": ((5,), "exact"),
    "ffn_gate_exps.weight": ((5, 24, 32), "matrix"),
    "ffn_up_exps.weight": ((5, 24, 32), "matrix"),
    "ffn_down_exps.weight": ((5, 32, 24), "matrix"),
    "ffn_gate_shexp.weight": ((24, 32), "matrix"),
    "ffn_up_shexp.weight": ((24, 32), "matrix"),
    "ffn_down_shexp.weight": ((32, 24), "matrix"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random M3 with text and vision model, as transformers saves it."""
    from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

    directory = tmp_path_factory.mktemp("checkpoint")
    config = MiniMaxM3VLConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, projector_hidden_size=20)
    MiniMaxM3SparseForConditionalGeneration(config).save_pretrained(directory)
    return directory


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors of a checkpoint in one file."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_the_sources_are_exactly_the_text_model_s_tensors(checkpoint: Path) -> None:
    """Every tensor of the text model that transformers saves has its place, and none is made up."""
    assert read_hparams(checkpoint) == SMALL
    saved = {text_name(name): shape for name, shape in stored(checkpoint).items() if not skipped_kind(name)}
    wanted = [(source, mapping.shape) for mapping in mappings(SMALL) for source in mapping.sources]
    assert dict(wanted) == saved
    assert len(wanted) == len(saved)  # no source is used twice


def test_the_vision_model_is_recognised(checkpoint: Path) -> None:
    """What is saved outside the language model is vision, and nothing inside it is."""
    kinds = {name: skipped_kind(name) for name in stored(checkpoint)}
    assert {name for name, kind in kinds.items() if kind is None} == {
        name for name in kinds if name.startswith("language_model.")
    }
    assert set(kinds.values()) == {None, "vision"}
    assert {name.split(".")[0] for name, kind in kinds.items() if kind} == {
        "vision_tower",
        "multi_modal_projector",
        "patch_merge_mlp",
    }


def test_the_gguf_file_holds_what_llama_cpp_creates() -> None:
    """Names, shapes and roles of each layer are those written out above, and nothing is there twice."""
    wanted = {
        "token_embd.weight": ((44, 32), "matrix"),
        "output_norm.weight": ((32,), "norm"),
        "output.weight": ((44, 32), "matrix"),
    }
    for layer, tensors in enumerate((DENSE_LAYER, SPARSE_LAYER, SPARSE_LAYER)):
        wanted |= {f"blk.{layer}.{name}": tensor for name, tensor in tensors.items()}
    made = mappings(SMALL)
    assert {mapping.name: (mapping.out_shape, mapping.role) for mapping in made} == wanted
    assert len(made) == len(wanted)


def test_experts_keep_their_order_and_their_matrices() -> None:
    """The experts stand in one tensor by number; w1 is the gate, w3 goes up and w2 comes down."""
    sources = {mapping.name: mapping.sources for mapping in mappings(SMALL)}
    for name, matrix in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        assert sources[f"blk.2.ffn_{name}_exps.weight"] == tuple(
            f"layers.2.block_sparse_moe.experts.{expert}.{matrix}.weight" for expert in range(5)
        )


def test_every_norm_of_the_checkpoint_is_gemma_style() -> None:
    """1 is added to whatever llama.cpp's converter adds it to: all names that end in `norm.weight`."""
    for mapping in mappings(SMALL):
        assert (mapping.role == "norm") == mapping.sources[0].endswith("norm.weight")


@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "language_model.", "model.language_model.", "model.", ""]
)
@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj.weight", "embed_tokens.weight", "norm.weight", "lm_head.weight"]
)
def test_releases_differ_in_their_prefix(prefix: str, name: str) -> None:
    """Whatever stands before a tensor of the text model is stripped, and nothing else."""
    assert text_name(prefix + name) == name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.vision_tower.layers.0.mlp.fc1.weight", "vision"),
        ("model.multi_modal_projector.merge_linear_1.bias", "vision"),
        ("language_model.model.mtp.layers.0.eh_proj.weight", "multi-token prediction"),
        ("model.mtp.layers.6.norm.weight", "multi-token prediction"),
        ("mtp.0.embed_tokens.weight", "multi-token prediction"),
        ("language_model.model.layers.3.mlp.up_proj.weight", None),
        ("language_model.model.layers.3.vision_tower.weight", None),
        ("language_model.model.layers.3.mtp.weight", None),
        ("vision_tower_2.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_what_the_text_model_does_not_use(name: str, kind: str | None) -> None:
    """Vision and multi-token prediction are known by their place; what is unknown is not passed over."""
    assert skipped_kind(name) == kind
