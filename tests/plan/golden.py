"""Plans for MiniMax-M3's published quants on the machines that m3 describes, as one text for people to read.

`python -m tests.plan.golden` writes tests/data/plans/minimax-m3.txt anew; read what changed, then commit it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from m3cli.plan.memory import Buffers, weights_of
from m3cli.plan.planner import NoPlan, Planner, Wanted
from m3cli.tasks.plan import described_machine
from scripts.make_shape_gguf import write_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.plan.planner import Configuration, Plan

FILE = Path(__file__).resolve().parent.parent / "data" / "plans" / "minimax-m3.txt"

QUANTS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "Q2_K_L", "IQ3_XXS", "IQ4_XS", "Q4_K_M", "Q5_K_S", "Q8_0")
RUNS = (
    ("gpu24-ram64", 131_072),
    ("gpu24-ram192", 131_072),
    ("gpu2x24-ram128", 131_072),
    ("mac128", 131_072),
    ("mac128", 32_768),
    ("cpu256", 131_072),
    ("gpu8x80", 131_072),
    ("gpu8x80", 1_048_576),
)
_ANSWER = 500  # tokens


def plans() -> str:
    """All of them, through files that have the models' tensor tables and no weights."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m3.gguf"
        write_shape("minimax-m3", QUANTS[0], path)
        shape = ModelShape.from_header(read_header(path))
        weights = {}
        for quant in QUANTS:
            write_shape("minimax-m3", quant, path.with_name(quant), vocabulary=False)
            weights[quant] = weights_of(read_header(path.with_name(quant)).tensors, shape.layers)
        blocks = []
        with DryRun(str(path)) as dry_run:
            asked = _asker(dry_run)
            for name, n_ctx in RUNS:
                machine = described_machine(name)
                blocks.append(f"{machine.name}, {n_ctx:,} tokens\n")
                for quant in QUANTS:
                    planner = Planner(shape, weights[quant], machine, asked)
                    result = planner.plan(Wanted(n_ctx, n_ctx - _ANSWER, _ANSWER))
                    heading = f"  {quant}, {weights[quant].total / 1e9:.1f} GB"
                    lines = _refusal(result) if isinstance(result, NoPlan) else _lines(result)
                    blocks.append("\n".join([heading, *(f"    {line}" for line in lines), ""]))
    return "\n".join(blocks)


def _asker(dry_run: DryRun) -> Callable[[Configuration], Buffers]:
    """Buffers do not depend on the quant: llama.cpp is asked once for a configuration."""
    known: dict[tuple[int, str, str, int], Buffers] = {}

    def ask(configuration: Configuration) -> Buffers:
        n_ctx, n_ubatch = configuration.n_ctx, configuration.n_ubatch
        key = (n_ctx, configuration.type_k, configuration.type_v, n_ubatch)
        if key not in known:
            need = dry_run.need(
                EngineConfig(
                    "",
                    n_ctx,
                    n_batch=max(512, n_ubatch),
                    n_ubatch=n_ubatch,
                    gpu_layers=0,
                    kv_type_k=configuration.type_k,
                    kv_type_v=configuration.type_v,
                )
            )
            compute = sum(need.compute.values()) + sum(need.output.values())
            known[key] = Buffers(sum(need.memory.values()), compute)
        return known[key]

    return ask


def _refusal(result: NoPlan) -> Iterator[str]:
    yield f"does not fit: {result.reason}"
    for alternative in result.alternatives:
        yield f"or: {alternative}"


def _lines(plan: Plan) -> Iterator[str]:
    chosen, speed = plan.configuration, plan.speed
    yield (
        f"K {chosen.type_k}, V {chosen.type_v}, ubatch {chosen.n_ubatch}, {chosen.gpu_layers} of 61 layers "
        f"on devices, experts of the first {chosen.cpu_experts} in RAM"
    )
    yield f"prefill {_rounded(speed.prefill_rate)} tokens/s, answer {_rounded(speed.decode_rate)} tokens/s"
    for place in plan.places:
        parts = ", ".join(
            f"{name} {getattr(place, name) / 1e9:.1f}" for name in ("weights", "kv", "compute", "other")
        )
        yield f"{place.name}: {place.used / 1e9:.1f} of {place.room / 1e9:.1f} GB ({parts})"
    if plan.streamed:
        yield f"streamed: {plan.streamed / 1e9:.1f} GB"
    for reason in plan.reasons:
        yield f"because: {reason}"
    for warning in plan.warnings:
        yield f"warning: {warning}"


def _rounded(rate: float) -> str:
    """Two digits: the third of an estimate means nothing."""
    return f"{float(f'{rate:.2g}'):g}"


if __name__ == "__main__":
    FILE.write_text(plans(), "utf-8")
