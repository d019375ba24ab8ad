"""Plans: what six known machines would run, that nothing is ever promised that does not fit, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import UsageError
from m3cli.model.shape import Indexer, ModelShape
from m3cli.plan import machine as machines
from m3cli.plan.machine import Device, Machine, described, this_machine
from m3cli.plan.memory import Buffers, LayerWeights, Weights
from m3cli.plan.planner import Configuration, Measured, NoPlan, Plan, Planner, Wanted
from m3cli.tasks.plan import described_machine

if TYPE_CHECKING:
    from pathlib import Path

# GB of published quants of MiniMax-M3, and of them what is not routed experts (about: 7 GB at 4 bits).
QUANTS = {"IQ1_S": 90.5, "IQ2_XXS": 116.6, "Q2_K_L": 153.1, "IQ3_XXS": 180.0, "Q4_K_M": 261.0, "Q8_0": 454.0}


def m3_shape() -> ModelShape:
    return ModelShape(
        name="MiniMax-M3",
        architecture="minimax-m3",
        file_type="",
        parameters=428_000_000_000,
        file_bytes=0,
        layers=60,
        leading_dense_layers=3,
        n_embd=6144,
        heads=64,
        kv_heads=(4,) * 60,
        head_dim_k=128,
        head_dim_v=128,
        context_length=1 << 20,
        vocab_size=200_064,
        experts=128,
        experts_used=4,
        experts_shared=1,
        sliding_window=None,
        rope_freq_base=5e6,
        indexer=Indexer(4, 128, 16, 128, 1),
        license=None,
        has_chat_template=True,
        tokenizer_model="gpt2",
        tokenizer_pre="minimax-m2",
        weight_bytes={},
    )


def m3_planner(quant: str, machine: Machine) -> Planner:
    """Sizes as llama.cpp reports them for M3 (see tests/engine/test_dry_run.py)."""
    shape = m3_shape()
    total = QUANTS[quant] * 1e9
    dense = 0.04 * total + 3e9
    experts = (total - dense - 1.6e9) / 57
    layers = tuple(LayerWeights(int(dense / 60), 0 if i < 3 else int(experts)) for i in range(60))
    weights = Weights(layers, int(0.8e9), int(0.8e9))

    def buffers(configuration: Configuration) -> Buffers:
        kv = shape.kv_bytes_per_token(configuration.type_k, configuration.type_v) * configuration.n_ctx
        return Buffers(kv, 38 * configuration.n_ctx * configuration.n_ubatch + 100_000_000)

    return Planner(shape, weights, machine, buffers)


@pytest.mark.parametrize(
    ("machine", "quant", "n_ctx", "expected"),
    [
        # 24 GB and 64 GB: not even the smallest quant's experts fit into the RAM; the disk has to help.
        ("gpu24-ram64", "IQ1_S", 131_072, {"gpu": "all", "kv": "q8_0", "streamed": True}),
        ("gpu24-ram64", "Q2_K_L", 131_072, None),
        # 24 GB and 192 GB, the machine of the field reports: Q2 with the experts in RAM, 8 bits of KV.
        ("gpu24-ram192", "IQ2_XXS", 131_072, {"gpu": "most", "kv": "q8_0", "streamed": False}),
        ("gpu24-ram192", "Q2_K_L", 131_072, {"gpu": "most", "kv": "q8_0", "streamed": False}),
        # Two GPUs hold attention with f16 keys and values.
        ("gpu2x24-ram128", "IQ1_S", 131_072, {"gpu": "all", "kv": "f16", "streamed": False}),
        # A Mac's memory is one.
        ("mac128", "IQ1_S", 32_768, {"gpu": "all", "kv": "f16", "streamed": False}),
        # No GPU.
        ("cpu256", "Q2_K_L", 131_072, {"gpu": "none", "kv": "f16", "streamed": False}),
        # A server holds everything, and a million tokens beside it.
        ("gpu8x80", "Q4_K_M", 1_048_576, {"gpu": "all", "kv": "f16", "streamed": False}),
        ("gpu8x80", "Q8_0", 131_072, {"gpu": "all", "kv": "f16", "streamed": False}),
    ],
)
def test_known_machines(machine: str, quant: str, n_ctx: int, expected: dict[str, Any] | None) -> None:
    """What a person who runs such a machine would choose for MiniMax-M3."""
    result = m3_planner(quant, described_machine(machine)).plan(Wanted(n_ctx, n_ctx - 1000))
    if expected is None:
        assert isinstance(result, NoPlan)
        assert result.alternatives
        return
    assert isinstance(result, Plan)
    chosen = result.configuration
    assert chosen.type_k == expected["kv"]
    assert bool(result.streamed) == expected["streamed"]
    assert {"all": chosen.gpu_layers == 61, "most": chosen.gpu_layers > 50, "none": not chosen.gpu_layers}[
        expected["gpu"]
    ]
    assert result.reasons
    # the indexer's keys are never quantized without a word, and never spoken of otherwise
    assert any("indexer" in warning for warning in result.warnings) == (chosen.type_k != "f16")


def test_the_speed_is_of_the_right_size() -> None:
    """A user measured 147-194 and 8.9 tokens a second with Q2_K_L, experts in RAM, on a faster GPU."""
    machine = described_machine("gpu24-ram192")
    card = replace(machine.devices[0], total=32 << 30, free=31 << 30, bandwidth=1.8e12, link=50e9)
    planner = m3_planner("Q2_K_L", replace(machine, devices=(card,)))
    plan = planner.plan(Wanted(131_072, 130_000, type_k="q8_0", type_v="q8_0", n_ubatch=512))
    assert isinstance(plan, Plan)
    assert 147 / plan.speed.band < plan.speed.prefill_rate < 194 * plan.speed.band
    assert 8.9 / plan.speed.band < plan.speed.decode_rate < 8.9 * plan.speed.band


MACHINES = st.builds(
    lambda ram, gpus: Machine(
        "drawn", ram << 30, ram << 30, 8, 60e9, 2e9, 1e12,
        tuple(Device(f"gpu {i}", gpu << 30, gpu << 30, 900e9, 80e12, 25e9) for i, gpu in enumerate(gpus)),
    ),
    st.integers(8, 600),
    st.lists(st.integers(4, 100), max_size=4),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(MACHINES, st.sampled_from(sorted(QUANTS)), st.integers(1, 4096).map(lambda n: n * 256))
def test_nothing_is_promised_that_does_not_fit(machine: Machine, quant: str, n_ctx: int) -> None:
    """No memory of a plan holds more than it has room for, but for mapped weights that are read again."""
    planner = m3_planner(quant, machine)
    result = planner.plan(Wanted(n_ctx, max(1, n_ctx - 600)))
    if isinstance(result, NoPlan):
        assert result.reason
        assert 1 <= len(result.alternatives) <= 3
        return
    *devices, ram = result.places
    assert all(place.used <= place.room for place in devices)
    assert ram.used - result.streamed <= ram.room
    assert ram.used - ram.weights <= ram.room
    weights = sum(place.weights for place in result.places)
    assert abs(weights - planner.weights.total) <= planner.weights.embeddings
    kv = planner.buffers(result.configuration).kv
    assert 0 <= kv - sum(place.kv for place in result.places) < 100  # rounding


@settings(max_examples=30, deadline=None)
@given(MACHINES, st.sampled_from(["f16", "q4_0"]), st.sampled_from([64, 512]), st.integers(0, 61))
def test_what_the_user_chose_stays(machine: Machine, kv: Any, n_ubatch: int, layers: int) -> None:
    """A plan changes nothing that was given."""
    wanted = Wanted(65_536, 60_000, type_k=kv, type_v=kv, n_ubatch=n_ubatch, gpu_layers=layers)
    result = m3_planner("IQ2_XXS", machine).plan(wanted)
    if isinstance(result, Plan):
        chosen = result.configuration
        assert (chosen.type_k, chosen.type_v, chosen.n_ubatch) == (kv, kv, n_ubatch)
        assert chosen.gpu_layers == (layers if machine.devices else 0)


def test_types_are_not_mixed_where_a_device_cannot() -> None:
    """Metal leaves attention over two types to the CPU, and CUDA converts both for each token."""
    wanted = Wanted(131_072, 130_000)
    two = m3_planner("IQ1_S", described_machine("gpu2x24-ram128"))
    assert ("f16", "q8_0") in two._kv_types(wanted)
    mac = m3_planner("IQ1_S", described_machine("mac128"))
    assert mac._kv_types(wanted) == [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")]
    assert mac._kv_types(replace(wanted, type_k="f16", type_v="q4_0")) == [("f16", "q4_0")]
    dense = Planner(replace(m3_shape(), indexer=None), two.weights, two.machine, two.buffers)
    assert dense._kv_types(wanted) == mac._kv_types(wanted)


def test_keys_stay_exact_where_that_is_enough() -> None:
    """The values are quantized first: what a query attends is decided by the keys."""
    plan = m3_planner("IQ1_S", described_machine("gpu2x24-ram128")).plan(Wanted(262_144, 262_000))
    assert isinstance(plan, Plan)
    assert (plan.configuration.type_k, plan.configuration.type_v) == ("f16", "q8_0")
    assert not plan.warnings


def test_a_quant_that_mostly_comes_from_the_disk_is_refused() -> None:
    """Up to a fifth of the weights may be read again; then a smaller quant is named that would do."""
    machine = described_machine("gpu24-ram64")
    assert isinstance(m3_planner("IQ1_S", machine).plan(Wanted(32_768, 32_000)), Plan)
    refused = m3_planner("Q4_K_M", machine).plan(Wanted(32_768, 32_000))
    assert isinstance(refused, NoPlan)
    assert any("read from the disk" in text for text in refused.alternatives)


def test_weights_that_are_kept_twice_cannot_be_read_again() -> None:
    """What llama.cpp repacks for the CPU is no mapped file any more."""
    base = m3_planner("Q4_K_M", described_machine("cpu256"))
    wanted = Wanted(32_768, 32_000)
    assert isinstance(base.plan(wanted), Plan)

    def buffers(configuration: Configuration) -> Buffers:
        return replace(base.buffers(configuration), repacked=base.weights.total)

    assert isinstance(Planner(base.shape, base.weights, base.machine, buffers).plan(wanted), NoPlan)


def test_a_measured_run_scales_the_next_prediction() -> None:
    """What a run took is what the same plan predicts afterwards, within a narrower band."""
    planner = m3_planner("Q2_K_L", described_machine("cpu256"))
    before = planner.plan(Wanted(32_768, 30_000))
    assert isinstance(before, Plan)
    chosen = before.configuration
    measured = Measured(0.2, 0.5, 30_000, 32_768, chosen.n_ubatch, chosen.type_k, chosen.type_v)
    after = before.speed.scaled(*planner.scale_of(measured))
    assert after.prefill == pytest.approx(0.2 * 30_000)
    assert after.decode_rate == pytest.approx(2.0)
    assert after.band < before.speed.band


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "ram is missing"),
        ({"ram": "much"}, "'much'"),
        ({"ram": "8 GiB", "rom": 1}, "unknown key rom"),
        ({"ram": "8 GiB", "disk_read": "0"}, "disk_read is '0'"),
        ({"ram": "8 GiB", "devices": {}}, "no list"),
        ({"ram": "8 GiB", "devices": [{"name": "x"}]}, "memory is missing"),
    ],
)
def test_a_wrong_description_is_named(source: dict[str, Any], words: str) -> None:
    """What is wrong in which file, and what would be right."""
    with pytest.raises(UsageError, match=words):
        described(source, "my.toml")


@pytest.mark.parametrize("size", ["3 GiB", "7 GiB", "1999 MB", "640 MB"])
def test_any_size_of_memory_can_be_described(size: str) -> None:
    """What is left out follows from what is there, whatever the number."""
    machine = described({"ram": size, "devices": [{"memory": size}]}, "x")
    assert 0 < machine.ram_available < machine.ram_total
    assert 0 < machine.devices[0].free < machine.devices[0].total


def test_more_layers_than_there_are_means_all() -> None:
    """`--gpu-layers 99` divides the layers as all of them are divided."""
    planner = m3_planner("Q2_K_L", described_machine("gpu8x80"))
    every, many = (planner.plan(Wanted(32_768, 30_000, gpu_layers=layers)) for layers in (61, 99))
    assert every == many
    assert isinstance(every, Plan)


def test_a_plan_does_not_depend_on_the_free_memory_of_the_minute() -> None:
    """What is saved of a context is found again: layers are split by what devices have."""
    machine = described_machine("gpu2x24-ram128")
    busier = tuple(
        replace(device, free=device.free - 4096 * (i + 1)) for i, device in enumerate(machine.devices)
    )
    first = m3_planner("IQ1_S", machine).plan(Wanted(32_768, 30_000))
    second = m3_planner("IQ1_S", replace(machine, devices=busier)).plan(Wanted(32_768, 30_000))
    assert isinstance(first, Plan)
    assert isinstance(second, Plan)
    assert first.configuration == second.configuration


def test_an_alternative_fits() -> None:
    """The context that is offered instead can be planned with all else as it was asked for."""
    planner = m3_planner("Q2_K_L", described_machine("cpu256"))
    wanted = Wanted(1_048_576, 1_000_000, type_k="f16", type_v="f16", n_ubatch=512)
    refused = planner.plan(wanted)
    assert isinstance(refused, NoPlan)
    offered = [int(text.split()[1].rstrip(":")) for text in refused.alternatives if text.startswith("--ctx")]
    assert len(offered) == 1
    assert isinstance(planner.plan(replace(wanted, n_ctx=offered[0], prompt=offered[0])), Plan)


def test_units_of_descriptions() -> None:
    """Powers of two where they are written so, else powers of ten."""
    machine = described({"ram": "64 GiB", "ram_bandwidth": "80 GB", "disk_read": "3.5G"}, "x")
    assert (machine.ram_total, machine.ram_bandwidth, machine.disk_read) == (64 << 30, 80e9, 3.5e9)
    assert machine.estimated == ("compute",)


def test_devices_that_the_engine_sees() -> None:
    """GPUs count, with their free memory; integrated ones use the RAM; CPU and its helpers are none."""

    def device(name: str, kind: str) -> dict[str, Any]:
        return {"name": name, "description": name, "kind": kind, "free": 20 << 30, "total": 24 << 30}

    kinds = {"CUDA0": "gpu", "Vulkan1": "igpu", "MTL0": "gpu", "BLAS": "accel", "CPU": "cpu"}
    machine = this_machine([device(name, kind) for name, kind in kinds.items()], 8)
    assert [(gpu.name, gpu.unified) for gpu in machine.devices] == [
        ("CUDA0", False),
        ("Vulkan1", True),
        ("MTL0", True),
    ]
    assert machine.device_memory == 20 << 30


def test_limits_of_a_control_group_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest limit above this process decides, less what is used, plus what the system gives up."""
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for place, limit in ((tmp_path / "a", "3000000000"), (group, "max")):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text("1000000000\n")
        (place / "memory.stat").write_text("anon 5\ninactive_file 400000000\n")
    monkeypatch.setattr(machines, "_CGROUPS", tmp_path)
    real = machines.Path

    class Faked(type(real())):  # type: ignore[misc]
        def read_text(self, *args: Any, **more: Any) -> str:
            return "0::/a/b\n" if str(self) == "/proc/self/cgroup" else super().read_text(*args, **more)

    monkeypatch.setattr(machines, "Path", Faked)
    machine = this_machine([], 2)
    assert machine.ram_available == 2_400_000_000
    assert "cgroup" in machine.limit
