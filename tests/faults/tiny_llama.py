"""A model with random weights that loads and computes at once, for drills in which it is not the point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.model.vocabulary import LETTERS
from tests.gguf_files import NORMAL, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, LAYERS, HEADS, FEED = 64, 2, 2, 128
WORDS = [f"word{number}" for number in range(300)]


def write_tiny_llama(path: Path) -> Path:
    """Write the model. Its answers are nonsense that depends on every token of the prompt."""
    chance = np.random.default_rng(0)
    tokens = [*LETTERS, *WORDS]

    def random(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return chance.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    tensors = {
        "token_embd.weight": chance.normal(0, 1, (len(tokens), WIDTH)).astype(np.float32),
        "output_norm.weight": ones,
        "output.weight": random(len(tokens), WIDTH),
    }
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH, WIDTH),
            "attn_v": (WIDTH, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FEED, WIDTH),
            "ffn_up": (FEED, WIDTH),
            "ffn_down": (WIDTH, FEED),
        }
        tensors |= {f"blk.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": ones for name in ("attn_norm", "ffn_norm")}
    fields = {
        "llama.context_length": 8192,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FEED,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": ["t h"],
    }
    return write_gguf(path, fields, tensors)
