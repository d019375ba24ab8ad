"""How a model is loaded for a run: as it was asked for, or as it fits this machine best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.engine.dry_run import DryRun
from m3cli.engine.local import system_facts
from m3cli.errors import DoesNotFitError
from m3cli.plan.machine import this_machine
from m3cli.plan.memory import PYTHON_BYTES, RAM_SHARE, weights_of
from m3cli.plan.planner import UBATCHES, NoPlan, Plan, Planner, Wanted
from m3cli.tasks.plan import buffers_of, engine_config
from m3cli.tasks.rates import offloads

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import EngineConfig
    from m3cli.plan.machine import Machine
    from m3cli.plan.planner import KVType
    from m3cli.tasks.model import OpenModel

# With so much beside weights and KV cache there is nothing to decide: compute buffers take less.
_PLENTY = 3_000_000_000


@dataclass(frozen=True, slots=True)
class Fixed:
    """What the user chose; None is for m3 to choose."""

    kv_type: KVType | None = None
    gpu_layers: int | None = None


def configured(
    base: EngineConfig, opened: OpenModel, fixed: Fixed, cache_dir: Path
) -> tuple[EngineConfig, tuple[str, ...]]:
    """`base` with placement, ubatch and KV types for this machine, and what the user should hear of it.

    Where there is no GPU and memory is plentiful, `base` it is, and nothing is measured. Raises
    DoesNotFitError, with what would fit, when nothing does.
    """
    devices = system_facts()["devices"] if offloads(cache_dir) else []
    machine = this_machine(devices, 0)
    if not machine.devices and _is_plentiful(base, opened, machine):
        return base, ()
    with DryRun(base.model_path) as dry_run:
        planner = Planner(
            opened.shape,
            weights_of(opened.header.tensors, opened.shape.layers),
            machine,
            lambda configuration: buffers_of(dry_run, base, configuration),
        )
        # Planned for the next power of two: questions of about a length share what was saved.
        larger = min(1 << (base.n_ctx - 1).bit_length(), opened.shape.context_length)
        for n_ctx in dict.fromkeys((max(larger, base.n_ctx), base.n_ctx)):
            plan = planner.plan(
                Wanted(
                    n_ctx,
                    n_ctx,
                    type_k=fixed.kv_type,
                    type_v=fixed.kv_type,
                    gpu_layers=fixed.gpu_layers,
                )
            )
            if isinstance(plan, Plan):
                break
    if isinstance(plan, NoPlan):
        hints = " ".join(plan.alternatives)
        raise DoesNotFitError(plan.reason, hints or "Use a smaller model.")
    chosen = replace(plan.configuration, n_ctx=base.n_ctx)
    told: tuple[str, ...] = ()
    if (chosen.type_k, chosen.n_ubatch) != (base.kv_type_k, base.n_ubatch) or machine.devices:
        told = (*plan.reasons, *plan.warnings)
    return engine_config(base, chosen), told


def stepped_down(config: EngineConfig, fixed: Fixed) -> EngineConfig | None:
    """The next smaller configuration, for when memory is not there after all; None if there is none."""
    smaller = replace(config, n_ubatch=max(config.n_ubatch // 4, UBATCHES[-1]))
    if fixed.kv_type is None and config.kv_type_k == "f16" and config.flash_attention:
        smaller = replace(smaller, kv_type_k="q8_0", kv_type_v="q8_0")
    return smaller if smaller != config else None


def _is_plentiful(base: EngineConfig, opened: OpenModel, machine: Machine) -> bool:
    kv = opened.shape.kv_bytes_per_token(base.kv_type_k, base.kv_type_v) * base.n_ctx
    need = opened.header.file_bytes + kv + PYTHON_BYTES + _PLENTY
    return need <= machine.ram_available * RAM_SHARE
