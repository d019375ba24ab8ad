"""Retry requests that failed for a reason that may pass."""

from __future__ import annotations

import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try, and how long to wait in between; times in seconds."""

    attempts: int = 4
    base_delay: float = 0.5
    max_delay: float = 30.0
    timeout: float = 10.0

    def delay(self, attempt: int, jitter: Callable[[], float] = random.random) -> float:
        """The time to wait after the failed attempt number `attempt`, counted from 1.

        Doubles with every attempt; between half of it and all of it, so that clients spread out.
        """
        full = min(self.max_delay, self.base_delay * 2 ** (attempt - 1))
        return full / 2 + full / 2 * jitter()


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that the server asks to wait, from the value of Retry-After: a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return max(0.0, moment - now)


def is_retryable(method: str, error: Exception) -> bool:
    """Whether trying again is safe and may help."""
    if method.upper() not in IDEMPOTENT_METHODS:
        return False
    if isinstance(error, urllib.error.HTTPError):
        return error.code in RETRYABLE_STATUS
    return isinstance(error, (urllib.error.URLError, TimeoutError))


def fetch(
    url: str,
    method: str = "GET",
    policy: RetryPolicy | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """The body of the response.

    Raises the last error when no attempt is left, or when trying again would not help.
    """
    policy = policy or RetryPolicy()
    request = urllib.request.Request(url, method=method)
    for attempt in range(1, policy.attempts + 1):
        try:
            with urllib.request.urlopen(request, timeout=policy.timeout) as response:
                return response.read()
        except (urllib.error.URLError, TimeoutError) as error:
            if attempt == policy.attempts or not is_retryable(method, error):
                raise
            pause = policy.delay(attempt)
            if isinstance(error, urllib.error.HTTPError):
                asked = retry_after(error.headers.get("Retry-After"), time.time())
                if asked is not None:
                    pause = min(max(pause, asked), policy.max_delay)
                error.close()
        sleep(pause)
    raise ValueError("a retry policy has at least one attempt")
