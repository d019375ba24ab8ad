"""What a configuration would take of which memory, by llama.cpp's own account and without taking it.

With `no_alloc`, llama.cpp reads the metadata of a model, decides where each tensor would go, and makes
contexts whose buffers are measured and not allocated. Adapters are left out, because llama.cpp has no such
way for them. Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from m3cli.engine.devices import buffer_type_name, device_of
from m3cli.engine.llama import load, make_context
from m3cli.engine.llama_library import lib, logged
from m3cli.engine.placement import model_params

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from m3cli.engine.events import EngineConfig

_MIB = 1 << 20

# The account is a C++ function and returns a std::map, of which ctypes knows nothing. A function that takes
# a std::vector tells by its name whether the map is that of libstdc++, whose nodes are laid out as below.
_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_LIBSTDCXX = "_Z14llama_prefetchSt6vectorI18llama_memory_rangeSaIS0_EE"

# Lines of llama.cpp's log; sizes are in MiB with two decimals.
_CREATING = re.compile(r"creating\s+(\S.*?) KV cache, size")
_CACHE = re.compile(
    r"size =\s*[\d.]+ MiB \(\s*(?P<cells>\d+) cells,\s*(?P<layers>\d+) layers.*?\), (?P<parts>.*)"
)
_PART = re.compile(r"(?P<name>\w) \((?P<type>\w+)\):\s*(?P<size>[\d.]+) MiB")
_BUFFER = re.compile(r"(\S+)\s+(compute|output) buffer size =\s*([\d.]+) MiB")


class _Node(ctypes.Structure):
    """A node of libstdc++'s `std::map<ggml_backend_buffer_type_t, llama_memory_breakdown_data>`."""

    _fields_ = (
        ("color", ctypes.c_size_t),
        ("parent", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("buffer_type", ctypes.c_void_p),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    )


class _Map(ctypes.Structure):
    """The map itself: its header's parent is the root of the tree."""

    _fields_ = (
        ("compare", ctypes.c_size_t),
        ("color", ctypes.c_size_t),
        ("root", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


def breakdown(context: Any) -> list[dict[str, Any]] | None:
    """Bytes of `model`, `context` and `compute` in each buffer type of a context, made by a dry run or not.

    `name` is the buffer type's, `device` that of its device, empty for main memory. `context` is the KV
    cache and what else a model remembers. None if this build of llama.cpp cannot be asked.
    """
    function = getattr(lib._lib, _BREAKDOWN, None)
    if function is None or not hasattr(lib._lib, _LIBSTDCXX):
        return None
    function.restype, function.argtypes = _Map, [ctypes.c_void_p]
    tree = function(context)  # its nodes, 64 bytes a buffer type, are never freed
    nodes = list(_walk(tree.root))
    if len(nodes) != tree.count:
        return None
    return [
        {
            "name": buffer_type_name(node.buffer_type),
            "device": device_of(node.buffer_type),
            "model": node.model,
            "context": node.context,
            "compute": node.compute,
        }
        for node in nodes
    ]


def _walk(address: int | None) -> Iterator[_Node]:
    if address:
        node = _Node.from_address(address)
        yield from _walk(node.left)
        yield node
        yield from _walk(node.right)


class DryModel:
    """A model of which only the metadata are loaded."""

    def __init__(self, config: EngineConfig, *, extra_buffers: bool = True) -> None:
        params = model_params(config, extra_buffers)
        params.no_alloc = True
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # a mapped file cannot be left unread
        self._model = load(config.model_path, params)

    def need(self, config: EngineConfig) -> dict[str, Any]:
        """Measure a context of `config`; the fields of m3cli.engine.dry_run.Need. Raises MachineError."""
        with logged() as lines:
            context = make_context(self._model, config)
            try:
                rows = breakdown(context)
            finally:
                lib.llama_free(context)
        caches, compute, output = _read_log(lines)
        placed = rows is not None
        if rows is None:
            memory = sum(part["nbytes"] for cache in caches for part in cache["parts"])
            rows = [
                {
                    "name": "",
                    "device": "",
                    "model": int(lib.llama_model_size(self._model)),
                    "context": memory,
                    "compute": 0,
                }
            ]
            rows += [
                {"name": name, "device": "", "model": 0, "context": 0, "compute": nbytes}
                for name, nbytes in compute.items()
            ]
        return {
            "placed": placed,
            "weights": _column(rows, "model"),
            "memory": _column(rows, "context"),
            "compute": _column(rows, "compute"),
            "output": output,
            "devices": {row["name"]: row["device"] for row in rows if row["device"]},
            "caches": caches,
        }

    def close(self) -> None:
        """Free the metadata; may be called twice."""
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


def _column(rows: Iterable[dict[str, Any]], key: str) -> dict[str, int]:
    return {row["name"]: row[key] for row in rows if row[key]}


def _read_log(lines: Iterable[str]) -> tuple[list[dict[str, Any]], Counter[str], Counter[str]]:
    """Caches, and bytes of compute and of output buffers, from what was logged when a context was made."""
    caches = []
    sizes: dict[str, Counter[str]] = {"compute": Counter(), "output": Counter()}
    name = ""
    for line in lines:
        if match := _CREATING.search(line):
            name = match[1]
        elif match := _CACHE.search(line):
            parts = [
                {"name": part["name"], "type": part["type"], "nbytes": _bytes(part["size"])}
                for part in _PART.finditer(match["parts"])
            ]
            caches.append(
                {
                    "name": name or line.partition(":")[0].removeprefix("llama_").replace("_", " "),
                    "cells": int(match["cells"]),
                    "layers": int(match["layers"]),
                    "parts": parts,
                }
            )
            name = ""
        elif match := _BUFFER.search(line):
            sizes[match[2]][match[1]] += _bytes(match[3])
    return caches, sizes["compute"], sizes["output"]


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * _MIB)
