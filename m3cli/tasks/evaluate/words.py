"""Common English words, and names made of them that stand in no text yet."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


@cache
def words(kind: str) -> tuple[str, ...]:
    """The `adjectives`, `nouns` or `verbs`: single words in lower case, sorted."""
    file = resources.files("m3cli.tasks.evaluate") / "words" / f"{kind}.txt"
    return tuple(file.read_text(encoding="ascii").split())


def pair(rng: random.Random) -> str:
    """An adjective and a noun, as RULER joins them: `quiet-river`."""
    return f"{rng.choice(words('adjectives'))}-{rng.choice(words('nouns'))}"


def number(rng: random.Random) -> str:
    """Seven digits, the first of them not 0."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    from uuid import UUID

    return str(UUID(int=rng.getrandbits(128), version=4))


class Names:
    """Hands out names, none of them twice, and none that is in `text`."""

    def __init__(self, rng: random.Random, text: str = "") -> None:
        self._rng = rng
        self._text = text
        self._given: set[str] = set()

    def new(self, make: Callable[[random.Random], str]) -> str:
        """What `make` makes of the random numbers, made again until it is new."""
        while (name := make(self._rng)) in self._given or name in self._text:
            pass
        self._given.add(name)
        return name
