"""What a quantization changed: in the weights of each tensor, and in what the model predicts on a text.

Nothing of the models is in this process: the worker of m3cli.engine reads the weights and runs them, one
model after the other.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from m3cli.engine.process import WorkerClient
from m3cli.errors import MachineError, ModelError, UsageError
from m3cli.model.ggml_types import FILE_TYPES
from m3cli.model.header import read_header
from m3cli.model.preflight import problem
from m3cli.model.shape import ModelShape
from quantize.calibration import token_windows
from quantize.divergence import Divergence, Measured, compare, kept_bytes, positions_of
from quantize.roles import role_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from m3cli.model.header import Header, Tensor
    from quantize.calibration import Windows

MIN_WINDOW = 16  # tokens

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to compare. Without `text`, which are paths, only the weights are.

    About `tokens` tokens of the text are run, in windows of `window`. `rows` is how many rows of a tensor are
    looked at, 0 for all. `gpu_layers` −1 puts every layer on the GPU; `threads` 0 takes all cores.
    """

    reference: Path
    new: Path
    text: tuple[str, ...] = ()
    tokens: int = 8192
    window: int = 512
    rows: int = 1024
    gpu_layers: int = 0
    threads: int = 0


class ModelFile(NamedTuple):
    """A model: its path and bytes, the type that it states, and bits of its tensors' data for each weight."""

    path: Path
    nbytes: int
    file_type: str
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class TensorError:
    """What became of a tensor. `role` is its name without the layer, which is None outside of all layers.

    `error` is sqrt(Σ(w−w′)² / Σw²) over `looked_at` of its `rows`, None where a type has no values to compare
    and infinity where only the reference is zero throughout.
    """

    name: str
    role: str
    layer: int | None
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    rows: int
    looked_at: int
    error: float | None


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """What will be done. `temporary_bytes` of `free_bytes` in `directory` are taken while it runs.

    Of the text's `text_tokens`, `windows` windows are run, of which `positions` positions count; all are 0 if
    there is no text.
    """

    reference: ModelFile
    new: ModelFile
    tensors: int
    windows: int
    positions: int
    text_tokens: int
    temporary_bytes: int
    free_bytes: int
    directory: str


@dataclass(frozen=True, slots=True)
class Compared:
    """The weights of `done` of `total` tensors were compared, the last of which is called `name`."""

    done: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class Verified:
    """The end: all tensors in the order of the file, and the divergence if there was a text."""

    reference: ModelFile
    new: ModelFile
    rows: int
    tensors: tuple[TensorError, ...]
    divergence: Divergence | None

    def passes(self, max_kl: float) -> bool:
        """Whether there is a mean KL divergence and it is at most `max_kl` nats."""
        return self.divergence is not None and self.divergence.mean_kl.value <= max_kl


class Verification:
    """Two files of one model, checked to be that: `planned` says what will be done with them.

    Raises ModelError for files that cannot be read or compared, UsageError for a text that is not there or
    settings that make no sense, CorpusError for too short a text, MachineError for too small a disk.
    """

    def __init__(self, request: VerifyRequest) -> None:
        self._request = request
        reference, new = read_header(request.reference), read_header(request.new)
        _check_alike(reference, new)
        self._headers = (reference, new)
        self._windows: Windows | None = None
        directory = tempfile.gettempdir()
        vocabulary = reference.count("tokenizer.ggml.tokens")
        if request.text:
            _check_runs(self._headers, request)
            most = max(1, request.tokens // request.window)
            self._windows = token_windows(request.text, request.reference, request.window, most)
        count = len(self._windows.ids) if self._windows else 0
        self.planned = VerifyPlan(
            reference=_model_file(reference),
            new=_model_file(new),
            tensors=len(reference.tensors),
            windows=count,
            positions=count * positions_of(request.window) if count else 0,
            text_tokens=self._windows.tokens if self._windows else 0,
            temporary_bytes=kept_bytes(count, request.window, vocabulary),
            free_bytes=shutil.disk_usage(directory).free,
            directory=directory,
        )
        if self.planned.temporary_bytes > self.planned.free_bytes:
            raise MachineError(
                f"The predictions of the reference take {self.planned.temporary_bytes:,} bytes in {directory}"
                f" while this runs, and {self.planned.free_bytes:,} are free there.",
                "Make room, ask for fewer --tokens, or point TMPDIR at a directory with more.",
            )

    def run(self) -> Iterator[Compared | Measured | Verified]:
        """Compare weights, then predictions. Raises ModelError, MachineError, EngineCrashError."""
        divergence = None
        tensors = []
        others = {tensor.name: tensor for tensor in self._headers[1].tensors}
        with WorkerClient("comparing the models") as client:
            for number, tensor in enumerate(self._headers[0].tensors, 1):
                tensors.append(self._compare(client, tensor, others[tensor.name]))
                yield Compared(number, self.planned.tensors, tensor.name)
            if self._windows:
                for event in compare(
                    client,
                    [header.path for header in self._headers],
                    self._windows,
                    gpu_layers=self._request.gpu_layers,
                    threads=self._request.threads,
                    directory=self.planned.directory,
                ):
                    if isinstance(event, Divergence):
                        divergence = event
                    else:
                        yield event
        yield Verified(
            self.planned.reference, self.planned.new, self._request.rows, tuple(tensors), divergence
        )

    def _compare(self, client: WorkerClient, before: Tensor, after: Tensor) -> TensorError:
        columns = before.dims[0] if before.dims else 1
        rows = before.elements // columns if columns else 0
        sides = [
            {"path": str(header.files[tensor.file]), "type": tensor.type, "offset": tensor.offset}
            for header, tensor in zip(self._headers, (before, after), strict=True)
        ]
        result = (
            rows
            and client.ask(
                {
                    "op": "tensor_errors",
                    "name": before.name,
                    "reference": sides[0],
                    "new": sides[1],
                    "rows": rows,
                    "columns": columns,
                    "sample": self._request.rows or rows,
                    "threads": self._request.threads,
                }
            )[0]["result"]
        )
        layer, role = role_of(before.name)
        return TensorError(
            name=before.name,
            role=role,
            layer=layer,
            before=before.type,
            after=after.type,
            bytes_before=before.nbytes,
            bytes_after=after.nbytes,
            rows=rows,
            looked_at=result["rows"] if result else 0,
            error=_relative(result["error"], result["energy"]) if result else None,
        )


def _relative(error: float, energy: float) -> float:
    if not error:
        return 0.0
    return math.sqrt(error / energy) if energy else math.inf


def _model_file(header: Header) -> ModelFile:
    number = header.get_int("general.file_type")
    weights = sum(tensor.elements for tensor in header.tensors)
    return ModelFile(
        header.path,
        header.file_bytes,
        FILE_TYPES.get(-1 if number is None else number, "unknown"),
        8 * sum(tensor.nbytes for tensor in header.tensors) / max(weights, 1),
    )


def _check_alike(reference: Header, new: Header) -> None:
    """Raise ModelError unless both files have the same tensors, whatever their types, and vocabulary."""
    difference = ""
    ours, theirs = ({tensor.name: tensor.dims for tensor in header.tensors} for header in (reference, new))
    other_dims = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if reference.architecture != new.architecture:
        difference = f"their architectures are {reference.architecture} and {new.architecture}"
    elif missing := [name for name in ours if name not in theirs]:
        difference = f"the second lacks {_listing(missing)}"
    elif extra := [name for name in theirs if name not in ours]:
        difference = f"the first lacks {_listing(extra)}"
    elif other_dims:
        name = other_dims[0]
        difference = f"{name} is {_dims(ours[name])} in the first and {_dims(theirs[name])} in the second"
    elif reference.strings("tokenizer.ggml.tokens") != new.strings("tokenizer.ggml.tokens"):
        counts = [header.count("tokenizer.ggml.tokens") for header in (reference, new)]
        difference = f"their vocabularies differ ({counts[0]:,} and {counts[1]:,} tokens)"
    if difference:
        raise ModelError(
            f"{reference.path} and {new.path} are not the same model: {difference}.",
            "Name a model and the file that was quantized from it.",
        )


def _check_runs(headers: tuple[Header, ...], request: VerifyRequest) -> None:
    """Raise what is known beforehand to keep the models from being run as asked."""
    for header in headers:
        shape = ModelShape.from_header(header)
        if error := problem(header, shape):
            raise error
        if not MIN_WINDOW <= request.window <= shape.context_length:
            raise UsageError(
                f"Windows of {request.window:,} tokens cannot be run: {header.path} takes up to "
                f"{shape.context_length:,}, and fewer than {MIN_WINDOW} tell nothing.",
                "Ask for --window 512, as is usual.",
            )
        if not header.count("tokenizer.ggml.tokens"):
            raise ModelError(
                f"{header.path} has no vocabulary, so it cannot be run on a text.",
                "Compare the weights alone, without --text.",
            )


def _dims(dims: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in dims)


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES:,} more tensors" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
