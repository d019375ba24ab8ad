"""Which device gets which weights: llama.cpp's parameters for loading a model.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from m3cli.engine.devices import buffer_types
from m3cli.engine.llama_library import lib
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.engine.events import EngineConfig


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override` of llama.h, which the bindings leave out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def model_params(config: EngineConfig, extra_buffers: bool) -> Any:
    """Make `llama_model_params` for `config`. Raises UsageError for what this build does not have.

    `extra_buffers` lets llama.cpp repack weights for this CPU.
    """
    params = lib.llama_model_default_params()
    params.n_gpu_layers = config.gpu_layers  # negative: all of them
    params.use_extra_bufts = extra_buffers
    params.no_host = config.no_host
    if config.main_gpu >= 0:
        params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
        params.main_gpu = config.main_gpu
    if config.tensor_split:
        params.tensor_split = _tensor_split(config.tensor_split)
    if config.tensor_overrides:
        overrides = _overrides(config.tensor_overrides)
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        params.overrides = overrides  # an address does not keep what it points at
    if not config.mmap:
        params.load_mode = lib.LLAMA_LOAD_MODE_MLOCK if config.mlock else lib.LLAMA_LOAD_MODE_NONE
    elif config.mlock:
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP_MLOCK
    return params


def _tensor_split(shares: Sequence[float]) -> Any:
    most = int(lib.llama_max_devices())
    if len(shares) > most:
        raise UsageError(
            f"The weights were to be split over {len(shares)} devices, and this build of llama.cpp takes "
            f"{most} at most.",
            "Name one share for each GPU.",
        )
    return (ctypes.c_float * most)(*shares)  # the rest is 0


def _overrides(pairs: Sequence[tuple[str, str]]) -> Any:
    known = buffer_types()
    overrides = (_Override * (len(pairs) + 1))()  # the last, empty one ends the list
    for override, (pattern, name) in zip(overrides, pairs, strict=False):
        if name not in known:
            raise UsageError(
                f"This build of llama.cpp has no buffer type {name} for the tensors that match {pattern}.",
                f"It has these: {', '.join(sorted(known))}.",
            )
        override.pattern = pattern.encode()
        override.buffer_type = known[name]
    return overrides
