from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from m3cli.engine import llama, llama_dry_run, llama_library
from m3cli.engine.dry_run import DryRun, Need
from m3cli.engine.events import EngineConfig, Finished, Loaded, Request
from m3cli.engine.local import LocalEngine
from m3cli.errors import EngineCrashError, MachineError, ModelError, UsageError
from scripts.make_shape_gguf import write_shape
from tests.tiny_models import write_gemma3, write_mamba

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20


@pytest.fixture(scope="module")
def dry_runs() -> Iterator[Callable[[str], DryRun]]:
    """One dry run a model, for all tests."""
    open_runs: dict[str, DryRun] = {}

    def of(path: str) -> DryRun:
        return open_runs.setdefault(path, DryRun(path, extra_buffers=False))

    yield of
    for dry_run in open_runs.values():
        dry_run.close()


@pytest.fixture(scope="module")
def large_m3(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shapes") / "m3.gguf"
    write_shape("minimax-m3", "Q2_K_L", path, vocabulary=False)
    return str(path)


def load_for_real(config: EngineConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Load weights and allocate a context: what llama.cpp logs, and what it says to have allocated."""
    with llama_library.logged() as lines:
        model = llama.Model(config, extra_buffers=False)
    rows = llama_dry_run.breakdown(model._context)
    model.close()
    assert rows is not None
    return lines, rows


def assert_is_what_was_allocated(need: Need, config: EngineConfig) -> None:
    """Compare with the sizes of real buffers, to the byte, and with the log, to its last decimal."""
    lines, rows = load_for_real(config)
    text = "".join(lines)
    assert need.placed
    assert need.memory == {row["name"]: row["context"] for row in rows if row["context"]}
    assert need.compute == {row["name"]: row["compute"] for row in rows if row["compute"]}
    assert sum(need.weights.values()) == pytest.approx(sum(row["model"] for row in rows), rel=1e-4)
    for kind, counted in (("KV", need.memory), ("compute", need.compute), ("output", need.output)):
        logged = sum(map(float, re.findall(rf"CPU +{kind} buffer size = +([\d.]+) MiB", text)))
        assert counted["CPU"] / MIB == pytest.approx(logged, abs=0.0101), kind
    for name, size in re.findall(r"([KV]) \(\w+\): +([\d.]+) MiB", text):
        parts = [(part[0], round(part[2] / MIB, 2)) for cache in need.caches for part in cache.parts]
        assert (name, float(size)) in parts
    assert sum(cache.nbytes for cache in need.caches) == pytest.approx(sum(need.memory.values()), abs=50_000)


@pytest.mark.parametrize(
    ("n_ctx", "kv_type", "n_ubatch"),
    [(512, "f16", 512), (2048, "q8_0", 64), (3072, "q4_0", 128), (8192, "f16", 256)],
)
@pytest.mark.parametrize("model", ["smollm2", "tiny_gguf"])
def test_a_dry_run_says_what_a_real_load_allocates(
    model: str,
    n_ctx: int,
    kv_type: Any,
    n_ubatch: int,
    request: pytest.FixtureRequest,
    dry_runs: Callable[[str], DryRun],
) -> None:
    """Caches and compute buffers are those of the same configuration, for full and for sparse attention."""
    path = str(request.getfixturevalue(model))
    config = EngineConfig(path, n_ctx, n_ubatch=n_ubatch, threads=1, kv_type_k=kv_type, kv_type_v=kv_type)
    need = dry_runs(path).need(config)
    assert_is_what_was_allocated(need, config)
    expected = ["main", "indexer"] if model == "tiny_gguf" else ["kv cache"]
    assert [cache.name for cache in need.caches] == expected


def test_different_types_of_k_and_v(smollm2: str, dry_runs: Callable[[str], DryRun]) -> None:
    config = EngineConfig(smollm2, 1024, threads=1, kv_type_k="q8_0", kv_type_v="q4_0")
    need = dry_runs(smollm2).need(config)
    assert_is_what_was_allocated(need, config)
    assert [part[:2] for part in need.caches[0].parts] == [("K", "q8_0"), ("V", "q4_0")]


def test_a_model_with_a_sliding_window(tmp_path: Path) -> None:
    """It has two caches, both for all tokens, as m3 asks for."""
    path = str(write_gemma3(tmp_path / "gemma3.gguf"))
    config = EngineConfig(path, 1024, threads=1)
    with DryRun(path, extra_buffers=False) as dry_run:
        need = dry_run.need(config)
    assert_is_what_was_allocated(need, config)
    assert [(cache.name, cache.cells, cache.layers) for cache in need.caches] == [
        ("non-SWA", 1024, 1),
        ("SWA", 1024, 5),
    ]


def test_a_recurrent_model(tmp_path: Path) -> None:
    """Its state is one cell, whatever the context."""
    path = str(write_mamba(tmp_path / "mamba.gguf"))
    with DryRun(path, extra_buffers=False) as dry_run:
        short, long = (dry_run.need(EngineConfig(path, n_ctx, threads=1)) for n_ctx in (256, 4096))
    assert short.memory == long.memory
    assert [part[0] for part in short.caches[0].parts][:2] == ["R", "S"]


def test_minimax_m3_with_a_million_tokens(large_m3: str) -> None:
    """A 152 GB model is measured in under three seconds of CPU time, and nothing of it is allocated."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    config = EngineConfig(large_m3, 1 << 20, kv_type_k="q8_0", kv_type_v="q8_0")
    with DryRun(large_m3) as dry_run:
        needs = {n_ubatch: dry_run.need(replace(config, n_ubatch=n_ubatch)) for n_ubatch in (64, 128, 512)}
        shorter = dry_run.need(EngineConfig(large_m3, 131_072))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    for need in needs.values():
        assert [(cache.name, cache.nbytes / MIB) for cache in need.caches] == [
            ("main", 65_280),
            ("indexer", 15_504),
        ]
        assert sum(need.memory.values()) == (65_280 + 15_504) * MIB
        assert sum(need.weights.values()) == pytest.approx(Path(large_m3).stat().st_size, rel=1e-4)
        assert need.total < 300 << 30
    compute = [round(sum(need.compute.values()) / MIB) for need in needs.values()]
    assert compute == [2444, 4884, 19_525]
    assert [cache.nbytes / MIB for cache in shorter.caches] == [15_360, 3648]
    assert round(sum(shorter.compute.values()) / MIB) == 2513


def test_a_build_that_cannot_be_asked_where_things_go(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the sums come from the log, and the answer says that they are not placed."""
    config = EngineConfig(smollm2, 2048, threads=1)
    model = llama_dry_run.DryModel(config, extra_buffers=False)
    placed = model.need(config)
    monkeypatch.setattr(llama_dry_run, "_BREAKDOWN", "no_such_function")
    unplaced = model.need(config)
    model.close()
    model.close()
    assert placed["placed"]
    assert not unplaced["placed"]
    assert unplaced["memory"] == {"": placed["memory"]["CPU"]}
    assert unplaced["compute"]["CPU"] == pytest.approx(placed["compute"]["CPU"], abs=6000)
    assert unplaced["weights"][""] == pytest.approx(placed["weights"]["CPU"], rel=1e-4)


def overridden(lines: list[str]) -> dict[str, str]:
    """Buffer type of each tensor that an override moved."""
    pattern = re.compile(r"tensor (\S+) \(.*\) buffer type overridden to (\S+)")
    return dict(match.groups() for line in lines if (match := pattern.match(line)))  # type: ignore[misc]


def test_overrides_are_applied_in_both_kinds_of_load(tiny_gguf: Path) -> None:
    """llama.cpp logs each tensor that was moved: the experts of the three sparse layers, and no other."""
    config = EngineConfig(str(tiny_gguf), 512, threads=1, tensor_overrides=((r"ffn_\w+_exps", "CPU"),))
    expected = {
        f"blk.{layer}.ffn_{kind}_exps.weight": "CPU" for layer in (1, 2, 3) for kind in ("gate", "up", "down")
    }
    real, _ = load_for_real(config)
    assert overridden(real) == expected
    with llama_library.logged() as lines:
        llama_dry_run.DryModel(config, extra_buffers=False).close()
    assert overridden(lines) == expected
    without, _ = load_for_real(replace(config, tensor_overrides=()))
    assert overridden(without) == {}


def test_the_first_override_that_matches_decides(tiny_gguf: Path) -> None:
    config = EngineConfig(
        str(tiny_gguf), 512, tensor_overrides=(("blk.1.ffn_up_exps", "CPU"), ("blk.[12].ffn_up_exps", "CPU"))
    )
    with llama_library.logged() as lines:
        llama_dry_run.DryModel(config, extra_buffers=False).close()
    names = [line.split()[1] for line in lines if "overridden" in line]
    assert names == ["blk.1.ffn_up_exps.weight", "blk.2.ffn_up_exps.weight"]


def test_overrides_reach_the_worker(smollm2: str, state_dir: Path) -> None:
    """A model with overrides generates, and is not loaded again for the second request."""
    config = EngineConfig(
        smollm2, 256, threads=1, tensor_overrides=(("ffn_up", "CPU"),), tensor_split=(1.0,), main_gpu=0
    )
    with LocalEngine(config, state_dir=state_dir) as engine:
        first = list(engine.generate(Request([28, 29, 30], 1)))
        second = list(engine.generate(Request([28, 29, 30], 1)))
    assert isinstance(first[-1], Finished)
    assert isinstance(second[-1], Finished)
    assert any(isinstance(event, Loaded) for event in first)
    assert not any(type(event).__name__ == "LoadProgress" for event in second)


def test_a_buffer_type_that_this_build_does_not_have(tiny_gguf: Path) -> None:
    """The error names it and those that there are; the worker lives on."""
    config = EngineConfig(str(tiny_gguf), 512, tensor_overrides=(("exps", "CUDA7"),))
    with DryRun(str(tiny_gguf)) as dry_run:
        with pytest.raises(UsageError, match=r"CUDA7.*exps.*CPU"):
            dry_run.need(config)
        assert dry_run.need(replace(config, tensor_overrides=())).memory
    with pytest.raises(UsageError, match="CUDA7"):
        llama.Model(config)


def test_a_pattern_that_is_no_regular_expression(tiny_gguf: Path) -> None:
    config = EngineConfig(str(tiny_gguf), 512, tensor_overrides=(("ffn_(up", "CPU"),))
    with DryRun(str(tiny_gguf)) as dry_run, pytest.raises(ModelError, match="regular expression"):
        dry_run.need(config)


def test_more_shares_than_devices(tiny_gguf: Path) -> None:
    config = EngineConfig(str(tiny_gguf), 512, tensor_split=(1.0,) * 1000)
    with DryRun(str(tiny_gguf)) as dry_run, pytest.raises(UsageError, match="1000 devices"):
        dry_run.need(config)


@pytest.mark.parametrize(("mmap", "mode"), [(True, "mmap"), (False, "none")])
def test_the_file_is_mapped_or_read(smollm2: str, mmap: bool, mode: str) -> None:
    lines, rows = load_for_real(EngineConfig(smollm2, 256, threads=1, mmap=mmap))
    assert f"(load_mode = {mode})" in "".join(lines)
    assert ("CPU_Mapped" in {row["name"] for row in rows}) == mmap


def test_weights_that_are_locked_in_memory(smollm2: str) -> None:
    """Whether the system allows it or not, llama.cpp is asked for it."""
    for mmap, mode in ((True, "mmap+mlock"), (False, "mlock")):
        lines, _ = load_for_real(EngineConfig(smollm2, 256, threads=1, mmap=mmap, mlock=True))
        assert f"(load_mode = {mode})" in "".join(lines)


@pytest.mark.parametrize("size", [0, 100, 5000, 1_000_000])
def test_a_broken_file(smollm2: str, size: int, tmp_path: Path) -> None:
    """One that is cut short cannot be measured: not in its header, nor where the weights are missing."""
    path = tmp_path / "cut.gguf"
    with Path(smollm2).open("rb") as stream:
        path.write_bytes(stream.read(size))
    with DryRun(str(path)) as dry_run, pytest.raises(ModelError, match=r"cut\.gguf"):
        dry_run.need(EngineConfig(str(path), 512))


def test_a_missing_file(tmp_path: Path) -> None:
    with DryRun(str(tmp_path / "none.gguf")) as dry_run, pytest.raises(ModelError, match="does not exist"):
        dry_run.need(EngineConfig("", 512))


def test_a_context_that_cannot_be_made(smollm2: str) -> None:
    """The error says why, and the next configuration is measured."""
    config = EngineConfig(smollm2, 512, kv_type_v="q8_0", flash_attention=False)
    with DryRun(smollm2) as dry_run:
        with pytest.raises(MachineError, match="flash_attn"):
            dry_run.need(config)
        assert dry_run.need(replace(config, flash_attention=True)).memory


def test_the_death_of_the_worker(smollm2: str, worker_script: Callable[[str], list[str]]) -> None:
    """A native crash is an error that says what was being done."""
    command = worker_script(
        "from m3cli.engine.worker import Worker\n"
        "Worker._op_dry_run = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)"
    )
    with (
        DryRun(smollm2, worker_command=command) as dry_run,
        pytest.raises(EngineCrashError, match=r"SIGSEGV while measuring what the model needs"),
    ):
        dry_run.need(EngineConfig(smollm2, 512))
    dry_run.close()


def test_nothing_outlives_a_dry_run(smollm2: str, new_children: Callable[[], set[int]]) -> None:
    with DryRun(smollm2) as dry_run:
        dry_run.need(EngineConfig(smollm2, 512))
        assert len(new_children()) == 1
    assert not new_children()
