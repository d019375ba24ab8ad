"""How much an error in a tensor matters for what the model says.

The measure is the KL divergence of the model's predictions, in nats a token, that a relative error of the
tensor's output causes, divided by that error (both are energies, so they grow together as long as they are
small). Errors of different tensors have little to do with each other, so their divergences add up.
That makes the divergence that a choice of types will cause a sum of sensitivity times error.
(The linearity of both: Malinovskii et al., Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem, 2024.)
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from m3cli.model.tokens import pack_ids

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.process import WorkerClient

_ERROR = 1e-3  # relative energy of the noise: about what 6 bits a weight make

# Medians of SmolLM2 135M and Qwen2.5 Coder 0.5B, by scripts/bench/quant_sensitivity.py; for tensors of which
# nothing was measured. The first that is found in the name decides.
_TYPICAL = (
    (re.compile(r"^output\."), 10.0),
    (re.compile(r"^token_embd\."), 1.0),
    (re.compile(r"attn_k\."), 0.08),
    (re.compile(r"attn_v\.|ffn_(up|down)"), 0.05),
    (re.compile(r""), 0.03),
)


class Sensitivity(NamedTuple):
    """Nats a token for a relative error of 1, or None for a tensor that is not used."""

    tensor: str
    value: float | None


def typical_sensitivity(tensor: str) -> float:
    """What tensors of such a name have in models that were measured."""
    return next(value for pattern, value in _TYPICAL if pattern.search(tensor))


def measure_sensitivities(
    worker: WorkerClient, config: EngineConfig, window: array[int], tensors: Sequence[str]
) -> Iterator[Sensitivity]:
    """Measure one tensor after the other on a window of text: each takes one pass over it.

    `config` has room for the window in one batch. Raises what loading and computing raises.
    """
    for tensor in tensors:
        message = {"op": "sensitivity", "config": asdict(config), "tensors": [tensor], "error": _ERROR}
        (divergence,) = worker.ask(message, pack_ids(window))[0]["result"]
        yield Sensitivity(tensor, None if divergence is None else max(divergence, 0.0) / _ERROR)
