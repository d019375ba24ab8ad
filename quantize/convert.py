"""A MiniMax-M3 checkpoint → a GGUF file that llama.cpp runs as `minimax-m3`.

Everything but the weights is read and checked first; then the weights stream through, a few rows of one
tensor at a time, so that memory does not depend on the size of the model. The order of the output
is fixed, which makes every byte of it have one place: that is what an interrupted conversion resumes by.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from m3cli.errors import MachineError, ModelError, UsageError

try:
    import gguf
    import numpy as np
    import safetensors  # noqa: F401 - for the sentence below
    import torch
    from gguf.quants import quantize
except ImportError as error:
    raise MachineError(
        f"Converting needs a package that is not installed: {error.name}.",
        "Install what it needs with: pip install 'm3cli[quantize]'.",
    ) from error

from quantize.checkpoint import AGAIN, Checkpoint, Weight
from quantize.events import Converted, ConvertEvent, ConvertRequest, OutputFile, OutType, Planned, Progress
from quantize.hparams import ARCHITECTURE, HParams, read_hparams
from quantize.metadata import add_hparams, add_metadata
from quantize.names import Mapping, mappings, skipped_kind, text_name
from quantize.partial import PartialFiles, Source
from quantize.vocabulary import add_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The largest value of each type; a block of q8_0 holds 127 steps of a scale that is f16.
_LIMITS = {
    gguf.GGMLQuantizationType.F32: 3.4028234e38,
    gguf.GGMLQuantizationType.BF16: 3.3895313e38,
    gguf.GGMLQuantizationType.F16: 65504.0,
    gguf.GGMLQuantizationType.Q8_0: 127 * 65504.0,
}
_TYPES: dict[OutType, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ALIGNMENT: int = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes; of each tensor's data
_PIECE_ELEMENTS = 8 << 20  # of a matrix, read and written at once: 32 MiB in f32
_FORMAT = 1  # counts up whenever the same checkpoint would give other bytes


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the output: its header, filled up to where the data begin, and its tensors."""

    name: str
    header: bytes
    tensors: tuple[_Tensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.padded for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class _Tensor:
    mapping: Mapping
    weights: tuple[Weight, ...]
    type: gguf.GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        block, nbytes = _quant_size(self.type)
        return self.mapping.shape[-1] // block * nbytes

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.mapping.out_shape[:-1], dtype=np.int64)) * self.row_bytes

    @property
    def padded(self) -> int:
        return self.nbytes + -self.nbytes % _ALIGNMENT


class _Piece(NamedTuple):
    nbytes: int
    tensor: str
    shard: Path | None
    make: Callable[[], bytes | memoryview]


class Conversion:
    """A checkpoint that was read and found convertible: `planned` says what it will become.

    Raises ModelError, naming file, key or tensor, for whatever is missing, unknown, misshapen or of
    a wrong type; UsageError for an output name that no GGUF file should have.
    """

    def __init__(self, request: ConvertRequest) -> None:
        if request.out.suffix != ".gguf":
            raise UsageError(f"The output {request.out} is not named *.gguf.", "Give --out such a name.")
        if not request.out.parent.is_dir():
            raise UsageError(f"There is no directory {request.out.parent}.", "Make it first.")
        self._request = request
        hparams = read_hparams(request.source)
        self._checkpoint = Checkpoint(request.source)
        tensors, skipped = _match(self._checkpoint, hparams, request.type)
        self._files, notes, licence = _headers(request, hparams, tensors)
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        if 0 < request.split_max_bytes < largest.nbytes:
            notes.append(
                f"The tensor {largest.mapping.name} alone has {largest.nbytes / 1e9:,.2f} GB, more than "
                "--split-max-size."
            )
        by_type: Counter[str] = Counter(tensor.type.name for tensor in tensors)
        self.planned = Planned(
            files=tuple(OutputFile(file.name, file.nbytes) for file in self._files),
            source_bytes=sum(shard.stat().st_size for shard in self._checkpoint.shards),
            parameters=sum(int(np.prod(t.mapping.out_shape, dtype=np.int64)) for t in tensors),
            tensors=tuple(
                (name, count, sum(t.nbytes for t in tensors if t.type.name == name))
                for name, count in sorted(by_type.items())
            ),
            skipped=skipped,
            license=licence,
            free_bytes=shutil.disk_usage(request.out.parent).free,
            notes=tuple(notes),
        )

    def run(self) -> Iterator[Progress | Converted]:
        """Convert. Raises what PartialFiles raises, and ModelError for a NaN or a value that is too large."""
        started = time.monotonic()
        with PartialFiles(
            self._request.out,
            self.planned.files,
            self._fingerprint(),
            self._sources(),
            resume=self._request.resume,
        ) as output:
            resumed = output.done
            yield Progress(output.done, output.total, resumed, "")
            start = 0
            for piece in self._pieces():
                there = max(output.done - start, 0)  # of this piece, written by an earlier run
                if there < piece.nbytes:
                    output.append(piece.make()[there:])
                    yield Progress(output.done, output.total, resumed, piece.tensor)
                start += piece.nbytes
            files = output.publish()
        yield Converted(tuple(files), time.monotonic() - started)

    def _pieces(self) -> Iterator[_Piece]:
        """Everything that is written, in order."""
        for file in self._files:
            yield _Piece(len(file.header), "", None, partial(bytes, file.header))
            for tensor in file.tensors:
                name = tensor.mapping.name
                for weight, first, last in _row_ranges(tensor):
                    nbytes = (last - first) * tensor.row_bytes
                    make = partial(_encode, tensor, weight, first, last)
                    yield _Piece(nbytes, name, weight.stored.file, make)
                if padding := tensor.padded - tensor.nbytes:
                    yield _Piece(padding, name, None, partial(bytes, padding))

    def _fingerprint(self) -> str:
        """Of all that the output depends on beside the shards' contents."""
        digest = hashlib.sha256(f"{_FORMAT} {self._request.type} {self._checkpoint.scale_block}".encode())
        for file in self._files:
            digest.update(os.fsencode(file.name) + f" {file.nbytes}\n".encode())
            digest.update(file.header)
        return digest.hexdigest()

    def _sources(self) -> dict[str, Source]:
        """Each shard by its name: what tells it from a changed one, and where the output first needs it."""
        first: dict[Path, int] = {}
        start = 0
        for piece in self._pieces():
            if piece.shard is not None:
                first.setdefault(piece.shard, start)
            start += piece.nbytes
        sources = {}
        for shard, place in first.items():
            status = shard.stat()
            identity = f"{status.st_size} {status.st_mtime_ns}"
            sources[shard.name.encode("utf-8", "backslashreplace").decode()] = Source(identity, place)
        return sources


def convert(request: ConvertRequest) -> Iterator[ConvertEvent]:
    """Read and check the checkpoint, then convert it: `Planned Progress+ Converted`."""
    conversion = Conversion(request)
    yield conversion.planned
    yield from conversion.run()


def _match(
    checkpoint: Checkpoint, hparams: HParams, out_type: OutType
) -> tuple[list[_Tensor], dict[str, int]]:
    """Find each tensor of the output in the checkpoint, and a reason for each that is not used."""
    there: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    scales = {scale for name in checkpoint.stored for scale in checkpoint.scale_names(name)}
    for name, stored in checkpoint.stored.items():
        if kind := skipped_kind(name):
            skipped[kind] += 1
        elif name not in scales:
            short = text_name(name)
            if short in there:
                raise ModelError(
                    f"{stored.file} holds {name}, and the checkpoint also {there[short]}: both are the same "
                    "tensor of the model.",
                    AGAIN,
                )
            there[short] = name
    wanted = mappings(hparams)
    sources = {source for mapping in wanted for source in mapping.sources}
    missing = [source for mapping in wanted for source in mapping.sources if source not in there]
    if missing and any("gate_up_proj" in name for name in there):
        raise ModelError(
            f"The checkpoint in {checkpoint.directory} holds fused matrices (gate_up_proj): transformers "
            "saved it in its own form, not in the published one.",
            "Save it from MiniMaxM3SparseForConditionalGeneration, which keeps the published names.",
        )
    if missing:
        raise ModelError(
            f"The checkpoint lacks the tensor {missing[0]}" + _and_more(missing, "that its config asks for."),
            AGAIN,
        )
    extra = sorted(set(there) - sources)
    if extra:
        file = checkpoint.stored[there[extra[0]]].file
        raise ModelError(
            f"{file} holds the tensor {there[extra[0]]}" + _and_more(extra, "that MiniMax-M3 does not have."),
            "Convert the published checkpoint; adapters and other additions have to be merged into it first.",
        )
    return [_tensor(mapping, checkpoint, there, out_type) for mapping in wanted], dict(skipped)


def _tensor(mapping: Mapping, checkpoint: Checkpoint, there: dict[str, str], out_type: OutType) -> _Tensor:
    weights = tuple(checkpoint.weight(there[source]) for source in mapping.sources)
    for weight in weights:
        if weight.stored.shape != mapping.shape:
            raise ModelError(
                f"The tensor {weight.stored.name} of {weight.stored.file} has the shape "
                f"{list(weight.stored.shape)}; by config.json it should be {list(mapping.shape)}.",
                AGAIN,
            )
    kind = _TYPES[out_type if mapping.role == "matrix" else "f32"][0]
    block = _quant_size(kind)[0]
    if mapping.shape[-1] % block:
        raise ModelError(
            f"The rows of {weights[0].stored.name} have {mapping.shape[-1]} elements, which is no multiple "
            f"of the {block} that a block of {out_type} has.",
            "Convert with --type bf16.",
        )
    return _Tensor(mapping, weights, kind)


def _row_ranges(tensor: _Tensor) -> Iterator[tuple[Weight, int, int]]:
    """(source, first row, row behind the last) of the pieces in which a tensor is converted."""
    shape = tensor.mapping.shape
    rows = shape[0] if len(shape) > 1 else 1
    step = max(1, _PIECE_ELEMENTS // shape[-1])
    for weight in tensor.weights:
        for first in range(0, rows, step):
            yield weight, first, min(first + step, rows)


def _encode(tensor: _Tensor, weight: Weight, first: int, last: int) -> memoryview:
    """Rows of a tensor as they stand in the file."""
    values = weight.rows(first, last, _LIMITS[tensor.type])
    if tensor.mapping.role == "norm":
        values = values.float() + 1  # Gemma's norms scale by 1 + weight, llama.cpp's by what is stored
    if tensor.type == gguf.GGMLQuantizationType.BF16:
        array = values.to(torch.bfloat16).view(torch.int16).numpy()
    elif tensor.type == gguf.GGMLQuantizationType.Q8_0:
        array = quantize(values.float().numpy(), tensor.type)
    else:
        half = tensor.type == gguf.GGMLQuantizationType.F16
        array = values.to(torch.float16 if half else torch.float32).numpy()
    data: memoryview = np.ascontiguousarray(array).data.cast("B")
    return data


def _headers(
    request: ConvertRequest, hparams: HParams, tensors: list[_Tensor]
) -> tuple[list[_File], list[str], str | None]:
    """Header and share of the tensors of each file; notes for the user; the licence."""
    for name in ("gguf", "metadata"):  # the library narrates under both names
        logging.getLogger(name).setLevel(logging.CRITICAL)
    writer = gguf.GGUFWriter(None, ARCHITECTURE, split_max_size=request.split_max_bytes)
    licence, notes = add_metadata(writer, request.source)
    writer.add_file_type(_TYPES[request.type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hparams(writer, hparams)
    notes += add_vocabulary(writer, request.source, hparams)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.mapping.name,
            tensor.mapping.out_shape,
            np.dtype(np.float32),  # of no effect beside raw_dtype
            tensor.nbytes,
            raw_dtype=tensor.type,
        )
    left = iter(tensors)
    files = []
    with tempfile.TemporaryDirectory() as directory:
        writer.write_header_to_file(Path(directory) / request.out.name)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        for path, share in zip(writer.format_shard_names(writer.path), writer.tensors, strict=True):
            header = path.read_bytes()
            header += bytes(-len(header) % _ALIGNMENT)
            files.append(_File(path.name, header, tuple(itertools.islice(left, len(share)))))
    return files, notes, licence


def _quant_size(kind: gguf.GGMLQuantizationType) -> tuple[int, int]:
    """Elements of a block, and the bytes that they share."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return block, nbytes


def _and_more(names: list[str], end: str) -> str:
    return f" and {len(names) - 1:,} more {end}" if len(names) > 1 else f" {end}"
