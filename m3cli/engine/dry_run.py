"""Ask llama.cpp what a configuration would take of which memory, without taking it.

The parent's side of m3cli.engine.llama_dry_run: a worker loads the metadata of a model once and then
measures as many contexts as it is asked to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from m3cli.engine.process import WorkerClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.engine.events import EngineConfig


@dataclass(frozen=True, slots=True)
class Cache:
    """What a model remembers, as llama.cpp logs it: `name` is `main` or `indexer`, or `kv cache` if alone.

    `parts` are letter, type and bytes: `("K", "q8_0", …)`. The log has two decimals of a MiB, so the
    bytes may be wrong by 5,243.
    """

    name: str
    cells: int
    layers: int
    parts: tuple[tuple[str, str, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(nbytes for _, _, nbytes in self.parts)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a configuration takes, by the name of llama.cpp's buffer type, such as `CPU` or `CUDA0`.

    `memory` is the KV cache and what else is remembered, of which `caches` are the parts. `output` holds the
    logits; its bytes, as those of `caches`, come from a log with two decimals of a MiB, all others are
    exact. `devices` names the device of each buffer type that is not in main memory. If not `placed`, this
    build of llama.cpp does not say where weights and memory go: their sums stand under an empty name.
    """

    weights: dict[str, int]
    memory: dict[str, int]
    compute: dict[str, int]
    output: dict[str, int]
    devices: dict[str, str]
    caches: tuple[Cache, ...]
    placed: bool

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(sum(each.values()) for each in (self.weights, self.memory, self.compute, self.output))


class DryRun(WorkerClient):
    """Measures configurations of the model at `model_path` in a worker, which `close` ends.

    `extra_buffers` as in m3cli.engine.llama.Model: whether weights may be repacked for this CPU.
    """

    def __init__(
        self,
        model_path: str,
        *,
        extra_buffers: bool = True,
        worker_command: Sequence[str] | None = None,
    ) -> None:
        super().__init__("measuring what the model needs", worker_command)
        self._model_path = model_path
        self._extra_buffers = extra_buffers

    def need(self, config: EngineConfig) -> Need:
        """Measure `config`, whatever its `model_path`.

        Adapters are not counted: they take the bytes of their files, and hardly change anything else.
        Placements other than those of the last call load the metadata again. Raises ModelError when the
        file cannot be loaded, MachineError when such a context cannot be made, UsageError for a buffer
        type that this build does not have, EngineCrashError when the worker dies.
        """
        config = replace(config, model_path=self._model_path)
        message = {"op": "dry_run", "config": asdict(config), "extra_buffers": self._extra_buffers}
        result = self.ask(message)[0]["result"]
        caches = tuple(
            Cache(
                cache["name"],
                cache["cells"],
                cache["layers"],
                tuple((part["name"], part["type"], part["nbytes"]) for part in cache["parts"]),
            )
            for cache in result.pop("caches")
        )
        return Need(**result, caches=caches)
