"""Make a GGUF file of a large model's real shape with a hole in the place of the weights.

Tensor table, metadata and size of the vocabulary are those of the published model, so llama.cpp loads it
without allocating (`no_alloc`) and m3 can plan for it; on the disk it takes a few megabytes. The types of
the tensors are those that llama.cpp's quantizer chooses, which is asked for each file in a dry run.
usage: python scripts/make_shape_gguf.py MODEL --quant NAME --out FILE.gguf
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from quantize.hparams import HParams
from quantize.metadata import add_hparams
from quantize.names import mappings

if TYPE_CHECKING:
    from collections.abc import Callable

TEMPLATE = Path(__file__).resolve().parent.parent / "tests" / "data" / "templates" / "minimax-m3.jinja"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


@dataclass(frozen=True)
class Tensor:
    """Name, dimensions with the slowest first, and type."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


@dataclass(frozen=True)
class Shape:
    """A model: how its tensors are called, and what its metadata say."""

    name: str
    architecture: str
    vocabulary: int
    tensors: tuple[Tensor, ...]
    add_metadata: Callable[[gguf.GGUFWriter], None]
    pre: str
    special: tuple[str, ...]  # the last tokens of the vocabulary: first bos, then eos
    template: str


@dataclass(frozen=True)
class Recipe:
    """A published quant: llama.cpp's file type, and which tensors its makers stored in another type.

    `types` maps regular expressions to types, as `llama-quantize --tensor-type` does.
    """

    file_type: gguf.LlamaFileType
    output: Type | None = None
    embeddings: Type | None = None
    types: dict[str, Type] = field(default_factory=dict)


# The makers' exact mixes are not known here. What llama.cpp would choose alone is 4 to 9 % smaller than the
# published MiniMax-M3 for I-quants and 3 % larger for Q2_K_L; with the types named here, every total is
# within 2 %. Attention and shared experts get the bits, as such makers do, then the down projections.
_ATTENTION = r"attn_(q|k|v|output)\.|_shexp\."
RECIPES = {
    "IQ1_S": Recipe(gguf.LlamaFileType.MOSTLY_IQ1_S, types={_ATTENTION: Type.Q5_K}),
    "IQ1_M": Recipe(gguf.LlamaFileType.MOSTLY_IQ1_M, types={_ATTENTION: Type.Q5_K}),
    "IQ2_XXS": Recipe(gguf.LlamaFileType.MOSTLY_IQ2_XXS, types={_ATTENTION: Type.Q5_K}),
    "Q2_K_L": Recipe(
        gguf.LlamaFileType.MOSTLY_Q2_K,
        output=Type.Q8_0,
        embeddings=Type.Q8_0,
        types={r"blk\.[45]\d\.ffn_down_exps": Type.Q2_K},
    ),
    "IQ3_XXS": Recipe(
        gguf.LlamaFileType.MOSTLY_IQ3_XXS, types={_ATTENTION: Type.Q8_0, "ffn_down_exps": Type.IQ3_S}
    ),
    "IQ4_XS": Recipe(gguf.LlamaFileType.MOSTLY_IQ4_XS),
    "Q4_K_M": Recipe(gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "Q5_K_S": Recipe(gguf.LlamaFileType.MOSTLY_Q5_K_S),
    "Q8_0": Recipe(gguf.LlamaFileType.MOSTLY_Q8_0),
    "BF16": Recipe(gguf.LlamaFileType.MOSTLY_BF16),
}


MINIMAX_M3 = HParams(
    layers=60,
    dense_layers=3,
    hidden=6144,
    vocab_size=200_064,
    context_length=1_048_576,
    rms_eps=1e-6,
    heads=64,
    kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5e6,
    dense_ff=12_288,
    experts=128,
    experts_used=4,
    expert_ff=3072,
    shared_experts=1,
    expert_scale=2.0,
    index_heads=4,
    index_dim=128,
    index_top_k=16,
    index_block=128,
    index_local=1,
)


def minimax_m3() -> Shape:
    """MiniMax-M3, 426 B parameters without the vision tower."""
    tensors = [
        Tensor(each.name, each.out_shape, Type.BF16 if each.role == "matrix" else Type.F32)
        for each in mappings(MINIMAX_M3)
    ]
    return Shape(
        "MiniMax M3",
        "minimax-m3",
        MINIMAX_M3.vocab_size,
        tuple(tensors),
        lambda writer: add_hparams(writer, MINIMAX_M3),
        "minimax-m2",
        ("]~!b[", "[e~[", "]~b]", "<mm:think>", "</mm:think>"),
        TEMPLATE.read_text("utf-8"),
    )


def llama_3_1_70b() -> Shape:
    """Llama 3.1 70B Instruct: dense."""
    return _transformer(
        "Llama 3.1 70B Instruct",
        "llama",
        "llama-bpe",
        vocabulary=128_256,
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        context=131_072,
        rope_theta=5e5,
        ff=28_672,
    )


def qwen3_30b_a3b() -> Shape:
    """Qwen3 30B A3B Instruct 2507: 128 experts, of which a token uses 8."""
    return _transformer(
        "Qwen3 30B A3B Instruct 2507",
        "qwen3moe",
        "qwen2",
        vocabulary=151_936,
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        context=262_144,
        rope_theta=1e7,
        ff=6144,
        expert_ff=768,
    )


def qwen3_235b_a22b() -> Shape:
    """Qwen3 235B A22B Instruct 2507."""
    return _transformer(
        "Qwen3 235B A22B Instruct 2507",
        "qwen3moe",
        "qwen2",
        vocabulary=151_936,
        layers=94,
        hidden=4096,
        heads=64,
        kv_heads=4,
        context=262_144,
        rope_theta=5e6,
        ff=12_288,
        expert_ff=1536,
    )


MODELS = {
    "minimax-m3": minimax_m3,
    "llama-3.1-70b": llama_3_1_70b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "qwen3-235b-a22b": qwen3_235b_a22b,
}


def _transformer(
    name: str,
    architecture: str,
    pre: str,
    *,
    vocabulary: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    context: int,
    rope_theta: float,
    ff: int,
    expert_ff: int = 0,
    head_dim: int = 128,
    experts: int = 128,
) -> Shape:
    """Grouped-query attention, with experts and a norm of each head (qwen3moe) or a dense MLP (llama)."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    table: dict[str, tuple[tuple[int, ...], Type]] = {
        "attn_norm": ((hidden,), Type.F32),
        "attn_q": ((width, hidden), Type.BF16),
        "attn_k": ((kv_width, hidden), Type.BF16),
        "attn_v": ((kv_width, hidden), Type.BF16),
        "attn_output": ((hidden, width), Type.BF16),
        "ffn_norm": ((hidden,), Type.F32),
    }
    if expert_ff:
        table |= {
            "attn_q_norm": ((head_dim,), Type.F32),
            "attn_k_norm": ((head_dim,), Type.F32),
            "ffn_gate_inp": ((experts, hidden), Type.F32),
            "ffn_gate_exps": ((experts, expert_ff, hidden), Type.BF16),
            "ffn_up_exps": ((experts, expert_ff, hidden), Type.BF16),
            "ffn_down_exps": ((experts, hidden, expert_ff), Type.BF16),
        }
    else:
        table |= {
            "ffn_gate": ((ff, hidden), Type.BF16),
            "ffn_up": ((ff, hidden), Type.BF16),
            "ffn_down": ((hidden, ff), Type.BF16),
        }
    tensors = [Tensor("token_embd.weight", (vocabulary, hidden), Type.BF16)]
    if architecture == "llama":
        tensors.append(Tensor("rope_freqs.weight", (head_dim // 2,), Type.F32))
    for layer in range(layers):
        tensors += [Tensor(f"blk.{layer}.{key}.weight", *value) for key, value in table.items()]
    tensors.append(Tensor("output_norm.weight", (hidden,), Type.F32))
    tensors.append(Tensor("output.weight", (vocabulary, hidden), Type.BF16))

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(vocabulary)
        writer.add_context_length(context)
        writer.add_block_count(layers)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(ff)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope_theta)
        if expert_ff:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(8)
            writer.add_expert_feed_forward_length(expert_ff)

    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    return Shape(name, architecture, vocabulary, tuple(tensors), add_metadata, pre, special, CHATML)


def quantized(shape: Shape, quant: str) -> tuple[Tensor, ...]:
    """Choose the type of each tensor as llama.cpp's quantizer does with an importance matrix."""
    recipe = RECIPES[quant]
    if quant == "BF16":
        return shape.tensors
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "bf16.gguf"
        _write(shape, shape.tensors, RECIPES["BF16"], source, vocabulary=False)
        chosen = _dry_quantize(source, recipe)
    return tuple(Tensor(each.name, each.shape, chosen.get(each.name, each.type)) for each in shape.tensors)


def _dry_quantize(source: Path, recipe: Recipe) -> dict[str, Type]:
    """Ask llama.cpp which type each tensor would get; tensors that stay as they are, are left out."""
    from m3cli.engine.llama_quantize import quantized_types

    message = {
        "path": str(source),
        "file_type": int(recipe.file_type),
        "importance": True,
        "types": [(pattern, kind.name) for pattern, kind in recipe.types.items()],
        "output": recipe.output.name if recipe.output is not None else None,
        "embeddings": recipe.embeddings.name if recipe.embeddings is not None else None,
    }
    chosen: dict[str, str | None] = quantized_types(message, b"")[0]
    return {name: Type[kind] for name, kind in chosen.items() if kind}


def write_shape(model: str, quant: str, out: Path, *, vocabulary: bool = True) -> int:
    """Write the sparse file; its size in bytes. Without `vocabulary`, llama.cpp can only load its shape."""
    shape = MODELS[model]()
    return _write(shape, quantized(shape, quant), RECIPES[quant], out, vocabulary=vocabulary)


def _write(shape: Shape, tensors: tuple[Tensor, ...], recipe: Recipe, out: Path, *, vocabulary: bool) -> int:
    writer = gguf.GGUFWriter(out, shape.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(shape.name)
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    shape.add_metadata(writer)
    if vocabulary:
        _add_vocabulary(writer, shape)
    else:
        writer.add_tokenizer_model("none")
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    padded = (tensor.nbytes + -tensor.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT for tensor in tensors)
    header = out.stat().st_size
    size = header + -header % gguf.GGUF_DEFAULT_ALIGNMENT + sum(padded)
    os.truncate(out, size)
    return size


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Write a byte-level BPE vocabulary of the real size: all pairs of bytes, then triples."""
    pairs = itertools.product(LETTERS, repeat=2)
    triples = itertools.product(map("".join, itertools.product(LETTERS, repeat=2)), LETTERS)
    wanted = shape.vocabulary - len(LETTERS) - len(shape.special)
    merges = list(itertools.islice(itertools.chain(pairs, triples), wanted))
    tokens = [*LETTERS, *map("".join, merges), *shape.special]
    plain = shape.vocabulary - len(shape.special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * plain + [3] * len(shape.special))  # normal, control
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(plain)
    writer.add_eos_token_id(plain + 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(shape.template)


def main() -> None:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--quant", choices=list(RECIPES), default="BF16")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    size = write_shape(arguments.model, arguments.quant, arguments.out)
    on_disk = arguments.out.stat().st_blocks * 512
    print(f"{arguments.out}: {size / 1e9:,.1f} GB, of which {on_disk / 1e6:,.1f} MB are on the disk")


if __name__ == "__main__":
    main()
