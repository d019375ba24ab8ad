"""One model and what its KV cache holds: answers prompts with as little prefill as possible.

Prefill goes in batches, and the numbers that a batch gives depend in their last digits on its size. So
batches end at fixed places: at multiples of the batch size, and where the shared prefix of a prompt
ends. What is reused ends at one of these too. Then a restored run computes what a cold one would
have, bit for bit, and a greedy answer is the same.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import time
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine.adapters import adapter_contents
from m3cli.engine.events import (
    Finished,
    Loaded,
    Notice,
    NotSaved,
    Prefilled,
    Restored,
    Saved,
    Stopped,
    Token,
)
from m3cli.engine.snapshots import SnapshotError, SnapshotStore, common_prefix
from m3cli.errors import DoesNotFitError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.engine.events import CacheConfig, EngineConfig, Event, Request
    from m3cli.engine.llama import Model
    from m3cli.engine.snapshots import Entry, Match

# The first batch is small: if llama.cpp crashes on this CPU, it does so at once.
_FIRST_BATCH = 32
_WORTH_SAVING = 256  # tokens beyond what is saved already
_WRITING = 1e9  # bytes a second; a cache that is computed again sooner than written is not saved
# Settings that change neither the numbers in a KV cache nor their order; adapters do, by their content.
_IRRELEVANT = {"model_path", "n_ctx", "threads", "allow_dense", "mmap", "mlock", "lora"}


class Session:
    """Answers requests on one model, one after the other.

    As soon as `stopping` says so, the run that is under way ends, with what it has computed saved if there
    is a cache. `key` is that of `snapshot_key`.
    """

    def __init__(
        self,
        model: Model,
        cache: CacheConfig | None = None,
        key: str = "",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._cache = cache
        self._stopping = stopping
        self._notices: list[str] = []
        self._store = (
            SnapshotStore(Path(cache.directory), key, max_bytes=cache.max_bytes, report=self._notices.append)
            if cache
            else None
        )
        model.truncate(0)
        self._held = array("i")  # tokens whose keys and values are in the KV cache
        self._exact = 0  # how many of them are as a run without reuse would have them
        self._cuts: set[int] = set()  # where batches of these ended, beside multiples of the batch size
        self._saved = 0  # how many of them are on the disk

    def generate(self, request: Request) -> Iterator[Event]:
        """Continue the prompt; see m3cli.engine.events for the order of events.

        The token that ends the generation is streamed and counted too; its text is empty or what
        was left of a broken character. Generation also ends, as `length`, when the context is full.
        Raises DoesNotFitError when the prompt is longer than the context, UsageError when it is
        empty, ModelError when it holds ids that the vocabulary does not have.
        """
        yield Loaded(
            self._model.load_seconds, self._model.n_ctx, self._model.description, self._model.attention
        )
        self._model.load_seconds = 0.0  # the next request finds it loaded

        # 1. Refuse what cannot work, before hours of prefill.
        tokens = array("i", request.tokens)
        self._check(tokens)

        # 2. Keep or fetch what is computed already.
        yield from self._reuse(tokens, request)
        restored = len(self._held)

        # 3. Compute the rest of the prompt.
        begin = time.monotonic()
        yield Prefilled(restored, len(tokens), 0.0)
        yield from self._prefill(tokens, request, begin)
        prefill_seconds = time.monotonic() - begin
        if self._stopping():
            yield from self._stopped(request)
            return

        # 4. Decode, one token at a time. The last one is sampled but needs no place in the cache.
        begin = time.monotonic()
        reason: Any = "length"
        generated = 0
        for token in self._decode(tokens, request):
            generated += 1
            yield token
            if self._model.ends(token.id):
                reason = "stop"
        if self._stopping():
            yield Stopped(len(tokens), self._saved)
            return
        yield Finished(reason, len(tokens), generated, prefill_seconds, time.monotonic() - begin, restored)

    def _check(self, tokens: array[int]) -> None:
        if not tokens:
            raise UsageError("The prompt is empty.", "Give a question or files that hold text.")
        if len(tokens) > self._model.n_ctx:
            raise DoesNotFitError(
                f"The prompt has {len(tokens):,} tokens, but the context holds {self._model.n_ctx:,}.",
                "Ask for a larger context or give fewer files.",
            )
        if min(tokens) < 0 or max(tokens) >= self._model.n_vocab:
            raise ModelError(
                f"The prompt holds token ids beyond the {self._model.n_vocab:,} of the model's vocabulary.",
                "The prompt was made with the tokenizer of another model; use the model's own.",
            )

    def _reuse(self, tokens: array[int], request: Request) -> Iterator[Event]:
        """Cut the KV cache back to what it shares with `tokens`, or load more than that from the disk."""
        begin = time.monotonic()
        common = common_prefix(_ids(self._held), _ids(tokens))
        if request.exact:
            common = min(common, self._exact)
        held = self._usable(common, len(self._held), self._cuts, tokens, request)
        for match in self._matches(tokens):
            usable = self._usable(match.common, match.entry.manifest.tokens, None, tokens, request)
            if usable > held and self._load(match.entry, tokens, usable, usable - held):
                yield from self._told()
                yield Restored(usable, time.monotonic() - begin, "disk")
                return
        held = min(held, len(self._held))  # a load that failed emptied it
        if held < len(self._held) and not self._model.truncate(held):
            held = 0
        self._hold(tokens, held)
        yield from self._told()
        if held:
            yield Restored(held, time.monotonic() - begin, "memory")

    def _matches(self, tokens: array[int]) -> list[Match]:
        return self._store.find(tokens) if self._store else []

    def _load(self, entry: Entry, tokens: array[int], usable: int, gained: int) -> bool:
        """Load an entry that begins with `usable` of `tokens`, if that pays; a bad one is removed."""
        store, begin = self._store, time.monotonic()
        if store is None or not store.pays(entry, gained):
            return False
        try:
            entry.check()
        except SnapshotError as error:
            store.discard(entry, str(error))
            return False
        loaded = self._model.load_state(entry.state_file, entry.manifest.tokens)
        if not loaded or (usable < entry.manifest.tokens and not self._model.truncate(usable)):
            self._model.truncate(0)
            self._hold(tokens, 0)
            store.discard(entry, "llama.cpp does not accept it")
            return False
        self._held, self._cuts = tokens[:usable], {usable}
        self._exact = self._saved = usable
        entry.touch()
        store.note_load(entry.nbytes, time.monotonic() - begin)
        return True

    def _usable(
        self, common: int, size: int, cuts: set[int] | None, tokens: array[int], request: Request
    ) -> int:
        """How many of `common` shared tokens, out of `size` in a KV cache, can be kept.

        `cuts` is where its batches ended, None for an entry on the disk: at its own end.
        """
        most = min(common, len(tokens) - (1 if request.max_tokens else 0))  # the last one gives the logits
        if not self._model.can_truncate:
            ends = size == request.prefix or size % self._model.n_batch == 0
            return size if size <= most and (ends or not request.exact) else 0
        if not request.exact:
            return most
        if request.prefix <= most and request.prefix in ({size} if cuts is None else cuts):
            return request.prefix
        return most - most % self._model.n_batch

    def _hold(self, tokens: array[int], count: int) -> None:
        """Note that the KV cache holds the first `count` of `tokens` and nothing else."""
        self._held = tokens[:count]
        self._exact = min(self._exact, count)
        self._cuts = {cut for cut in self._cuts if cut <= count}
        self._saved = min(self._saved, count)

    def _prefill(self, tokens: array[int], request: Request, begin: float) -> Iterator[Event]:
        first, last_save = len(self._held), begin
        exact = self._exact == first
        while len(self._held) < len(tokens) and not self._stopping():
            done = len(self._held)
            end = self._next_cut(done, len(tokens), request.prefix)
            if not self._model.decode(tokens, done, end - done):
                if not self._model.truncate(done):
                    self._hold(tokens, 0)
                return
            self._held = tokens[:end]
            self._cuts.add(end)
            self._exact = end if exact else self._exact
            now = time.monotonic()
            yield Prefilled(end, len(tokens), now - begin)
            due = self._cache is not None and now - last_save >= self._cache.checkpoint_seconds
            shared = request.save and end == request.prefix
            if shared or (due and end % self._model.n_batch == 0):
                yield from self._save(request, (end - first) / max(now - begin, 1e-9))
                last_save = time.monotonic()

    def _next_cut(self, done: int, total: int, prefix: int) -> int:
        """Where the batch that begins at `done` ends."""
        size = self._model.n_batch
        cuts = [(done // size + 1) * size, min(_FIRST_BATCH, size), prefix, total]
        return min(cut for cut in cuts if cut > done)

    def _decode(self, tokens: array[int], request: Request) -> Iterator[Token]:
        limit = min(request.max_tokens, self._model.n_ctx - len(tokens) + 1)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        sampler = self._model.sampler(request.sampling, request.schema)
        try:
            for number in range(1, limit + 1):
                token = sampler.sample()
                if self._model.ends(token):
                    yield Token(token, text.decode(b"", final=True))
                    return
                yield Token(token, text.decode(self._model.piece(token), final=number == limit))
                if number < limit:
                    if self._stopping() or not self._model.decode(array("i", [token]), 0, 1):
                        return
                    self._held.append(token)
        finally:
            sampler.close()

    def _stopped(self, request: Request) -> Iterator[Event]:
        yield from self._save(request, 0.0)
        yield Stopped(len(self._held), self._saved)

    def _save(self, request: Request, tokens_per_second: float) -> Iterator[Event]:
        """Save what the KV cache holds; a failure costs a notice and nothing else."""
        count = len(self._held)
        if self._store is None or self._cache is None or count - self._saved < _WORTH_SAVING:
            return
        if self._exact < count:  # another process could not compute the same
            return
        begin, nbytes = time.monotonic(), self._model.state_bytes()
        if tokens_per_second and (count - self._saved) / tokens_per_second < nbytes / _WRITING:
            return
        try:
            entry = self._store.save(
                self._held,
                nbytes,
                lambda path: self._model.save_state(path, self._held),
                label=request.label,
                model=self._cache.model_name,
                tokens_per_second=tokens_per_second,
            )
        except SnapshotError as error:
            self._store = None  # it would fail again
            yield NotSaved(f"The context is not saved for later: {error}.")
            return
        yield from self._told()
        if entry is not None:
            self._saved = count
            yield Saved(count, entry.nbytes, time.monotonic() - begin)

    def _told(self) -> Iterator[Notice]:
        """What the store had to report."""
        while self._notices:
            yield Notice(self._notices.pop(0))


def snapshot_key(config: EngineConfig, cache: CacheConfig, build: str, attention: str) -> str:
    """What two runs have to share so that the KV cache of one serves the other.

    The model's content and that of its adapters, the build of llama.cpp, the types and the attention of the
    cache, batch sizes and placement, which decide the last digits. Raises ModelError when an adapter cannot
    be read.
    """
    parts = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
    parts |= {"model": cache.model_digest, "build": build, "attention": attention}
    adapters = adapter_contents(config.lora)
    if adapters:
        parts["lora"] = adapters
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _ids(tokens: array[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32)
