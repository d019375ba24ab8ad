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
from quantize.quantizer import FLOATS

if TYPE_CHECKING:
    from array import array
    from collections.abc import Collection, Iterator, Sequence

    from m3cli.engine.events import EngineConfig
    from m3cli.engine.process import WorkerClient

# Relative energy of the noise, by the precision of the weights, to which llama.cpp rounds activations too:
# as small as what rounding does allows.
_ERROR, _BF16_ERROR, _QUANTIZED_ERROR = 1e-3, 1e-2, 5e-2
_NO_ERROR = 1e-9

# What is usual in SmolLM2 135M and Qwen2.5 Coder 0.5B, by scripts/bench/quant_facts.py, for tensors of which
# nothing was measured. The first that is found in the name decides.
_TYPICAL = (
    (re.compile(r"^output\."), 10.0),
    (re.compile(r"^token_embd\."), 0.1),
    (re.compile(r"attn_"), 0.04),
    (re.compile(r""), 0.07),
)


class Sensitivity(NamedTuple):
    """Nats a token for a relative error of 1, or None for a tensor that is not used."""

    tensor: str
    value: float | None


def typical_sensitivity(tensor: str) -> float:
    """What tensors of such a name have in models that were measured."""
    return next(value for pattern, value in _TYPICAL if pattern.search(tensor))


def measure_sensitivities(
    worker: WorkerClient,
    config: EngineConfig,
    window: array[int],
    tensors: Sequence[str],
    *,
    types: Collection[str] = ("F32",),
) -> Iterator[Sensitivity]:
    """Measure one tensor after the other on a window of text: each takes one pass over it, or two.

    `types` are those of the model's weights. With quantized or BF16 ones llama.cpp rounds activations so
    coarsely that the slightest change makes it round them otherwise; so what almost no error does is taken
    off what a larger one does. `config` has room for the window in one batch. Raises what loading and
    computing raises.
    """
    error = _ERROR
    if any(kind not in FLOATS for kind in types):
        error = _QUANTIZED_ERROR
    elif "BF16" in types:
        error = _BF16_ERROR

    def divergence(tensor: str, error: float) -> float | None:
        message = {"op": "sensitivity", "config": asdict(config), "tensors": [tensor], "error": error}
        (found,) = worker.ask(message, pack_ids(window))[0]["result"]
        return None if found is None else float(found)

    for tensor in tensors:
        found = divergence(tensor, error)
        if found is not None:
            rounding = (divergence(tensor, _NO_ERROR) or 0.0) if error > _ERROR else 0.0
            found = max(found - rounding, 0.0) / error
        yield Sensitivity(tensor, found)
