"""What the server has done, in the form that Prometheus reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from m3cli.engine.events import Finished, Prefilled, Restored, Token

if TYPE_CHECKING:
    from m3cli.engine.events import Event
    from m3cli.serve.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("m3_requests", "HTTP requests.", ["path", "status"], registry=registry)
        self._prompt = Counter("m3_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._restored = Counter(
            "m3_restored_tokens", "Of them, those whose KV cache was there already.", registry=registry
        )
        self._generated = Counter("m3_generated_tokens", "Tokens of answers.", registry=registry)
        self._prefill = Counter("m3_prefill_seconds", "Seconds of computing prompts.", registry=registry)
        self._decode = Counter("m3_decode_seconds", "Seconds of generating answers.", registry=registry)
        self.cancelled = Counter("m3_cancelled_requests", "Answers that a client left.", registry=registry)
        self.failed = Counter("m3_failed_requests", "Answers that ended in an error.", registry=registry)
        self.first_token = Histogram(
            "m3_time_to_first_token_seconds",
            "From the end of a request to the first token of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        waiting = Gauge("m3_waiting_requests", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: scheduler.waiting)
        running = Gauge("m3_running_requests", "Requests that are being answered.", registry=registry)
        running.set_function(lambda: scheduler.running)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    def heard(self, event: Event) -> None:
        """Count an event of an answer."""
        if isinstance(event, Restored):
            self._restored.inc(event.tokens)
        elif isinstance(event, Prefilled):
            if event.done == event.total:
                self._prompt.inc(event.total)
        elif isinstance(event, Token):
            self._generated.inc()
        elif isinstance(event, Finished):
            self._prefill.inc(event.prefill_seconds)
            self._decode.inc(event.decode_seconds)
