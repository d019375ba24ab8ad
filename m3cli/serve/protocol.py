"""HTTP connections that cannot be held open by who says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

MOST_CONNECTIONS = 512
_SILENCE = 20.0  # seconds for a request to come, twice as long at the most


class Connection(H11Protocol):
    """uvicorn's, which closes connections beyond a number, and those on which no request comes for long."""

    most = MOST_CONNECTIONS
    """How many there may be at a time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or end it at once if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._look = self.loop.call_later(_SILENCE, self._close_if_silent, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        super().connection_lost(exc)
        if hasattr(self, "_look"):
            self._look.cancel()

    def _close_if_silent(self, before: object) -> None:
        """Close if nothing has come since it was last looked, when nothing was under way either."""
        now: Any = self.cycle
        if now is None or now.response_complete:
            if now is before:
                self.transport.close()
                return
        else:
            now = self  # under way: not to be taken for silence the next time
        self._look = self.loop.call_later(_SILENCE, self._close_if_silent, now)
