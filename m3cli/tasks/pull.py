"""`m3 model pull`: choose a published quant that fits this machine, download it, check it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.engine.local import system_facts
from m3cli.errors import DoesNotFitError, MachineError, ModelError, UsageError
from m3cli.model.hub import ALIASES, open_repository
from m3cli.model.pull import Target, Transferred, Trouble, check_space, checked_header, download, remote_facts
from m3cli.plan.machine import this_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from m3cli.model.hub import Quant, Repository
    from m3cli.model.pull import Facts

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What is wanted: `name` is an alias, OWNER/REPO or OWNER/REPO:QUANT.

    Without a `directory` the files go to the hub's cache.
    """

    name: str
    quant: str | None = None
    revision: str | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """One quant of a repository and what speaks against it.

    `misfit` is why it does not fit this machine, empty if it does; `facts` is None for a quant whose
    header was not read, because the choice did not depend on it.
    """

    quant: Quant
    misfit: str
    facts: Facts | None

    @property
    def problem(self) -> str:
        """Why it cannot be run anywhere; empty if nothing is known against it."""
        return self.quant.problem or (self.facts.problem if self.facts else "")


@dataclass(frozen=True, slots=True)
class PullPlan:
    """A choice, made. `missing_bytes` are still to be downloaded; licences are None where none is stated."""

    repository: Repository
    offers: tuple[Offer, ...]
    chosen: Offer
    target: Target
    missing_bytes: int
    free_bytes: int

    @property
    def licenses(self) -> tuple[str, ...]:
        """What the repository's card and the model's header say, once if they agree."""
        header = self.chosen.facts.license if self.chosen.facts else None
        found = [text for text in (self.repository.license, header) if text]
        return tuple(dict.fromkeys(found))

    @property
    def path(self) -> Path:
        """The first file of the model, which is the one to name."""
        return self.target.path(self.chosen.quant.files[0])


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of all files are there, in their place or in a part; now in file `name`."""

    name: str
    done: int
    total: int
    received: int


def plan_pull(
    request: PullRequest, *, fits: Callable[[int], str] | None = None, every_header: bool = False
) -> PullPlan:
    """Look at the repository and choose; nothing is downloaded but headers.

    `fits` says why a model of so many bytes does not fit, and nothing if it does; by default
    `memory_room`'s. With `every_header` each quant's is read, not only those that the choice depends on.
    Raises UsageError, ModelError, MachineError, and DoesNotFitError when `auto` finds no quant.
    """
    name, wanted = _parsed(request)
    repository = open_repository(name, request.revision)
    target = Target(repository, request.directory)
    fits = fits or memory_room()
    misfits = {quant.name: _misfit(quant, target, fits) for quant in repository.quants}
    facts: dict[str, Facts] = {}

    def offer(quant: Quant) -> Offer:
        return Offer(quant, misfits[quant.name], facts.get(quant.name))

    def look(quant: Quant) -> Offer:
        if not quant.problem and quant.name not in facts:
            facts[quant.name] = remote_facts(repository, quant)
        return offer(quant)

    if every_header:
        for quant in repository.quants:
            look(quant)
    if wanted == AUTO:
        fitting = [quant for quant in repository.quants if not misfits[quant.name]]
        chosen = next((quant for quant in fitting if not look(quant).problem), None)
        if chosen is None:
            raise _none_fits(repository, [offer(quant) for quant in repository.quants])
    else:
        chosen = repository.find(wanted)
        if problem := look(chosen).problem:
            raise ModelError(
                f"The quant {chosen.name} of {repository.name} cannot be used: {problem.rstrip('.')}.",
                "Choose another quant, or let --quant auto choose.",
            )
    return PullPlan(
        repository,
        tuple(offer(quant) for quant in repository.quants),
        offer(chosen),
        target,
        target.missing(chosen),
        target.free(),
    )


def pull(plan: PullPlan) -> Iterator[Progress | Trouble]:
    """Download what is missing, verify everything, and check the header of the files on the disk.

    Raises what m3cli.model.pull.download does, and ModelError for a model that cannot be run.
    """
    quant = plan.chosen.quant
    check_space(plan.target, quant)
    sizes = {file.name: file.nbytes for file in quant.files}
    before, name, earlier = 0, quant.files[0].name, 0
    received = 0
    for event in download(plan.repository, quant, plan.target):
        if isinstance(event, Transferred):
            if event.name != name:
                before, earlier = before + sizes[name], earlier + received
                name = event.name
            received = event.received
            yield Progress(name, before + event.done, quant.nbytes, earlier + received)
        else:
            yield event
    checked_header(plan.target, quant)


def memory_room() -> Callable[[int], str]:
    """A function that says why a model of so many bytes does not fit the free memory of this machine.

    The weights and a tenth of them, for context and buffers, against RAM and the memory of devices
    together; an estimate.
    """
    try:
        devices = system_facts()["devices"]
    except MachineError:  # what it takes to download does not need llama.cpp
        devices = []
    machine = this_machine(devices, 0)
    room = machine.ram_available + machine.device_memory

    def fits(nbytes: int) -> str:
        needed = nbytes + nbytes // 10
        if needed <= room:
            return ""
        return f"takes about {needed / 1e9:,.1f} GB of memory, and {room / 1e9:,.1f} GB are free"

    return fits


def _parsed(request: PullRequest) -> tuple[str, str]:
    """Repository and quant. Raises UsageError."""
    name, _, quant = request.name.partition(":")
    name = ALIASES.get(name.lower(), name)
    if name.count("/") != 1:
        raise UsageError(
            f"{request.name!r} is no name of a repository.",
            f"Give OWNER/REPO, OWNER/REPO:QUANT, or one of {', '.join(ALIASES)}.",
        )
    if quant and request.quant and quant.lower() != request.quant.lower():
        raise UsageError(
            f"{request.name} names the quant {quant}, and --quant the quant {request.quant}.",
            "Give only one.",
        )
    return name, (AUTO if (request.quant or quant or AUTO).lower() == AUTO else request.quant or quant)


def _misfit(quant: Quant, target: Target, fits: Callable[[int], str]) -> str:
    if reason := fits(quant.nbytes):
        return reason
    try:
        check_space(target, quant)
    except MachineError:
        missing, free = target.missing(quant) / 1e9, target.free() / 1e9
        return f"{missing:,.1f} GB are to download, and the disk has {free:,.1f} GB free"
    return ""


def _none_fits(repository: Repository, offers: list[Offer]) -> DoesNotFitError | ModelError:
    fitting = [offer for offer in offers if not offer.misfit]
    if fitting:
        worst = fitting[-1]
        return ModelError(
            f"No quant of {repository.name} that fits this machine can be run; of {worst.quant.name}: "
            f"{worst.problem.rstrip('.')}.",
            "Choose another repository, or a machine with more memory.",
        )
    smallest = offers[-1]
    return DoesNotFitError(
        f"No quant of {repository.name} fits this machine: {smallest.quant.name}, the smallest, "
        f"{smallest.misfit}.",
        "Name one with --quant to download it all the same, or choose a smaller model.",
    )
