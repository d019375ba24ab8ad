"""The engine that runs a model on this machine, in a worker process.

Nothing here imports llama_cpp: a library that crashes or does not load is an error with a hint.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.engine.events import (
    Finished,
    Loaded,
    LoadProgress,
    Notice,
    Prefilled,
    Stopped,
    Token,
    event_of,
    request_message,
)
from m3cli.engine.process import WorkerClient, WorkerDiedError, WorkerProcess
from m3cli.engine.workarounds import extra_buffers_crash, remember_extra_buffers_crash
from m3cli.errors import ImpossibleError, UsageError
from m3cli.model.tokens import pack_ids, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from m3cli.engine.events import CacheConfig, EngineConfig, Event, Request

# What an instruction that the machine offers but does not have looks like from outside.
_SUSPICIOUS = {"SIGSEGV", "SIGILL", "SIGBUS"}

_BATCH_BYTES = 16 << 20  # text in one request to the tokenizer


class LocalEngine:
    """An Engine around one worker process, which keeps the model between requests.

    The worker starts with the first `generate`. When it dies in its very first computation, as it
    does on machines whose AMX is only pretended, the run starts over once without llama.cpp's
    extra weight buffers: events from LoadProgress on come a second time, with a Notice. If that
    helps, `state_dir` remembers it.

    With a `cache`, KV caches are kept on the disk between runs. Ctrl-C or SIGTERM ends a computation
    with Stopped, after which KeyboardInterrupt is raised; the worker lives on. A generator that is
    closed before its end kills the worker at once, and so does a second Ctrl-C. `stop` from another thread
    ends a computation as the first does, and nothing is raised.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        state_dir: Path,
        cache: CacheConfig | None = None,
        worker_command: Sequence[str] | None = None,
    ) -> None:
        self._config = config
        self._cache = cache
        self._state_dir = state_dir
        self._command = worker_command
        self._worker: WorkerProcess | None = None
        self._extra_buffers: bool | None = None  # None: not looked up yet
        self._proven = False  # this worker has computed something
        self._doing = ""
        self._running = False
        self._stopping = False  # the user has asked the run to end
        self._reach = threading.Lock()  # of the worker, which another thread may want to stop
        self._sent = False  # a request that can be stopped
        self._stop_wanted = False  # by another thread

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the continuation of `request`; see Engine."""
        if self._running:
            raise RuntimeError("generate was called while another generation is running")
        self._running = True
        self._sent = self._stop_wanted = False
        keep = False
        try:
            with self._signals():
                yield from self._run_or_retry(request)
            keep = True
        except (ImpossibleError, UsageError):
            keep = True  # refused by a worker that is well
            raise
        finally:
            self._running = False
            if not keep:
                self._kill()
        if self._stopping:
            raise KeyboardInterrupt

    def _run_or_retry(self, request: Request) -> Iterator[Event]:
        if self._extra_buffers is None:
            self._extra_buffers = not extra_buffers_crash(self._state_dir)
        try:
            yield from self._run(request)
        except WorkerDiedError as death:
            first_computation = self._doing.startswith("reading") and not self._proven
            if not (self._extra_buffers and first_computation and death.signal_name in _SUSPICIOUS):
                raise death.crash(self._doing) from None
            signal_name = death.signal_name
        else:
            return
        self._kill()
        self._extra_buffers = False
        try:
            for event in self._run(request):
                if isinstance(event, Prefilled) and event.done > 0 and signal_name:
                    remember_extra_buffers_crash(self._state_dir)
                    yield Notice(
                        f"llama.cpp crashed with {signal_name} on this CPU's extra weight formats (such as "
                        "AMX), so m3 runs without them from now on."
                    )
                    signal_name = ""
                yield event
        except WorkerDiedError as death:
            self._extra_buffers = True
            raise death.crash(self._doing) from None

    def _run(self, request: Request) -> Iterator[Event]:
        """One attempt. Raises WorkerDiedError."""
        self._doing = "starting"
        if self._worker is not None and not self._worker.alive:
            self._kill()  # it died while nothing was asked of it
        if self._worker is None:
            self._worker = WorkerProcess(self._command)
            self._proven = False
        message = {
            "op": "generate",
            "config": asdict(self._config),
            "cache": self._cache and asdict(self._cache),
            "extra_buffers": self._extra_buffers,
            "request": request_message(request),
        }
        with self._reach:
            self._worker.send(message, pack_ids(request.tokens))
            self._sent = True
            if self._stop_wanted:
                self._worker.stop()
        generated = 0
        while True:
            reply, _ = self._worker.receive()
            event = event_of(reply)
            match event:
                case LoadProgress():
                    self._doing = "loading the model"
                case Loaded():
                    self._doing = "making ready"
                case Prefilled(done=done, total=total):
                    self._doing = f"reading the prompt ({done:,} of {total:,} tokens)"
                    self._proven = self._proven or done > 0
                    if done == total:
                        self._doing = "generating the first token"
                case Token():
                    generated += 1
                    self._doing = f"generating (after {generated:,} tokens)"
            yield event
            if isinstance(event, (Finished, Stopped)):
                return

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Have Ctrl-C and SIGTERM stop a computation in order, so that what it has is saved.

        The second one ends it at once, and so does the first where there is nothing to save. Reading
        the worker's replies goes on meanwhile: an exception could come in the middle of one.
        """

        def interrupted(*_: object) -> None:
            if self._stopping or self._worker is None or not self._computing:
                raise KeyboardInterrupt
            self._stopping = True
            self._worker.stop()

        self._stopping = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [(number, signal.signal(number, interrupted)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    @property
    def _computing(self) -> bool:
        return self._doing.startswith(("reading", "generating"))

    def stop(self) -> None:
        """Have the generation end with Stopped that runs in another thread, if one does; see Engine."""
        with self._reach:
            self._stop_wanted = True
            if self._running and self._sent and self._worker is not None:
                self._worker.stop()

    def _kill(self) -> None:
        with self._reach:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """End the worker and free all it holds; may be called twice."""
        with self._reach:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LocalTokenizer(WorkerClient):
    """A model's own tokenizer, run by llama.cpp in a worker: a Tokenizer.

    For vocabularies that m3 cannot build itself (SentencePiece, WordPiece, unknown BPE). Its name
    holds a digest of the vocabulary. Raises ModelError when the file cannot be loaded and
    EngineCrashError when the worker dies.
    """

    def __init__(self, model_path: str, *, worker_command: Sequence[str] | None = None) -> None:
        super().__init__("tokenizing", worker_command)
        self._model_path = model_path
        self._facts: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """`llama.cpp:` and a digest of all tokens of the vocabulary."""
        return f"llama.cpp:{self.facts()['digest']}"

    @property
    def bos_id(self) -> int | None:
        """The id that every prompt has to begin with, or None if the model wants none."""
        facts = self.facts()
        bos: int | None = facts["bos"]
        return bos if facts["add_bos"] else None

    def facts(self) -> dict[str, Any]:
        """`bos` and `eos` (id or None), `add_bos`, `size` in tokens and `digest`."""
        if self._facts is None:
            message, _ = self.ask({"op": "vocabulary", "model_path": self._model_path})
            self._facts = message["result"]
        return self._facts

    def encode(self, text: str) -> list[int]:
        """Ids of content: special token strings in it are plain text."""
        return self._tokenize([text], template=False)[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded: list[list[int]] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                encoded += self._tokenize(batch, template=False)
                batch, size = [], 0
        return encoded + self._tokenize(batch, template=False)

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text has."""
        return list(map(len, self.encode_batch(texts)))

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: special token strings in it become their ids."""
        return self._tokenize([text], template=True)[0]

    def _tokenize(self, texts: Sequence[str], *, template: bool) -> list[list[int]]:
        if not texts:
            return []
        data = [text.encode("utf-8", "replace") for text in texts]
        message, payload = self.ask(
            {
                "op": "tokenize",
                "model_path": self._model_path,
                "texts": [(len(each), template) for each in data],
            },
            b"".join(data),
        )
        ids = unpack_ids(payload).tolist()
        encoded = []
        start = 0
        for count in message["result"]:
            encoded.append(ids[start : start + count])
            start += count
        return encoded


def system_facts(*, worker_command: Sequence[str] | None = None) -> dict[str, Any]:
    """Ask a short-lived worker what the installed llama.cpp is and sees.

    What is told is in m3cli.engine.devices.system_facts. Raises MachineError when the library does not load.
    """
    with WorkerClient("looking at this machine", worker_command) as worker:
        facts: dict[str, Any] = worker.ask({"op": "facts"})[0]["result"]
    return facts
