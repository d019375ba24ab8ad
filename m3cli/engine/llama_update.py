"""Replace tokens in the middle of a KV cache, and keep what was computed behind them.

The keys of the tokens behind are rotated to their new positions (llama.cpp's K-shift). llama.cpp computes
only at the end of a sequence, so new tokens are computed in a second one, which shares all before them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from m3cli.engine.llama_library import LOG, lib
from m3cli.errors import EngineCrashError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from m3cli.engine.edits import Edit
    from m3cli.engine.llama import Model


def splice(model: Model, tokens: array[int], edits: Sequence[Edit]) -> Iterator[int]:
    """Make the KV cache that of `tokens`, which `edits` make of those that it holds.

    Yields the end of what was computed, batch by batch: all tokens before it are those of `tokens`. If it
    ends early, because `model.abort` was called or nobody asks on, those behind are not. Raises what
    `Model.decode` raises.
    """
    memory, helper = model.memory, model.helper
    LOG.clear()
    for edit in reversed(edits):  # so that the places of those before still are the old ones
        model.remove(edit.old_start, edit.old_end)
        moved = (edit.new_end - edit.new_start) - (edit.old_end - edit.old_start)
        if moved:
            lib.llama_memory_seq_add(memory, 0, edit.old_end, -1, moved)
    shared = 0
    try:
        for edit in edits:
            lib.llama_memory_seq_cp(memory, 0, helper, shared, edit.new_start)
            for start in range(edit.new_start, edit.new_end, model.n_batch):
                end = min(start + model.n_batch, edit.new_end)
                if not _decode(model, tokens, start, end):
                    return
                if "K-shift" in LOG:  # llama.cpp says so, and goes on
                    raise EngineCrashError(
                        "llama.cpp could not move the keys of a context that was to be updated in place.",
                        "Use --update exact.",
                    )
                for sequence in (0, model.guard):
                    if sequence is not None:
                        lib.llama_memory_seq_cp(memory, helper, sequence, start, end)
                yield end
            shared = edit.new_end
    finally:
        lib.llama_memory_seq_rm(memory, helper, -1, -1)


def _decode(model: Model, tokens: array[int], start: int, end: int) -> bool:
    count = end - start
    batch: Any = lib.llama_batch_init(count, 0, 1)
    try:
        batch.n_tokens = count
        view = (lib.llama_token * count).from_buffer(tokens, start * tokens.itemsize)
        ctypes.memmove(batch.token, view, ctypes.sizeof(view))
        for place in range(count):
            batch.pos[place] = start + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = model.helper
            batch.logits[place] = place == count - 1
        return model.compute(batch, count)
    finally:
        lib.llama_batch_free(batch)
