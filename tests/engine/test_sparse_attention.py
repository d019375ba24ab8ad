"""MiniMax-M3 runs with its sparse attention, or says that it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from m3cli.engine.events import EngineConfig, Loaded, Request, Token
from m3cli.engine.local import LocalEngine
from m3cli.errors import ExitCode, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from m3cli.engine.events import Attention, Event

BUDGET = 64  # tokens that a query of the tiny model attends
# llama.cpp then interleaves sequences in one cache, which MSA cannot follow, and says so in its log only.
UNIFIED_CACHE = """
from m3cli.engine import llama_library
make = llama_library.lib.llama_init_from_model
def make_unified(model, params):
    params.n_seq_max = params.n_outputs_max = 2
    params.kv_unified = True
    return make(model, params)
llama_library.lib.llama_init_from_model = make_unified
"""


@pytest.fixture
def m3_config(tiny_gguf: Path) -> EngineConfig:
    return EngineConfig(str(tiny_gguf), n_ctx=1024, threads=1)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Far more tokens than a query attends."""
    return list(map(int, np.random.default_rng(1).integers(1000, size=5 * BUDGET)))


def attention(events: Iterable[Event]) -> Attention:
    return next(event.attention for event in events if isinstance(event, Loaded))


def ids(events: Iterable[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def test_greedy_tokens_are_those_of_transformers(
    tiny_m3: Path, m3_config: EngineConfig, state_dir: Path, prompt: list[int]
) -> None:
    """The engine, in its worker, with prefill in batches, says what the reference says."""
    from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

    reference = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tiny_m3, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    want = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            want.append(int(reference(input_ids=torch.tensor([want])).logits[0, -1].argmax()))
    with LocalEngine(replace(m3_config, n_batch=128, n_ubatch=64), state_dir=state_dir) as engine:
        events = list(engine.generate(Request(prompt, 24)))
    assert attention(events) == "sparse"
    assert ids(events) == want[len(prompt) :]


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantized_caches_keep_it(
    m3_config: EngineConfig, state_dir: Path, prompt: list[int], kv_type: str
) -> None:
    """Sparse attention runs on a quantized cache too."""
    quantized = replace(m3_config, kv_type_k=kv_type, kv_type_v=kv_type)  # type: ignore[arg-type]
    with LocalEngine(quantized, state_dir=state_dir) as engine:
        events = list(engine.generate(Request(prompt, 2)))
    assert attention(events) == "sparse"
    assert len(ids(events)) == 2


def test_dense_attention_is_refused_unless_allowed(
    m3_config: EngineConfig, state_dir: Path, prompt: list[int]
) -> None:
    """Without flash attention there is no MSA; who allows that gets other tokens, and is told."""
    dense = replace(m3_config, flash_attention=False)
    with (
        LocalEngine(dense, state_dir=state_dir) as engine,
        pytest.raises(ModelError, match=r"tiny-m3\.gguf needs its sparse attention") as caught,
    ):
        list(engine.generate(Request(prompt, 16)))
    assert caught.value.exit_code == ExitCode.IMPOSSIBLE
    with LocalEngine(replace(dense, allow_dense=True), state_dir=state_dir) as engine:
        events = list(engine.generate(Request(prompt, 16)))
    with LocalEngine(m3_config, state_dir=state_dir) as engine:
        sparse = list(engine.generate(Request(prompt, 16)))
    assert (attention(events), attention(sparse)) == ("dense", "sparse")
    assert ids(events) != ids(sparse)


def test_llama_cpps_own_word_counts(
    m3_config: EngineConfig,
    state_dir: Path,
    prompt: list[int],
    worker_script: Callable[[str], list[str]],
) -> None:
    """If llama.cpp runs dense for a reason of its own, which it only logs, m3 stops as well; each time."""
    command = worker_script(UNIFIED_CACHE)
    with LocalEngine(m3_config, state_dir=state_dir, worker_command=command) as engine:
        for _ in range(2):  # llama.cpp warns once a process
            with pytest.raises(ModelError, match="dense attention"):
                list(engine.generate(Request(prompt, 1)))
    allowed = replace(m3_config, allow_dense=True)
    with LocalEngine(allowed, state_dir=state_dir, worker_command=command) as engine:
        assert attention(engine.generate(Request(prompt, 1))) == "dense"


def test_other_models_attend_fully(config: EngineConfig, state_dir: Path) -> None:
    """For a model that never had sparse attention there is nothing to refuse."""
    with LocalEngine(replace(config, flash_attention=False), state_dir=state_dir) as engine:
        assert attention(list(engine.generate(Request([28] * 8, 1)))) == "full"
