"""The effective context of a model as it was measured on this machine, for what acts on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.engine.adapters import adapter_contents
from m3cli.tasks.evaluate.store import Variant, recall

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import Attention, EngineConfig
    from m3cli.model.shape import ModelShape
    from m3cli.tasks.evaluate.trial import Group

# The group that is most like a question about a corpus first.
_TELLING: tuple[Group, ...] = ("code", "meaning", "retrieval", "coreference", "tracing", "aggregation")


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


def effective_context(state_dir: Path, variant: Variant) -> Effective | None:
    """What was measured, by the bar of the model's own score at short lengths; None if nothing tells it."""
    known = recall(state_dir, variant)
    for group in _TELLING:
        found = known.groups.get(group) if known is not None else None
        if known is None or found is None:
            continue
        try:
            length, longest = int(found["relative"]["length"]), int(found["longest"])
            modes = known.modes
            sweeps = {"sweep", "select"} <= modes.keys() and modes["sweep"]["low"] > modes["select"]["mean"]
        except (TypeError, ValueError, LookupError):
            continue
        if length > 0:
            return Effective(length, longest, group, bool(sweeps))
    return None
