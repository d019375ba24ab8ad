"""Why a plan is as it is, and what the user should know of it, as sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.model.shape import ModelShape
    from m3cli.plan.machine import Machine
    from m3cli.plan.memory import Weights
    from m3cli.plan.planner import Plan, Wanted

_DEFAULT_UBATCH = 512


def reasons(plan: Plan, wanted: Wanted, weights: Weights, machine: Machine, compute: int) -> Iterator[str]:
    """What decided; `compute` are the bytes of the compute buffer."""
    configuration = plan.configuration
    layers = len(weights.layers)
    if not machine.devices:
        yield "There is no GPU that llama.cpp sees: everything is in the RAM."
    elif configuration.gpu_layers > layers and not configuration.cpu_experts:
        yield "All weights fit on the GPU."
    elif configuration.gpu_layers > layers:
        having = [number for number, layer in enumerate(weights.layers) if layer.experts]
        staying = sum(number < configuration.cpu_experts for number in having)
        of_which = "all layers" if staying == len(having) else f"{staying} of {len(having)} layers"
        yield (
            f"The experts of {of_which} stay in RAM, since a token uses few of them; attention and all else "
            "is on the GPU."
        )
    else:
        without = ", without their experts, which stay in RAM" if configuration.cpu_experts else ""
        yield f"{configuration.gpu_layers} of {layers + 1} layers fit on the GPU{without}."
    if (configuration.type_k, configuration.type_v) != ("f16", "f16") and wanted.type_k is None:
        kv = f"{configuration.type_k} keys and {configuration.type_v} values"
        yield f"With a KV cache of f16 it would not fit or be much slower: it has {kv}."
    if wanted.n_ubatch is None and configuration.n_ubatch < _DEFAULT_UBATCH:
        yield f"A ubatch of {configuration.n_ubatch} keeps the compute buffer at {compute / 1e9:.1f} GB."


def warnings(plan: Plan, shape: ModelShape) -> Iterator[str]:
    """What may go against the user's wishes."""
    type_k = plan.configuration.type_k
    if shape.indexer and type_k != "f16":
        yield (
            f"The indexer's keys are quantized with the KV cache ({type_k}), which may change which blocks "
            "are attended; --kv-type f16 keeps them exact."
        )
    if plan.streamed:
        yield (
            f"{plan.streamed / 1e9:.0f} GB of the weights do not fit into the RAM and are read from the disk "
            "over and over."
        )
