"""`m3 plan`: what would run here, in how much memory, and how long it would take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import read_corpus
from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.engine.local import system_facts
from m3cli.errors import UsageError
from m3cli.model.digest import model_digest
from m3cli.plan.machine import Machine, described, this_machine
from m3cli.plan.memory import Buffers, weights_of
from m3cli.plan.planner import Configuration, Planner, Wanted
from m3cli.plan.window import plan_window
from m3cli.prompt.pack import pack_chunks
from m3cli.settings import read_toml
from m3cli.tasks.model import open_model
from m3cli.tasks.rates import known_speed, with_measured_rates

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.memo import Memo
    from m3cli.model.catalog import ModelRef
    from m3cli.model.shape import ModelShape
    from m3cli.plan.planner import KVType, NoPlan, Plan

_ANSWER = 500  # tokens of an answer, for the time that it takes
_AROUND = 400  # tokens of instructions, template and question


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned. `ctx` None is what the corpus takes, 0 the model's context.

    `machine` is a TOML description or the name of one that m3 brings; None is this machine. What is not
    None is taken as it is. `cache_dir` is where measurements of this machine are kept.
    """

    model: ModelRef
    cache_dir: Path
    corpus: CorpusRequest | None = None
    ctx: int | None = None
    machine: str | None = None
    type_k: KVType | None = None
    type_v: KVType | None = None
    n_ubatch: int | None = None
    gpu_layers: int | None = None
    cpu_experts: int | None = None
    memo: Memo | None = None


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan, or why there is none, for `prompt` tokens in a context of `n_ctx`."""

    model: str
    shape: ModelShape
    machine: Machine
    prompt: int
    n_ctx: int
    result: Plan | NoPlan
    measured: bool


def make_plan(request: PlanRequest, stdin: Callable[[], bytes]) -> PlanReport:
    """Plan without loading the model: from its header, and from what llama.cpp would allocate.

    Raises CorpusError, ModelError, UsageError, DoesNotFitError for a context larger than the model's.
    """
    with open_model(request.model, request.memo) as opened:
        shape = opened.shape
        prompt = 0
        if request.corpus is not None:
            corpus = read_corpus(request.corpus, stdin)
            prompt = pack_chunks(corpus.chunks, opened.tokenizer.count_batch).tokens + _AROUND
        header = opened.header
    n_ctx = _n_ctx(request, shape.context_length, prompt)
    prompt = min(prompt, n_ctx) if prompt else n_ctx - min(_ANSWER, n_ctx // 4)
    path = str(header.path)
    machine = _machine(request, Path(path))
    speed = known_speed(request.cache_dir, model_digest(header)) if request.machine is None else None
    base = EngineConfig(path, n_ctx)
    with DryRun(path) as dry_run:
        planner = Planner(
            shape,
            weights_of(header.tensors, shape.layers),
            machine,
            lambda configuration: buffers_of(dry_run, base, configuration),
        )
        wanted = Wanted(
            n_ctx,
            prompt,
            _ANSWER,
            request.type_k,
            request.type_v,
            request.n_ubatch,
            request.gpu_layers,
            request.cpu_experts,
        )
        if speed is not None:
            planner.scale = planner.scale_of(speed)
        result = planner.plan(wanted)
    return PlanReport(request.model.name, shape, machine, prompt, n_ctx, result, measured=speed is not None)


def _n_ctx(request: PlanRequest, context_length: int, prompt: int) -> int:
    window = plan_window(context_length, request.ctx or 0)
    if request.ctx is not None or not prompt:
        return window.size
    return window.n_ctx(prompt)


def _machine(request: PlanRequest, model: Path) -> Machine:
    if request.machine is not None:
        return described_machine(request.machine)
    facts = system_facts()
    machine = this_machine(facts["devices"], facts["cores"])
    return with_measured_rates(machine, request.cache_dir, model)


def described_machine(name: str) -> Machine:
    """A machine by the name of a description that m3 brings, or by its file. Raises UsageError."""
    directory = resources.files("m3cli.plan") / "machines"
    brought = {Path(file.name).stem: file for file in directory.iterdir()}
    if name not in brought and not Path(name).exists():
        raise UsageError(
            f"There is no description of a machine {name}.",
            f"Name a TOML file, or one of {', '.join(sorted(brought))}.",
        )
    if name not in brought:
        return described(read_toml(Path(name), follow=True), name)
    with resources.as_file(brought[name]) as file:
        return described(read_toml(file, follow=True), name)


def engine_config(base: EngineConfig, configuration: Configuration) -> EngineConfig:
    """`base` as it was planned."""
    overrides = []
    if configuration.cpu_experts and configuration.gpu_layers:
        layers = "|".join(map(str, range(configuration.cpu_experts)))
        overrides.append((rf"blk\.({layers})\.ffn_\w+_exps\.", "CPU"))
    return replace(
        base,
        n_ctx=configuration.n_ctx,
        n_batch=max(512, configuration.n_ubatch),
        n_ubatch=configuration.n_ubatch,
        gpu_layers=configuration.gpu_layers,
        kv_type_k=configuration.type_k,
        kv_type_v=configuration.type_v,
        tensor_overrides=tuple(overrides),
        tensor_split=configuration.tensor_split,
    )


def buffers_of(dry_run: DryRun, base: EngineConfig, configuration: Configuration) -> Buffers:
    """What llama.cpp would allocate. Sizes do not depend on where things go: all is measured in the RAM."""
    here = replace(configuration, gpu_layers=0, cpu_experts=0, tensor_split=())
    need = dry_run.need(engine_config(base, here))
    return Buffers(
        kv=sum(need.memory.values()), compute=sum(need.compute.values()) + sum(need.output.values())
    )
