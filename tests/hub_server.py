"""A hub on the loopback interface: what huggingface_hub and m3 ask of one, and every way to get it wrong."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"


@dataclass
class Faults:
    """What goes wrong; all of it off. Counters are used up by the requests that they spoil.

    `break_after` is bytes of a body after which the connection is cut, `breaks` times. `wrong` sends other
    bytes of the right length for so many whole-file requests, `busy` answers so many with `busy_status`.
    """

    break_after: int = 0
    breaks: int = 0
    wrong: int = 0
    busy: int = 0
    busy_status: int = 503
    retry_after: str = ""
    gated: bool = False
    no_ranges: bool = False
    html: bool = False
    endless: bool = False
    api_html: bool = False
    absent: bool = False
    lie_about_size: int = 0
    lengthless: bool = False


@dataclass
class HubServer:
    """A running server. `files` are those of the one repository, `siblings` what is said of them.

    `requests` lists what was asked: (method, path, Range header, whether a token was sent, port).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    repo: str = "owner/tiny-GGUF"
    faults: Faults = field(default_factory=Faults)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    commit: str = COMMIT
    requests: list[tuple[str, str, str, bool, int]] = field(default_factory=list)
    sent: int = 0
    halfway: threading.Event = field(default_factory=threading.Event)
    stall: threading.Event | None = None

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        # The second one plays the CDN that the hub redirects to.
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.port, self.cdn_port = (server.server_address[1] for server in self._servers)
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.stall:
            self.stall.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, source: Path | bytes) -> None:
        """Publish a file."""
        self.files[name] = source if isinstance(source, bytes) else source.read_bytes()

    def sha256(self, name: str) -> str:
        """The digest of a published file."""
        return hashlib.sha256(self.files[name]).hexdigest()

    def downloads(self) -> list[tuple[str, str]]:
        """(path, Range) of every request to the CDN."""
        return [(path, ranged) for _, path, ranged, _, port in self.requests if port == self.cdn_port]

    def description(self) -> dict[str, Any]:
        """The answer of /api/models/…?blobs=True."""
        siblings = []
        for name, data in self.files.items():
            said: dict[str, Any] = {
                "rfilename": self.renamed.get(name, name),
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if name.endswith(".gguf"):
                said["lfs"] = {"sha256": self.sha256(name), "size": len(data), "pointerSize": 134}
            siblings.append(said | self.overrides.get(name, {}))
        tags = ["gguf", f"license:{self.card.get('license', 'other')}"]
        return {
            "_id": "1",
            "id": self.repo,
            "sha": self.commit,
            "cardData": self.card,
            "siblings": siblings,
            "tags": tags,
            "private": False,
            "gated": "manual" if self.faults.gated else False,
            "downloads": 0,
            "likes": 0,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, faults = self.hub, self.hub.faults
        port = self.server.server_address[1]
        path = unquote(urlsplit(self.path).path)
        ranged = self.headers.get("Range", "")
        if path == "/api/agent-harnesses":  # the library asks once a day, whatever it is used for
            return self._send(404, b"{}", {})
        hub.requests.append((self.command, path, ranged, "Authorization" in self.headers, port))
        if faults.busy:
            faults.busy -= 1
            return self._send(faults.busy_status, b"busy", {"Retry-After": faults.retry_after})
        if port == hub.cdn_port:
            return self._file(path.removeprefix("/cdn/"), ranged)
        if match := re.fullmatch(rf"/api/models/{hub.repo}/tree/([^/]+)/?(.*)", path):
            entries = [
                {"type": "file", "path": s["rfilename"], "oid": s["blobId"], **s} for s in self._siblings()
            ]
            return self._json(entries)
        if match := re.fullmatch(rf"/api/models/{hub.repo}(?:/revision/(.+))?", path):
            if faults.api_html:
                return self._send(200, HTML, {"Content-Type": "text/html"})
            if match[1] not in (None, "main", hub.commit):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self._json(hub.description())
        if match := re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)", path):
            name = match[2]
            if faults.gated:
                return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            if name not in hub.files or faults.absent:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            headers = {
                "Location": f"http://127.0.0.1:{hub.cdn_port}/cdn/{name}",
                "X-Repo-Commit": hub.commit,
                "X-Linked-Size": str(len(hub.files[name])),
                "X-Linked-Etag": f'"{hub.sha256(name)}"',
                "ETag": f'"{hub.sha256(name)}"',
            }
            return self._send(302, b"", headers)
        return self._send(404 if "resolve" in path else 401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _siblings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.hub.description()["siblings"]
        return found

    def _file(self, name: str, ranged: str) -> None:
        hub, faults = self.hub, self.hub.faults
        data = HTML if faults.html else hub.files[name]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged)
        start, end, status = 0, len(data), 200
        if match and not faults.no_ranges and not faults.html:
            start, status = int(match[1]), 206
            end = min(int(match[2]) + 1 if match[2] else end, end)
        body = data[start:end]
        # Requests for headers stay right, so that what a test spoils is the download.
        whole = end == len(hub.files[name])
        if faults.wrong and whole and len(body) > 8:
            faults.wrong -= 1
            body = body[:-4] + bytes(byte ^ 0xFF for byte in body[-4:])
        length = len(data) + faults.lie_about_size
        headers = {
            "ETag": f'"{hub.sha256(name)}"',
            "Content-Type": "text/html" if faults.html else "binary/data",
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
        if faults.endless or faults.lengthless:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(body) + (faults.lie_about_size if status == 200 else 0))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = len(body)
        if faults.breaks and whole and len(body) > faults.break_after:
            faults.breaks -= 1
            cut = faults.break_after
            self.close_connection = True
        for at in range(0, cut, 1 << 16):
            self.wfile.write(body[at : min(at + (1 << 16), cut)])
            hub.sent += min(1 << 16, cut - at)
            if whole and at > cut // 2:
                hub.halfway.set()
                if hub.stall:
                    hub.stall.wait(30)
        while faults.endless:
            self.wfile.write(bytes(1 << 16))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
