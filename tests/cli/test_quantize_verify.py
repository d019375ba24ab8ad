"""`m3 quantize verify`, as a person and as CI run it."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from m3cli.report.quantize_plot import plot as draw
from quantize.convert import convert
from quantize.divergence import Divergence
from quantize.events import ConvertRequest
from quantize.verify import ModelFile, TensorError, Verified
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from tests.cli.conftest import Run

README = str(Path(__file__).parents[2] / "README.md")
TEXT = ("--text", README, "--tokens", "256", "--window", "64", "--threads", "1")


@pytest.fixture(scope="module")
def files(tiny_m3: Path, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The tiny model in f32 and in q8_0."""
    new = tmp_path_factory.mktemp("q8_0") / "tiny-q8_0.gguf"
    for _ in convert(ConvertRequest(tiny_m3, new, "q8_0")):
        pass
    return str(tiny_gguf), str(new)


def test_a_report_for_people(m3: Run, files: tuple[str, str], tmp_path: Path) -> None:
    """Tables on stdout, what it took on stderr, a picture in a file."""
    done = m3("quantize", "verify", *files, *TEXT, "--plot", "plot.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "tiny-q8_0.gguf, Q8_0",
        "9.01 bits",
        "ffn_down_exps",
        "F32   Q8_0",
        "KL divergence, 99.9 %",
    ):
        assert words in done.stdout
    assert "124 positions, the second half of 4 windows of 64 tokens" in done.stdout
    assert "take 254.0 kB in" in done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in done.stderr


def test_a_report_for_programs(m3: Run, files: tuple[str, str], tmp_path: Path) -> None:
    """One object with every tensor; the exit code says whether the divergence is small enough."""
    done = m3("quantize", "verify", *files, *TEXT, "--json", "--quiet", "--max-kl", "0.5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["passed"], found["max_kl"], found["rows_per_tensor"]) == (True, 0.5, 1024)
    assert found["new"]["file_type"] == "Q8_0"
    assert found["reference"]["path"] == files[0]
    assert len(found["tensors"]) == 74
    head = next(tensor for tensor in found["tensors"] if tensor["name"] == "output.weight")
    assert (head["role"], head["layer"], head["type_before"], head["type_after"]) == (
        "output",
        None,
        "F32",
        "Q8_0",
    )
    assert 0.004 < head["relative_error"] < 0.007
    divergence = found["divergence"]
    assert (divergence["positions"], divergence["window"], divergence["windows"]) == (124, 64, 4)
    assert list(divergence["kl_quantiles"]) == ["median", "p90", "p99", "p99.9", "max"]
    assert 0 < divergence["kl_mean"]["value"] < 0.5
    failed = m3("quantize", "verify", *files, *TEXT, "--json", "--max-kl", "1e-9", cwd=tmp_path)
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["passed"] is False


def test_weights_alone(m3: Run, files: tuple[str, str], tmp_path: Path) -> None:
    """Without a text nothing is run; the plot has one half, and is the same bytes each time."""
    for name in ("a.svg", "b.svg"):
        done = m3("quantize", "verify", *files, "--rows", "0", "--plot", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "only the weights are compared" in done.stderr
    assert "all 27,762" in done.stdout
    assert "KL" not in done.stdout
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert b"<dc:date>" not in picture


def test_a_matplotlibrc_of_the_tree_changes_nothing(m3: Run, files: tuple[str, str], tmp_path: Path) -> None:
    """Matplotlib would read one in the current directory, and even run LaTeX if that says so."""
    inside = tmp_path / "tree"
    inside.mkdir()
    (inside / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 20\nnonsense: 1\n")
    for cwd in (inside, tmp_path):
        done = m3("quantize", "verify", *files, "--rows", "8", "--plot", "plot.svg", cwd=cwd)
        assert done.returncode == 0, done.stderr
    assert (inside / "plot.svg").read_bytes() == (tmp_path / "plot.svg").read_bytes()
    (inside / "matplotlibrc").write_bytes(b"font.size: \xff\xfe\n")
    done = m3("quantize", "verify", *files, "--rows", "8", "--plot", "plot.svg", cwd=inside)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".svg", ".PNG"])
def test_names_that_mean_something_to_matplotlib(suffix: str) -> None:
    """Formulas, labels that it would hide, other scripts, bytes that are no text: all can be drawn."""
    names = ("$\\frac{1", "_hidden", "日本", "\x1b[31m\u202e\n", "\udcff", "x" * 5000)
    model = ModelFile(Path("a$^{\udcff日.gguf"), 1, "Q4_K", 4.5)
    tensors = [
        TensorError(f"blk.1.{name}", name, layer, "F32", "Q4_K", 4, 1, 1, 1, error)
        for name in names
        for layer in (None, 0, 9999)
        for error in (None, 0.0, 1e-30, math.inf)
    ]
    one = np.zeros(1)
    for each in (tensors, tensors[:2], []):
        for divergence in (None, Divergence(16, 1, one, one, one, one)):
            assert len(draw(Verified(model, model, 8, tuple(each), divergence), suffix)) > 1000


def test_mistakes(m3: Run, files: tuple[str, str], smollm2: str, tmp_path: Path) -> None:
    """Each is one sentence and what to do, said before anything runs."""
    for code, words, arguments in (
        (2, "hold against --max-kl", (*files, "--max-kl", "1")),
        (2, "neither *.png nor *.svg", (*files, "--plot", "plot.pdf")),
        (2, "no directory", (*files, "--plot", "nowhere/plot.svg")),
        (3, "There is no file", (files[0], "nothing.gguf")),
        (3, "not the same model: their architectures are minimax-m3 and llama", (files[0], smollm2)),
        (2, "Windows of 4 tokens", (*files, "--text", README, "--window", "4")),
    ):
        done = m3("quantize", "verify", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_without_matplotlib(files: tuple[str, str], tmp_path: Path) -> None:
    """It belongs to an extra, which the error names; all else works without it."""
    code = "import sys; sys.modules['matplotlib'] = None; from m3cli.__main__ import main; main()"
    command = [sys.executable, "-c", code, "quantize", "verify", *files, "--rows", "8"]
    for plot, returncode in (((), 0), (("--plot", "plot.svg"), 3)):
        done = subprocess.run(
            [*command, *plot], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
        )
        assert done.returncode == returncode, done.stderr
    assert "pip install 'm3cli[plot]'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption(
    environ: dict[str, str], files: tuple[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """It ends at once, says so, and leaves no file."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [M3, "quantize", "verify", *files, "--text", README, "--tokens", "11000", "--threads", "1"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environ, "TMPDIR": str(temporary)},
    ) as process:
        assert process.stderr is not None
        while "meanwhile" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(number)
        output, rest = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "interrupted; nothing is kept" in rest
    assert list(temporary.iterdir()) == []
