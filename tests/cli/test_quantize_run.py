"""`m3 quantize run`: by a mixture, a recipe and a budget; what interrupts it, and what it refuses."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from m3cli.errors import ExitCode
from m3cli.model.header import read_header
from quantize.importance import Entry, Importance, write_importance
from quantize.recipes import load_recipe
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Run

CHOICES = [
    ["--type", "Q4_K_M"],
    ["--recipe", "uniform-q5_k"],
    ["--budget", "5MB", "--candidates", "Q4_K,q8_0"],
]


@pytest.fixture
def here(tmp_path: Path, tiny_gguf: Path) -> Path:
    """A directory with the model, as in.gguf, and a folder for what is made."""
    (tmp_path / "in.gguf").symlink_to(tiny_gguf)
    (tmp_path / "made").mkdir()
    return tmp_path


def made(here: Path) -> list[str]:
    return sorted(path.name for path in (here / "made").iterdir())


def run_of(*options: str) -> list[str]:
    return ["quantize", "run", "in.gguf", "--out", "made/q.gguf", "--threads", "2", *options]


@pytest.mark.parametrize("choice", CHOICES, ids=["type", "recipe", "budget"])
def test_planned_then_made(m3: Run, here: Path, choice: list[str]) -> None:
    """The plan, to people and to programs, has the size that the file then has; stdout is its path alone."""
    planned = m3(*run_of(*choice, "--dry-run", "--json"))
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["written"], plan["seconds"]) == (None, None)
    assert plan["total_bytes"] == sum(file["nbytes"] for file in plan["files"])
    table = m3(*run_of(*choice, "--dry-run"))
    assert table.returncode == 0
    for fact in (
        "source",
        "28.7 MB, 7,169,176 weights",
        f"q.gguf, {plan['total_bytes']:,} bytes",
        "free there",
    ):
        assert fact in table.stdout
    assert made(here) == []

    done = m3(*run_of(*choice))
    assert (done.returncode, done.stdout) == (0, "made/q.gguf\n"), done.stderr
    assert "wrote 1 file, " in done.stderr
    assert (here / "made" / "q.gguf").stat().st_size == plan["total_bytes"]
    types = {tensor.name: tensor.type for tensor in read_header(here / "made" / "q.gguf").tensors}
    assert {name: types[name] for name in plan["types"]} == plan["types"]
    assert [file for file in made(here) if file.endswith(".gguf")] == ["q.gguf"]


def test_a_budget_leaves_its_recipe(m3: Run, here: Path) -> None:
    """The recipe is beside the file, explained on stderr and in JSON; given back, it makes the same bytes."""
    done = m3(*run_of(*CHOICES[2], "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["written"] == ["made/q.gguf"]
    assert result["seconds"] > 0
    assert made(here) == ["q.gguf", "q.recipe.toml"]
    saved = (here / "made" / "q.recipe.toml").read_text("utf-8")
    assert saved == result["budget"]["recipe"]
    assert "% of what is lost" in done.stderr
    assert "q.recipe.toml" in done.stderr
    budget = result["budget"]
    assert budget["predicted_kl"] is budget["least_kl"] is None  # which would take sensitivities
    assert (budget["measured"], budget["sensitivities"]) == (True, False)
    assert sum(share["cost"] for share in budget["roles"]) == pytest.approx(1)
    assert result["total_bytes"] <= 5_000_000

    recipe = load_recipe(str(here / "made" / "q.recipe.toml"))
    assert recipe.rules
    again = m3("quantize", "run", "in.gguf", "-o", "again.gguf", "--recipe", "made/q.recipe.toml", "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "again.gguf\n", "")
    assert (here / "again.gguf").read_bytes() == (here / "made" / "q.gguf").read_bytes()


def test_a_dry_run_with_a_budget_prints_a_recipe(m3: Run, here: Path) -> None:
    """Under the table stands what can be saved and given to --recipe; nothing is written."""
    done = m3(*run_of(*CHOICES[2], "--dry-run", "--quiet"))
    assert (done.returncode, done.stderr) == (0, "")
    (here / "cut.toml").write_text(done.stdout[done.stdout.index("name = ") :])
    assert load_recipe(str(here / "cut.toml")).rules
    assert made(here) == []


def test_quiet(m3: Run, here: Path) -> None:
    done = m3(*run_of(*CHOICES[0], "--quiet"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "made/q.gguf\n", "")


def test_parts(m3: Run, here: Path) -> None:
    """Split files keep the budget together; stdout names the first, with which the model is opened."""
    done = m3(*run_of("--budget", "5MB", "--candidates", "Q8_0,Q4_K", "--split-max-size", "1M"))
    assert done.returncode == 0, done.stderr
    parts = sorted((here / "made").glob("*.gguf"))
    assert len(parts) > 3
    assert done.stdout == f"made/q-00001-of-{len(parts):05d}.gguf\n"
    assert 4_900_000 < sum(part.stat().st_size for part in parts) <= 5_000_000
    assert len(read_header(parts[0]).tensors) == 74


def test_with_an_importance_matrix_and_before_there_is_one(m3: Run, here: Path, tiny_gguf: Path) -> None:
    """A plan that assumes an importance matrix has the types that one then allows."""
    assumed = m3(*run_of("--type", "iq2_xxs", "--assume-imatrix", "--dry-run", "--json"))
    assert assumed.returncode == 0, assumed.stderr
    write_importance(here / "i.gguf", importance(tiny_gguf))
    done = m3(*run_of("--type", "iq2_xxs", "--imatrix", "i.gguf", "--json"))
    assert done.returncode == 0, done.stderr
    before, after = json.loads(assumed.stdout), json.loads(done.stdout)
    assert before["types"] == after["types"]
    assert "IQ2_XXS" in after["types"].values()
    assert (here / "made" / "q.gguf").stat().st_size == after["total_bytes"]
    assert read_header(here / "made" / "q.gguf").get_str("quantize.imatrix.file") == "i.gguf"


def importance(model: Path, columns: int = 0) -> Importance:
    """One for all matrices of `model`; with `columns` instead of their own number, it is another model's."""
    entries = {}
    for tensor in read_header(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.dims) > 1:
            experts = (*tensor.dims, 1)[2]
            sums = np.ones((experts, columns or tensor.dims[0]), np.float32)
            entries[tensor.name] = Entry(sums, np.full(experts, 8))
    return Importance(entries, ("text",), 512, 4)


SLOW = ["--type", "IQ3_S"]  # seconds of searching
USAGE, IMPOSSIBLE = ExitCode.USAGE, ExitCode.IMPOSSIBLE
BUDGET = ["--candidates", "Q4_K,Q8_0", "--budget"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], USAGE, "Nothing says what to quantize to."),
        (["--type", "Q8_0", "--recipe", "uniform-q8_0"], USAGE, "More than one thing says"),
        (["--type", "Q8_0", "--budget", "9MB"], USAGE, "More than one thing says"),
        (["--recipe", "uniform-q8_0", "--budget", "9MB"], USAGE, "More than one thing says"),
        (["--type", "Q9"], USAGE, "There is no file type Q9."),
        (["--type", "IQ2_XXS"], USAGE, "needs an importance matrix, and there is none"),
        (["--recipe", "uniform-iq1_s"], USAGE, "needs an importance matrix, and there is none"),
        (["--recipe", "other.toml"], USAGE, "Rule 1 (blk\\.99\\.) of recipe other names no tensor"),
        (["--recipe", "none.toml"], USAGE, "The recipe none.toml cannot be read"),
        (["--recipe", "broken.toml"], USAGE, "broken.toml is not valid TOML"),
        ([*BUDGET, "0"], USAGE, "The value '0' of --budget is not a size"),
        ([*BUDGET, "0.0GB"], USAGE, "The value '0.0GB' of --budget is not a size"),
        ([*BUDGET, "much"], USAGE, "The value 'much' of --budget is not a size"),
        ([*BUDGET, "-5GB"], USAGE, "The value '-5GB' of --budget is not a size"),
        ([*BUDGET, "1.5MB"], USAGE, "is too small: the model takes"),
        (["--budget", "9MB", "--candidates", "Q4_K,Q9"], USAGE, "There is no type Q9."),
        (["--budget", "9MB", "--candidates", ""], USAGE, "--candidates"),
        (["--type", "Q4_K_M", "--candidates", "Q4_K"], USAGE, "--candidates"),
        (["--type", "Q4_K_M", "--assume-imatrix"], USAGE, "Give it with --dry-run"),
        (
            ["--type", "Q4_K_M", "--assume-imatrix", "--dry-run", "--imatrix", "i.gguf"],
            USAGE,
            "without --imatrix",
        ),
        (["--type", "Q4_K_M", "--imatrix", "none.gguf"], IMPOSSIBLE, "There is no file none.gguf."),
        (["--type", "Q4_K_M", "--imatrix", "in.gguf"], IMPOSSIBLE, "is not an importance matrix"),
        (["--type", "Q4_K_M", "--imatrix", "broken.toml"], IMPOSSIBLE, "broken.toml"),
        (["--type", "Q4_K_M", "--imatrix", "i.gguf"], IMPOSSIBLE, "has 64 values for blk."),
        (["--type", "Q4_K_M", "--imatrix", "i.gguf", "--dry-run"], IMPOSSIBLE, "has 64 values for blk."),
        ([*BUDGET, "9MB", "--imatrix", "i.gguf"], IMPOSSIBLE, "has 64 values for blk."),
        (["--type", "Q4_K_M", "--split-max-size", "0"], USAGE, "The value '0' of --split-max-size"),
        (["--type", "Q4_K_M", "--out", "made/q.bin"], USAGE, "is not named *.gguf"),
        (["--type", "Q4_K_M", "--out", "nowhere/q.gguf"], USAGE, "There is no directory nowhere."),
    ],
)
def test_wrong_input(
    m3: Run, here: Path, tiny_gguf: Path, options: list[str], code: ExitCode, words: str
) -> None:
    """One sentence that says what is wrong, a hint, and the exit code of its kind; nothing is written."""
    (here / "other.toml").write_text(
        "file_type = 'Q8_0'\n[[tensors]]\npattern = 'blk\\.99\\.'\ntype = 'Q8_0'\n"
        "[[tensors]]\npattern = '.*'\ntype = 'Q8_0'\n"
    )
    (here / "broken.toml").write_text("name = \n")
    if "i.gguf" in options:
        write_importance(here / "i.gguf", importance(tiny_gguf, 64))
    refused(m3(*run_of(*options)), code, words)
    assert made(here) == []
    assert not (here / "nowhere").exists()


def refused(done: subprocess.CompletedProcess[str], code: ExitCode, words: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in " ".join(done.stderr.split())
    assert done.stderr.count("error: ") == 1
    message, *hint = done.stderr.partition("error: ")[2].strip().split("\n")
    assert message.endswith(".")
    assert hint
    assert "Traceback" not in done.stderr


def test_a_source_that_is_quantized_or_none(m3: Run, here: Path, smollm2: str) -> None:
    """Errors would add up, so it has to be asked for; what is no model is no source."""
    (here / "q4.gguf").symlink_to(smollm2)
    (here / "text.gguf").write_text("no model")
    for choice in (["--type", "Q3_K_M"], ["--recipe", "uniform-q4_k"], [*BUDGET, "90MB"]):
        done = m3("quantize", "run", "q4.gguf", "-o", "made/q.gguf", *choice)
        refused(done, USAGE, "q4.gguf is quantized already: ")
        assert "--allow-requantize" in done.stderr
    refused(
        m3("quantize", "run", "text.gguf", "-o", "made/q.gguf", "--type", "Q8_0"), IMPOSSIBLE, "text.gguf"
    )
    refused(
        m3("quantize", "run", "none.gguf", "-o", "made/q.gguf", "--type", "Q8_0"), IMPOSSIBLE, "none.gguf"
    )
    assert made(here) == []


@pytest.mark.parametrize("choice", CHOICES, ids=["type", "recipe", "budget"])
def test_nothing_is_overwritten(m3: Run, here: Path, choice: list[str]) -> None:
    """A file that is there stays, and is told before anything is measured."""
    (here / "made" / "q.gguf").write_text("mine")
    done = m3(*run_of(*choice))
    refused(done, USAGE, "made/q.gguf already exists.")
    assert "of what is lost" not in done.stderr
    assert (here / "made" / "q.gguf").read_text() == "mine"
    assert made(here) == ["q.gguf"]


@pytest.fixture(scope="module")
def whole(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run of SLOW makes."""
    out = tmp_path_factory.mktemp("whole") / "q.gguf"
    subprocess.run([M3, "quantize", "run", str(tiny_gguf), "-o", str(out), *SLOW, "-q"], check=True)
    return out.read_bytes()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60  # only to fail rather than hang
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(
    m3: Run, here: Path, environ: dict[str, str], whole: bytes, number: signal.Signals
) -> None:
    """Exit 130, what was written is kept, and the same command ends with the same bytes."""
    process = subprocess.Popen(
        [M3, *run_of(*SLOW)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, env=environ,
        start_new_session=True,
    )  # fmt: skip
    unfinished = here / "made" / "q.gguf.partial" / "q.gguf"
    wait_until(lambda: unfinished.exists() and unfinished.stat().st_size > len(whole) // 5)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (ExitCode.INTERRUPTED, "")
    assert "interrupted; give the same command again to go on" in stderr
    assert "Traceback" not in stderr
    assert made(here) == ["q.gguf.partial"]
    kept = unfinished.stat().st_size
    assert len(whole) // 5 < kept < len(whole)

    done = m3(*run_of(*SLOW))
    assert (done.returncode, done.stdout) == (0, "made/q.gguf\n"), done.stderr
    assert "going on at " in done.stderr
    assert made(here) == ["q.gguf"]
    assert (here / "made" / "q.gguf").read_bytes() == whole


def test_an_unfinished_run_of_another_kind(m3: Run, here: Path) -> None:
    """What was begun with other options is neither gone on with nor lost."""
    (here / "made" / "q.gguf.partial").mkdir()
    journal = here / "made" / "q.gguf.partial" / "journal.json"
    journal.write_text('{"fingerprint": "x", "done": 5, "sources": {}}')
    refused(m3(*run_of(*CHOICES[0])), USAGE, "is of another model, or was begun with other options")
    assert journal.read_text() == '{"fingerprint": "x", "done": 5, "sources": {}}'


def test_a_full_disk(m3: Run, here: Path, environ: dict[str, str]) -> None:
    """Exit 3 and what to do, which is not an option that the command lacks; then the same command ends it."""
    done = subprocess.run(
        [M3, *run_of(*CHOICES[0])],
        capture_output=True, text=True, cwd=here, env=environ, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )  # fmt: skip
    refused(done, IMPOSSIBLE, "q.gguf.partial cannot be written: File too large")
    assert made(here) == ["q.gguf.partial"]
    assert "Free some space" in done.stderr
    assert "--resume" not in done.stderr
    assert m3(*run_of(*CHOICES[0], "-q")).returncode == 0
    shutil.move(here / "made" / "q.gguf", here / "first.gguf")
    assert m3(*run_of(*CHOICES[0], "-q")).returncode == 0
    assert (here / "first.gguf").read_bytes() == (here / "made" / "q.gguf").read_bytes()
