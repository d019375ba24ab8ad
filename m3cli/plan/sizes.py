"""The buffers of any configuration: asked where they have to be right, else reckoned from what was asked.

Asking llama.cpp takes a tenth of a second for a large context, and a plan looks at dozens of configurations.
The KV cache grows with the context and the types alone, and the compute buffer is linear in the ubatch and
in the context, with little difference between types. Over MiniMax-M3, SmolLM2 and Gemma 3 what is reckoned
of long contexts differs by at most 7 % of the compute buffer (25 % of short ones, where it is small), so a
plan is made with it and then asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from m3cli.plan.memory import Buffers, filling_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3cli.model.shape import ModelShape
    from m3cli.plan.planner import Configuration, KVType

LEAST_UBATCH, MOST_UBATCH = 64, 2048

_Family = tuple[str, str, int]  # types of keys and values, and ubatch


class Sizes:
    """Buffers of a model's configurations, of contexts that are full; `ask` says what an empty one takes."""

    def __init__(self, shape: ModelShape, ask: Callable[[Configuration], Buffers]) -> None:
        self._shape = shape
        self._ask = ask
        self._known: dict[_Family, dict[int, Buffers]] = {}
        # By context, the types of keys and values that others are reckoned from.
        self._bases: dict[int, tuple[KVType, KVType]] = {}

    def exact(self, configuration: Configuration) -> Buffers:
        """What llama.cpp says."""
        known = self._known.setdefault(_family(configuration), {})
        n_ctx, n_ubatch = configuration.n_ctx, configuration.n_ubatch
        if n_ctx not in known:
            empty = self._ask(configuration)
            growth = filling_bytes(self._shape, n_ctx, n_ubatch)
            known[n_ctx] = replace(empty, compute=empty.compute + growth)
        return known[n_ctx]

    def is_known(self, configuration: Configuration) -> bool:
        """Whether `reckoned` is what llama.cpp says."""
        return configuration.n_ctx in self._known.get(_family(configuration), {})

    def reckoned(self, configuration: Configuration) -> Buffers:
        """Nearly what llama.cpp would say; asked only where nothing is known that is near."""
        if self.is_known(configuration):
            return self.exact(configuration)
        return self._between_contexts(configuration) or self._from_base(configuration)

    def _between_contexts(self, configuration: Configuration) -> Buffers | None:
        known = self._known.get(_family(configuration), {})
        below = max((n_ctx for n_ctx in known if n_ctx < configuration.n_ctx), default=None)
        above = min((n_ctx for n_ctx in known if n_ctx > configuration.n_ctx), default=None)
        if below is None or above is None:
            return None
        return _between(known[below], known[above], (configuration.n_ctx - below) / (above - below))

    def _from_base(self, configuration: Configuration) -> Buffers:
        n_ctx, n_ubatch = configuration.n_ctx, configuration.n_ubatch
        types = configuration.type_k, configuration.type_v
        base = self._bases.setdefault(n_ctx, types)
        if not LEAST_UBATCH <= n_ubatch <= MOST_UBATCH or n_ctx <= LEAST_UBATCH:
            return self.exact(configuration)
        like_base = replace(configuration, type_k=base[0], type_v=base[1])
        small = self.exact(replace(like_base, n_ubatch=LEAST_UBATCH))
        large = self.exact(replace(like_base, n_ubatch=MOST_UBATCH))
        # (no more tokens are computed at a time than the context has)
        share = (min(n_ubatch, n_ctx) - LEAST_UBATCH) / (min(MOST_UBATCH, n_ctx) - LEAST_UBATCH)
        buffers = _between(small, large, share)
        a_token = self._shape.kv_bytes_per_token(*base)
        if types != base and a_token:
            buffers = replace(buffers, kv=buffers.kv * self._shape.kv_bytes_per_token(*types) // a_token)
        return buffers


def _family(configuration: Configuration) -> _Family:
    return configuration.type_k, configuration.type_v, configuration.n_ubatch


def _between(low: Buffers, high: Buffers, share: float) -> Buffers:
    return Buffers(
        round(low.kv + (high.kv - low.kv) * share),
        round(low.compute + (high.compute - low.compute) * share),
        low.repacked,
    )
