"""`m3 plan`: what would run here, in how much memory, and how long it would take."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import read_corpus
from m3cli.errors import UsageError
from m3cli.model.digest import model_digest
from m3cli.plan.machine import Machine, described
from m3cli.plan.planner import Configuration, NoPlan, Plan, Wanted
from m3cli.plan.window import plan_window
from m3cli.prompt.pack import pack_chunks
from m3cli.settings import read_toml
from m3cli.tasks.configure import ANSWER, RunOptions, choose, planner_of
from m3cli.tasks.model import open_model
from m3cli.tasks.rates import known_speed, machine_here, with_measured_rates

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.memo import Memo
    from m3cli.model.catalog import ModelRef
    from m3cli.model.shape import ModelShape
    from m3cli.plan.planner import Planner
    from m3cli.tasks.costs import Prices

_CELLS = 256  # tokens of the smallest context
_AROUND = 400  # tokens of instructions, template and question


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned. `ctx` None is what the corpus takes, 0 the model's context.

    `machine` is a TOML description or the name of one that m3 brings; None is this machine. What the user
    chose of `run` is taken as it is. `cache_dir` is where measurements of this machine are kept.
    """

    model: ModelRef
    cache_dir: Path
    corpus: CorpusRequest | None = None
    ctx: int | None = None
    machine: str | None = None
    run: RunOptions = field(default_factory=RunOptions)
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

    def costs(self, prices: Prices) -> dict[str, float]:
        """What the question costs, hosted and here: the first time, and when the context is restored."""
        if isinstance(self.result, NoPlan):
            return replace(prices, watts=0.0).costs(self.prompt, ANSWER, 0, 0)
        speed = self.result.speed
        return prices.costs(self.prompt, ANSWER, speed.total, speed.load + speed.decode)


def make_plan(request: PlanRequest, stdin: Callable[[], bytes]) -> PlanReport:
    """Plan without loading the model: from its header, and from what llama.cpp would allocate.

    Raises CorpusError, ModelError, UsageError, DoesNotFitError for a context larger than the model's.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open_model(request.model, request.memo))
        header, shape = opened.header, opened.shape
        machine = _machine(request, header.path)
        cache_dir = request.cache_dir if request.machine is None else None
        base = request.run.engine_config(header, shape, _CELLS)
        planner = stack.enter_context(planner_of(header, shape, machine, base, cache_dir))
        # llama.cpp reads the metadata while we read the files.
        ready = stack.enter_context(ThreadPoolExecutor(1)).submit(planner.buffers, Configuration(_CELLS))
        prompt = 0
        if request.corpus is not None:
            corpus = read_corpus(request.corpus, stdin)
            prompt = pack_chunks(corpus.chunks, opened.tokenizer.count_batch).tokens + _AROUND
        n_ctx = _n_ctx(request, shape.context_length, prompt)
        prompt = min(prompt, n_ctx) if prompt else n_ctx - min(ANSWER, n_ctx // 4)
        ready.result()
        result = choose(planner, request.run, n_ctx)
        speed = known_speed(cache_dir, model_digest(header)) if cache_dir is not None else None
        if isinstance(result, Plan):
            result = _for_prompt(planner, result, n_ctx, prompt)
            if speed is not None:
                result = replace(result, speed=result.speed.scaled(*planner.scale_of(speed)))
            if cache_dir is not None and result.state_bytes > (free := _free(cache_dir)):
                words = (
                    f"The context would take {result.state_bytes / 1e9:.1f} GB on the disk, and the cache "
                    f"has {free / 1e9:.1f} GB free: it would not be kept."
                )
                result = replace(result, warnings=(*result.warnings, words))
    return PlanReport(request.model.name, shape, machine, prompt, n_ctx, result, speed is not None)


def _free(directory: Path) -> int:
    """Bytes that are free on the disk of a directory, which need not be there yet."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _for_prompt(planner: Planner, chosen: Plan, n_ctx: int, prompt: int) -> Plan:
    """What was chosen, with the memory and the time that this prompt takes."""
    configuration = chosen.configuration
    plan = planner.plan(
        Wanted(
            n_ctx,
            prompt,
            ANSWER,
            configuration.type_k,
            configuration.type_v,
            configuration.n_ubatch,
            configuration.gpu_layers,
            configuration.cpu_experts,
        )
    )
    if isinstance(plan, NoPlan):  # not with what a shorter context has just fitted
        return chosen
    return replace(plan, reasons=chosen.reasons, warnings=chosen.warnings)


def _n_ctx(request: PlanRequest, context_length: int, prompt: int) -> int:
    window = plan_window(context_length, request.ctx or 0)
    if request.ctx is not None or not prompt:
        return window.size
    return window.n_ctx(prompt)


def _machine(request: PlanRequest, model: Path) -> Machine:
    if request.machine is not None:
        return described_machine(request.machine)
    return with_measured_rates(machine_here(request.cache_dir), request.cache_dir, model)


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
