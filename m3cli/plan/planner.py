"""The best configuration that a machine can hold, and how long it will take; or what would fit instead.

Preference, in this order: the whole prompt fits; then speed; then the precision of the KV cache. A less
precise KV cache is taken only where it saves a fifth of the time, 4 bits only where nothing else fits. The
keys are quantized after the values: they decide what is attended, and an indexer's keys have their type.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from m3cli.plan import explain
from m3cli.plan.memory import DEVICE_MARGIN, RAM_SHARE, process_bytes
from m3cli.plan.sizes import Sizes
from m3cli.plan.speed import Speed, predict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.model.shape import ModelShape
    from m3cli.plan.machine import Device, Machine
    from m3cli.plan.memory import Buffers, Weights

KVType = Literal["f16", "q8_0", "q4_0"]

KV_TYPES: tuple[tuple[KVType, KVType], ...] = (
    ("f16", "f16"),
    ("f16", "q8_0"),
    ("q8_0", "q8_0"),
    ("q8_0", "q4_0"),
    ("q4_0", "q4_0"),
)
UBATCHES = (512, 2048, 1024, 256, 128, 64)  # llama.cpp's default first
# A KV type of less precision, and layers that leave the devices, have to save this much of the time.
_WORTH = 0.8
_NOTICED = 0.98  # less is no reason to leave llama.cpp's default
# Of the weights, what may have no place in any memory; with more, a smaller quant serves better.
_MISSING = 0.2
_CELLS = 256
_GIB = 1 << 30
_MODEST = 32_768  # tokens of a context that is still of use
_FEWEST_BITS = 1.6  # a weight, on average, in the smallest quants that are published


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a model is run. Sizes in tokens.

    The last `gpu_layers` layers (of `layers` + 1, the output being one) are on devices, divided by
    `tensor_split`; the routed experts of the first `cpu_experts` layers stay in the RAM all the same.
    """

    n_ctx: int
    type_k: KVType = "f16"
    type_v: KVType = "f16"
    n_ubatch: int = 512
    gpu_layers: int = 0
    cpu_experts: int = 0
    tensor_split: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """What one memory holds, in bytes: `name` is a device's or RAM; `room` is what it could."""

    name: str
    room: int
    weights: int = 0
    kv: int = 0
    compute: int = 0
    other: int = 0

    @property
    def used(self) -> int:
        """All that is taken."""
        return self.weights + self.kv + self.compute + self.other


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration that fits, where its bytes go, what it was preferred for, and how long it takes.

    `streamed` bytes of weights do not fit into the RAM and are read from the disk again and again.
    """

    configuration: Configuration
    places: tuple[Place, ...]
    speed: Speed
    state_bytes: int
    streamed: int = 0
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Nothing fits: what lacks, and the nearest things that would, as sentences."""

    reason: str
    alternatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be run: a context of so many tokens, `prompt` of which are read and `answer` written.

    What is not None was chosen by the user and is not changed.
    """

    n_ctx: int
    prompt: int
    answer: int = 500
    type_k: KVType | None = None
    type_v: KVType | None = None
    n_ubatch: int | None = None
    gpu_layers: int | None = None
    cpu_experts: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took, in seconds a token of prefill and decode, and how it was run."""

    prefill: float
    decode: float
    prompt: int
    n_ctx: int
    n_ubatch: int
    type_k: KVType
    type_v: KVType


@dataclass
class Planner:
    """Plans for one model on one machine. `buffers` says what llama.cpp allocates for a configuration."""

    shape: ModelShape
    weights: Weights
    machine: Machine
    buffers: Callable[[Configuration], Buffers]
    _sizes: Sizes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._sizes = Sizes(self.shape, self.buffers)

    def plan(self, wanted: Wanted) -> Plan | NoPlan:
        """The best plan, or why there is none."""
        while True:
            best = self._best(wanted)
            decides = best.configuration if best is not None else self._smallest(wanted)
            if self._sizes.is_known(decides):
                return self._explained(best, wanted) if best is not None else self._no_plan(wanted)
            self._sizes.exact(decides)  # what was reckoned decides what is asked, never what is told

    def _best(self, wanted: Wanted) -> Plan | None:
        plans = [plan for kv in self._kv_types(wanted) if (plan := self._fastest(wanted, kv))]
        whole = [plan for plan in plans if not plan.streamed] or plans
        if not whole:
            return None
        best = whole[0]
        for plan in whole[1:]:
            if plan.configuration.type_v == "q4_0" and best.configuration.type_v != "q4_0":
                break
            if plan.speed.total < best.speed.total * _WORTH:
                best = plan
        return best

    def scale_of(self, measured: Measured) -> tuple[float, float]:
        """The factors by which a run took longer than was predicted for it, in prefill and decode."""
        configuration = Configuration(measured.n_ctx, measured.type_k, measured.type_v, measured.n_ubatch)
        wanted = Wanted(measured.n_ctx, measured.prompt, type_k=measured.type_k, type_v=measured.type_v)
        self._sizes.exact(configuration)
        plan = self._placed(wanted, configuration)
        if plan is None or not measured.prefill or not measured.decode:
            return 1.0, 1.0
        return measured.prefill * plan.speed.prefill_rate, measured.decode * plan.speed.decode_rate

    def largest(self, wanted: Wanted) -> int:
        """The longest context, in tokens, that fits in any way, up to what is asked for; 0 if none does."""
        smallest = self._smallest(wanted)
        cells = wanted.n_ctx // _CELLS
        if not cells:
            return 0

        def shorter(n_ctx: int) -> Configuration:
            return replace(smallest, n_ctx=n_ctx)

        def fits(cells: int) -> bool:
            n_ctx = cells * _CELLS
            asked = replace(wanted, n_ctx=n_ctx, prompt=min(wanted.prompt, n_ctx))
            return self._placed(asked, shorter(n_ctx)) is not None

        for n_ctx in (_CELLS, cells * _CELLS):  # between them, sizes are reckoned
            self._sizes.exact(shorter(n_ctx))
        while True:
            found = bisect_left(range(1, cells + 1), True, key=lambda count: not fits(count))
            if not found or self._sizes.is_known(shorter(found * _CELLS)):
                return found * _CELLS
            self._sizes.exact(shorter(found * _CELLS))

    def _smallest(self, wanted: Wanted) -> Configuration:
        """The configuration of this context that takes the least memory."""
        choices = [
            Configuration(wanted.n_ctx, k, v, wanted.n_ubatch or UBATCHES[-1])
            for k, v in self._kv_types(wanted)
        ]
        sizes = [self._sizes.reckoned(choice) for choice in choices]
        return min(zip(choices, sizes, strict=True), key=lambda pair: pair[1].kv + pair[1].compute)[0]

    def _kv_types(self, wanted: Wanted) -> list[tuple[KVType, KVType]]:
        """Types of keys and values, the most precise first.

        With flash attention on a GPU, two types are for CUDA to convert in each step, unless the model has
        an indexer: what that chooses is converted anyway. Metal leaves them to the CPU.
        """
        devices = self.machine.devices
        mixed = not devices or (
            self.shape.indexer is not None and not any(device.unified for device in devices)
        )
        types = dict.fromkeys((wanted.type_k or k, wanted.type_v or v) for k, v in KV_TYPES)
        return [(k, v) for k, v in types if mixed or k == v] or list(types)

    def _fastest(self, wanted: Wanted, kv: tuple[KVType, KVType]) -> Plan | None:
        """The fastest plan with these KV types."""
        best: Plan | None = None
        for n_ubatch in (wanted.n_ubatch,) if wanted.n_ubatch else UBATCHES:
            if not wanted.n_ubatch and n_ubatch > max(512, wanted.n_ctx):
                continue
            plan = self._placed(wanted, Configuration(wanted.n_ctx, *kv, n_ubatch))
            if plan is not None and (best is None or self._is_better(plan, best)):
                best = plan
        return best

    @staticmethod
    def _is_better(plan: Plan, best: Plan) -> bool:
        """Whether a plan is faster than another of the same KV types, by enough; layers on devices count."""
        if bool(plan.streamed) != bool(best.streamed):
            return not plan.streamed
        layers = plan.configuration.gpu_layers - best.configuration.gpu_layers
        enough = _NOTICED if not layers else _WORTH if layers < 0 else 1 / _WORTH
        return plan.speed.total < best.speed.total * enough

    def _placed(self, wanted: Wanted, configuration: Configuration) -> Plan | None:
        """As much on the devices as they hold, the experts of first layers being the first to stay away."""
        buffers = self._sizes.reckoned(configuration)
        for choices in self._placements(wanted):
            placed = [self._place(configuration, *choice) for choice in choices]
            first = bisect_left(placed, True, key=lambda candidate: self._fits(candidate, buffers))
            if first < len(placed):  # what follows has less on the devices
                return self._timed(wanted, placed[first], buffers)
        return None

    def _place(self, configuration: Configuration, gpu_layers: int, cpu_experts: int) -> Configuration:
        split = _split(self.machine.devices) if gpu_layers else ()
        return replace(configuration, gpu_layers=gpu_layers, cpu_experts=cpu_experts, tensor_split=split)

    def _fits(self, candidate: Configuration, buffers: Buffers) -> bool:
        """Whether the devices hold it."""
        return all(place.used <= place.room for place in self._places(candidate, buffers)[:-1])

    def _timed(self, wanted: Wanted, candidate: Configuration, buffers: Buffers) -> Plan | None:
        places = self._places(candidate, buffers)
        ram = places[-1]
        streamed = max(ram.used - ram.room, 0)
        # The weights in RAM are mapped: what does not fit is read again. All else has to fit.
        mapped = ram.weights if candidate.gpu_layers else ram.weights - buffers.repacked
        missing = self.weights.total - self._room
        if streamed and (
            streamed > mapped * 0.5
            or missing > self.weights.total * _MISSING
            or self.machine.limit == "ulimit -v"
        ):
            return None
        speed = predict(
            self.shape, self.weights, self.machine, candidate, wanted.prompt, wanted.answer,
            streamed, buffers.kv,
        )  # fmt: skip
        return Plan(candidate, places, speed, self._state(wanted, buffers), streamed)

    def _placements(self, wanted: Wanted) -> list[list[tuple[int, int]]]:
        """(gpu_layers, cpu_experts), the most on the devices first; lists of which each has ever less."""
        layers = len(self.weights.layers)
        if not self.machine.devices or wanted.gpu_layers == 0:
            return [[(0, 0)]]
        asked = wanted.gpu_layers
        wanted_layers = layers + 1 if asked is None or asked < 0 else min(asked, layers + 1)
        has_experts = self.weights.experts > 0
        choices: Sequence[int] = (
            [wanted.cpu_experts] if wanted.cpu_experts is not None
            else range(layers + 1) if has_experts else [0]
        )  # fmt: skip
        placements = [[(wanted_layers, cpu_experts) for cpu_experts in choices]]
        if wanted.gpu_layers is None:
            fewer = range(layers, -1, -1)
            placements.append([(gpu_layers, layers if has_experts else 0) for gpu_layers in fewer])
        return placements

    def _places(self, configuration: Configuration, buffers: Buffers) -> tuple[Place, ...]:
        """What each device and, last, the RAM would hold."""
        devices, layers = self.machine.devices, self.weights.layers
        first = len(layers) + 1 - configuration.gpu_layers
        on_device = [0] * len(devices)
        kv_on = [0] * len(devices)
        in_ram, kv_in_ram = self.weights.embeddings, 0
        heads = sum(self.shape.kv_heads) or 1
        for number in range(len(layers) + 1):
            if number < len(layers):
                dense, experts = layers[number].dense, layers[number].experts
                kv = buffers.kv * self.shape.kv_heads[number] // heads
            else:
                dense, experts, kv = self.weights.output, 0, 0
            if number < first:
                in_ram += dense + experts
                kv_in_ram += kv
                continue
            device = _device_of(number - first, configuration)
            stays = number < configuration.cpu_experts
            on_device[device] += dense + (0 if stays else experts)
            kv_on[device] += kv
            in_ram += experts if stays else 0
        if configuration.gpu_layers > len(layers) and not self.weights.output:
            on_device[-1] += self.weights.embeddings  # the embeddings serve as output matrix too
        places = [
            Place(
                device.name if len(devices) == 1 else f"{device.name} {number}",
                device.free,
                on_device[number],
                kv_on[number],
                buffers.compute if on_device[number] else 0,
                DEVICE_MARGIN if on_device[number] and not device.unified else 0,
            )
            for number, device in enumerate(devices)
        ]
        unified = sum(place.used for place, device in zip(places, devices, strict=True) if device.unified)
        compute = buffers.compute // 8 if configuration.gpu_layers else buffers.compute
        room = int(self.machine.ram_available * RAM_SHARE)
        other = process_bytes(self.shape, self.weights.tensors, configuration.n_ubatch)
        return (*places, Place("RAM", room, in_ram, kv_in_ram, compute, other + unified))

    @property
    def _room(self) -> int:
        """Bytes of all memories."""
        return int(self.machine.ram_available * RAM_SHARE) + self.machine.device_memory

    def _state(self, wanted: Wanted, buffers: Buffers) -> int:
        return buffers.kv * min(wanted.prompt, wanted.n_ctx) // max(wanted.n_ctx, 1)

    def _explained(self, plan: Plan, wanted: Wanted) -> Plan:
        compute = self._sizes.exact(plan.configuration).compute
        why = explain.reasons(plan, wanted, self.weights, self.machine, compute)
        return replace(plan, reasons=tuple(why), warnings=tuple(explain.warnings(plan, self.shape)))

    def _no_plan(self, wanted: Wanted) -> NoPlan:
        """Why nothing fits, and up to three things that would."""
        smallest = self._smallest(wanted)
        buffers = self._sizes.exact(smallest)
        processes = process_bytes(self.shape, self.weights.tensors, smallest.n_ubatch)
        need = self.weights.total + buffers.kv + buffers.compute + processes
        room = self._room
        limit = f", held back by {self.machine.limit}" if self.machine.limit else ""
        reason = (
            f"{self.shape.name} with a context of {wanted.n_ctx:,} tokens takes at least {need / 1e9:.2f} GB "
            f"(weights {self.weights.total / 1e9:.2f}, KV cache {buffers.kv / 1e9:.2f}, compute "
            f"{buffers.compute / 1e9:.2f}), and {self.machine.name} has {room / 1e9:.2f} GB{limit}."
        )
        alternatives: list[str] = []
        free = replace(wanted, type_k=None, type_v=None, n_ubatch=None)
        plan = self.plan(free) if free != wanted else None
        if isinstance(plan, Plan):
            chosen = plan.configuration
            alternatives.append(
                f"A KV cache of {chosen.type_k} keys and {chosen.type_v} values with a ubatch of "
                f"{chosen.n_ubatch:,}: {sum(place.used for place in plan.places) / 1e9:.1f} GB."
            )
        longest = self.largest(wanted)
        if longest >= _CELLS:
            alternatives.append(
                f"--ctx {longest}: a context of {longest:,} tokens fits; --strategy select packs what "
                "matters most into it."
            )
        disk = int(room * _MISSING / (1 - _MISSING))
        contexts = dict.fromkeys((wanted.n_ctx, min(wanted.n_ctx, _MODEST)))
        for n_ctx, again in [*((n_ctx, 0) for n_ctx in contexts), (wanted.n_ctx, disk)]:
            if again and (alternatives or self.machine.limit == "ulimit -v"):
                continue
            beside = self._sizes.exact(replace(smallest, n_ctx=n_ctx))
            weights_room = room + again - beside.kv - beside.compute - processes
            bits = weights_room * 8 / max(self.shape.parameters, 1)
            if bits >= _FEWEST_BITS and weights_room < self.weights.total:
                alternatives.append(
                    f"A quant of at most {weights_room / 1e9:.1f} GB with a context of {n_ctx:,} tokens: "
                    f"{bits:.1f} bits a weight, where this file has "
                    f"{self.weights.total * 8 / self.shape.parameters:.1f}."
                    + (" A part of it would be read from the disk over and over." if again else "")
                )
        if not alternatives:
            alternatives.append(
                f"A machine with {need / 1e9:.0f} GB for model and context, or a smaller model: at "
                f"{_FEWEST_BITS} bits a weight this one alone takes "
                f"{self.shape.parameters * _FEWEST_BITS / 8e9:.0f} GB."
            )
        return NoPlan(reason, tuple(alternatives[:3]))


def _split(devices: Sequence[Device]) -> tuple[float, ...]:
    # Whole proportions of what devices have, not of what is free this minute: saved KV caches depend on them.
    return tuple(float(max(round(device.total / _GIB), 1)) for device in devices) if len(devices) > 1 else ()


def _device_of(position: int, configuration: Configuration) -> int:
    """Which device holds the layer at `position` among those on devices, as llama.cpp divides them."""
    split = configuration.tensor_split
    if len(split) < 2:
        return 0
    share = position / configuration.gpu_layers
    total, reached = sum(split), 0.0
    for number, part in enumerate(split):
        reached += part / total
        if share < reached:
            return number
    return len(split) - 1
