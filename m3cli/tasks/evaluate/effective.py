"""The effective context of a model as it was measured on this machine, for what acts on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.engine.adapters import adapter_contents
from m3cli.tasks.evaluate.results import RELATIVE_BAR, bar_of
from m3cli.tasks.evaluate.store import Variant, recall

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import Attention, EngineConfig, KVType
    from m3cli.model.shape import ModelShape
    from m3cli.tasks.evaluate.trial import Group

# The group that is most like a question about a corpus first.
_TELLING: tuple[Group, ...] = ("code", "meaning", "retrieval", "coreference", "tracing", "aggregation")
_SMALLER: tuple[KVType, ...] = ("q8_0", "q4_0")  # what the planner falls back to


@dataclass(frozen=True, slots=True)
class Effective:
    """`length` tokens of context are used well, up to `longest` were measured, on questions of `group`.

    Both are the same where no length that was measured is too long. `sweeps` says that reading all of a
    corpus in windows was found better than selecting from it.
    """

    length: int
    longest: int
    group: Group
    sweeps: bool


def variant_of(digest: str, shape: ModelShape, config: EngineConfig) -> Variant:
    """Under what results of a model with this digest are kept. Raises ModelError for an unreadable adapter.

    The attention is the one that is expected, which is known before the model is loaded.
    """
    attention: Attention = "full"
    if shape.indexer is not None:
        attention = "sparse" if config.flash_attention else "dense"
    if config.lora:
        adapters = json.dumps(adapter_contents(config.lora)).encode()
        digest += f"-{hashlib.blake2b(adapters, digest_size=8).hexdigest()}"
    return Variant(digest, config.kv_type_k, config.kv_type_v, attention)


def variants_of(digest: str, shape: ModelShape, config: EngineConfig, *, named: bool) -> list[Variant]:
    """The variants that a run by `config` may turn out to be, the likeliest first.

    Unless the type of the KV cache is `named` by the user, m3 may choose a smaller one.
    """
    found = [variant_of(digest, shape, config)]
    if not named:
        found += [replace(found[0], type_k=kv_type, type_v=kv_type) for kv_type in _SMALLER]
    if config.allow_dense and shape.indexer is not None:
        found += [replace(variant, attention="dense") for variant in found]
    return found


def effective_context(state_dir: Path, variant: Variant) -> Effective | None:
    """What was measured, by the bar of the model's own score at short lengths; None if nothing tells it.

    Nothing is told by a group of which the model answers nothing, or too few questions for an interval that
    clears the bar even at the shortest length.
    """
    known = recall(state_dir, variant)
    for group in _TELLING:
        scores = known.scores.get(group)
        if not scores:
            continue
        bar = bar_of(scores, RELATIVE_BAR * next(iter(scores.values())).mean)
        if bar.length > 0:
            gain = known.gains.get("sweep")
            return Effective(bar.length, max(scores), group, gain is not None and gain.low > 0)
    return None
