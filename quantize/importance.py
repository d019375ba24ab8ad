"""Importance matrices: how much each input column of a weight matrix matters, measured on text.

For every tensor an importance matrix has the squares of the activations that its columns were multiplied
with, summed over tokens, and the number of these tokens; a tensor of experts has both for each expert. Two
formats are read, GGUF and the binary one that llama.cpp wrote before; GGUF is written. Both are defined by
llama.cpp's common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp, and what a quantizer is given is what
tools/quantize/quantize.cpp gives it. The files come from anywhere: every length is checked before it is
believed, and what is wrong ends in a ModelError that names the file and the place.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from m3cli.errors import MachineError, ModelError
from m3cli.model.header import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO, NoReturn

    from numpy.typing import NDArray

    from m3cli.model.header import Header, Tensor

_SUMS, _COUNTS, _SENSITIVITY = ".in_sum2", ".counts", ".sensitivity"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_CHOOSE = "Choose another importance matrix, or compute one with m3 quantize imatrix."
# llama.cpp leaves these out rather than fail where the sizes differ: nothing is multiplied with them.
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_MAX_COUNT = 2.0**53  # tokens; a float32 may be larger than any int64
_MAX_NAME = 1 << 16  # bytes
_ALIGNMENT = 32  # bytes, GGUF's default
_UINT32, _STRING, _ARRAY, _F32 = 4, 8, 9, 0  # GGUF's numbers of value types, ggml's of a tensor type


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What was measured for one tensor, which holds `n_mat` matrices, such as experts.

    `sums` [n_mat, n_cols] are squared activations of each column, summed over the tokens in `counts`
    [n_mat]. The older format does not tell matrices apart: there both have one row.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """An importance matrix: an entry for each measured tensor, and the text that it was measured on.

    `datasets` are names of files as whoever computed it wrote them, `chunk_count` the number of pieces of
    text, each of `chunk_size` tokens. In the older format `chunk_size` is not known, which is 0, and counts
    are in pieces, not in tokens. `sensitivities` are m3's own addition, which llama.cpp passes over: see
    quantize.sensitivity.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_size: int
    chunk_count: int
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    def weights(self, tensor: str, n_cols: int, n_mat: int) -> NDArray[np.float32] | None:
        """The mean squared activation of each column, [n_mat, n_cols], or None for an unmeasured tensor.

        An expert that no token was sent to has 1 everywhere, as llama-quantize has it. Raises ModelError
        when the entry is not of `n_mat` times `n_cols` values.
        """
        entry = self.entries.get(tensor)
        if entry is None:
            return None
        if entry.sums.size != n_cols * n_mat:
            if tensor in _EMBEDDINGS:
                return None
            raise ModelError(
                f"The importance matrix has {entry.sums.size:,} values for {tensor}, which needs "
                f"{n_cols * n_mat:,}.",
                "It was computed for another model: choose the one for this model.",
            )
        counts = entry.counts.astype(np.float32)[:, None]
        means = np.ones_like(entry.sums, np.float32)
        np.divide(entry.sums, counts, out=means, where=counts > 0)
        return means.reshape(n_mat, n_cols)


def unhit(importance: Importance) -> dict[str, int]:
    """How many matrices (experts) no token was sent to, for each tensor that has any."""
    missing = {name: int((entry.counts == 0).sum()) for name, entry in importance.entries.items()}
    return {name: count for name, count in missing.items() if count}


def merged(first: Importance, second: Importance) -> Importance:
    """Both as one, as if it had been measured on the texts of both: what `llama-imatrix --in-file` does.

    Where one counts tokens and the other one, in the older format, pieces of text, these are taken to have
    the size of the others. Raises ModelError when a tensor has different sizes in the two, or sums that
    float32 cannot add. Sensitivities are those of the first, where it has any.
    """
    size = first.chunk_size or second.chunk_size
    scale = [1 if each.chunk_size or not size else size for each in (first, second)]
    entries = [
        {name: _scaled(name, entry, factor) for name, entry in each.entries.items()}
        for each, factor in zip((first, second), scale, strict=True)
    ]
    result = {**entries[0], **entries[1]}
    for name in entries[0].keys() & entries[1].keys():
        result[name] = _sum(name, entries[0][name], entries[1][name])
    chunks = first.chunk_count + second.chunk_count
    if first.chunk_size and second.chunk_size:
        chunks = first.chunk_count + second.chunk_count * second.chunk_size // first.chunk_size
    datasets = tuple(dict.fromkeys((*first.datasets, *second.datasets)))
    sensitivities = {**second.sensitivities, **first.sensitivities}
    return Importance(dict(sorted(result.items())), datasets, size, min(chunks, (1 << 32) - 1), sensitivities)


def _scaled(name: str, entry: Entry, factor: int) -> Entry:
    if factor == 1:
        return entry
    with np.errstate(over="ignore"):
        return _finite(name, entry.sums * np.float32(factor), entry.counts * factor)


def _sum(name: str, first: Entry, second: Entry) -> Entry:
    rows = max(len(first.counts), len(second.counts))
    if first.sums.size != second.sums.size or {len(first.counts), len(second.counts)} - {1, rows}:
        raise ModelError(
            f"Two importance matrices have different sizes for {name}: {_size(first)} and {_size(second)}.",
            "They are of different models: merge only those of one.",
        )
    counts = np.broadcast_to(first.counts, rows) + np.broadcast_to(second.counts, rows)
    with np.errstate(over="ignore"):
        return _finite(name, first.sums.reshape(rows, -1) + second.sums.reshape(rows, -1), counts)


def _finite(name: str, sums: NDArray[np.float32], counts: NDArray[np.int64]) -> Entry:
    if not np.isfinite(sums).all():
        raise ModelError(
            f"The sums of {name} in two importance matrices are too large for one.",
            "Look at where they come from: no real activations are so large.",
        )
    return Entry(sums, counts)


def _size(entry: Entry) -> str:
    return " x ".join(f"{n:,}" for n in entry.sums.shape)


def read_importance(path: Path) -> Importance:
    """Read an importance matrix in either format.

    Raises ModelError when the file is missing, is something else, is broken or is cut short, and when it
    holds numbers that cannot have been measured.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelError(f"{path} is {what}.", "Name an importance matrix.")
        with path.open("rb", buffering=0) as file:
            if file.read(4) == b"GGUF":
                return _read_gguf(path)
            file.seek(0)
            return _LegacyReader(path, file, status.st_size).read()
    except FileNotFoundError as error:
        raise ModelError(f"There is no file {path}.", "Check the path of the importance matrix.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"{path} cannot be read: {reason}.", "Check the path and its permissions."
        ) from error


def _read_gguf(path: Path) -> Importance:
    header = read_header(path)
    sums, counts = (
        {
            tensor.name.removesuffix(suffix): tensor
            for tensor in header.tensors
            if tensor.name.endswith(suffix)
        }
        for suffix in (_SUMS, _COUNTS)
    )
    kind = header.get_str("general.type")
    if kind != "imatrix" and not sums:
        what = "a model" if kind in (None, "model") else f"of type {kind!r}"
        raise ModelError(f"{path} is not an importance matrix: it is a GGUF file that is {what}.", _CHOOSE)
    if not sums and not counts:
        raise ModelError(f"The importance matrix {path} has no entries.", _CHOOSE)
    if unpaired := sorted(sums.keys() ^ counts.keys()):
        there, missing = ("sums", "counts") if unpaired[0] in sums else ("counts", "sums")
        _fail(path, f"it has {there} for {unpaired[0]}, and no {missing}")
    single = {t.name: t for t in header.tensors if t.name.endswith(_SENSITIVITY) and t.dims == (1, 1)}
    tensors = [*sums.values(), *counts.values(), *single.values()]
    for tensor in tensors:
        if tensor.type != "F32" or not tensor.elements:
            _fail(path, f"{tensor.name} holds {tensor.elements:,} values of type {tensor.type}")
    if sum(tensor.nbytes for tensor in tensors) > header.file_bytes:
        _fail(path, "its tensors overlap")
    return Importance(
        {name: _entry(header, sums[name], counts[name], name) for name in sorted(sums)},
        tuple(name.decode("utf-8", "replace") for name in header.strings(_DATASETS)),
        _uint32(header, _CHUNK_SIZE),
        _uint32(header, _CHUNK_COUNT),
        {name.removesuffix(_SENSITIVITY): _single(header, tensor) for name, tensor in single.items()},
    )


def _entry(header: Header, in_sum2: Tensor, in_counts: Tensor, name: str) -> Entry:
    sums, counts = _values(header, in_sum2), _values(header, in_counts)
    rows = len(counts) if len(counts) > 1 else len(sums) // (in_sum2.dims or (1,))[0]
    if len(sums) % rows:
        _fail(header.path, f"{name} has {len(sums):,} sums, which {rows:,} counts do not divide")
    _check(header.path, name, sums)
    if not ((counts >= 0) & (counts <= _MAX_COUNT)).all():
        _fail(header.path, f"{name} has a count of {_first_odd(counts, _MAX_COUNT)}")
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.int64)  # halves away from zero
    return Entry(sums.reshape(rows, -1), np.array(np.broadcast_to(whole, rows)))


def _single(header: Header, tensor: Tensor) -> float:
    value = _values(header, tensor)
    _check(header.path, tensor.name, value)
    return float(value[0])


def _values(header: Header, tensor: Tensor) -> NDArray[np.float32]:
    path = header.files[tensor.file]
    values = np.fromfile(path, "<f4", tensor.elements, offset=tensor.offset)
    if len(values) != tensor.elements:
        raise ModelError(f"{path} changed while it was being read.", "Run the command again.")
    return values.astype(np.float32, copy=False)


def _uint32(header: Header, key: str) -> int:
    value = header.get_int(key) or 0
    if not 0 <= value < 1 << 32:
        _fail(header.path, f"{key} is {value:,}")
    return value


def _check(path: Path, name: str, sums: NDArray[np.float32]) -> None:
    if not (np.isfinite(sums) & (sums >= 0)).all():
        _fail(path, f"{name} has a value that is {_first_odd(sums, np.finfo(np.float32).max)}")


def _first_odd(values: NDArray[np.float32], limit: float) -> float:
    return float(values[~((values >= 0) & (values <= limit))][0])


def _fail(path: Path, problem: str) -> NoReturn:
    raise ModelError(f"The importance matrix {path} is broken: {problem}.", _CHOOSE)


class _LegacyReader:
    """The binary format from before GGUF: numbers are int32 and float32, little-endian, without a magic."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._where = "the number of entries"
        self._known = False  # that it is such a file at all

    def read(self) -> Importance:
        """All of it. Raises ModelError."""
        total = self._number()
        if total < 1:
            self._fail(f"is {total:,}")
        entries: dict[str, Entry] = {}
        for i in range(total):
            self._where = f"entry {i + 1:,} of {total:,}"
            name, entry = self._entry()
            if name in entries:
                self._fail(f"is the second one for {name}")
            entries[name] = entry
            self._known = True
        chunks, datasets = self._origin()
        return Importance(dict(sorted(entries.items())), datasets, 0, chunks)

    def _entry(self) -> tuple[str, Entry]:
        length = self._number()
        if not 1 <= length <= _MAX_NAME:
            self._fail(f"has a name of {length:,} bytes")
        try:
            name = self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            self._fail("has a name that is not UTF-8")
        calls, count = self._number(), self._number()
        if count < 1:
            self._fail(f"({name}) has {count:,} values")
        sums = np.frombuffer(self._take(4 * count), "<f4").astype(np.float32)
        _check(self._path, name, sums)
        # Without a count the values are the means themselves.
        return name, Entry(sums[None, :], np.array([max(calls, 1)], np.int64))

    def _origin(self) -> tuple[int, tuple[str, ...]]:
        """The number of chunks and the data's name, which old files lack, and broken ones may."""
        if self._left() < 4:
            return 0, ()
        chunks = max(self._number(), 0)
        length = self._number() if self._left() >= 4 else 0
        if not 0 < length <= min(self._left(), _MAX_NAME):
            return chunks, ()
        return chunks, (self._take(length).decode("utf-8", "replace"),)

    def _number(self) -> int:
        number: int = struct.unpack("<i", self._take(4))[0]
        return number

    def _left(self) -> int:
        return self._size - self._file.tell()

    def _take(self, n: int) -> bytes:
        if n > self._left():
            self._fail(f"takes {n:,} bytes, and only {self._left():,} are left")
        parts = []
        while n and (part := self._file.read(n)):  # a raw file may give less than was asked for
            parts.append(part)
            n -= len(part)
        if n:
            self._fail("cannot be read: the file became shorter")
        return b"".join(parts)

    def _fail(self, problem: str) -> NoReturn:
        if self._known:
            _fail(self._path, f"{self._where}, at byte {self._file.tell():,}, {problem}")
        raise ModelError(
            f"{self._path} is not an importance matrix: it is no GGUF file, and for one in llama.cpp's older "
            f"format, {self._where} {problem}.",
            _CHOOSE,
        )


def write_importance(path: Path, importance: Importance) -> None:
    """Write `importance` in llama.cpp's GGUF format; `path` is replaced when all is on the disk.

    Counts become float32 as the format has it, so above 16,777,216 they are rounded. Raises MachineError
    when the disk is full or does not let itself be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            for part in _gguf(importance):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Free some space, check the permissions, or name another file with --out.",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # there is none when all went well
            temporary.unlink()


def _gguf(importance: Importance) -> Iterator[bytes]:
    arrays: list[tuple[str, NDArray[np.float32]]] = []
    for name, entry in sorted(importance.entries.items()):
        arrays += [(name + _SUMS, entry.sums), (name + _COUNTS, entry.counts.astype("<f4")[:, None])]
    for name, value in sorted(importance.sensitivities.items()):
        arrays.append((name + _SENSITIVITY, np.array([[value]], "<f4")))
    header = [
        struct.pack("<4sIQQ", b"GGUF", 3, len(arrays), 4),
        _string("general.type") + struct.pack("<I", _STRING) + _string("imatrix"),
        _string(_DATASETS) + struct.pack("<IIQ", _ARRAY, _STRING, len(importance.datasets)),
        *map(_string, importance.datasets),
        _string(_CHUNK_COUNT) + struct.pack("<II", _UINT32, importance.chunk_count),
        _string(_CHUNK_SIZE) + struct.pack("<II", _UINT32, importance.chunk_size),
    ]
    offset = 0
    for name, array in arrays:
        n_mat, n_cols = array.shape
        header.append(_string(name) + struct.pack("<IQQIQ", 2, n_cols, n_mat, _F32, offset))
        offset += len(_padded(b"", 4 * array.size)) + 4 * array.size
    written = b"".join(header)
    yield _padded(written, len(written))
    for _, array in arrays:
        yield _padded(np.ascontiguousarray(array, "<f4").tobytes(), 4 * array.size)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes, size: int) -> bytes:
    """`data` and the zeros that GGUF wants behind `size` bytes."""
    return data + bytes(-size % _ALIGNMENT)
