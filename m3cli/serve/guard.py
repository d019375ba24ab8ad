"""Who may talk to the server, and how much they may send.

On a loopback address, programs of this machine may; pages in a browser may not, which is why a request has to
name this machine as its host (a page's own host name may be made to point here) and, if it comes from
a page, that page has to be of this machine too. On other addresses everybody needs the key.
"""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from m3cli.serve.answers import error_of
from m3cli.serve.fields import RequestError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

# This machine as a Host header names it, and an Origin header behind its scheme.
_HERE = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
PAGES = re.compile(rf"(?i:https?://{_HERE.pattern})")  # that may use the server from within a browser
OPEN = frozenset({"/health", "/m3/hello"})  # for everybody who may connect
_FOR_M3 = "/m3/"  # for commands of the user who started the server


class Guard:
    """Passes on the requests of those who may ask. `api_key` empty is for a loopback address."""

    def __init__(self, app: ASGIApp, *, api_key: str, secret: str, loopback: bool) -> None:
        self._app = app
        self._api_key = api_key
        self._secret = secret
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, and pass on the rest."""
        if scope["type"] == "http" and (refusal := self._refusal(scope["path"], Headers(scope=scope))):
            status, body = error_of(refusal)
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        if self._loopback:
            if not _HERE.fullmatch(headers.get("host", "")):
                return RequestError(
                    "This server answers to the names of this machine only (localhost, 127.0.0.1).",
                    status=403,
                )
            if "origin" in headers and not PAGES.fullmatch(headers["origin"]):
                return RequestError("This server does not answer pages of other hosts.", status=403)
        if path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if given and _same(given, self._secret):
            return None
        if path.startswith(_FOR_M3):
            return RequestError(
                "This address is for m3 commands of the user who started the server.", status=401
            )
        if self._api_key and not _same(given, self._api_key):
            return RequestError(
                "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.", status=401
            )
        return None


def _same(given: str, key: str) -> bool:
    # A header's bytes come as characters; clients send a key in UTF-8.
    return hmac.compare_digest(given.encode("latin-1"), key.encode("utf-8", "surrogateescape"))


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """The body of a request, of at most `most` bytes, sent within `seconds`. Raises RequestError."""
    too_large = RequestError(f"The body is larger than {most:,} bytes.", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    with anyio.move_on_after(seconds) as scope:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise too_large
    if scope.cancelled_caught:
        raise RequestError(f"The body was not sent within {seconds:g} seconds.", status=408)
    return bytes(body)
