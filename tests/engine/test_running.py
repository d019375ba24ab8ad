"""Servers are found by files that nobody else can have written, and nothing else in them counts."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli import __version__
from m3cli.engine.running import (
    RunningServer,
    announce,
    model_state,
    new_secret,
    proof,
    running_servers,
    this_machine,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def server(**changed: Any) -> RunningServer:
    """One that lives as long as this process."""
    values: dict[str, Any] = {
        "version": __version__,
        "pid": os.getpid(),
        "machine": this_machine(),
        "host": "127.0.0.1",
        "port": 8303,
        "secret": new_secret(),
        "model_path": "/models/m.gguf",
        "model_state": [1, 2],
        "n_ctx": 4096,
        "run": {"threads": 1},
        "caches": True,
        "started": time.time(),
    }
    return RunningServer(**{**values, **changed})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where servers are announced; it need not exist."""
    return tmp_path / "cache" / "servers"


def test_an_announced_server_is_found_as_it_is(directory: Path) -> None:
    """What was announced is read back, from a file and a directory that only their owner can read."""
    one = server()
    path = announce(directory, one)
    assert running_servers(directory) == [one]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert list(directory.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_the_file_is_closed_whatever_the_umask(directory: Path, mask: int) -> None:
    """A mask that lets others read everything changes nothing."""
    before = os.umask(mask)
    try:
        path = announce(directory, server())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_youngest_comes_first(directory: Path) -> None:
    """Of several servers the one that started last is preferred."""
    ports = {8304: 2.0, 8303: 3.0, 8305: 1.0}
    for port, started in ports.items():
        announce(directory, server(port=port, started=started))
    assert [each.port for each in running_servers(directory)] == [8303, 8304, 8305]


def test_no_directory_is_no_server(directory: Path) -> None:
    """Where none was ever announced there is none, and nothing is made."""
    assert running_servers(directory) == []
    assert not directory.exists()


def test_a_dead_server_is_forgotten(directory: Path) -> None:
    """The file of a process that has ended is removed, and those of others stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = announce(directory, server(pid=ended.pid)), announce(directory, server())
    assert [each.pid for each in running_servers(directory)] == [os.getpid()]
    assert not dead.exists()
    assert alive.exists()


def test_a_server_of_another_machine_is_left_alone(directory: Path) -> None:
    """In a home directory that machines share, what died there cannot be told here: its file stays."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = announce(directory, server(pid=ended.pid, machine=f"not-{this_machine()}"))
    announce(directory, server(port=1, machine=f"not-{this_machine()}"))
    assert running_servers(directory) == []
    assert path.exists()


def test_a_server_of_another_version_is_left_alone(directory: Path) -> None:
    """After an upgrade, the server that runs still may say things that are not understood here."""
    path = announce(directory, server(version="0.0"))
    assert running_servers(directory) == []
    assert path.exists()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o601, 0o644, 0o777])
def test_a_file_that_others_may_use_is_passed_over(directory: Path, mode: int) -> None:
    """Whoever can read the secret can claim to be the server; whoever can write it can name any."""
    path = announce(directory, server())
    path.chmod(mode)
    assert running_servers(directory) == []
    assert path.exists()


def test_a_link_is_passed_over(directory: Path, tmp_path: Path) -> None:
    """A link is not followed, not even to a file that would be right."""
    path = announce(directory, server())
    elsewhere = path.replace(tmp_path / "elsewhere.json")
    path.symlink_to(elsewhere)
    assert running_servers(directory) == []


def test_what_is_no_file_does_not_block(directory: Path) -> None:
    """A pipe, which would wait for a writer, and a directory are passed over."""
    directory.mkdir(parents=True)
    os.mkfifo(directory / "1-1.json", 0o600)
    (directory / "2-2.json").mkdir(mode=0o700)
    assert running_servers(directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_passed_over(directory: Path) -> None:
    """Even where it is closed to everybody else."""
    path = announce(directory, server())
    os.chown(path, 65534, 65534)
    assert running_servers(directory) == []


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1",
        "example.org",
        "localhost",
        "0.0.0.0",
        "127.0.0.1.example.org",
        "127.0.0.1@example.org",
        "127.0.0.1\n.example.org",
        "127.0.0.1\n",
        "::",
        "::ffff:10.0.0.1",
        "",
    ],
)
def test_only_this_machine_is_asked(directory: Path, host: str) -> None:
    """A file that names a host which may be elsewhere is passed over: a prompt would go there."""
    announce(directory, server(host=host))
    assert running_servers(directory) == []


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.9", "http://127.0.0.9:8303"), ("::1", "http://[::1]:8303")]
)
def test_loopback_addresses_are_asked(directory: Path, host: str, url: str) -> None:
    """All of them, spelled as addresses."""
    announce(directory, server(host=host))
    assert [each.url for each in running_servers(directory)] == [url]


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(port=0),
        lambda values: values.update(port=65536),
        lambda values: values.update(port="8303"),
        lambda values: values.update(port=True),
        lambda values: values.update(pid=0),
        lambda values: values.update(pid=-1),
        lambda values: values.update(pid=2**80),
        lambda values: values.update(secret=None),
        lambda values: values.update(started=1),
        lambda values: values.update(run=[]),
        lambda values: values.update(caches=1),
        lambda values: values.update(model_state={}),
        lambda values: values.update(more=1),
        _without("secret"),
        _without("run"),
    ],
)
def test_a_file_of_another_form_is_passed_over(
    directory: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """As another version of m3 may have written it; a group of processes is never taken for one."""
    path = announce(directory, server())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    assert running_servers(directory) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"pid"',
        b"\xff\xfe",
        b"[" * 90_000,
        b'{"a":' * 15_000,
        b" " * 200_000,
    ],
)
def test_broken_files_are_passed_over(directory: Path, content: bytes) -> None:
    """Whatever a file holds, the others are found."""
    one = server()
    announce(directory, one)
    (directory / "1-1.json").write_bytes(content)
    (directory / "1-1.json").chmod(0o600)
    assert running_servers(directory) == [one]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(list(asdict(server()))), VALUES, max_size=3))
def test_any_values_give_a_server_of_this_machine_or_none(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    """No value in a file makes finding servers fail, nor leads away from this machine."""
    directory = tmp_path_factory.mktemp("servers")
    path = announce(directory, server())
    path.write_text(json.dumps({**asdict(server()), **changes}))
    for found in running_servers(directory):
        assert found.host.startswith("127.") or found.host == "::1"
        assert 0 < found.port < 65536
        assert found.pid > 0


def test_a_changed_model_file_is_another_state(tmp_path: Path) -> None:
    """Its size and its time of change tell it from what a server has opened."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"1")
    states = [model_state(path)]
    os.utime(path, ns=(0, 10**18))
    states.append(model_state(path))
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 10**18))
    states.append(model_state(path))
    assert len({tuple(state) for state in states}) == 3


def test_a_proof_depends_on_secret_and_nonce() -> None:
    """Neither another secret nor another nonce gives the same, and the secret is not in it."""
    secret, other = new_secret(), new_secret()
    assert proof(secret, "1") == proof(secret, "1")
    assert len({proof(secret, "1"), proof(secret, "2"), proof(other, "1"), proof(other, "2")}) == 4
    assert secret not in proof(secret, "1")


def test_announcing_again_replaces(directory: Path) -> None:
    """A server at the address of one that died takes the place of its file."""
    one = server()
    announce(directory, one)
    two = replace(one, secret=new_secret())
    announce(directory, two)
    assert running_servers(directory) == [two]
