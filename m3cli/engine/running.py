"""Which servers of m3 run on this machine: each leaves a file, for commands of the same user to find it by.

A file names the address, the model and a secret. Only its owner can read it, and a file that others could
have written or read is passed over. Whoever is going to send something asks for a proof first that the
process at the address knows the secret: another one may listen there by now.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from m3cli import __version__

if TYPE_CHECKING:
    from pathlib import Path

_FIELDS: dict[str, type] = {
    "version": str,
    "pid": int,
    "machine": str,
    "host": str,
    "port": int,
    "secret": str,
    "model_path": str,
    "model_state": list,
    "n_ctx": int,
    "run": dict,
    "caches": bool,
    "started": float,
}
_LARGEST_FILE = 100_000  # bytes
_LOOPBACK_ADDRESS = r"127(\.\d{1,3}){3}|::1"
LOOPBACK = re.compile(rf"localhost|{_LOOPBACK_ADDRESS}")  # this machine, as hosts are named


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server at `host` and `port`, which serves contexts of up to `n_ctx` tokens.

    `run` is how its model runs, as JSON: two servers with the same answer alike. `model_state` is size and
    time of change of the model file when it was opened. `caches` says whether it keeps KV caches on the disk.
    Only commands of the same `version` of m3 speak with it.
    """

    version: str
    pid: int
    machine: str
    host: str
    port: int
    secret: str
    model_path: str
    model_state: list[int]
    n_ctx: int
    run: dict[str, Any]
    caches: bool
    started: float

    @property
    def url(self) -> str:
        """Where it listens, e.g. `http://127.0.0.1:8303`."""
        return url_of(self.host, self.port)


def url_of(host: str, port: int) -> str:
    """The address of a server, e.g. `http://127.0.0.1:8303`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def this_machine() -> str:
    """A name that tells this machine from others which share the home directory."""
    return socket.gethostname()


def model_state(path: Path) -> list[int]:
    """What changes with the content of a file: its size in bytes and its time of change in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def new_secret() -> str:
    """A secret that nobody guesses."""
    return secrets.token_urlsafe(32)


def proof(secret: str, nonce: str) -> str:
    """What only those can say of `nonce` who know the secret."""
    return hmac.new(secret.encode(), nonce.encode(), hashlib.sha256).hexdigest()


def announce(directory: Path, server: RunningServer) -> Path:
    """Leave the file by which a server is found; to be removed when it ends. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{server.pid}-{server.port}.json"
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(server), file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def running_servers(directory: Path) -> list[RunningServer]:
    """The servers of this user on this machine, the youngest first; those that died are forgotten."""
    found = []
    try:
        paths = sorted(directory.glob("*.json"))
    except OSError:
        return []
    for path in paths:
        server = _read(path)
        if server is None or server.machine != this_machine() or server.version != __version__:
            continue
        if _lives(server.pid):
            found.append(server)
        else:
            with suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda server: -server.started)


def _read(path: Path) -> RunningServer | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            trusted = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if not trusted or stat.S_IMODE(status.st_mode) & 0o077:
                return None
            values = json.loads(file.read(_LARGEST_FILE))
        if values.keys() != _FIELDS.keys():
            return None
        if not all(type(values[name]) is kind for name, kind in _FIELDS.items()):
            return None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    server = RunningServer(**values)
    # What is sent goes to this machine only, whatever the file says.
    local = re.fullmatch(_LOOPBACK_ADDRESS, server.host)
    return server if local and 0 < server.port < 65536 and server.pid > 0 else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's: not the server
        return False
    return True
