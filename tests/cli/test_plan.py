"""`m3 plan`: from the header and llama.cpp's own account, without loading anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from m3cli.model.catalog import resolve
from m3cli.plan.planner import Plan
from m3cli.tasks.plan import PlanRequest, make_plan
from scripts.make_shape_gguf import write_shape

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run


def test_a_plan_for_a_corpus(m3: Run, tmp_path: Path) -> None:
    """The context is what the files take; memory and time are in the table and in the object."""
    (tmp_path / "a.py").write_text("value = 1\n" * 300)
    done = m3("plan", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RAM" in done.stdout
    assert "tokens/s" in done.stdout
    found = json.loads(m3("plan", ".", "--json", cwd=tmp_path).stdout)
    assert found["fits"]
    assert found["n_ctx"] % 256 == 0
    assert 1200 < found["prompt_tokens"] < 4000
    ram = found["memory"][-1]
    assert ram["kv"] == found["n_ctx"] * 23_040  # SmolLM2-135M: 30 layers, 3 KV heads of 64, f16
    assert ram["used"] == ram["weights"] + ram["kv"] + ram["compute"] + ram["other"]


def test_choices_of_the_user(m3: Run, tmp_path: Path) -> None:
    """Flags are kept; costs are added; another machine is planned for."""
    options = ("--ctx", "4096", "--kv-type", "q8_0", "--ubatch", "128", "--json")
    found = json.loads(m3("plan", *options, cwd=tmp_path).stdout)
    assert found["configuration"]["type_k"] == found["configuration"]["type_v"] == "q8_0"
    assert found["configuration"]["n_ubatch"] == 128
    prices = ("--price-in", "1", "--price-out", "2", "--watts", "100")
    costs = json.loads(m3("plan", *options, *prices, cwd=tmp_path).stdout)["costs"]
    assert costs["hosted, each time"] == pytest.approx((found["prompt_tokens"] + 1000) / 1e6)
    assert 0 < costs["here, next times"] < costs["here, this time"]
    (tmp_path / "my.toml").write_text('ram = "2 GiB"\n[[devices]]\nmemory = "8 GiB"\n')
    other = json.loads(m3("plan", *options, "--machine", "my.toml", cwd=tmp_path).stdout)
    assert other["configuration"]["gpu_layers"] == 31
    assert m3("plan", "--machine", "nothing", cwd=tmp_path).returncode == 2
    assert m3("plan", "--ctx", "many", cwd=tmp_path).returncode == 2


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that the cache could not keep is told of before hours are spent on it."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    request = PlanRequest(resolve(None, {}), tmp_path / "cache", ctx=4096)
    result = make_plan(request, lambda: b"").result
    assert isinstance(result, Plan)
    assert any("would not be kept" in warning for warning in result.warnings)
    monkeypatch.undo()
    result = make_plan(request, lambda: b"").result
    assert isinstance(result, Plan)
    assert not any("would not be kept" in warning for warning in result.warnings)


def test_the_real_m3_at_a_million_tokens(m3: Run, tmp_path: Path) -> None:
    """Of a file with M3's real shape: exact numbers in seconds, what fits, and what would."""
    file = tmp_path / "m3.gguf"
    write_shape("minimax-m3", "Q2_K_L", file)
    command = ("plan", "-m", str(file), "--ctx", "max", "--json")
    server = json.loads(m3(*command, "--machine", "gpu8x80", cwd=tmp_path).stdout)
    assert server["fits"]
    assert server["configuration"]["type_k"] == "f16"
    assert len([place for place in server["memory"] if place["weights"] > 1e9]) >= 8
    assert abs(sum(place["kv"] for place in server["memory"]) - 152_064 * 1_048_576) < 1e6
    small = m3(*command, "--machine", "gpu24-ram64", cwd=tmp_path)
    assert small.returncode == 3
    found = json.loads(small.stdout)
    assert not found["fits"]
    assert "KV cache" in found["reason"]
    assert found["alternatives"]
    table = m3(*command[:-1], "--machine", "gpu24-ram64", cwd=tmp_path)
    assert "does not fit" in table.stdout


def test_a_machine_with_little_memory(environ: dict[str, str], tmp_path: Path) -> None:
    """`ulimit -v` is a limit like any other, and the reason says so."""
    command = f"ulimit -v 6000000; exec {sys.executable} -m m3cli plan --ctx 8192 --json"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    machine = json.loads(done.stdout)["machine"]
    assert machine["limit"] == "ulimit -v"
    assert machine["ram_available"] == 6_000_000 * 1024
