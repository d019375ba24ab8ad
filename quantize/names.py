"""Which tensors a MiniMax-M3 checkpoint holds, and what GGUF calls them.

GGUF names are those of llama.cpp's llama-arch.cpp, checkpoint names those of the published
weights. Shapes have the slowest dimension first, as safetensors does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quantize.hparams import HParams

# matrix: stored in the type asked for; exact: always f32; norm: f32, and Gemma-style, so 1 is added.
Role = Literal["matrix", "exact", "norm"]

_TEXT_PREFIX = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?")
_SKIPPED = {
    "vision": re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector|patch_merge_mlp)\."),
    "multi-token prediction": re.compile(_TEXT_PREFIX.pattern + r"mtp\."),
}


@dataclass(frozen=True, slots=True)
class Mapping:
    """A tensor of the GGUF file and where it comes from.

    `sources` are names without the checkpoint's prefix (see `text_name`): one, or one an expert.
    `shape` is that of a source.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    stacked: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape in the GGUF file: experts stand behind one another in one tensor."""
        return (len(self.sources), *self.shape) if self.stacked else self.shape


def text_name(name: str) -> str:
    """Strip what stands before `layers.`, `embed_tokens.`, `norm.` or `lm_head.`: it differs by release."""
    match = _TEXT_PREFIX.match(name)
    return name[match.end() :] if match else name


def skipped_kind(name: str) -> str | None:
    """`vision` or `multi-token prediction` for a tensor that the text model does not use."""
    return next((kind for kind, pattern in _SKIPPED.items() if pattern.match(name)), None)


def mappings(hparams: HParams) -> list[Mapping]:
    """Every tensor of the GGUF file, in the order in which they are written."""
    vocabulary = (hparams.vocab_size, hparams.hidden)
    result = [Mapping("token_embd.weight", ("embed_tokens.weight",), vocabulary, "matrix")]
    for layer in range(hparams.layers):
        result += _attention(hparams, layer)
        result += _dense_mlp(hparams, layer) if layer < hparams.dense_layers else _experts(hparams, layer)
    result.append(Mapping("output_norm.weight", ("norm.weight",), (hparams.hidden,), "norm"))
    result.append(Mapping("output.weight", ("lm_head.weight",), vocabulary, "matrix"))
    return result


def _attention(h: HParams, layer: int) -> list[Mapping]:
    heads, kv_heads = h.heads * h.head_dim, h.kv_heads * h.head_dim
    table: list[tuple[str, str, tuple[int, ...], Role]] = [
        ("attn_norm", "input_layernorm", (h.hidden,), "norm"),
        ("attn_q", "self_attn.q_proj", (heads, h.hidden), "matrix"),
        ("attn_k", "self_attn.k_proj", (kv_heads, h.hidden), "matrix"),
        ("attn_v", "self_attn.v_proj", (kv_heads, h.hidden), "matrix"),
        ("attn_output", "self_attn.o_proj", (h.hidden, heads), "matrix"),
        ("attn_q_norm", "self_attn.q_norm", (h.head_dim,), "norm"),
        ("attn_k_norm", "self_attn.k_norm", (h.head_dim,), "norm"),
    ]
    if layer >= h.dense_layers:
        table += [
            ("indexer.q_proj", "self_attn.index_q_proj", (h.index_heads * h.index_dim, h.hidden), "exact"),
            ("indexer.k_proj", "self_attn.index_k_proj", (h.index_dim, h.hidden), "exact"),
            ("indexer.q_norm", "self_attn.index_q_norm", (h.index_dim,), "norm"),
            ("indexer.k_norm", "self_attn.index_k_norm", (h.index_dim,), "norm"),
        ]
    table.append(("ffn_norm", "post_attention_layernorm", (h.hidden,), "norm"))
    return _single(layer, table)


def _dense_mlp(h: HParams, layer: int) -> list[Mapping]:
    return _single(
        layer,
        [
            ("ffn_gate", "mlp.gate_proj", (h.dense_ff, h.hidden), "matrix"),
            ("ffn_up", "mlp.up_proj", (h.dense_ff, h.hidden), "matrix"),
            ("ffn_down", "mlp.down_proj", (h.hidden, h.dense_ff), "matrix"),
        ],
    )


def _experts(h: HParams, layer: int) -> list[Mapping]:
    moe = "block_sparse_moe"
    bias = (f"layers.{layer}.{moe}.e_score_correction_bias",)
    result = _single(layer, [("ffn_gate_inp", f"{moe}.gate", (h.experts, h.hidden), "exact")])
    result.append(Mapping(f"blk.{layer}.exp_probs_b.bias", bias, (h.experts,), "exact"))
    for gguf, source, shape in (
        ("ffn_gate_exps", "w1", (h.expert_ff, h.hidden)),
        ("ffn_up_exps", "w3", (h.expert_ff, h.hidden)),
        ("ffn_down_exps", "w2", (h.hidden, h.expert_ff)),
    ):
        sources = tuple(f"layers.{layer}.{moe}.experts.{e}.{source}.weight" for e in range(h.experts))
        result.append(Mapping(f"blk.{layer}.{gguf}.weight", sources, shape, "matrix", stacked=True))
    shared = f"{moe}.shared_experts"
    return result + _single(
        layer,
        [
            ("ffn_gate_shexp", f"{shared}.gate_proj", (h.shared_ff, h.hidden), "matrix"),
            ("ffn_up_shexp", f"{shared}.up_proj", (h.shared_ff, h.hidden), "matrix"),
            ("ffn_down_shexp", f"{shared}.down_proj", (h.hidden, h.shared_ff), "matrix"),
        ],
    )


def _single(layer: int, table: list[tuple[str, str, tuple[int, ...], Role]]) -> list[Mapping]:
    return [
        Mapping(f"blk.{layer}.{gguf}.weight", (f"layers.{layer}.{source}.weight",), shape, role)
        for gguf, source, shape, role in table
    ]
