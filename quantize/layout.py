"""The exact bytes of the headers of the GGUF files that a quantization writes, before it writes any.

Key/values of the source are copied as they stand, so that a 200,000-token vocabulary costs nothing but
its reading. What a model split over several files looks like is as gguf-split and the gguf package have
it: the first file holds all key/values and its share of the tensors, the others only what they need.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.errors import UsageError
from m3cli.model.ggml_types import TENSOR_TYPES
from m3cli.model.header import DEFAULT_ALIGNMENT, MAX_SHARDS, Header, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TYPE_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}
_STRING = 8
_VALUE_TYPES = {"H": 2, "I": 4, "i": 5}  # struct code → GGUF value type
_VERSION = {"general.quantization_version": 2}  # GGML_QNT_VERSION
_ALIGNMENT = "general.alignment"
_SPLIT = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the output: what it is made of, and its type there."""

    source: Tensor
    type: str
    alignment: int = DEFAULT_ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        if self.type == self.source.type:
            return self.source.nbytes
        kind = TENSOR_TYPES[_TYPE_NUMBERS[self.type]]
        return self.source.elements // kind.block * kind.nbytes

    @property
    def padded(self) -> int:
        """Bytes that it takes in the file: `nbytes`, then zeros."""
        return self.nbytes + -self.nbytes % self.alignment


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file of the output: its header, filled up to where the data begin, then the padded tensors."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        return len(self.header) + sum(tensor.padded for tensor in self.tensors)


def lay_out(
    header: Header,
    types: Mapping[str, str],
    name: str,
    *,
    file_type: int,
    split_max_bytes: int = 0,
    extra: Mapping[str, str | int] = {},
) -> tuple[OutFile, ...]:
    """Lay out the model of `header` with its tensors in `types`, by name; the others keep their type.

    The file is called `name`, which ends in `.gguf`, or `NAME-00001-of-0000N.gguf` where more than
    `split_max_bytes` bytes of tensors would be in it; a file has more than these only if one tensor alone
    has. `file_type` is the number for `general.file_type`; `extra` keys, strings or uint32, are added or
    replace those of the source.

    Raises UsageError for a type that there is not or that does not divide a tensor's rows, and for more
    files than m3 reads as one model; ModelError when the source cannot be read again.
    """
    alignment = header.get_int(_ALIGNMENT) or DEFAULT_ALIGNMENT
    tensors = [_retyped(tensor, types.get(tensor.name, tensor.type), alignment) for tensor in header.tensors]
    shares = _shares(tensors, split_max_bytes)
    if len(shares) > MAX_SHARDS:
        raise UsageError(
            f"The model would be split into {len(shares):,} files; {MAX_SHARDS:,} are the most.",
            "Give a larger --split-max-size.",
        )
    pairs = _pairs(header, {"general.file_type": file_type, **_VERSION, **extra})
    if len(shares) == 1:
        return (OutFile(name, _header(pairs, tensors, alignment), tuple(tensors)),)
    # Where the data begin in a file depends on the alignment, so that each file has to name it.
    others = [header.raw(_ALIGNMENT)] if _ALIGNMENT in header.spans else []
    stem = name.removesuffix(".gguf")
    files = []
    for i, share in enumerate(shares):
        split = _split_pairs(i, len(shares), len(tensors))
        data = _header([*(others if i else pairs), *split], share, alignment)
        files.append(OutFile(f"{stem}-{i + 1:05d}-of-{len(shares):05d}.gguf", data, tuple(share)))
    return tuple(files)


def _retyped(tensor: Tensor, kind: str, alignment: int) -> OutTensor:
    if kind != tensor.type:
        if kind not in _TYPE_NUMBERS:
            raise UsageError(
                f"There is no tensor type {kind}, which {tensor.name} should get.",
                f"Choose among {', '.join(_TYPE_NUMBERS)}.",
            )
        block = TENSOR_TYPES[_TYPE_NUMBERS[kind]].block
        columns = tensor.dims[0] if tensor.dims else 1
        if columns % block:
            raise UsageError(
                f"The rows of {tensor.name} have {columns:,} elements, which is no multiple of the {block} "
                f"that a block of {kind} has.",
                "Give this tensor a type of smaller blocks, or keep its own.",
            )
    return OutTensor(tensor, kind, alignment)


def _shares(tensors: list[OutTensor], most: int) -> list[list[OutTensor]]:
    """Cut the tensors, in their order, into files of at most `most` bytes; 0 is no limit."""
    shares: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shares[-1] and 0 < most < size + tensor.nbytes:
            shares.append([])
            size = 0
        shares[-1].append(tensor)
        size += tensor.nbytes
    return shares


def _pairs(header: Header, settings: Mapping[str, str | int]) -> list[bytes]:
    """Key/values of the source with `settings` in place of those of the same name, or behind them."""
    pairs = {key: b"" for key in header.spans if key not in _SPLIT}
    for key in pairs.keys() - settings.keys():
        pairs[key] = header.raw(key)
    for key, value in settings.items():
        pairs[key] = _text(key, value) if isinstance(value, str) else _number(key, "I", value)
    return list(pairs.values())


def _split_pairs(number: int, count: int, tensor_count: int) -> list[bytes]:
    values = zip(_SPLIT, "HHi", (number, count, tensor_count), strict=True)
    return [_number(key, code, value) for key, code, value in values]


def _header(pairs: Sequence[bytes], tensors: Sequence[OutTensor], alignment: int) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)), *pairs]
    offset = 0
    for tensor in tensors:
        dims = tensor.source.dims
        kind = _TYPE_NUMBERS.get(tensor.type)
        if kind is None:
            kind = int(tensor.type)  # newer than m3, which names it by its number
        parts.append(_string(tensor.source.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        offset += tensor.padded
    data = b"".join(parts)
    return data + bytes(-len(data) % alignment)


def _number(key: str, code: str, value: int) -> bytes:
    return _string(key) + struct.pack(f"<I{code}", _VALUE_TYPES[code], value)


def _text(key: str, value: str) -> bytes:
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "backslashreplace")  # a file's name may be no Unicode
    return struct.pack("<Q", len(data)) + data
