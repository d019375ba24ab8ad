"""How many bytes a configuration takes where: weights by layer, and what llama.cpp allocates beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.model.shape import weight_class

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.model.header import Tensor
    from m3cli.model.shape import ModelShape

_LAYER = re.compile(r"blk\.(\d+)\.")

# What m3's own processes take beside the model, at most, where the model is not looked at.
PYTHON_BYTES = 300_000_000

# What follows was measured on x86-64 Linux with llama.cpp 0c1e570; scripts/bench/plan_truth.py checks it.
# The worker that has computed a context of the tiniest model: Python and the libraries 44 MB, the rest is
# work space of the threads.
_WORKER = 51_000_000
# llama.cpp's vocabulary, resident once it is loaded. A token without merges (text, two maps, what it prints
# as): 170 bytes over the 262,144 of Gemma 3, and 12 where samplers choose. With merges 362 over the 49,152 of
# SmolLM2, 330 over 128,256 of Llama's size, 317 over 151,936 of Qwen's, 307 over 200,064 of MiniMax-M3's.
_TOKEN, _MERGE = 182, 150
# A node that a graph has room for, in two graphs and the scheduler: the difference of ubatches of 128 and 512
# tokens of a tiny MiniMax-M3, by the numbers of nodes that llama_context::graph_max_nodes reserves.
_NODE = 716
# m3 itself: Python and texts, and the tokenizer that it builds of a byte-pair vocabulary (79 MB in all for
# SmolLM2, 146 for Llama's size, 200 for MiniMax-M3's).
_PARENT, _PARENT_TOKEN = 60_000_000, 700
# Cells that llama.cpp takes for used when it reserves the graph of an empty cache (llama-kv-cache-msa.cpp).
_RESERVED_CELLS = 256

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
    """Bytes of a model's weights. `output` is that of the output matrix, 0 if the embeddings serve as one.

    `tensors` and `expert_elements` count all tensors and the elements of routed experts; 0 is unknown.
    """

    layers: tuple[LayerWeights, ...]
    embeddings: int
    output: int
    tensors: int = 0
    expert_elements: int = 0

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
    with the outputs. `repacked` are the weights that are kept a second time, in the order that suits the CPU.
    """

    kv: int
    compute: int
    repacked: int = 0


def weights_of(tensors: Iterable[Tensor], layers: int) -> Weights:
    """Sum the tensor table of a header by class and layer."""
    dense, experts = [0] * layers, [0] * layers
    embeddings = output = count = elements = 0
    for tensor in tensors:
        count += 1
        match = _LAYER.match(tensor.name)
        kind = weight_class(tensor.name)
        if kind == "embeddings":
            embeddings += tensor.nbytes
        elif match is None or int(match[1]) >= layers:
            output += tensor.nbytes
        elif kind == "experts":
            experts[int(match[1])] += tensor.nbytes
            elements += tensor.elements
        else:
            dense[int(match[1])] += tensor.nbytes
    return Weights(tuple(map(LayerWeights, dense, experts)), embeddings, output, count, elements)


def vocabulary_bytes(tokens: int, merges: int) -> int:
    """Bytes that llama.cpp's vocabulary takes in the worker."""
    return tokens * _TOKEN + merges * _MERGE


def worker_bytes(shape: ModelShape, tensors: int, n_ubatch: int) -> int:
    """Bytes that the worker takes beside weights, KV cache and compute buffers of a model."""
    nodes = max(1024, 8 * tensors)
    if shape.indexer:
        nodes = max(40 * n_ubatch, 32 * tensors)
    # A byte-pair vocabulary has about a merge a token.
    merges = shape.vocab_size if shape.tokenizer_model == "gpt2" else 0
    return _WORKER + vocabulary_bytes(shape.vocab_size, merges) + nodes * _NODE


def parent_bytes(shape: ModelShape) -> int:
    """Bytes that m3 itself takes beside the worker."""
    return _PARENT + (shape.vocab_size * _PARENT_TOKEN if shape.tokenizer_model == "gpt2" else 0)


def process_bytes(shape: ModelShape, tensors: int, n_ubatch: int) -> int:
    """Bytes of both processes beside weights, KV cache and compute buffers."""
    return worker_bytes(shape, tensors, n_ubatch) + parent_bytes(shape)


def filling_bytes(shape: ModelShape, n_ctx: int, n_ubatch: int) -> int:
    """Bytes by which the compute buffer grows until a context is full: 0 for models without an indexer.

    llama.cpp reserves it with an empty cache, when there are no positions yet whose blocks an indexer
    chooses among: a mask of each token of a ubatch and each position, a bias of each block, and the map of
    positions to cells, of four bytes each, come as the context fills.
    """
    if shape.indexer is None:
        return 0
    positions = max(-(-n_ctx // _RESERVED_CELLS) * _RESERVED_CELLS - _RESERVED_CELLS, 0)
    tokens = min(n_ubatch, n_ctx)
    return 4 * positions * (tokens + 1) + 4 * tokens * (positions // max(shape.indexer.block_size, 1))
