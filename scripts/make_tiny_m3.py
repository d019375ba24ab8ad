"""Make a tiny MiniMax-M3 with random weights, in the form of the published checkpoint, for tests.

It has everything that the real one has: dense and sparse layers, experts, an indexer, a vision tower,
several shards, a byte-level BPE tokenizer with the split of o200k. Only its answers mean nothing.
Sparse attention keeps 4 blocks of 16 tokens, so prompts of more than 64 tokens leave some out.
usage: python scripts/make_tiny_m3.py DIRECTORY [--seed N] [--config published|saved] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.minimax_m3_vl import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
)

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "tests" / "data" / "templates" / "minimax-m3.jinja"
# Sources that do not change, so that the vocabulary does not, and with it what tests measure.
TRAINING_TEXT = ROOT / "tests" / "data" / "review" / "sources"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["]~!b[", "]~b]", "[e~[", "]!p~[", "]<]minimax[>[", "]<]image[>[", "]<]video[>["]
USER_DEFINED = ["<mm:think>", "</mm:think>", "<tool_call>", "</tool_call>"]
VOCABULARY = 1024  # tokens, of which the last few are not used, as in the published model
LAYERS, DENSE = 4, 1

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "rotary_dim": 32,
    "dense_intermediate_size": 512,
    "intermediate_size": 256,
    "shared_intermediate_size": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense"] * DENSE + ["sparse"] * (LAYERS - DENSE),
    "layer_types": ["full_attention"] * DENSE + ["minimax_m3_sparse"] * (LAYERS - DENSE),
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_block_size": 16,
    "index_topk_blocks": 4,
    "index_local_blocks": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


def make(directory: Path, *, seed: int = 0, config: str = "published", dtype: str = "bfloat16") -> None:
    """Write the checkpoint into `directory`, which has to be empty or absent.

    `config` is the form of config.json, that of the release or the one that transformers saves again.
    """
    if directory.exists() and any(directory.iterdir()):
        sys.exit(f"{directory} is not empty; name another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {"bos_token": "]~!b[", "eos_token": "[e~[", "add_bos_token": False},
    )
    shutil.copyfile(TEMPLATE, directory / "chat_template.jinja")
    (directory / "README.md").write_text(
        "---\nlicense: other\nlicense_name: minimax-community\nlicense_link: LICENSE\n---\n# Tiny M3\n",
        "utf-8",
    )
    ids = {key: tokenizer.token_to_id(text) for key, text in (("bos", "]~!b["), ("eos", "[e~["))}
    text = MiniMaxM3VLTextConfig(**TEXT, bos_token_id=ids["bos"], eos_token_id=ids["eos"])
    whole = MiniMaxM3VLConfig(
        text_config=text.to_dict(),
        vision_config=VISION,
        image_token_index=tokenizer.token_to_id("]<]image[>["),
        video_token_index=tokenizer.token_to_id("]<]video[>["),
        projector_hidden_size=64,
    )
    model = random_model(whole, seed).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="2MB")
    if config == "published":
        path = directory / "config.json"
        _write_json(path, published(json.loads(path.read_text("utf-8"))))


def random_model(config: MiniMaxM3VLConfig, seed: int) -> MiniMaxM3SparseForConditionalGeneration:
    """Weights wide enough that attention, routing, norms and biases all show in the logits.

    Embeddings as large as those of a trained model keep the rounding errors of the first layers small
    beside what they are added to; else they decide between blocks of almost equal scores.
    """
    torch.manual_seed(seed)
    model = MiniMaxM3SparseForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("norm.weight", "layernorm.weight")):
                weight.normal_(0, 0.2)
            elif name.endswith("e_score_correction_bias"):
                weight.normal_(0, 0.1)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(0, 1)
            elif weight.dim() > 1:
                weight.normal_(0, 0.06)
    return model


def published(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json in the form of the release."""
    text = dict(config["text_config"])
    sparse = [int(kind == "minimax_m3_sparse") for kind in text.pop("layer_types")]
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["partial_rotary_factor"] = rope["rope_theta"], rope["partial_rotary_factor"]
    text["moe_layer_freq"] = [int(kind == "sparse") for kind in text.pop("mlp_layer_types")]
    text["n_shared_experts"] = 1
    text["hidden_act"], text["scoring_func"], text["use_routing_bias"] = "swigluoai", "sigmoid", True
    text["use_gemma_norm"], text["use_qk_norm"], text["qk_norm_type"] = True, True, "per_head"
    text["sparse_attention_config"] = {
        "use_sparse_attention": True,
        "sparse_num_index_heads": text.pop("index_n_heads"),
        "sparse_index_dim": text.pop("index_head_dim"),
        "sparse_topk_blocks": text.pop("index_topk_blocks"),
        "sparse_block_size": text.pop("index_block_size"),
        "sparse_local_block": text.pop("index_local_blocks"),
        "sparse_init_block": 0,
        "sparse_score_type": "max",
        "sparse_attention_freq": sparse,
        "sparse_disable_index_value": sparse,
    }
    return {**config, "text_config": text}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE of o200k's split, trained on sources in several languages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=True) for text in SPECIAL]
    added += [AddedToken(text, special=False, normalized=False) for text in USER_DEFINED]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added) - 5,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sources = sorted(path for path in TRAINING_TEXT.rglob("*.*") if path.is_file())
    tokenizer.train_from_iterator((path.read_text("utf-8") for path in sources), trainer)
    tokenizer.add_tokens(added)
    return tokenizer


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main() -> None:
    """Parse the arguments and make it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", choices=["published", "saved"], default="published")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    make(arguments.directory, seed=arguments.seed, config=arguments.config, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
