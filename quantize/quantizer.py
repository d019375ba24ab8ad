"""A GGUF model → a smaller one: each tensor in the type that was chosen for it.

What is written is known to the byte before the first weight is read. The order of the output is that of the
source, which makes every byte of it have one place: an interrupted run goes on there.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from m3cli.errors import ModelError, UsageError
from m3cli.model.ggml_types import TENSOR_TYPES
from quantize import kinds
from quantize.events import Converted, OutputFile, Progress
from quantize.layout import lay_out
from quantize.native import Rows, quantize_all
from quantize.partial import PartialFiles, Source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from m3cli.model.header import Header, Tensor
    from quantize.importance import Importance
    from quantize.layout import OutFile, OutTensor

FLOATS = ("F32", "F16", "BF16")

_KNOWN = {each.name for each in TENSOR_TYPES.values()}
_PIECE_ELEMENTS = 8 << 20  # weights that are in the worker's memory at once: 32 MiB in f32
_FORMAT = 1  # counts up whenever the same choice of types would give other bytes


@dataclass(frozen=True, slots=True)
class Output:
    """Where the model goes. `split_max_bytes` 0 makes one file; `threads` 0 takes all cores.

    `allow_requantize` lets weights be quantized that are so already.
    """

    path: Path
    split_max_bytes: int = 0
    allow_requantize: bool = False
    threads: int = 0


@dataclass(frozen=True, slots=True)
class SourceModel:
    """What goes in: a model, and the importance matrix of it, with the name of its file, if there is one.

    With `assume_importance` it is planned as if there were one.
    """

    header: Header
    importance: Importance | None = None
    importance_name: str = ""
    assume_importance: bool = False


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What will be written; nothing is yet. Sizes are in bytes, exact.

    `tensors` has (type, count, bytes) for each type, `changed` the tensors that get another one.
    """

    files: tuple[OutputFile, ...]
    source_bytes: int
    parameters: int
    tensors: tuple[tuple[str, int, int], ...]
    changed: int
    free_bytes: int
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors' data for each weight."""
        return 8 * sum(nbytes for _, _, nbytes in self.tensors) / self.parameters


class Quantization:
    """A model and the type of each of its tensors, checked: `planned` says what it will become.

    `file_type` is the number that the file states for its mixture of types. Raises UsageError for an output
    name that is no GGUF file's, for weights that are quantized already, and for a type that needs an
    importance matrix where there is none; ModelError for tensors that m3 does not know.
    """

    def __init__(self, source: SourceModel, types: Mapping[str, str], output: Output, file_type: int) -> None:
        check_output(output.path)
        header, importance = source.header, source.importance
        self._header, self._output, self._importance = header, output, importance
        types = {tensor.name: types.get(tensor.name, tensor.type) for tensor in header.tensors}
        changed = [tensor for tensor in header.tensors if types[tensor.name] != tensor.type]
        _check_types(source, changed, types, output, file_type)
        self._files = lay_out(
            header,
            types,
            output.path.name,
            file_type=file_type,
            split_max_bytes=output.split_max_bytes,
            extra=provenance(source),
        )
        tensors = [tensor for file in self._files for tensor in file.tensors]
        counts = Counter(tensor.type for tensor in tensors)
        self.planned = QuantizePlan(
            files=tuple(OutputFile(file.name, file.nbytes) for file in self._files),
            source_bytes=header.file_bytes,
            parameters=sum(tensor.elements for tensor in header.tensors),
            tensors=tuple(
                (kind, count, sum(tensor.nbytes for tensor in tensors if tensor.type == kind))
                for kind, count in sorted(counts.items(), key=lambda item: kinds.bits(item[0]))
            ),
            changed=len(changed),
            free_bytes=shutil.disk_usage(output.path.parent).free,
            notes=tuple(_notes(changed, importance)),
        )

    def run(self) -> Iterator[Progress | Converted]:
        """Quantize, going on where an interrupted run ended.

        Raises what PartialFiles raises, ModelError for weights that are no numbers, EngineCrashError.
        """
        started = time.monotonic()
        with PartialFiles(
            self._output.path,
            self.planned.files,
            self._fingerprint(),
            self._sources(),
            resume=True,
            what="quantization",
            go_on="give the same command again",
        ) as output:
            resumed = output.done
            yield Progress(output.done, output.total, resumed, "")
            left, ahead = itertools.tee(self._left(output.done))
            made = quantize_all((piece.rows for piece, _ in ahead if piece.rows), self._output.threads)
            for piece, there in left:
                data = next(made) if piece.rows else piece.literal
                output.append(memoryview(data)[there:])
                yield Progress(output.done, output.total, resumed, piece.tensor)
            files = output.publish()
        yield Converted(tuple(files), time.monotonic() - started)

    def _left(self, done: int) -> Iterator[tuple[_Piece, int]]:
        """The pieces that are not in the first `done` bytes, and how many bytes of each are."""
        place = 0
        for file in self._files:
            for piece in self._pieces(file):
                if place + piece.nbytes > done:
                    yield piece, max(done - place, 0)
                place += piece.nbytes

    def _pieces(self, file: OutFile) -> Iterator[_Piece]:
        yield _Piece(len(file.header), "", None, file.header)
        for tensor in file.tensors:
            yield from self._rows(tensor)
            if padding := tensor.padded - tensor.nbytes:
                yield _Piece(padding, tensor.source.name, None, bytes(padding))

    def _rows(self, tensor: OutTensor) -> Iterator[_Piece]:
        source = tensor.source
        columns, rows, matrices = matrices_of(source)
        row_in, row_out = kinds.row_bytes(source.type, columns), kinds.row_bytes(tensor.type, columns)
        weights = None
        if self._importance is not None and tensor.type != source.type:
            weights = self._importance.weights(source.name, columns, matrices)
        step = max(1, _PIECE_ELEMENTS // columns)
        for matrix in range(matrices):
            for first in range(0, rows, step):
                count = min(step, rows - first)
                place = source.offset + (matrix * rows + first) * row_in
                yield _Piece(
                    count * row_out,
                    source.name,
                    Rows(
                        self._header.files[source.file],
                        source.name,
                        place,
                        source.type,
                        tensor.type,
                        count,
                        columns,
                        None if weights is None else weights[matrix],
                    ),
                )

    def _fingerprint(self) -> str:
        """Of all that the output depends on beside the weights."""
        digest = hashlib.sha256(f"{_FORMAT}\n".encode())
        for file in self._files:
            digest.update(os.fsencode(file.name) + f" {file.nbytes}\n".encode())
            digest.update(file.header)
        if self._importance is not None:
            for name, entry in sorted(self._importance.entries.items()):
                digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def _sources(self) -> dict[str, Source]:
        """Each file of the source: what tells it from a changed one, and where the output first needs it."""
        first: dict[int, int] = {}
        place = 0
        for file in self._files:
            place += len(file.header)
            for tensor in file.tensors:
                first.setdefault(tensor.source.file, place)
                place += tensor.padded
        sources = {}
        for number, start in first.items():
            path = self._header.files[number]
            status = path.stat()
            name = path.name.encode("utf-8", "backslashreplace").decode()
            sources[name] = Source(f"{status.st_size} {status.st_mtime_ns}", start)
        return sources


class _Piece(NamedTuple):
    """The next bytes of the output: `rows` that are quantized, or a `literal`."""

    nbytes: int
    tensor: str
    rows: Rows | None
    literal: bytes = b""


def matrices_of(tensor: Tensor) -> tuple[int, int, int]:
    """Columns of a tensor, rows of each of its matrices, and matrices; a vector is one row."""
    columns, rows, *rest = *tensor.dims, 1, 1
    return columns, rows, math.prod(rest)


def is_covered(tensor: Tensor, importance: Importance | None) -> bool:
    """Whether there are importances for the tensor. Raises ModelError when they are of another model."""
    columns, _, matrices = matrices_of(tensor)
    return importance is not None and importance.weights(tensor.name, columns, matrices) is not None


def check_output(path: Path) -> None:
    """Raise UsageError unless a model can be written to `path`, or begun and not finished."""
    if path.suffix != ".gguf":
        raise UsageError(f"The output {path} is not named *.gguf.", "Give --out such a name.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent}.", "Make it first.")
    if os.path.lexists(path) and not path.with_name(path.name + ".partial").exists():
        raise UsageError(f"{path} already exists.", "Delete it, or name another file with --out.")


def check_source(header: Header, quantizable: Collection[str], *, allow_requantize: bool) -> None:
    """Raise UsageError for a model that is quantized already, unless that is allowed."""
    done = [t for t in header.tensors if t.name in quantizable and t.type not in FLOATS]
    if done and not allow_requantize:
        raise UsageError(
            f"{header.path} is quantized already: {done[0].name}"
            + (f" and {len(done) - 1:,} more are" if len(done) > 1 else " is")
            + f" {done[0].type}. Quantized again, its errors would add up.",
            "Quantize the original in BF16, F16 or F32, or give --allow-requantize.",
        )


def _check_types(
    source: SourceModel,
    changed: list[Tensor],
    types: Mapping[str, str],
    output: Output,
    file_type: int,
) -> None:
    header, importance = source.header, source.importance
    unknown = [tensor for tensor in header.tensors if tensor.type not in _KNOWN]
    if unknown:
        raise ModelError(
            f"The tensor {unknown[0].name} of {header.path} has the type {unknown[0].type}, which is newer "
            "than m3.",
            "Update m3.",
        )
    check_source(header, [tensor.name for tensor in changed], allow_requantize=output.allow_requantize)
    covered = {tensor.name for tensor in changed if is_covered(tensor, importance)}
    if importance is not None and changed and not covered:
        raise ModelError(
            f"The importance matrix {source.importance_name} has nothing on any tensor of {header.path}.",
            "It was computed for another model: choose the one for this model.",
        )
    missing = [
        tensor.name
        for tensor in changed
        if tensor.name not in covered and kinds.needs_importance(types[tensor.name], tensor.name, file_type)
    ]
    if missing and not source.assume_importance:
        whose = "there is none" if importance is None else "the given one has nothing on it"
        raise UsageError(
            f"The type {types[missing[0]]} of {missing[0]} needs an importance matrix, and {whose}.",
            "Compute one with m3 quantize imatrix and give it with --imatrix, or choose a larger type.",
        )


def provenance(source: SourceModel) -> dict[str, str | int]:
    """What the file will say of the importance matrix, as llama-quantize has it."""
    importance = source.importance
    if importance is None:
        return {}
    extra: dict[str, str | int] = {
        "quantize.imatrix.file": source.importance_name,
        "quantize.imatrix.entries_count": len(importance.entries),
        "quantize.imatrix.chunks_count": importance.chunk_count,
    }
    if importance.datasets:
        extra["quantize.imatrix.dataset"] = importance.datasets[0]
    return extra


def _notes(changed: list[Tensor], importance: Importance | None) -> Iterator[str]:
    if importance is None:
        return
    # Embeddings are looked up and not multiplied, so nothing is known of them.
    missing = [t.name for t in changed if t.name not in importance.entries and t.name != "token_embd.weight"]
    if missing:
        yield (
            f"the importance matrix has nothing on {missing[0]}"
            + (f" and {len(missing) - 1:,} more tensors" if len(missing) > 1 else "")
            + "; their weights count alike"
        )
