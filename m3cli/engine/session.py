"""One model and what its KV cache holds: answers prompts with as little prefill as possible.

Prefill goes in batches, and the numbers that a batch gives depend in their last digits on its size. So
batches end at fixed places: at multiples of the batch size, and where the shared prefix of a prompt
ends. What is reused ends at one of these too. Then a restored run computes what a cold one would
have, bit for bit, and a greedy answer is the same.

A context that was updated in place is not what a cold run would have computed. It is kept apart from the
others on the disk, and serves only requests that ask for it.
"""

from __future__ import annotations

import codecs
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.engine import inplace
from m3cli.engine.edits import changed_of, common_prefix, runs_of, staleness
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
    Updated,
)
from m3cli.engine.llama_update import splice
from m3cli.engine.snapshots import SnapshotError, SnapshotStore
from m3cli.errors import DoesNotFitError, ImpossibleError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator

    from numpy.typing import NDArray

    from m3cli.engine.events import CacheConfig, Event, Request
    from m3cli.engine.llama import Model
    from m3cli.engine.snapshots import Entry

# The first batch is small: if llama.cpp crashes on this CPU, it does so at once.
_FIRST_BATCH = 32
_WORTH_SAVING = 256  # tokens beyond what is saved already
_WRITING = 1e9  # bytes a second; a cache that is computed again sooner than written is not saved
_UPDATED = "-inplace"  # ends the key of contexts that were updated in place
# Contexts of the same files on the disk that are compared, to update one of them; and those that were
# updated in place of which more are not kept.
_MOST_BASES, _MOST_UPDATED = 4, 2


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
        self._store = self._open_store(key)
        self._updated_store = self._open_store(key + _UPDATED, most_of_a_label=_MOST_UPDATED)
        model.truncate(0)
        self._held = array("i")  # tokens whose keys and values are in the KV cache
        self._exact = 0  # how many of them are as a run without reuse would have them
        self._cuts: set[int] = set()  # where batches of these ended
        self._changed: NDArray[np.int32] | None = None  # see m3cli.engine.edits; None if never updated
        self._prefix = 0  # how many of them are not about one question
        self._saved = 0  # how many of them are on the disk

    def _open_store(self, key: str, *, most_of_a_label: int = 0) -> SnapshotStore | None:
        if self._cache is None:
            return None
        return SnapshotStore(
            Path(self._cache.directory),
            key,
            max_bytes=self._cache.max_bytes,
            most_of_a_label=most_of_a_label,
            report=self._notices.append,
        )

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
        self._check(tokens, request)

        # 2. Keep or fetch what is computed already.
        plan = yield from self._reuse(tokens, request)
        restored = plan.kept if plan else len(self._held)

        # 3. Compute the rest of the prompt.
        begin = time.monotonic()
        yield Prefilled(restored, len(tokens), 0.0)
        if plan:
            yield from self._update(plan, tokens, request, begin)
        yield from self._prefill(tokens, request, begin)
        self._prefix = min(request.prefix, len(self._held))
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
        yield Finished(
            reason,
            len(tokens),
            generated,
            prefill_seconds,
            time.monotonic() - begin,
            restored,
            0.0 if self._changed is None else staleness(self._changes()[: self._prefix]),
        )

    def _check(self, tokens: array[int], request: Request) -> None:
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
        if request.update == "inplace" and self._model.update_problem:
            raise ImpossibleError(
                f"A context of this model cannot be updated in place: {self._model.update_problem}.",
                "Leave out --update inplace.",
            )

    def _reuse(self, tokens: array[int], request: Request) -> Generator[Event, None, inplace.Plan | None]:
        """Cut the KV cache back to what it shares with `tokens`, or load more than that from the disk.

        With a plan that is returned, the KV cache holds what that begins with instead.
        """
        begin = time.monotonic()
        common = common_prefix(_ids(self._held), _ids(tokens))
        exact = self._as_cold(min(common, self._exact), self._cuts, tokens, request)
        held = exact
        if not request.exact and (self._changed is None or request.update != "exact"):
            held = min(common, _most(tokens, request))
        if held < len(self._held) and not self._model.can_truncate:
            held = 0
        found = self._found(tokens, request, held)
        if not self._model.update_problem and request.update != "exact":
            best = max([held, *(usable for usable, _ in found)])
            plan = self._plan(tokens, request, best)
            if plan and plan.kept_staleness > inplace.STALEST:
                yield Notice(
                    "The context is not updated in place: of what would be kept of it, "
                    f"{plan.kept_staleness:.0%} of what it was computed from would have changed since."
                )
            elif plan and self._fetch(plan, best):
                yield from self._told()
                yield Restored(plan.kept, time.monotonic() - begin, "disk" if plan.base.entry else "memory")
                return plan
            elif not self._held:  # what failed to load emptied it
                held, found = 0, self._found(tokens, request, 0)
        for usable, entry in found:
            if self._load(entry, usable - held) and self._cut(tokens, usable, usable):
                yield from self._told()
                yield Restored(usable, time.monotonic() - begin, "disk")
                return None
        self._cut(tokens, min(held, len(self._held)), exact)  # a load that failed emptied it
        yield from self._told()
        if self._held:
            yield Restored(len(self._held), time.monotonic() - begin, "memory")
        return None

    def _found(self, tokens: array[int], request: Request, held: int) -> list[tuple[int, Entry]]:
        """Entries on the disk of which more than `held` tokens can be used, and how many."""
        found = []
        for match in self._store.find(tokens) if self._store else ():
            size = match.entry.manifest.tokens
            if size > self._model.n_ctx:
                continue
            usable = self._as_cold(match.common, {size, *match.entry.manifest.cuts}, tokens, request)
            if usable > held and (usable == size or self._model.can_truncate):
                found.append((usable, match.entry))
        return found

    def _plan(self, tokens: array[int], request: Request, usable: int) -> inplace.Plan | None:
        """How to update a context in place, if that is better than to compute all behind `usable` tokens."""
        wanted = _ids(tokens)[: min(request.prefix, _most(tokens, request))]
        if len(wanted) <= usable:
            return None
        bases = []
        if self._prefix:
            ids = _ids(self._held)[: self._prefix].copy()
            bases.append(inplace.Base(ids, self._changes()[: self._prefix], min(self._exact, self._prefix)))
        for store in (self._store, self._updated_store) if request.label else ():
            for entry, ids in store.labelled(request.label, _MOST_BASES) if store else ():
                changed = changed_of(entry.manifest.changed, len(ids))
                exact = len(ids) if store is self._store else 0
                bases.append(inplace.Base(ids, changed, exact, entry))
        return inplace.choose(bases, wanted, len(wanted) - usable, request.update, self._model.n_ctx)

    def _fetch(self, plan: inplace.Plan, usable: int) -> bool:
        """Have the KV cache hold what a plan begins with; False if it is better computed from `usable` on."""
        if plan.base.entry is None:
            return self._cut(self._held, self._prefix, self._exact)
        return self._load(plan.base.entry, len(plan.changed) - usable - plan.computed)

    def _update(
        self, plan: inplace.Plan, tokens: array[int], request: Request, begin: float
    ) -> Iterator[Event]:
        """Follow a plan. If it is stopped, the KV cache keeps what is right; it is empty if that fails."""
        started = time.monotonic()
        unsaved = len(self._held) - self._saved
        exact = self._as_cold(plan.exact, self._cuts, tokens, request)
        size = plan.edits[0].new_start if plan.edits else len(plan.changed)
        computed = 0
        try:
            for size in splice(self._model, tokens, plan.edits):
                computed = plan.computed_before(size)
                yield Prefilled(plan.kept + computed, len(tokens), time.monotonic() - begin)
                if self._stopping():
                    break
            finished = computed == plan.computed
            if finished:
                size = len(plan.changed)
            elif not self._model.truncate(size):
                size = 0
        except BaseException:
            self._cut(tokens, 0, 0)
            raise
        self._changed, self._saved = plan.changed, max(size - unsaved - computed, 0)
        self._hold(tokens[:size], exact)
        if not finished:
            return
        seconds = time.monotonic() - started
        yield Updated(size, plan.count, computed, plan.staleness, seconds)
        if request.save and size == request.prefix:
            yield from self._save(request, computed / max(seconds, 1e-9))

    def _as_cold(self, common: int, cuts: Collection[int], tokens: array[int], request: Request) -> int:
        """How many of `common` tokens, computed in batches with such ends, a cold run would compute alike."""
        most = min(common, _most(tokens, request))
        differing = [cut for cut in {request.prefix}.symmetric_difference(cuts) if self._is_irregular(cut)]
        end = min([most, *differing])
        prefix = request.prefix if request.prefix in cuts and request.prefix <= end else 0
        return max(end - end % self._model.n_batch, prefix)

    def _is_irregular(self, cut: int) -> bool:
        """Whether not every run ends a batch there."""
        size = self._model.n_batch
        return cut % size != 0 and cut != min(_FIRST_BATCH, size)

    def _load(self, entry: Entry, gained: int) -> bool:
        """Load an entry, if that pays where it saves `gained` tokens; a bad one is removed."""
        begin = time.monotonic()
        updated = entry.manifest.key.endswith(_UPDATED)
        store = self._updated_store if updated else self._store
        if store is None or not store.pays(entry, gained):
            return False
        try:
            entry.check()
            tokens = entry.tokens()  # first: another process may remove it at any time
            self._hold(array("i"))
            if not self._model.load_state(entry.state_file, entry.manifest.tokens):
                raise SnapshotError("llama.cpp does not accept it")
        except SnapshotError as error:
            store.discard(entry, str(error))
            return False
        manifest = entry.manifest
        self._hold(array("i", tokens.tobytes()))
        self._prefix = manifest.tokens
        self._cuts = {manifest.tokens, *manifest.cuts}
        if updated:
            self._changed = changed_of(manifest.changed, manifest.tokens)
        else:
            self._exact = manifest.tokens
        self._saved = manifest.tokens
        entry.touch()
        store.note_load(entry.nbytes, time.monotonic() - begin)
        return True

    def _cut(self, tokens: array[int], count: int, exact: int) -> bool:
        """Keep the first `count` of `tokens` in the KV cache, `exact` of them exact; False if it is empty."""
        if count < len(self._held) and not self._model.truncate(count):
            count = 0
        self._hold(tokens[:count], exact)
        return count > 0

    def _hold(self, held: array[int], exact: int = 0) -> None:
        """Note that the KV cache holds these tokens, of which at most `exact` are exact."""
        count = len(held)
        self._held = held
        self._exact = min(self._exact, exact, count)
        self._cuts = {cut for cut in self._cuts if cut <= count}
        self._prefix, self._saved = min(self._prefix, count), min(self._saved, count)
        if self._changed is not None:
            self._changed = self._changed[:count] if count > self._exact else None

    def _changes(self) -> NDArray[np.int32]:
        """See m3cli.engine.edits: for each token that is held."""
        changed = np.zeros(len(self._held), np.int32)
        if self._changed is not None:
            changed[: len(self._changed)] = self._changed  # what came later was computed later
        return changed

    def _prefill(self, tokens: array[int], request: Request, begin: float) -> Iterator[Event]:
        first, last_save = len(self._held), begin
        exact = self._exact == first
        while len(self._held) < len(tokens) and not self._stopping():
            done = len(self._held)
            end = self._next_cut(done, len(tokens), request.prefix)
            if not self._model.decode(tokens, done, end - done):
                self._cut(tokens, done, done)
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
        store = self._store if self._changed is None else self._updated_store
        if store is None or self._cache is None or count - self._saved < _WORTH_SAVING:
            return
        if self._changed is None and self._exact < count:  # another process could not compute the same
            return
        begin, nbytes = time.monotonic(), self._model.state_bytes()
        if tokens_per_second and (count - self._saved) / tokens_per_second < nbytes / _WRITING:
            return
        try:
            entry = store.save(
                self._held,
                nbytes,
                lambda path: self._model.save_state(path, self._held),
                label=request.label,
                model=self._cache.model_name,
                tokens_per_second=tokens_per_second,
                cuts=sorted(cut for cut in self._cuts if cut < count and self._is_irregular(cut)),
                changed=[] if self._changed is None else runs_of(self._changes()),
            )
        except SnapshotError as error:
            self._store = self._updated_store = None  # it would fail again
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


def _most(tokens: array[int], request: Request) -> int:
    """How many tokens of a prompt need not be computed: not the last one, which gives the logits."""
    return len(tokens) - (1 if request.max_tokens else 0)


def _ids(tokens: array[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32)
