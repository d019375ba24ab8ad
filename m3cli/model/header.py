"""What stands at the front of a GGUF file: key/values and the tensor table, without the weights.

Format: GGUF versions 2 and 3, little-endian (docs/gguf.md of ggml). Arrays are walked over and
remembered by place, so that a 200,000-token vocabulary costs nothing until somebody asks for it.
The file is not trusted: every count and length is checked against what is left of the file, and
whatever is wrong ends in a ModelError that names the file, the thing that was being read and
the byte offset.
"""

from __future__ import annotations

import itertools
import math
import re
import stat
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from m3cli.errors import ModelError
from m3cli.model.cursor import DOWNLOAD_AGAIN, Cursor
from m3cli.model.ggml_types import TENSOR_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import NoReturn

    Scalar = int | float | bool | bytes
    Numbers = tuple[int | float | bool, ...]

T = TypeVar("T", int, float, bool)

DEFAULT_ALIGNMENT = 32  # bytes; of the tensors of a file that lacks general.alignment
MAX_SHARDS = 1 << 12  # of a model
_STRING, _ARRAY = 8, 9
# Value type number → struct code of one element.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Far above every published model, low enough that a hostile header does not stall.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMS = 4  # GGML_MAX_DIMS
_KEPT_ELEMENTS = 1024  # numeric arrays up to this length are read at once
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Array:
    """Where an array lies: `count` elements of GGUF value type `type` in bytes `start` to `end`."""

    type: int
    count: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One line of the tensor table. `dims` has the fastest-running dimension first, as GGUF does.

    `file` is the index into `Header.files`, `offset` counts bytes from the start of that file. For
    a type that is newer than m3, `type` is its number and `nbytes` the room up to the next tensor.
    """

    name: str
    dims: tuple[int, ...]
    type: str
    file: int
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.dims)


class Header:
    """Key/values of a model and the tensors of all its files.

    `path` is the file to hand to llama.cpp: the first shard of a split model. The typed getters
    return None for a key that is absent and raise ModelError for one of another type. `spans` says
    where each key and its value lie in that file: first byte, and byte behind the last.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        file_bytes: int,
        fields: Mapping[str, Scalar | Array | Numbers],
        tensors: tuple[Tensor, ...],
        spans: Mapping[str, tuple[int, int]],
    ) -> None:
        self.path = files[0]
        self.files = files
        self.file_bytes = file_bytes
        self.fields = fields
        self.tensors = tensors
        self.spans = spans

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the keys that describe the network's shape."""
        return self.require_str("general.architecture")

    def get_int(self, key: str) -> int | None:
        """Return an integer of any width."""
        return self._get(key, int)

    def get_float(self, key: str) -> float | None:
        """Return a float of either width."""
        return self._get(key, float)

    def get_bool(self, key: str) -> bool | None:
        """Return a boolean."""
        return self._get(key, bool)

    def get_str(self, key: str) -> str | None:
        """Return a string; bytes that are no UTF-8 become U+FFFD."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, bytes):
            self._wrong_type(key, "string")
        return value.decode("utf-8", "replace")

    def require_int(self, key: str) -> int:
        """Return an integer that has to be there."""
        value = self.get_int(key)
        return self._missing(key) if value is None else value

    def require_str(self, key: str) -> str:
        """Return a string that has to be there."""
        value = self.get_str(key)
        return self._missing(key) if value is None else value

    def array(self, key: str) -> Numbers | None:
        """Return a numeric array, read from the file if they are many."""
        value = self.fields.get(key)
        if value is None or isinstance(value, tuple):
            return value
        if not isinstance(value, Array) or value.type == _STRING:
            self._wrong_type(key, "array of numbers")
        data = self._read(key, value.start, value.end)
        return struct.unpack(f"<{value.count}{_NUMBERS[value.type]}", data)

    def strings(self, key: str) -> list[bytes]:
        """Return a string array, read from the file; [] if the key is absent."""
        value = self.fields.get(key)
        if value is None:
            return []
        if not isinstance(value, Array) or value.type != _STRING:
            self._wrong_type(key, "array of strings")
        data = self._read(key, value.start, value.end)
        length = struct.Struct("<Q").unpack_from
        result: list[bytes] = []
        position = 0
        for _ in range(value.count):
            start = position + 8
            position = start + length(data, position)[0]
            result.append(data[start:position])
        return result

    def count(self, key: str) -> int:
        """Return the number of elements of an array, 0 if the key is absent."""
        value = self.fields.get(key)
        if value is None:
            return 0
        if isinstance(value, tuple):
            return len(value)
        if not isinstance(value, Array):
            self._wrong_type(key, "array")
        return value.count

    def raw(self, key: str) -> bytes:
        """Return a key that is there and its value as they stand in the file."""
        return self._read(key, *self.spans[key])

    def _get(self, key: str, kind: type[T]) -> T | None:
        value = self.fields.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            self._wrong_type(key, kind.__name__)
        return value

    def _read(self, key: str, start: int, end: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(data) != end - start:
            raise ModelError(f"{self.path} changed while {key} was being read.", "Run the command again.")
        return data

    def _missing(self, key: str) -> NoReturn:
        raise ModelError(
            f"{self.path} lacks the key {key}, without which the model cannot be run.",
            "Choose another file of this model; this one was made by a tool that left the key out.",
        )

    def _wrong_type(self, key: str, wanted: str) -> NoReturn:
        raise ModelError(
            f"The key {key} of {self.path} has the wrong type; it should be of type {wanted}.",
            "Choose another file of this model.",
        )


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file at `path`, or of all shards if it is one of a split model.

    Raises ModelError when a file is missing, is no GGUF, is broken or is cut short.
    """
    first = _read_file(path)
    count = first.fields.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return Header((path,), first.size, first.fields, tuple(first.tensors), first.spans)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or count > MAX_SHARDS:
        raise ModelError(
            f"{path} is one of {count} parts of a model, but its name does not say which.",
            f"Give all parts their published names, such as NAME-00001-of-{count:05d}.gguf.",
        )
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    files = tuple(path.with_name(name) for name in names)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(
            f"{_listing(missing)} of the {count} parts of the model in {path.parent} "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            "Download the missing parts into the same directory.",
        )
    parts = [first if file == path else _read_file(file) for file in files]
    return _join(files, parts)


def _join(files: tuple[Path, ...], parts: list[_Part]) -> Header:
    tensors: list[Tensor] = []
    for i, part in enumerate(parts):
        if part.fields.get("split.no") != i or part.fields.get("split.count") != len(files):
            raise ModelError(
                f"{files[i]} does not say that it is part {i + 1} of {len(files)} of a model.",
                "Download the parts again from one source.",
            )
        tensors += [replace(tensor, file=i) for tensor in part.tensors]
    total = parts[0].fields.get("split.tensors.count", len(tensors))
    if total != len(tensors) or len({t.name for t in tensors}) != len(tensors):
        raise ModelError(
            f"The parts of {files[0]} do not belong together: they hold {len(tensors)} tensors, "
            f"and the first part names {total!r}.",
            "Download the parts again from one source.",
        )
    size = sum(part.size for part in parts)
    return Header(files, size, parts[0].fields, tuple(tensors), parts[0].spans)


@dataclass(frozen=True, slots=True)
class _Part:
    size: int
    fields: dict[str, Scalar | Array | Numbers]
    tensors: list[Tensor]
    spans: dict[str, tuple[int, int]]


def _read_file(path: Path) -> _Part:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path} is a directory, not a model file.", "Name the .gguf file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file.", "Name a .gguf file.")
        with path.open("rb", buffering=0) as file:
            return _parse(Cursor(path, file, status.st_size))
    except FileNotFoundError as error:
        raise ModelError(f"There is no file {path}.", "Check the path, or see m3 model list.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _parse(cursor: Cursor) -> _Part:
    _check_magic(cursor)
    tensor_count = cursor.number("Q", "the number of tensors", _MAX_TENSORS)
    key_count = cursor.number("Q", "the number of keys", _MAX_KEYS)
    fields: dict[str, Scalar | Array | Numbers] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(key_count):
        start = cursor.position
        key = cursor.name(f"the name of key {i + 1} of {key_count}")
        if key in fields:
            cursor.fail(f"the key {key}", "stands there twice")
        fields[key] = _value(cursor, key)
        spans[key] = (start, cursor.position)
    table = [_tensor_line(cursor, f"tensor {i + 1} of {tensor_count}") for i in range(tensor_count)]
    if len({line[0] for line in table}) != len(table):
        cursor.fail("the tensor table", "names a tensor twice")
    tensors = _place(cursor, table, fields.get("general.alignment", DEFAULT_ALIGNMENT))
    return _Part(cursor.size, fields, tensors, spans)


def _check_magic(cursor: Cursor) -> None:
    start = cursor.peek(512)
    if start[:4] != b"GGUF":
        raise ModelError(
            f"{cursor.path} is not a GGUF file{_looks_like(start)}.",
            "Run git lfs pull in its repository, or download the file itself."
            if start.startswith(b"version https://git-lfs")
            else "Choose a .gguf file; m3 model list shows those that are here.",
        )
    cursor.take(4, "the magic number")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise ModelError(
            f"{cursor.path} is a big-endian GGUF file, which llama.cpp does not read here.",
            "Choose a little-endian file, or convert this one with gguf-convert-endian.",
        )
    if version not in (2, 3):
        raise ModelError(
            f"{cursor.path} is a GGUF file of version {version}; m3 reads versions 2 and 3.",
            "Choose a newer file of this model." if version < 2 else "Update m3.",
        )


def _looks_like(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a Git LFS pointer that stands for the model"
    if start.startswith(b"PK\x03\x04"):
        return ": it looks like a zip archive, such as a PyTorch checkpoint"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return ": it looks like a web page, such as the error page of a download"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27:
        return ": it looks like safetensors weights"
    if start[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return ": it is in llama.cpp's older GGML format"
    return ""


def _value(cursor: Cursor, key: str) -> Scalar | Array | Numbers:
    what = f"the value of {key}"
    kind = cursor.number("I", what)
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        return cursor.scalar(_code(cursor, kind, what), what)
    element = cursor.number("I", what)
    count = cursor.number("Q", what)
    if element == _STRING:
        start = cursor.position
        cursor.skip_strings(count, what)
        return Array(element, count, start, cursor.position)
    code = _code(cursor, element, what)
    nbytes = count * struct.calcsize(f"<{code}")
    if count <= _KEPT_ELEMENTS:
        return struct.unpack(f"<{count}{code}", cursor.take(nbytes, what))
    start = cursor.position
    cursor.skip(nbytes, what)
    return Array(element, count, start, cursor.position)


def _code(cursor: Cursor, kind: int, what: str) -> str:
    if kind not in _NUMBERS:
        cursor.fail(what, "is an array of arrays" if kind == _ARRAY else f"has the unknown type {kind}")
    return _NUMBERS[kind]


def _tensor_line(cursor: Cursor, what: str) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name(f"the name of {what}")
    rank = cursor.number("I", f"the dimensions of {name}", _MAX_DIMS)
    dims = tuple(cursor.number("Q", f"the dimensions of {name}", 1 << 62) for _ in range(rank))
    kind = cursor.number("I", f"the type of {name}")
    return name, dims, kind, cursor.number("Q", f"the offset of {name}")


def _place(
    cursor: Cursor, table: list[tuple[str, tuple[int, ...], int, int]], alignment: object
) -> list[Tensor]:
    """Turn offsets into places in the file, and check that the file reaches to the last tensor's end."""
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        cursor.fail("general.alignment", f"is {alignment!r}, which is no power of two")
    data = -(-cursor.position // alignment) * alignment
    starts = sorted({offset for *_, offset in table})
    following = dict(itertools.pairwise(starts))
    tensors: list[Tensor] = []
    end = data
    for name, dims, kind, offset in table:
        known = TENSOR_TYPES.get(kind)
        if known is None:
            nbytes = max(following.get(offset, cursor.size - data) - offset, 0)
        elif dims and dims[0] % known.block:
            cursor.fail(f"tensor {name}", f"has rows of {dims[0]} elements, no multiple of {known.block}")
        else:
            nbytes = math.prod(dims) // known.block * known.nbytes
        end = max(end, data + offset + nbytes)
        tensors.append(Tensor(name, dims, known.name if known else str(kind), 0, data + offset, nbytes))
    if table and end > cursor.size:
        raise ModelError(f"{cursor.path} is cut short: {cursor.size:,} of {end:,} bytes.", DOWNLOAD_AGAIN)
    return tensors


def _listing(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else ", ".join(names[:5]) + f" and {len(names) - 5} more"


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = getattr(error, "strerror", None) or str(error)
    return ModelError(f"{path} cannot be read: {reason}.", "Check the path and its permissions.")
