"""A thread-safe cache that forgets what was used least recently, or what is too old."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass
class CacheInfo:
    """Counters since the cache was made or cleared."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class LRUCache:
    """Holds up to `capacity` values, each for at most `ttl` seconds."""

    def __init__(
        self, capacity: int, ttl: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self.capacity = capacity
        self.ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[Hashable, tuple[float, Any]] = OrderedDict()
        self._lock = threading.RLock()
        self.info = CacheInfo()

    def __len__(self) -> int:
        return len(self._entries)

    def _expired(self, stored_at: float) -> bool:
        return self.ttl is not None and self._clock() - stored_at >= self.ttl

    def get(self, key: Hashable, default: Any = None) -> Any:
        """The value stored under `key`, which becomes the most recently used one."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.info.misses += 1
                return default
            stored_at, value = entry
            if self._expired(stored_at):
                del self._entries[key]
                self.info.misses += 1
                return default
            self._entries.move_to_end(key)
            self.info.hits += 1
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Store `value`; the least recently used entry goes if there is no room."""
        with self._lock:
            self._entries[key] = (self._clock(), value)
            self._entries.move_to_end(key)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
                self.info.evictions += 1

    def get_or_compute(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The stored value, or what `compute` returns; it runs once per key even with many threads."""
        with self._lock:
            value = self.get(key, _MISSING)
            if value is _MISSING:
                value = compute()
                self.put(key, value)
            return value

    def purge(self) -> int:
        """Drop all expired entries; return how many there were."""
        with self._lock:
            stale = [key for key, (stored_at, _) in self._entries.items() if self._expired(stored_at)]
            for key in stale:
                del self._entries[key]
            return len(stale)

    def clear(self) -> None:
        """Drop everything and start counting anew."""
        with self._lock:
            self._entries.clear()
            self.info = CacheInfo()
