"""`m3 model pull` against a hub on the loopback interface, as a person and as a script run it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from m3cli.errors import ExitCode
from m3cli.model.catalog import demo_model
from tests.cli.conftest import M3
from tests.gguf_files import LLAMA_KEYS, write_gguf
from tests.hub_server import HubServer
from tests.model.test_preflight import INDEXER, INDEXER_KEYS, write_m3

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cli.conftest import Run

NAME = "SmolLM2-135M-Instruct-Q4_K_M.gguf"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub with the demo model in one file, 98 MB."""
    demo = demo_model()
    if demo is None:
        pytest.skip("the demo model is not installed")
    with HubServer() as server:
        server.add(NAME, demo.path)
        server.add("README.md", b"# SmolLM2\n")
        yield server


@pytest.fixture
def environ(environ: dict[str, str], hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Everything of the hub's library in an empty directory."""
    return {**environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}


def pulled(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == ExitCode.DONE, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def small(hub: HubServer, tmp_path: Path, **sizes: int) -> None:
    """Publish small models instead: the number of weights of each quant."""
    hub.files.clear()
    for quant, count in sizes.items():
        weights = np.random.default_rng(count).standard_normal(count).astype(np.float32)
        hub.add(
            f"tiny-{quant}.gguf",
            write_gguf(tmp_path / f"{quant}.gguf", LLAMA_KEYS, {"token_embd.weight": weights}),
        )


def test_a_pulled_model_answers_by_name_and_by_path(m3: Run, hub: HubServer) -> None:
    """Standard output is the path and nothing else; m3 finds the model in the hub's cache from then on."""
    done = m3("model", "pull", hub.repo, "--accept-license")
    assert done.returncode == ExitCode.DONE, done.stderr
    path = done.stdout.removesuffix("\n")
    assert path.endswith(f"/{NAME}")
    assert "98.4 MB, verified" in done.stderr
    details = pulled(m3("model", "info", NAME.removesuffix(".gguf"), "--json"))
    assert details["path"] == path
    assert details["architecture"] == "llama"
    again = pulled(m3("model", "pull", f"{hub.repo}:q4_k_m", "--accept-license", "--json", "-q"))
    assert again["path"] == path
    assert again["received_bytes"] == 0
    assert again["license"] == ["apache-2.0"]


def test_a_killed_download_goes_on_where_it_was(
    m3: Run, environ: dict[str, str], hub: HubServer, tmp_path: Path
) -> None:
    """A kill -9 in the middle of 98 MB costs what was in flight, and no more."""
    hub.stall = hub.halfway.__class__()
    command = [M3, "model", "pull", hub.repo, "--accept-license", "-q"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        assert hub.halfway.wait(60)
        process.send_signal(signal.SIGKILL)
    hub.stall.set()
    part = next((tmp_path / "hf").rglob("*.m3.incomplete")).stat().st_size
    assert part > 30_000_000
    done = pulled(m3("model", "pull", hub.repo, "--accept-license", "--json"))
    assert done["received_bytes"] == len(hub.files[NAME]) - part
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_keeps_its_part(
    m3: Run, environ: dict[str, str], hub: HubServer, tmp_path: Path, number: int
) -> None:
    """Exit code 130, a line that says how to go on, and a second run that does."""
    hub.stall = hub.halfway.__class__()
    command = [M3, "model", "pull", hub.repo, "--accept-license", "--dir", str(tmp_path / "models")]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert hub.halfway.wait(60)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    hub.stall.set()
    assert process.returncode == ExitCode.INTERRUPTED
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    part = (tmp_path / "models" / f"{NAME}.part").stat().st_size
    done = pulled(m3(*command[1:], "--json"))
    assert done["received_bytes"] == len(hub.files[NAME]) - part
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]


def test_a_dry_run_shows_every_quant_and_writes_nothing(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """Sizes are exact; the largest that fits is the choice."""
    small(hub, tmp_path, Q8_0=60_000, Q2_K=20_000)
    hub.add("mmproj-F16.gguf", b"GGUF")
    told = pulled(m3("model", "pull", hub.repo, "--dry-run", "--json", "--dir", "models"))
    assert [(q["name"], q["bytes"], q["fits"], q["header_read"]) for q in told["quants"]] == [
        (name, len(hub.files[f"tiny-{name}.gguf"]), True, True) for name in ("Q8_0", "Q2_K")
    ]
    assert told["quant"] == "Q8_0"
    assert told["received_bytes"] is None
    assert told["path"] == str(tmp_path / "models" / "tiny-Q8_0.gguf")
    assert not (tmp_path / "models").exists()
    shown = m3("model", "pull", hub.repo, "--dry-run")
    assert "Q2_K" in shown.stdout
    assert "licence: apache-2.0" in shown.stdout


def test_auto_passes_over_what_is_too_large_or_broken(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """Nine terabytes do not fit, an M3 without its indexer cannot be run, and the next one is taken."""
    hub.files.clear()
    broken = {f"{INDEXER}{key}": None for key in INDEXER_KEYS}
    hub.add("m3-Q8_0.gguf", write_m3(tmp_path / "a.gguf"))
    hub.add("m3-Q4_K_M.gguf", write_m3(tmp_path / "b.gguf", {**broken, "general.name": "x" * 2000}))
    hub.add("m3-Q2_K.gguf", write_m3(tmp_path / "c.gguf"))
    hub.overrides["m3-Q8_0.gguf"] = {
        "size": 1 << 43,
        "lfs": {"sha256": "0" * 64, "size": 1 << 43, "pointerSize": 134},
    }
    told = pulled(m3("model", "pull", hub.repo, "--accept-license", "--json", "-q"))
    quants = {quant["name"]: quant for quant in told["quants"]}
    assert told["quant"] == "Q2_K"
    assert "GB of memory" in quants["Q8_0"]["misfit"]
    assert not quants["Q8_0"]["header_read"]
    assert "lacks minimax-m3.attention.indexer.head_count" in quants["Q4_K_M"]["problem"]
    assert told["license"] == ["apache-2.0", "minimax-community (https://example.org/LICENSE)"]
    named = m3("model", "pull", hub.repo, "--quant", "Q4_K_M", "--accept-license")
    assert named.returncode == ExitCode.IMPOSSIBLE
    assert "The quant Q4_K_M of owner/tiny-GGUF cannot be used" in named.stderr
    assert "/tmp" not in named.stderr.partition("error:")[2]


def test_a_machine_that_is_too_small_is_told_the_smallest(m3: Run, hub: HubServer) -> None:
    """Exit code 3, with both sizes."""
    hub.overrides[NAME] = {"size": 1 << 43, "lfs": {"sha256": "0" * 64, "size": 1 << 43, "pointerSize": 134}}
    done = m3("model", "pull", hub.repo, "--dry-run")
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "No quant of owner/tiny-GGUF fits this machine: Q4_K_M, the smallest, takes about" in done.stderr


def test_without_a_terminal_the_licence_needs_the_flag(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """Exit code 2, with the licence and the flag in the message; nothing is downloaded."""
    small(hub, tmp_path, Q8_0=2_000)
    hub.card = {"license": "other", "license_name": "minimax-\x1b[31mcommunity"}
    done = m3("model", "pull", hub.repo)
    assert done.returncode == ExitCode.USAGE
    assert "minimax-\ufffd[31mcommunity" in done.stderr
    assert "--accept-license" in done.stderr
    assert done.stdout == ""
    assert not list((tmp_path / "hf").rglob("*.gguf"))


@pytest.mark.parametrize(("answer", "code"), [("y\n", ExitCode.DONE), ("\n", ExitCode.USAGE)])
def test_at_a_terminal_the_licence_is_asked_for(
    environ: dict[str, str], hub: HubServer, tmp_path: Path, answer: str, code: ExitCode
) -> None:
    """Return alone is a no."""
    small(hub, tmp_path, Q8_0=2_000)
    ours, theirs = pty.openpty()
    command = [M3, "model", "pull", hub.repo]
    with subprocess.Popen(
        command, env=environ, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, answer.encode())
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == code
    assert b"licence: apache-2.0" in shown
    assert out.strip().endswith("tiny-Q8_0.gguf") == (code == ExitCode.DONE)


def test_names_that_cannot_be_are_usage_errors(m3: Run, hub: HubServer) -> None:
    """Before anything is asked of the hub."""
    for arguments in (["nonsense"], ["a/b/c"], ["owner/tiny-GGUF:Q4_0", "--quant", "Q8_0"]):
        done = m3("model", "pull", *arguments)
        assert done.returncode == ExitCode.USAGE, arguments
        assert "Traceback" not in done.stderr
    assert hub.requests == []


def test_offline_mode_is_obeyed(m3: Run, hub: HubServer) -> None:
    """The library's own switch; nothing is asked of the hub."""
    done = m3("model", "pull", hub.repo, HF_HUB_OFFLINE="1")
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "HF_HUB_OFFLINE forbids downloads." in done.stderr
    assert hub.requests == []


def test_an_unknown_quant_is_answered_with_those_that_there_are(m3: Run, hub: HubServer) -> None:
    """Exit code 3."""
    done = m3("model", "pull", hub.repo, "--quant", "Q9_9", "--accept-license")
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "has no quant Q9_9" in done.stderr
    assert "It has Q4_K_M." in done.stderr


def test_the_default_is_an_alias_for_a_published_repository(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """`m3 model pull` alone asks for MiniMax-M3; the hub decides whether it is there."""
    done = m3("model", "pull", "--dry-run")
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "There is no repository bartowski/MiniMaxAI_MiniMax-M3-GGUF" in done.stderr
    small(hub, tmp_path, Q2_K=2_000)
    hub.repo = "bartowski/MiniMaxAI_MiniMax-M3-GGUF"
    assert pulled(m3("model", "pull", "--dry-run", "--json"))["repository"] == hub.repo


def test_hostile_names_write_nothing_outside(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """A sentence, exit code 3, and a directory as it was."""
    hub.renamed[NAME] = "../../../../evil.gguf"
    before = sorted(path.name for path in tmp_path.iterdir())
    done = m3("model", "pull", hub.repo, "--accept-license", "--dir", str(tmp_path / "models"))
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "'../../../../evil.gguf'" in done.stderr
    assert sorted({path.name for path in tmp_path.iterdir()} - {"hf"}) == [n for n in before if n != "hf"]


def test_a_connection_that_breaks_is_told_and_mended(m3: Run, hub: HubServer, tmp_path: Path) -> None:
    """With --quiet nothing is said."""
    small(hub, tmp_path, Q8_0=400_000)
    hub.faults.break_after, hub.faults.breaks = 1 << 20, 1
    done = m3("model", "pull", hub.repo, "--accept-license")
    assert done.returncode == ExitCode.DONE
    assert "trying again in 1 s" in done.stderr
    quiet = m3("model", "pull", hub.repo, "--accept-license", "-q")
    assert quiet.returncode == ExitCode.DONE
    assert quiet.stderr == ""
