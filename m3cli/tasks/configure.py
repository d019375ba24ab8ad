"""How a model is loaded for a run: as it was asked for, and else as it fits this machine best."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.engine.workarounds import extra_buffers_crash
from m3cli.errors import DoesNotFitError, ImpossibleError
from m3cli.model.preflight import update_problem
from m3cli.plan.memory import PYTHON_BYTES, RAM_SHARE, Buffers, weights_of
from m3cli.plan.planner import UBATCHES, NoPlan, Plan, Planner, Wanted
from m3cli.tasks.rates import machine_here, with_measured_rates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from m3cli.engine.events import Update
    from m3cli.model.header import Header
    from m3cli.model.shape import ModelShape
    from m3cli.plan.machine import Machine
    from m3cli.plan.planner import Configuration, KVType
    from m3cli.tasks.model import OpenModel

# With so much beside weights and KV cache there is nothing to decide: compute buffers take less.
_PLENTY = 3_000_000_000
_UBATCH = 512  # tokens, llama.cpp's default
_CHANGES_ANSWERS = frozenset({"lora", "allow_dense", "flash_attention"})
ANSWER = 500  # tokens of an answer, for the time that it takes


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a model is to be run, as far as the user chose; what is None is for m3 to choose.

    The routed experts of the first `cpu_experts` layers stay in main memory. The others are those of
    EngineConfig; with any of `tensor_overrides`, `tensor_split` and `main_gpu` the user has decided what
    goes where, and nothing is planned. `update` is that of a Request.
    """

    type_k: KVType | None = None
    type_v: KVType | None = None
    n_ubatch: int | None = None
    gpu_layers: int | None = None
    cpu_experts: int | None = None
    flash_attention: bool = True
    allow_dense: bool = False
    threads: int = 0
    tensor_overrides: tuple[tuple[str, str], ...] = ()
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = -1
    op_offload: bool = True
    no_host: bool = False
    mmap: bool = True
    mlock: bool = False
    lora: tuple[tuple[str, float], ...] = ()
    update: Update = "exact"

    @property
    def planned(self) -> bool:
        """Whether anything is left for m3 to choose."""
        placed = self.tensor_overrides or self.tensor_split or self.main_gpu >= 0
        return self.flash_attention and not placed

    def as_json(self) -> dict[str, Any]:
        """These options as JSON holds them, for another process: adapters by where and what they are.

        And whether contexts may be updated in place; each request says how its own is.
        """
        options: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        options["update"] = self.update != "exact"
        options["lora"] = [[*_file_state(path), scale] for path, scale in self.lora]
        return options

    def agrees_with(self, other: Mapping[str, Any]) -> bool:
        """Whether a model that runs with `other` options, as JSON, does what these ask for.

        What these leave open may be anything, but for what changes the answers.
        """
        mine, default = self.as_json(), RunOptions().as_json()
        return mine.keys() == other.keys() and all(
            value == other[name] or (value == default[name] and name not in _CHANGES_ANSWERS)
            for name, value in mine.items()
        )

    def engine_config(self, header: Header, shape: ModelShape, n_ctx: int) -> EngineConfig:
        """The configuration of a context of `n_ctx` tokens where nothing is planned."""
        n_ubatch = self.n_ubatch or _UBATCH
        experts = _experts_in_ram(min(self.cpu_experts or 0, shape.layers))
        return EngineConfig(
            model_path=str(header.path),
            n_ctx=n_ctx,
            n_batch=max(_UBATCH, n_ubatch),
            n_ubatch=n_ubatch,
            threads=self.threads,
            gpu_layers=-1 if self.gpu_layers is None else self.gpu_layers,
            kv_type_k=self.type_k or "f16",
            kv_type_v=self.type_v or "f16",
            flash_attention=self.flash_attention,
            allow_dense=self.allow_dense,
            tensor_overrides=(*self.tensor_overrides, *experts),
            main_gpu=self.main_gpu,
            tensor_split=self.tensor_split,
            op_offload=self.op_offload,
            no_host=self.no_host,
            mmap=self.mmap,
            mlock=self.mlock,
            lora=self.lora,
        )

    def wanted(self, n_ctx: int, prompt: int, layers: int) -> Wanted:
        """What a planner of a model with so many layers is to keep to; sizes in tokens."""
        return Wanted(
            n_ctx,
            prompt,
            ANSWER,
            self.type_k,
            self.type_v,
            self.n_ubatch,
            self.gpu_layers,
            None if self.cpu_experts is None else min(self.cpu_experts, layers),
        )


@contextmanager
def planner_of(
    header: Header, shape: ModelShape, machine: Machine, base: EngineConfig, cache_dir: Path | None
) -> Iterator[Planner]:
    """A planner that asks llama.cpp itself. `cache_dir` knows whether weights may be repacked here."""
    repacks = cache_dir is None or not extra_buffers_crash(cache_dir)
    with DryRun(base.model_path, extra_buffers=repacks) as dry_run:
        yield Planner(
            shape,
            weights_of(header.tensors, shape.layers),
            machine,
            lambda configuration: _buffers(dry_run, base, configuration),
        )


def choose(planner: Planner, options: RunOptions, n_ctx: int) -> Plan | NoPlan:
    """The plan for `n_ctx` tokens, or why there is none.

    It is made for the next power of two, whole, and not for the prompt or by the speed of the last run:
    questions of about a length share what was saved of the context.
    """
    shape = planner.shape
    larger = min(1 << (n_ctx - 1).bit_length(), shape.context_length)
    for planned in dict.fromkeys((max(larger, n_ctx), n_ctx)):
        plan = planner.plan(options.wanted(planned, planned, shape.layers))
        if isinstance(plan, Plan):
            break
    return plan


def configured(
    opened: OpenModel, options: RunOptions, n_ctx: int, cache_dir: Path
) -> tuple[EngineConfig, tuple[str, ...]]:
    """How to load the model for `n_ctx` tokens, and what the user should hear of it.

    Where there is no GPU and memory is plentiful there is nothing to choose, and nothing is measured.
    Raises DoesNotFitError, with what would fit, when nothing does.
    """
    header, shape = opened.header, opened.shape
    base = options.engine_config(header, shape, n_ctx)
    if not options.planned:
        return base, ()
    machine = machine_here(cache_dir)
    if not machine.devices and _is_plentiful(base, opened, machine):
        return base, ()
    machine = with_measured_rates(machine, cache_dir, header.path)
    with planner_of(header, shape, machine, base, cache_dir) as planner:
        plan = choose(planner, options, n_ctx)
    if isinstance(plan, NoPlan):
        hints = " ".join(plan.alternatives)
        raise DoesNotFitError(plan.reason, hints or "Use a smaller model.")
    chosen = applied(base, plan.configuration)
    told: tuple[str, ...] = ()
    if (chosen.kv_type_k, chosen.n_ubatch) != (base.kv_type_k, base.n_ubatch) or machine.devices:
        told = (*plan.reasons, *plan.warnings)
    return replace(chosen, n_ctx=n_ctx), told


def stepped_down(config: EngineConfig, options: RunOptions) -> EngineConfig | None:
    """The next smaller configuration, for when memory is not there after all; None if there is none."""
    smaller = config
    if options.n_ubatch is None:
        smaller = replace(config, n_ubatch=max(config.n_ubatch // 4, UBATCHES[-1]))
    if options.type_k is None and config.kv_type_k == "f16" and config.flash_attention:
        smaller = replace(smaller, kv_type_k="q8_0", kv_type_v=options.type_v or "q8_0", in_place=False)
    return smaller if smaller != config else None


def updatable(config: EngineConfig, header: Header, update: Update) -> tuple[EngineConfig, tuple[str, ...]]:
    """`config` for contexts that are brought up to date so, and what the user should hear of that.

    Raises ImpossibleError where `inplace` is asked of a model that cannot do it.
    """
    if update == "exact":
        return config, ()
    if not (problem := update_problem(header, config.kv_type_k)):
        return replace(config, in_place=True), ()
    if update == "inplace":
        raise ImpossibleError(
            f"The context of {header.path.name} cannot be updated in place: {problem}.",
            "Leave out --update inplace; all behind an edit is then computed again.",
        )
    return config, (f"the context is updated exactly: in place it cannot be, as {problem}",)


def applied(base: EngineConfig, configuration: Configuration) -> EngineConfig:
    """`base` as it was planned."""
    return replace(
        base,
        n_ctx=configuration.n_ctx,
        n_batch=max(_UBATCH, configuration.n_ubatch),
        n_ubatch=configuration.n_ubatch,
        gpu_layers=configuration.gpu_layers,
        kv_type_k=configuration.type_k,
        kv_type_v=configuration.type_v,
        tensor_overrides=_experts_in_ram(configuration.cpu_experts),
        tensor_split=configuration.tensor_split,
    )


def _file_state(name: str) -> list[str | int]:
    """What tells a file from others, and from what it was before; of one that is not there, its name."""
    try:
        path = Path(name).resolve(strict=True)
        status = path.stat()
    except (OSError, RuntimeError):
        return [name]
    return [str(path), status.st_size, status.st_mtime_ns]


def _experts_in_ram(layers: int) -> tuple[tuple[str, str], ...]:
    """The override that keeps the routed experts of so many layers, the first ones, in main memory."""
    numbers = "|".join(map(str, range(layers)))
    return ((rf"blk\.({numbers})\.ffn_\w+_exps\.", "CPU"),) if numbers else ()


def _buffers(dry_run: DryRun, base: EngineConfig, configuration: Configuration) -> Buffers:
    """What llama.cpp would allocate. Sizes do not depend on where things go: all is measured in the RAM."""
    need = dry_run.need(applied(base, replace(configuration, gpu_layers=0, cpu_experts=0, tensor_split=())))
    return Buffers(
        kv=sum(need.memory.values()),
        compute=sum(need.compute.values()) + sum(need.output.values()),
        repacked=sum(nbytes for name, nbytes in need.weights.items() if name != "CPU"),
    )


def _is_plentiful(base: EngineConfig, opened: OpenModel, machine: Machine) -> bool:
    kv = opened.shape.kv_bytes_per_token(base.kv_type_k, base.kv_type_v) * base.n_ctx
    need = opened.header.file_bytes + kv + PYTHON_BYTES + _PLENTY
    return need <= machine.ram_available * RAM_SHARE
