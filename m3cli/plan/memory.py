"""How many bytes a configuration takes where: weights by layer, and what llama.cpp allocates beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.model.shape import weight_class

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.model.header import Tensor

_LAYER = re.compile(r"blk\.(\d+)\.")

# What m3's own processes take beside the model: Python, tokenizer, texts.
PYTHON_BYTES = 300_000_000
# On each GPU a context of the driver and its kernels, and room for what fragments.
DEVICE_MARGIN = 700_000_000
# Of the RAM that is free, for what else the user does.
RAM_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Bytes of one layer: what every token uses, and its routed experts."""

    dense: int = 0
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's weights. `output` is that of the output matrix, 0 if the embeddings serve as one."""

    layers: tuple[LayerWeights, ...]
    embeddings: int
    output: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts + self.embeddings + self.output

    @property
    def dense(self) -> int:
        """Of all layers, what every token uses."""
        return sum(layer.dense for layer in self.layers)

    @property
    def experts(self) -> int:
        """Of all layers, the routed experts."""
        return sum(layer.experts for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Buffers:
    """Bytes that llama.cpp allocates for a context beside the weights, by its own account.

    `kv` is the KV cache of all layers, an indexer's keys included; `compute` the scratch space of a batch,
    with the outputs.
    """

    kv: int
    compute: int


def weights_of(tensors: Iterable[Tensor], layers: int) -> Weights:
    """Sum the tensor table of a header by class and layer."""
    dense, experts = [0] * layers, [0] * layers
    embeddings = output = 0
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        kind = weight_class(tensor.name)
        if kind == "embeddings":
            embeddings += tensor.nbytes
        elif match is None or int(match[1]) >= layers:
            output += tensor.nbytes
        elif kind == "experts":
            experts[int(match[1])] += tensor.nbytes
        else:
            dense[int(match[1])] += tensor.nbytes
    return Weights(tuple(map(LayerWeights, dense, experts)), embeddings, output)
