"""How long a configuration takes, from bytes that move and operations that are done.

Decoding a token reads all weights that it uses, and the KV cache that it attends, once: the time is that
of the memories. Prefill computes: two operations a weight and token, and attention; it reads all weights
once a ubatch, which takes longer if that is small. Experts in RAM are carried to the device once a ubatch,
or computed by the CPU, whichever is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3cli.model.shape import ModelShape
    from m3cli.plan.machine import Machine
    from m3cli.plan.memory import Weights
    from m3cli.plan.planner import Configuration

# The share of the rates on paper that inference gets.
_EFFICIENCY = 0.6
_PREFILL_EFFICIENCY = 0.35
# Without a measurement the truth lies within this factor, with one within the other.
_UNMEASURED, _MEASURED = 2.5, 1.4


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to load, to prefill the prompt, and to write the answer; tokens a second of both.

    `band` is the factor by which the truth may differ either way.
    """

    load: float
    prefill: float
    decode: float
    prefill_rate: float
    decode_rate: float
    band: float

    @property
    def total(self) -> float:
        """Seconds from the start to the end of the answer."""
        return self.load + self.prefill + self.decode

    def scaled(self, prefill: float, decode: float) -> Speed:
        """With the times of prefill and decode multiplied, by what a run has shown."""
        return Speed(
            self.load,
            self.prefill * prefill,
            self.decode * decode,
            self.prefill_rate / prefill,
            self.decode_rate / decode,
            _MEASURED,
        )


def predict(
    shape: ModelShape,
    weights: Weights,
    machine: Machine,
    configuration: Configuration,
    prompt: int,
    answer: int,
    streamed: int,
    kv_bytes: int,
) -> Speed:
    """Predict the speed of reading `prompt` and writing `answer` tokens.

    `streamed` bytes of the experts are read from the disk again, `kv_bytes` is the whole KV cache.
    """
    layers = len(weights.layers)
    first = layers + 1 - configuration.gpu_layers
    used = shape.experts_used / shape.experts if shape.experts else 1.0
    device_bandwidth = min((device.bandwidth for device in machine.devices), default=0.0)
    device_compute = min((device.compute for device in machine.devices), default=0.0)
    link = min((device.link for device in machine.devices), default=0.0)
    dense_device = sum(layer.dense for layer in weights.layers[max(first, 0) :])
    dense_device += (weights.output or weights.embeddings) if configuration.gpu_layers > layers else 0
    experts_device = sum(
        layer.experts
        for number, layer in enumerate(weights.layers)
        if number >= max(first, configuration.cpu_experts)
    )
    dense_ram = weights.dense + (weights.output or weights.embeddings) - dense_device
    experts_ram = weights.experts - experts_device
    kv_share = (layers - max(first, 0)) / layers if layers else 0.0
    attended = _attended(shape, prompt)
    kv_read = kv_bytes * min(1.0, attended / max(configuration.n_ctx, 1))

    # 1. decode: everything that a token uses is read once
    seconds = 0.0
    if configuration.gpu_layers and device_bandwidth:
        read = dense_device + experts_device * used + kv_read * kv_share
        seconds += read / (device_bandwidth * _EFFICIENCY)
    read = max(dense_ram, 0) + experts_ram * used + kv_read * (1 - kv_share)
    seconds += read / (machine.ram_bandwidth * _EFFICIENCY)
    if streamed and experts_ram + dense_ram:
        missing = streamed / (experts_ram + dense_ram)
        seconds += missing * (dense_ram + experts_ram * used) / machine.disk_read
    decode_seconds = seconds

    # 2. prefill: operations a token, or bytes a ubatch
    dense_flops, expert_flops = _flops_per_byte(shape, weights)
    attention = _attention_flops(shape, prompt)
    seconds = 0.0
    if configuration.gpu_layers and device_compute:
        flops = dense_flops * dense_device + expert_flops * experts_device * used
        read = (dense_device + experts_device) / (device_bandwidth * _EFFICIENCY)
        rate = device_compute * _PREFILL_EFFICIENCY
        seconds += max(flops / rate, read / configuration.n_ubatch) + attention * kv_share / rate
    cpu_compute = machine.compute * _PREFILL_EFFICIENCY
    in_ram = max(dense_ram, 0) + experts_ram
    ram_flops = dense_flops * max(dense_ram, 0) + expert_flops * experts_ram * used
    read = in_ram / (machine.ram_bandwidth * _EFFICIENCY)
    computed = max(ram_flops / cpu_compute, read / configuration.n_ubatch)
    if configuration.gpu_layers and link:
        carried = in_ram / (link * configuration.n_ubatch)
        carried += ram_flops / (device_compute * _PREFILL_EFFICIENCY)
        computed = min(computed, carried)
    seconds += computed + attention * (1 - kv_share) / cpu_compute
    if streamed:
        # A ubatch uses all weights in turn: what is read first has left the system's cache when it is due.
        seconds += in_ram / (machine.disk_read * configuration.n_ubatch)
    prefill_seconds = seconds
    return Speed(
        load=(weights.total) / machine.disk_read,
        prefill=prefill_seconds * prompt,
        decode=decode_seconds * answer,
        prefill_rate=1 / prefill_seconds if prefill_seconds else 0.0,
        decode_rate=1 / decode_seconds if decode_seconds else 0.0,
        band=_UNMEASURED,
    )


def _flops_per_byte(shape: ModelShape, weights: Weights) -> tuple[float, float]:
    """Operations a token for each byte of weights: of all but routed experts, and of those."""
    if not weights.total:
        return 0.0, 0.0
    rest = weights.total - weights.experts
    if not weights.expert_elements or not weights.experts or not rest:
        same = 2.0 * shape.parameters / weights.total
        return same, same
    others = max(shape.parameters - weights.expert_elements, 0)
    return 2.0 * others / rest, 2.0 * weights.expert_elements / weights.experts


def _attended(shape: ModelShape, prompt: int) -> float:
    """Tokens whose keys and values a query reads, as a mean over layers."""
    if shape.indexer is None:
        return float(prompt)
    sparse = shape.sparse_layers / shape.layers
    # the indexer looks at every token, with one small head of keys
    looked = prompt * shape.indexer.key_length / (sum(shape.kv_heads) / shape.layers * 2 * shape.head_dim_k)
    return (1 - sparse) * prompt + sparse * (min(prompt, shape.indexer.attended_tokens) + looked)


def _attention_flops(shape: ModelShape, prompt: int) -> float:
    """Operations of attention a token, averaged over the prompt: half of it is behind the mean token."""
    if shape.indexer is None:
        return 4.0 * shape.heads * shape.head_dim_k * shape.layers * prompt / 2
    dense = shape.layers - shape.sparse_layers
    full = 4.0 * shape.heads * shape.head_dim_k * dense * prompt / 2
    reach = min(prompt, shape.indexer.attended_tokens)
    sparse = 4.0 * shape.heads * shape.head_dim_k * shape.sparse_layers * reach
    looked = 2.0 * shape.indexer.head_count * shape.indexer.key_length * shape.sparse_layers * prompt / 2
    return full + sparse + looked
