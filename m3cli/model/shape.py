"""What a GGUF header says about a network: its size, its attention, its weights by class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m3cli.errors import ModelError
from m3cli.model.ggml_types import FILE_TYPES, TENSOR_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from m3cli.model.header import Header, Tensor

WeightClass = Literal["dense", "experts", "embeddings", "output"]

# Keys of MiniMax Sparse Attention, behind `<architecture>.attention.indexer.`; Indexer's fields.
INDEXER_KEYS = ("head_count", "key_length", "top_k", "block_size", "local_blocks")

_EXPERTS = re.compile(r"\bffn_\w+_exps\b")
_EMBEDDINGS = re.compile(r"(?:token|position|per_layer_token)_embd\b|token_types\b")


@dataclass(frozen=True, slots=True)
class Indexer:
    """MiniMax-M3's sparse attention: per query, `top_k` blocks of `block_size` tokens are attended.

    The `local_blocks` that end with the query's own are always among them. Each of `head_count` heads,
    one a KV head, chooses for itself by keys of `key_length` elements, of which there is one head.
    """

    head_count: int
    key_length: int
    top_k: int
    block_size: int
    local_blocks: int

    @property
    def attended_tokens(self) -> int:
        """The most tokens that a query attends in one layer and KV head."""
        return self.top_k * self.block_size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Facts of a model file; nothing here was measured by running it.

    Sizes are in elements, `*_bytes` in bytes. `kv_heads` has one entry a layer, 0 for layers
    without attention. `weight_bytes` is the tensor table summed by class: `experts` are the
    routed experts, of which a token uses `experts_used` of `experts` a layer; `dense` is all that
    every token uses, `experts_shared` included. The first `leading_dense_layers` layers have no experts,
    and no indexer in models with one. `output` is 0 when the output matrix is the embedding matrix.
    `sliding_window` and `indexer` are None for models without; `parameters` counts the elements of all
    tensors.
    """

    name: str
    architecture: str
    file_type: str
    parameters: int
    file_bytes: int
    layers: int
    leading_dense_layers: int
    n_embd: int
    heads: int
    kv_heads: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    context_length: int
    vocab_size: int
    experts: int
    experts_used: int
    experts_shared: int
    sliding_window: int | None
    rope_freq_base: float | None
    indexer: Indexer | None
    license: str | None
    has_chat_template: bool
    tokenizer_model: str | None
    tokenizer_pre: str | None
    weight_bytes: dict[WeightClass, int]

    @classmethod
    def from_header(cls, header: Header) -> ModelShape:
        """Collect the facts; key names are those of docs/gguf.md and llama.cpp's llama-arch.cpp.

        Raises ModelError, naming the key, when one is absent that llama.cpp cannot do without, or
        when it holds a value that no network can have.
        """
        arch = header.architecture
        layers = _positive(header, f"{arch}.block_count", 1 << 16)
        n_embd = _positive(header, f"{arch}.embedding_length")
        heads = _largest(header, f"{arch}.attention.head_count") or 1
        head_dim = n_embd // heads
        return cls(
            name=_name(header),
            architecture=arch,
            file_type=_file_type(header),
            parameters=sum(tensor.elements for tensor in header.tensors),
            file_bytes=header.file_bytes,
            layers=layers,
            leading_dense_layers=min(
                max(header.get_int(f"{arch}.leading_dense_block_count") or 0, 0), layers
            ),
            n_embd=n_embd,
            heads=heads,
            kv_heads=_per_layer(header, f"{arch}.attention.head_count_kv", layers, default=heads),
            head_dim_k=header.get_int(f"{arch}.attention.key_length") or head_dim,
            head_dim_v=header.get_int(f"{arch}.attention.value_length") or head_dim,
            context_length=_positive(header, f"{arch}.context_length"),
            vocab_size=header.count("tokenizer.ggml.tokens") or header.get_int(f"{arch}.vocab_size") or 0,
            experts=header.get_int(f"{arch}.expert_count") or 0,
            experts_used=header.get_int(f"{arch}.expert_used_count") or 0,
            experts_shared=header.get_int(f"{arch}.expert_shared_count") or 0,
            sliding_window=header.get_int(f"{arch}.attention.sliding_window") or None,
            rope_freq_base=header.get_float(f"{arch}.rope.freq_base"),
            indexer=_indexer(header, arch),
            license=_license(header),
            has_chat_template="tokenizer.chat_template" in header.fields,
            tokenizer_model=header.get_str("tokenizer.ggml.model"),
            tokenizer_pre=header.get_str("tokenizer.ggml.pre"),
            weight_bytes=_weight_bytes(header.tensors),
        )

    @property
    def sparse_layers(self) -> int:
        """Layers with an indexer, 0 for models without."""
        return self.layers - self.leading_dense_layers if self.indexer else 0

    def kv_bytes_per_token(self, type_k: str = "f16", type_v: str = "f16") -> int:
        """Estimate the bytes that one token takes in the KV cache of all layers.

        Exact for plain attention (layers * KV heads * (key + value dimensions), in whole quantized
        blocks) and for MiniMax-M3, for whose indexer llama.cpp's llama-kv-cache-msa.cpp allocates K and
        a V that is never used, of one head, in each sparse layer. Too much for sliding windows and latent
        attention, too little for other models that cache more than K and V. Raises ValueError for a
        cache type that ggml does not have.
        """
        key, value = _row_bytes(type_k), _row_bytes(type_v)
        total = sum(key(heads * self.head_dim_k) + value(heads * self.head_dim_v) for heads in self.kv_heads)
        if self.indexer:
            total += self.sparse_layers * (key(self.indexer.key_length) + value(self.head_dim_v))
        return total


def _row_bytes(name: str) -> Callable[[int], int]:
    for kind in TENSOR_TYPES.values():
        if kind.name.lower() == name.lower():
            return lambda elements: -(-elements // kind.block) * kind.nbytes
    raise ValueError(f"ggml has no type {name!r}.")


def _positive(header: Header, key: str, limit: int = 1 << 31) -> int:
    value = header.require_int(key)
    if not 0 < value < limit:
        raise ModelError(
            f"The key {key} of {header.path} is {value}, which no model can have.",
            "Choose another file of this model.",
        )
    return value


def _numbers(header: Header, key: str) -> tuple[int, ...]:
    """Read a key that holds one integer or, for models whose layers differ, one for each layer."""
    if isinstance(header.fields.get(key), int | None):
        value = header.get_int(key)
        return () if value is None else (value,)
    values = header.array(key) or ()
    if not all(isinstance(value, int) and 0 <= value < 1 << 31 for value in values):
        raise ModelError(
            f"The key {key} of {header.path} holds something other than counts.",
            "Choose another file of this model.",
        )
    return tuple(map(int, values))


def _largest(header: Header, key: str) -> int:
    return max(_numbers(header, key), default=0)


def _per_layer(header: Header, key: str, layers: int, default: int) -> tuple[int, ...]:
    values = _numbers(header, key) or (default,)
    if len(values) == 1:
        return values * layers
    if len(values) < layers:
        raise ModelError(
            f"The key {key} of {header.path} lists {len(values)} layers of {layers}.",
            "Choose another file of this model.",
        )
    return values[:layers]


def _indexer(header: Header, arch: str) -> Indexer | None:
    """The indexer, if all its keys are there; whether it can work is m3cli.model.preflight's question."""
    values = {name: header.get_int(f"{arch}.attention.indexer.{name}") for name in INDEXER_KEYS}
    known = {name: value for name, value in values.items() if value is not None}
    return Indexer(**known) if len(known) == len(INDEXER_KEYS) else None


def _name(header: Header) -> str:
    return header.get_str("general.name") or header.get_str("general.basename") or header.path.stem


def _file_type(header: Header) -> str:
    number = header.get_int("general.file_type")
    return "unknown" if number is None else FILE_TYPES.get(number, f"type {number}")


def _license(header: Header) -> str | None:
    short, name, link = (header.get_str(f"general.license{end}") for end in ("", ".name", ".link"))
    best = name if short in (None, "other") and name else short
    return " ".join(filter(None, (best, f"({link})" if link else None))) or None


def _weight_bytes(tensors: Iterable[Tensor]) -> dict[WeightClass, int]:
    result: dict[WeightClass, int] = {"dense": 0, "experts": 0, "embeddings": 0, "output": 0}
    for tensor in tensors:
        result[weight_class(tensor.name)] += tensor.nbytes
    return result


def weight_class(name: str) -> WeightClass:
    """The class of a tensor, by its name."""
    if _EXPERTS.search(name):
        return "experts"
    if _EMBEDDINGS.match(name):
        return "embeddings"
    return "output" if name.startswith("output.") else "dense"
