"""The child process around llama.cpp: a native crash ends it, and not the shell of m3.

    python -m m3cli.engine.worker REQUEST_FD REPLY_FD DIE_WITH_PARENT

A frame is two lengths (JSON, payload), a JSON object and a payload of raw bytes; token ids travel
in the payload as little-endian int32. A request is `{"op": "generate" | "tokenize" | "vocabulary" |
"facts" | "dry_run", …}`, or names an operation of a module in `_ELSEWHERE`. Each is answered by any number
of `{"event": …}` and then by an event Finished or Stopped, a `{"result": …}` or an `{"error": …}`.
`{"op": "stop"}` has no answer of its own: it ends the generation that is under way, or that was asked for
before it.

The frames have pipes of their own, so nothing that native code prints can corrupt them. The worker
ignores SIGINT and SIGHUP, which a terminal sends to the whole group, and SIGTERM, which others do: the
parent decides. It never outlives its parent: a thread reads the requests, and end of file there means that
the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
from importlib import import_module
from itertools import chain
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from m3cli.engine.events import CacheConfig, EngineConfig, event_message, request_of
from m3cli.errors import M3Error
from m3cli.model.tokens import pack_ids, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.engine.events import Event
    from m3cli.engine.llama import Model
    from m3cli.engine.llama_dry_run import DryModel
    from m3cli.engine.session import Session
    from m3cli.engine.vocabulary import Vocabulary

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LENGTHS = struct.Struct("<IQ")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Settings that decide where weights go; the others are of the context.
_OF_THE_WEIGHTS = ("model_path", "gpu_layers", "tensor_overrides", "main_gpu", "tensor_split", "no_host")

# Modules with a table OPERATIONS of their own: name → (message, payload) → (result, payload).
_ELSEWHERE = {
    "quantized_types": "llama_quantize",
    "quantize_rows": "llama_quantize",
    "row_errors": "llama_quantize",
    "activations": "llama_activations",
    "logits": "llama_logits",
    "sensitivity": "llama_sensitivity",
    "tensor_errors": "llama_errors",
}

Message = dict[str, Any]


def frame(message: Message, payload_size: int = 0) -> bytes:
    """Everything of a frame but its payload."""
    text = json.dumps(message).encode("ascii")
    return _LENGTHS.pack(len(text), payload_size) + text


def write_frame(stream: BinaryIO, message: Message, payload: bytes = b"") -> None:
    """Write one frame and flush it. Raises BrokenPipeError when nobody reads."""
    stream.write(frame(message, len(payload)))
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """Read one frame; None at the end of the stream, also when it ends within a frame."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    size, payload_size = _LENGTHS.unpack(lengths)
    body = stream.read(size + payload_size)
    if len(body) < size + payload_size:
        return None
    return json.loads(body[:size]), body[size:]


class Worker:
    """Answers requests one after the other; keeps what it loaded for the next one."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests = requests
        self._replies = replies
        self._queue: SimpleQueue[tuple[Message, bytes]] = SimpleQueue()
        self._model: Model | None = None
        self._session: Session | None = None
        self._session_key: object = None
        self._stopping = threading.Event()
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_path = ""
        self._dry_model: DryModel | None = None
        self._dry_key: object = None

    def serve(self) -> None:
        """Answer requests until the parent is gone, then end the process."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            message, payload = self._queue.get()
            try:
                if module := _ELSEWHERE.get(message["op"]):
                    operations = import_module(f"m3cli.engine.{module}").OPERATIONS
                    result, reply = operations[message["op"]](message, payload)
                    self._send({"result": result}, reply)
                else:
                    getattr(self, f"_op_{message['op']}")(message, payload)
            except M3Error as error:
                self._send(
                    {"error": type(error).__name__, "message": error.message, "hint": error.hint},
                )

    def _read(self) -> None:
        while (received := read_frame(self._requests)) is not None:
            operation = received[0]["op"]
            if operation == "stop":
                self._stopping.set()
                if self._model is not None:
                    self._model.abort()
                continue
            if operation == "generate":
                self._stopping.clear()
                if self._model is not None:
                    self._model.go_on()
            self._queue.put(received)
        os._exit(0)  # the main thread may be deep in native code, which nothing else stops

    def _send(self, message: Message, payload: bytes = b"") -> None:
        try:
            write_frame(self._replies, message, payload)
        except BrokenPipeError:
            os._exit(0)

    def _send_event(self, event: Event) -> None:
        self._send(event_message(event))

    def _op_generate(self, message: Message, payload: bytes) -> None:
        cache = message["cache"] and CacheConfig(**message["cache"])
        session = self._load(config_of(message), message["extra_buffers"], cache)
        for event in session.generate(request_of(message["request"], unpack_ids(payload))):
            self._send_event(event)

    def _load(self, config: EngineConfig, extra_buffers: bool, cache: CacheConfig | None) -> Session:
        from m3cli.engine.llama import Model
        from m3cli.engine.llama_library import build
        from m3cli.engine.session import Session
        from m3cli.engine.snapshot_key import snapshot_key

        key = (config, extra_buffers, cache)
        if self._session is None or key != self._session_key:
            if self._model is not None:
                self._model.close()
                self._model = self._session = None
            self._model = Model(config, extra_buffers=extra_buffers, progress=self._send_event)
            kernels = f"{build()} {extra_buffers}"
            snapshots = snapshot_key(config, cache, kernels, self._model.attention) if cache else ""
            self._session = Session(self._model, cache, snapshots, self._stopping.is_set)
            self._session_key = key
        return self._session

    def _op_tokenize(self, message: Message, payload: bytes) -> None:
        """Texts as UTF-8 in the payload, with their sizes in bytes and whether they are template text."""
        vocabulary = self._load_vocabulary(message["model_path"])
        texts = []
        start = 0
        for size, template in message["texts"]:
            texts.append((payload[start : start + size].decode("utf-8"), template))
            start += size
        encoded = vocabulary.encode_all(texts)
        self._send({"result": [len(ids) for ids in encoded]}, pack_ids(chain.from_iterable(encoded)))

    def _op_vocabulary(self, message: Message, _payload: bytes) -> None:
        self._send({"result": self._load_vocabulary(message["model_path"]).facts()})

    def _load_vocabulary(self, path: str) -> Vocabulary:
        from m3cli.engine.vocabulary import Vocabulary

        if self._vocabulary is None or path != self._vocabulary_path:
            if self._vocabulary is not None:
                self._vocabulary.close()
                self._vocabulary = None
            self._vocabulary = Vocabulary(path)
            self._vocabulary_path = path
        return self._vocabulary

    def _op_dry_run(self, message: Message, _payload: bytes) -> None:
        from m3cli.engine.llama_dry_run import DryModel

        config = config_of(message)
        key = ([getattr(config, name) for name in _OF_THE_WEIGHTS], message["extra_buffers"])
        if self._dry_model is None or key != self._dry_key:
            if self._dry_model is not None:
                self._dry_model.close()
                self._dry_model = None
            self._dry_model = DryModel(config, extra_buffers=message["extra_buffers"])
            self._dry_key = key
        self._send({"result": self._dry_model.need(config)})

    def _op_facts(self, _message: Message, _payload: bytes) -> None:
        from m3cli.engine.devices import system_facts

        self._send({"result": system_facts()})


def config_of(message: Message) -> EngineConfig:
    """Make the configuration of a request; JSON knows no tuples."""
    values = dict(message["config"])
    values["tensor_overrides"] = tuple(map(tuple, values.get("tensor_overrides", ())))
    values["tensor_split"] = tuple(values.get("tensor_split", ()))
    values["lora"] = tuple(map(tuple, values.get("lora", ())))
    return EngineConfig(**values)


def _die_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, even by SIGKILL."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve on the two file descriptors that end the argument list."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    requests, replies, die_with_parent = (sys.argv if argv is None else argv)[-3:]
    if die_with_parent == "1" and sys.platform == "linux":
        _die_with_parent()
    Worker(os.fdopen(int(requests), "rb"), os.fdopen(int(replies), "wb")).serve()


if __name__ == "__main__":
    main()
