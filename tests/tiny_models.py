"""Tiny models with random weights for the kinds of memory that no small published model here has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.model.vocabulary import LETTERS
from tests.gguf_files import NORMAL, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY, WIDTH, LAYERS = 1000, 64, 6


def _tokenizer() -> dict[str, Any]:
    tokens = [*LETTERS, *(f"token{i}" for i in range(VOCABULARY - len(LETTERS)))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * VOCABULARY,
        "tokenizer.ggml.merges": ["t h"],
    }


def write_mamba(path: Path) -> Path:
    """Write a recurrent model: its state is one step, which cannot be taken back."""
    chance = np.random.default_rng(0)
    inner, state, rank, kernel = 2 * WIDTH, 8, 4, 4

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return chance.normal(0, 0.3, shape).astype(np.float32)

    tensors = {
        "token_embd.weight": random(VOCABULARY, WIDTH),
        "output_norm.weight": np.ones(WIDTH, np.float32),
    }
    for layer in range(2):
        tensors |= {
            f"blk.{layer}.{name}": values
            for name, values in {
                "attn_norm.weight": np.ones(WIDTH, np.float32),
                "ssm_in.weight": random(2 * inner, WIDTH),
                "ssm_conv1d.weight": random(inner, kernel),
                "ssm_conv1d.bias": random(inner),
                "ssm_x.weight": random(rank + 2 * state, inner),
                "ssm_dt.weight": random(inner, rank),
                "ssm_dt.bias": random(inner),
                "ssm_a": -np.abs(random(inner, state)) - 0.1,
                "ssm_d": random(inner),
                "ssm_out.weight": random(WIDTH, inner),
            }.items()
        }
    fields = {
        "mamba.context_length": 4096,
        "mamba.embedding_length": WIDTH,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.block_count": 2,
        "mamba.ssm.conv_kernel": kernel,
        "mamba.ssm.inner_size": inner,
        "mamba.ssm.state_size": state,
        "mamba.ssm.time_step_rank": rank,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        **_tokenizer(),
    }
    return write_gguf(path, fields, tensors, arch="mamba")


def write_gemma3(path: Path) -> Path:
    """Write a model of which five layers in six see 32 tokens back."""
    chance = np.random.default_rng(0)
    head, feed = 32, 128

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return chance.normal(0, 0.1, shape).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    tensors = {"token_embd.weight": random(VOCABULARY, WIDTH) * 5, "output_norm.weight": ones}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": values
            for name, values in {
                "attn_norm": ones,
                "attn_q": random(2 * head, WIDTH),
                "attn_k": random(head, WIDTH),
                "attn_v": random(head, WIDTH),
                "attn_output": random(WIDTH, 2 * head),
                "post_attention_norm": ones,
                "attn_q_norm": np.ones(head, np.float32),
                "attn_k_norm": np.ones(head, np.float32),
                "ffn_norm": ones,
                "ffn_gate": random(feed, WIDTH),
                "ffn_up": random(feed, WIDTH),
                "ffn_down": random(WIDTH, feed),
                "post_ffw_norm": ones,
            }.items()
        }
    fields = {
        "gemma3.context_length": 4096,
        "gemma3.embedding_length": WIDTH,
        "gemma3.feed_forward_length": feed,
        "gemma3.block_count": LAYERS,
        "gemma3.attention.head_count": 2,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": head,
        "gemma3.attention.value_length": head,
        "gemma3.attention.sliding_window": 32,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.rope.freq_base": 1e6,
        **_tokenizer(),
    }
    return write_gguf(path, fields, tensors, arch="gemma3")


def ids(count: int, seed: int = 0) -> list[int]:
    """Tokens at random that all of these models know, and SmolLM2."""
    return list(map(int, np.random.default_rng(seed).integers(5, 900, size=count)))
