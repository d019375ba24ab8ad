"""Replace tokens in the middle of a KV cache, and keep what was computed behind them.

The keys of the tokens behind are rotated to their new positions (llama.cpp's K-shift). llama.cpp computes
only at the end of a sequence, so new tokens are computed in a second one, which shares all before them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from m3cli.engine.llama_library import lib

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from m3cli.engine.edits import Edit
    from m3cli.engine.llama import Model

_SEQUENCE, _HELPER = 0, 1


def splice(model: Model, tokens: array[int], edits: Sequence[Edit]) -> Iterator[int]:
    """Make the KV cache that of `tokens`, which `edits` make of those that it holds.

    Yields how many tokens were computed so far. If it ends before all edits are done, because `model.abort`
    was called or nobody asks on, the KV cache is neither the old nor the new one. Raises what
    `Model.decode` raises.
    """
    memory = model.memory
    for edit in reversed(edits):  # so that the places of those before still are the old ones
        lib.llama_memory_seq_rm(memory, _SEQUENCE, edit.old_start, edit.old_end)
        moved = (edit.new_end - edit.new_start) - (edit.old_end - edit.old_start)
        if moved:
            lib.llama_memory_seq_add(memory, _SEQUENCE, edit.old_end, -1, moved)
    computed = shared = 0
    try:
        for edit in edits:
            lib.llama_memory_seq_cp(memory, _SEQUENCE, _HELPER, shared, edit.new_start)
            for start in range(edit.new_start, edit.new_end, model.n_batch):
                end = min(start + model.n_batch, edit.new_end)
                if not _decode(model, tokens, start, end):
                    return
                # At once, as in one sequence alone they may have to give way to others; see Model.
                lib.llama_memory_seq_cp(memory, _HELPER, _SEQUENCE, start, end)
                computed += end - start
                yield computed
            shared = edit.new_end
    finally:
        lib.llama_memory_seq_rm(memory, _HELPER, -1, -1)


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
            batch.seq_id[place][0] = _HELPER
            batch.logits[place] = place == count - 1
        return model.compute(batch, count)
    finally:
        lib.llama_batch_free(batch)
