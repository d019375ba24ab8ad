"""The parent's side of what llama.cpp does for quantization, in a worker process."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m3cli.engine.process import WorkerClient, WorkerDiedError, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from m3cli.engine.worker import Message
    from m3cli.model.header import Header, Tensor

_AHEAD = 2  # requests that a worker has while its answer to an earlier one is written


class Rows(NamedTuple):
    """Rows of one matrix of a tensor, to be quantized `to` a type: the unit of work.

    `importance` is that of the columns, float32, or None.
    """

    path: Path
    tensor: str
    offset: int
    type: str
    to: str
    rows: int
    columns: int
    importance: NDArray[np.float32] | None


class Native(WorkerClient):
    """Asks llama.cpp's quantizer. `threads` 0 takes all cores. A context manager: the worker ends with it."""

    def __init__(self, threads: int = 0) -> None:
        super().__init__("quantizing", None)
        self._threads = threads

    def types(self, header: Header, file_type: int, *, importance: bool) -> dict[str, str]:
        """Type of each tensor in llama.cpp's own mixture number `file_type`.

        `importance` says whether there is an importance matrix, which changes some choices. Raises
        ModelError.
        """
        chosen = self._chosen(header.path, file_type, importance=importance, pure=False)
        return {tensor.name: chosen.get(tensor.name) or tensor.type for tensor in header.tensors}

    def quantizable(self, header: Header) -> frozenset[str]:
        """Names of the tensors that llama.cpp's quantizer does not leave as they are. Raises ModelError."""
        # A tensor that is of the wanted type already looks as one that stays: so ask for two types.
        found: set[str] = set()
        for file_type in (7, 2):  # Q8_0 and Q4_0, to which rows of any model can fall back
            chosen = self._chosen(header.path, file_type, importance=False, pure=True)
            found.update(name for name, kind in chosen.items() if kind)
        return frozenset(found)

    def _chosen(self, path: Path, file_type: int, *, importance: bool, pure: bool) -> dict[str, str | None]:
        message = {
            "op": "quantized_types",
            "path": str(path),
            "file_type": file_type,
            "importance": importance,
            "pure": pure,
        }
        result: dict[str, str | None] = self.ask(message)[0]["result"]
        return result

    def errors(
        self,
        tensor: Tensor,
        path: Path,
        pieces: Sequence[tuple[int, int, int]],
        candidates: Sequence[str],
        importance: NDArray[np.float32] | None,
    ) -> tuple[float, dict[str, float]]:
        """Energy of a sample of weights, and the error that each of the candidates makes in it.

        The error of a type that cannot hold such weights is infinite. `pieces` are (offset in the file,
        rows, row of `importance`), which is [matrices, columns]. Energy and error are sums over weights,
        times the importance of their column if there is one.
        """
        message = {
            "op": "row_errors",
            "path": str(path),
            "tensor": tensor.name,
            "type": tensor.type,
            "columns": tensor.dims[0],
            "pieces": pieces,
            "to": candidates,
            "threads": self._threads,
        }
        result = self.ask(message, b"" if importance is None else importance.tobytes())[0]["result"]
        return result["energy"], dict(zip(candidates, result["errors"], strict=True))


def quantize_all(work: Iterable[Rows], threads: int = 0) -> Generator[bytes, None, None]:
    """Quantize each of `work` in order, in a worker that is always a little ahead.

    Raises ModelError for weights that cannot be quantized, EngineCrashError when the worker dies.
    """
    waiting: deque[Rows] = deque()
    worker = WorkerProcess()
    try:
        for rows in work:
            worker.send(*_request(rows, threads))
            waiting.append(rows)
            if len(waiting) > _AHEAD:
                yield worker.receive()[1]
                waiting.popleft()
        while waiting:
            yield worker.receive()[1]
            waiting.popleft()
    except WorkerDiedError as death:
        raise death.crash(f"quantizing {waiting[0].tensor}" if waiting else "quantizing") from None
    finally:
        worker.kill()


def _request(rows: Rows, threads: int) -> tuple[Message, bytes]:
    message = {"op": "quantize_rows", "threads": threads, **rows._asdict(), "path": str(rows.path)}
    importance = message.pop("importance")
    return message, b"" if importance is None else np.ascontiguousarray(importance, np.float32).tobytes()
