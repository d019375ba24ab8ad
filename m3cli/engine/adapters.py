"""LoRA adapters, told from their headers: which fit a model, and what makes two of them the same.

llama.cpp believes much of what an adapter says. Where that would end in a failed assertion or a jump to
nowhere, which kills the worker, or in wrong answers without a word, the adapter is refused here, before
llama.cpp sees it and before the weights are read. Source: llama-adapter.cpp, build_lora_mm and
build_inp_embd of llama-graph.cpp.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.errors import ModelError, UsageError
from m3cli.model.cursor import DOWNLOAD_AGAIN
from m3cli.model.digest import model_digest
from m3cli.model.header import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.engine.events import EngineConfig
    from m3cli.model.header import Header, Tensor

_ALPHA = "adapter.lora.alpha"
_FLOAT64 = 12  # enum gguf_type of gguf.h
# What llama.cpp's converter writes. ggml cannot multiply by every type that a file may hold.
_TYPES = {"F32", "F16", "BF16", "Q8_0"}
# For some architectures, MiniMax-M3 among them, llama.cpp's graph has a fixed size: with 8 adapters of all
# matrices it was four fifths full, and when it is full llama.cpp aborts.
_MOST = 8
_EMBEDDING = "token_embd.weight"
_FEED_FORWARD = re.compile(r"\.ffn_(up|gate|down)(_shexp)?\.weight")

_OTHER_FILE = (
    "Name the GGUF file of a LoRA adapter; convert_lora_to_gguf.py of llama.cpp makes one from an adapter in "
    "PEFT's format."
)
_OTHER_ADAPTER = "Take an adapter that was made for this model, or the model that it was made for."


def check_adapters(config: EngineConfig) -> None:
    """Read the headers of the adapters in `config.lora` and compare them with the model's.

    Raises ModelError for a file that is missing, is no adapter, is broken or cannot belong to this model,
    UsageError for too many of them, or a scale that is not finite.
    """
    if not config.lora:
        return
    if len(config.lora) > _MOST:
        raise UsageError(
            f"{len(config.lora)} adapters were given, and {_MOST} can be applied at once.",
            "Merge some of them into the model.",
        )
    model = read_header(Path(config.model_path))
    for name, scale in config.lora:
        if not math.isfinite(ctypes.c_float(scale).value):
            raise UsageError(
                f"The adapter {name} cannot be applied with a scale of {scale}.", "Give a number, such as 1."
            )
        adapter = _read(Path(name))
        _check_kind(adapter, model)
        _check_tensors(adapter, model)


def adapter_contents(lora: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Digest and scale of each adapter that changes anything, wherever it lies and in whatever order.

    Raises ModelError when a file cannot be read.
    """
    return sorted((model_digest(_read(Path(name))), float(scale)) for name, scale in lora if scale)


def _read(path: Path) -> Header:
    try:
        header = read_header(path)
    except ModelError as error:
        hint = error.hint if error.hint == DOWNLOAD_AGAIN else _OTHER_FILE
        raise ModelError(error.message, hint) from error
    if len(header.files) > 1:
        raise _refusal(header, f"it is split into {len(header.files)} files", _OTHER_FILE)
    return header


def _check_kind(adapter: Header, model: Header) -> None:
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = _text(adapter, key)
        if found != wanted:
            raise _refusal(adapter, f"it is no LoRA: its key {key} is {found or 'missing'}", _OTHER_FILE)
    architecture = _text(adapter, "general.architecture")
    if architecture != model.architecture:
        raise _refusal(
            adapter,
            f"it was made for the architecture {architecture}, and {model.path.name} is of "
            f"{model.architecture}",
            _OTHER_ADAPTER,
        )
    if "adapter.alora.invocation_tokens" in adapter.fields:
        raise _refusal(
            adapter,
            "it is an activated LoRA, which begins at certain tokens of the prompt only",
            "Take an adapter that applies to the whole prompt.",
        )
    alpha = adapter.fields.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or _is_float64(adapter, _ALPHA):
        raise _refusal(adapter, f"its key {_ALPHA} is no finite number of 32 bits", _OTHER_FILE)


def _text(header: Header, key: str) -> str:
    """Return a string, empty if the key is absent or of another type."""
    value = header.fields.get(key)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _is_float64(header: Header, key: str) -> bool:
    """Whether `key`, which is a float of either width, is one of 64 bits: llama.cpp aborts at it."""
    size = min((tensor.offset for tensor in header.tensors), default=0)
    with header.path.open("rb") as file:
        name = key.encode()
        return struct.pack(f"<Q{len(name)}sI", len(name), name, _FLOAT64) in file.read(size)


def _check_tensors(adapter: Header, model: Header) -> None:
    """Refuse what llama.cpp does not look at; names, and rows and columns, it compares itself."""
    weights = {tensor.name: tensor for tensor in model.tensors}
    parts = {tensor.name: tensor for tensor in adapter.tensors}
    unclear = [name for name in parts if name.count(".lora_") > 1 or "\0" in name]
    if unclear:
        raise _refusal(adapter, f"it holds a tensor with the odd name {unclear[0]!r}", _OTHER_FILE)
    names = sorted(name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a"))
    if not names:
        raise _refusal(adapter, "it holds no tensors of a LoRA", _OTHER_FILE)
    for name in names:
        a, b = parts[f"{name}.lora_a"], parts.get(f"{name}.lora_b")
        if b is None:
            raise _refusal(adapter, f"it holds {a.name} without its other half", _OTHER_FILE)
        for part in (a, b):
            if part.type not in _TYPES:
                hint = f"Convert it to one of {', '.join(sorted(_TYPES))}."
                raise _refusal(adapter, f"{part.name} is of type {part.type}", hint)
        weight = weights.get(name)
        if weight is not None:
            _check_weight(adapter, a, b, weight, weights)


def _check_weight(
    adapter: Header, a: Tensor, b: Tensor, weight: Tensor, weights: Mapping[str, Tensor]
) -> None:
    rank = _shape(a)[0 if weight.name.endswith(_EMBEDDING) else 1]
    whole = rank > 0 and _shape(b)[0] == rank
    if not whole or not _shape(a)[2:] == _shape(b)[2:] == _shape(weight)[2:]:
        raise _refusal(
            adapter,
            f"the shapes of {weight.name} do not agree: {_shown(weight)} in the model, {_shown(a)} and "
            f"{_shown(b)} in the adapter",
            _OTHER_ADAPTER,
        )
    if weight.name == _EMBEDDING and "output.weight" not in weights:
        raise _refusal(
            adapter,
            f"it changes {_EMBEDDING}, which this model also uses for its output, and llama.cpp cannot "
            "change one without the other",
            "Take an adapter that leaves the embeddings alone, or merge it into the model.",
        )
    if weight.type == "NVFP4" and _FEED_FORWARD.search(weight.name):
        raise _refusal(
            adapter,
            f"it changes {weight.name}, and llama.cpp cannot do that to a matrix of type NVFP4",
            "Take another quant of the model.",
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.dims, 1, 1, 1, 1)[:4]


def _shown(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.dims))


def _refusal(adapter: Header, why: str, hint: str) -> ModelError:
    return ModelError(f"The adapter {adapter.path} cannot be used: {why}.", hint)
