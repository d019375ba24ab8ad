"""How the model is to run, from flags to the engine."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from m3cli.cli.values import run_options, settings
from m3cli.errors import UsageError
from m3cli.tasks.configure import RunOptions

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run


def options(**flags: object) -> RunOptions:
    """What becomes of these flags alone."""
    return run_options(settings(flags))


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.setenv("M3_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.chdir(tmp_path)


def test_nothing_is_fixed_unless_asked_for() -> None:
    """Without flags everything is left to the plan; one type is that of keys and values."""
    assert options() == RunOptions()
    assert options().planned
    assert options(kv_type="q8_0") == RunOptions(type_k="q8_0", type_v="q8_0")
    assert options(kv_type="f16", kv_type_v="q8_0") == RunOptions(type_k="f16", type_v="q8_0")
    assert options(kv_type_v="q8_0") == RunOptions(type_v="q8_0")


def test_who_places_tensors_decides() -> None:
    """Patterns, shares and a main GPU are handed on as they are, and nothing is planned beside them."""
    overridden = options(override_tensor=["exps=CPU", r"blk\.(1|2)\.ffn=CPU"])
    assert overridden.tensor_overrides == (("exps", "CPU"), (r"blk\.(1|2)\.ffn", "CPU"))
    assert options(tensor_split="3, 1").tensor_split == (3.0, 1.0)
    for placed in (overridden, options(tensor_split="1"), options(main_gpu=0)):
        assert not placed.planned


def test_adapters_and_their_scales() -> None:
    """The scale stands behind a colon; a Windows drive is none."""
    assert options(lora=["a.gguf", "b.gguf:0.5", "c:/d.gguf", "e.gguf:-1"]).lora == (
        ("a.gguf", 1.0),
        ("b.gguf", 0.5),
        ("c:/d.gguf", 1.0),
        ("e.gguf", -1.0),
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"override_tensor": ["exps"]}, "names no buffer type"),
        ({"override_tensor": ["=CPU"]}, "names no buffer type"),
        ({"override_tensor": ["a(=CPU"]}, "no regular expression"),
        ({"tensor_split": "1,x"}, "no list of shares"),
        ({"tensor_split": "0,0"}, "are 0"),
        ({"kv_type_v": "q8_0", "flash_attention": "off"}, "needs flash attention"),
    ],
)
def test_what_is_malformed_is_named(flags: dict[str, object], words: str) -> None:
    """What is wrong, and how it is written."""
    with pytest.raises(UsageError, match=words):
        options(**flags)


def test_flags_reach_the_engine(m3: Run, tmp_path: Path) -> None:
    """A buffer type that is not there and a missing adapter are refused; one that is there serves."""
    (tmp_path / "a.py").write_text("value = 1\n")
    ask = ("ask", "a.py", "What is value?", "--max-tokens", "3", "--no-cache", "--ctx", "1024")
    wrong = m3(*ask, "--override-tensor", "ffn_up=CUDA7", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no buffer type CUDA7" in wrong.stderr
    missing = m3(*ask, "--lora", "style.gguf:0.5", cwd=tmp_path)
    assert missing.returncode == 3
    assert "style.gguf" in missing.stderr
    placed = m3(
        *ask, "--override-tensor", "ffn_up=CPU", "--ubatch", "64", "--kv-type-v", "q8_0", "--no-mmap",
        "--no-op-offload", "--no-host", "--watts", "50", cwd=tmp_path,
    )  # fmt: skip
    assert placed.returncode in (0, 4), placed.stderr
    assert "cost here, this time: 0.0000" in placed.stderr


@pytest.mark.parametrize("kibibytes", [250_000, 420_000, 470_000, 800_000])
def test_a_limit_on_memory(environ: dict[str, str], tmp_path: Path, kibibytes: int) -> None:
    """Under `ulimit -v` it makes do, or says with numbers what lacks; it never just crashes."""
    (tmp_path / "a.py").write_text("value = 1\n")
    command = (
        f"ulimit -v {kibibytes}; exec {sys.executable} -m m3cli ask a.py 'What is value?' --max-tokens 2 "
        "--ctx 4096 --no-cache"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3, 4), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode == 3:
        assert "GB" in done.stderr or "ran out of memory" in done.stderr
    else:
        assert kibibytes > 250_000
