"""An importance matrix of a model, computed over text.

It streams `Planned ModelLoaded (Progress | Saved)* (Probing | Saved)* Computed`.

The parent's side of m3cli.engine.llama_activations. Windows of text are computed one after the other, each
from an empty context. Now and then all that was added up is written into one file beside the output, which
is replaced as a whole: whatever kills the computation, it can go on from there.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.events import EngineConfig
from m3cli.engine.process import WorkerClient
from m3cli.errors import ModelError, UsageError
from m3cli.model.digest import model_digest
from m3cli.model.header import read_header
from m3cli.model.preflight import problem
from m3cli.model.shape import ModelShape
from m3cli.model.tokens import pack_ids
from quantize.calibration import token_windows
from quantize.imatrix_partial import PartialMatrix, Totals
from quantize.importance import Entry, Importance, merged, read_importance, write_importance
from quantize.native import Native
from quantize.roles import role_of
from quantize.sensitivity import measure_sensitivities

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from m3cli.model.header import Header

FEW_WINDOWS = 50  # with fewer, what a text happens to be about shows in the matrix

_LEAST_WINDOW = 16  # llama.cpp passes over smaller batches
_UBATCH = 512  # tokens, llama.cpp's default
_PROBED = 256  # tokens, of the second half of which the predictions are compared
_SAVING_SHARE = 0.05  # of the time, at most, is spent on saving
_EXPERTS_IN_RAM = ((r"\.ffn_\w+_exps\.", "CPU"),)


@dataclass(frozen=True, slots=True)
class ImatrixRequest:
    """What to compute, of which text. Sizes are in tokens; `windows` None takes all that the text has.

    What is in the matrices `add`, such as published ones, is added to it.

    With `output_tensor`, the output matrix is measured too, and with `sensitivities` what an error in each
    tensor does to the model's predictions; both are what a budget is spent by.

    `gpu_layers` −1 puts on the GPU what it can take; with `cpu_moe` the routed experts stay in main memory.
    Results so far are saved every `save_every` seconds, or less often where saving takes long.
    """

    model: Path
    data: tuple[str, ...]
    out: Path
    window: int = 512
    windows: int | None = None
    add: tuple[Path, ...] = ()
    output_tensor: bool = True
    sensitivities: bool = True
    gpu_layers: int = -1
    cpu_moe: bool = False
    threads: int = 0
    save_every: float = 60.0
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """`windows` of `window` tokens, out of a text of `text_tokens`; `resumed` of them are done already."""

    windows: int
    window: int
    text_tokens: int
    resumed: int


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """The model can compute, `seconds` after loading began."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` windows are computed; the first of them may be of an earlier run.

    This run computes `tokens_per_second`, and needs about `seconds_left` more.
    """

    done: int
    total: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Probing:
    """The sensitivities of `done` of `total` tensors are measured, which takes `seconds_left` more."""

    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Saved:
    """What the first `windows` gave is in the file `path`, with the sensitivities that are measured."""

    path: Path
    windows: int


@dataclass(frozen=True, slots=True)
class Unused:
    """The `experts` of a layer, out of `total`, that no token was sent to."""

    layer: int
    experts: tuple[int, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Computed:
    """The matrix is in the file `out`: entries for `tensors`, from `windows` with `tokens` in all.

    `sensitivities` are how many tensors have one; `seconds` are those of this run.
    """

    out: Path
    tensors: int
    windows: int
    tokens: int
    sensitivities: int
    seconds: float
    unused: tuple[Unused, ...]

    @property
    def advice(self) -> str:
        """What would make the matrix better; empty when nothing is known against it."""
        if self.windows < FEW_WINDOWS:
            return (
                f"{self.windows:,} windows are few: with {FEW_WINDOWS:,} or more, of varied text, the matrix "
                "depends less on what they happen to be about."
            )
        if self.unused:
            return (
                "Experts that no token was sent to are quantized as if all their columns mattered equally: "
                "give more text, or more varied text."
            )
        return ""


ImatrixEvent = Planned | ModelLoaded | Progress | Probing | Saved | Computed


class ImatrixComputation:
    """Computes what a request asks for, once `planned` was read.

    Raises UsageError for a file in the way, for results so far that are of something else or would be lost,
    and for numbers that make no sense; ModelError for a model that cannot be run; CorpusError for too little
    text; MachineError when the model does not fit or the disk is full; EngineCrashError when llama.cpp dies.
    """

    def __init__(self, request: ImatrixRequest) -> None:
        self._request = request
        self._partial = PartialMatrix(request.out, resume=request.resume)
        self._header = header = read_header(request.model)
        shape = ModelShape.from_header(header)
        if error := problem(header, shape):
            raise error
        self._config = _engine_config(request, shape)
        self._added = [_matrix_of(header, path) for path in request.add]
        windows = token_windows(request.data, request.model, request.window, request.windows)
        self._windows = windows.ids
        self._identity = {
            "model": model_digest(header),
            "window": request.window,
            "output_tensor": request.output_tensor,
        }
        self._sensitivities: dict[str, float | None] = {}  # None: the tensor is not used
        self._done, self._before = self._resumed()
        self._stopping = self._computing = False
        self.planned = Planned(len(self._windows), request.window, windows.tokens, self._done)

    def run(self) -> Iterator[ImatrixEvent]:
        """Compute, stream how far it is, and write the file.

        Ctrl-C or SIGTERM saves what there is after the window that is being computed, and ends with
        KeyboardInterrupt; a second one ends it at once.
        """
        begin = time.monotonic()
        total, window = len(self._windows), self._request.window
        yield self.planned
        with WorkerClient("computing the importance matrix") as worker, self._signals():
            self._ask(worker, b"")
            computing = time.monotonic()
            self._computing = True
            yield ModelLoaded(computing - begin)
            saved, cost = computing, 0.0
            for ids in self._windows[self._done :]:
                self._ask(worker, pack_ids(ids))
                self._done += 1
                now = time.monotonic()
                rate = (self._done - self.planned.resumed) / (now - computing)
                yield Progress(self._done, total, rate * window, (total - self._done) / rate)
                if self._stopping:
                    break
                if self._done < total and now - saved >= max(self._request.save_every, cost / _SAVING_SHARE):
                    self._save(self._totals(worker))
                    saved = time.monotonic()
                    cost = saved - now
                    yield Saved(self._partial.path, self._done)
            totals = self._totals(worker)
            if self._done < total:
                self._save(totals)
                yield Saved(self._partial.path, self._done)
                raise KeyboardInterrupt
        if self._request.sensitivities:
            with self._signals():
                yield from self._probe(totals)
        importance = Importance(
            {name: Entry(each.sums.astype(np.float32), each.counts) for name, each in totals.items()},
            self._request.data,
            window,
            self._done,
            {name: value for name, value in self._sensitivities.items() if value is not None},
        )
        self._save(totals)  # what stands in the way of the last step loses nothing
        for other in self._added:
            importance = merged(importance, other)
        self._partial.refuse_existing_output()
        write_importance(self._request.out, importance)
        self._partial.remove()
        yield Computed(
            self._request.out,
            len(importance.entries),
            self._done,
            self._done * window,
            len(importance.sensitivities),
            time.monotonic() - begin,
            _unused(importance),
        )

    def _probe(self, totals: Mapping[str, Totals]) -> Iterator[Probing | Saved]:
        """Measure the sensitivities that are not known yet, on the beginning of the first window."""
        with Native(self._request.threads) as native:
            wanted = native.quantizable(self._header)
        tensors = [tensor for tensor in self._header.tensors if tensor.name in wanted]
        types = {tensor.type for tensor in tensors}
        names = [tensor.name for tensor in tensors]
        left = [name for name in names if name not in self._sensitivities]
        ids = self._windows[0][:_PROBED]
        config = replace(self._config, n_ctx=len(ids), n_batch=len(ids), n_ubatch=len(ids))
        begin = saved = time.monotonic()
        with WorkerClient("measuring sensitivities") as worker:
            measuring = measure_sensitivities(worker, config, ids, left, types=types)
            for done, each in enumerate(measuring, 1):
                self._sensitivities[each.tensor] = each.value
                now = time.monotonic()
                yield Probing(
                    len(names) - len(left) + done, len(names), (now - begin) / done * (len(left) - done)
                )
                if self._stopping or (now - saved >= self._request.save_every and done < len(left)):
                    self._save(totals)
                    saved = time.monotonic()
                    yield Saved(self._partial.path, self._done)
                if self._stopping:
                    raise KeyboardInterrupt

    def _resumed(self) -> tuple[int, dict[str, Totals]]:
        """How many windows an earlier run did, and what they gave. Raises UsageError."""
        done, text, totals, self._sensitivities = self._partial.read(self._identity)
        if done > len(self._windows):
            raise UsageError(
                f"{done:,} windows are done already, and there are {len(self._windows):,} now.",
                f"Ask for as many with --windows, of the same text. {self._partial.restart}",
            )
        if done and text != self._text_digest(done):
            raise self._partial.mismatch("text")
        return done, totals

    def _ask(self, worker: WorkerClient, payload: bytes, *, totals: bool = False) -> tuple[Any, bytes]:
        message = {
            "op": "activations",
            "config": asdict(self._config),
            "output_tensor": self._request.output_tensor,
            "totals": totals,
        }
        return worker.ask(message, payload)

    def _totals(self, worker: WorkerClient) -> dict[str, Totals]:
        """What all windows so far gave, with those of earlier runs."""
        reply, payload = self._ask(worker, b"", totals=True)
        result = reply["result"]
        totals = {name: Totals(each.sums.copy(), each.counts.copy()) for name, each in self._before.items()}
        start = 0
        for name, n_mat, n_cols, counts in zip(
            result["names"], result["n_mat"], result["n_cols"], result["counts"], strict=True
        ):
            sums = np.frombuffer(payload, np.float64, n_mat * n_cols, start).reshape(n_mat, n_cols)
            start += sums.nbytes
            if name in totals:
                totals[name].sums += sums
                totals[name].counts += np.array(counts, np.int64)
            else:
                totals[name] = Totals(sums, np.array(counts, np.int64))
        if not totals:
            raise ModelError(
                f"llama.cpp multiplied with no weights of {self._request.model} that m3 knows.",
                "No importance matrix can be computed for this model.",
            )
        return totals

    def _save(self, totals: Mapping[str, Totals]) -> None:
        identity = {
            **self._identity,
            "done": self._done,
            "text": self._text_digest(self._done),
            "sensitivities": self._sensitivities,
        }
        self._partial.write(identity, totals)

    def _text_digest(self, count: int) -> str:
        """Digest of the first `count` windows: a run may go on with more of them than it began with."""
        digest = hashlib.blake2b(digest_size=16)
        for ids in self._windows[:count]:
            digest.update(pack_ids(ids))
        return digest.hexdigest()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupted(*_: object) -> None:
            if self._stopping or not self._computing:
                raise KeyboardInterrupt
            self._stopping = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [(number, signal.signal(number, interrupted)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def _matrix_of(header: Header, path: Path) -> Importance:
    """Read a matrix that is to be added. Raises ModelError when it is of another model."""
    importance = read_importance(path)
    sizes = {
        tensor.name: math.prod(tensor.dims) // max(tensor.dims[1], 1)
        for tensor in header.tensors
        if tensor.dims[1:]
    }
    for name, entry in importance.entries.items():
        if name in sizes and entry.sums.size != sizes[name]:
            raise ModelError(
                f"The importance matrix {path} has {entry.sums.size:,} values for {name}, which has "
                f"{sizes[name]:,} columns.",
                "It was computed for another model: choose one for this model.",
            )
    return importance


def _engine_config(request: ImatrixRequest, shape: ModelShape) -> EngineConfig:
    window = request.window
    if not _LEAST_WINDOW <= window <= shape.context_length:
        raise UsageError(
            f"A window of {window:,} tokens cannot be taken: {request.model.name} takes {_LEAST_WINDOW} to "
            f"{shape.context_length:,}.",
            "Give --window 512, as is usual.",
        )
    return EngineConfig(
        model_path=str(request.model),
        n_ctx=window,
        n_batch=window,
        n_ubatch=-(-window // -(-window // _UBATCH)),  # equal parts: none is too small to count
        threads=request.threads,
        gpu_layers=request.gpu_layers,
        tensor_overrides=_EXPERTS_IN_RAM if request.cpu_moe else (),
    )


def _unused(importance: Importance) -> tuple[Unused, ...]:
    """The experts without a token, by layer; the matrices of an expert get the same tokens."""
    found: dict[int, Unused] = {}
    for name, entry in importance.entries.items():
        layer, _ = role_of(name)
        experts = np.flatnonzero(entry.counts == 0)
        if layer is not None and len(experts):
            found[layer] = Unused(layer, tuple(experts.tolist()), len(entry.counts))
    return tuple(found[layer] for layer in sorted(found))
