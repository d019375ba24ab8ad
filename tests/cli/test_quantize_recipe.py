"""`m3 quantize recipe`: the list, a recipe as a file, and what recipes make of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from quantize.recipes import built_in, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run


def test_the_list(m3: Run) -> None:
    """Without a name, every built-in recipe stands in a row with its description."""
    done = m3("quantize", "recipe")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()[1:]]
    assert [(name, text.strip()) for name, text in rows] == [(r.name, r.description) for r in built_in()]
    listed = json.loads(m3("quantize", "recipe", "--json").stdout)
    assert [each["name"] for each in listed] == [recipe.name for recipe in built_in()]
    assert all(each["nbytes"] is None and each["problem"] is None for each in listed)


def test_from_a_built_in_recipe_to_one_of_my_own(m3: Run, tmp_path: Path) -> None:
    """What is printed is a file that can be changed and given back."""
    printed = m3("quantize", "recipe", "m3-q3").stdout
    assert printed == load_recipe("m3-q3").toml()
    mine = tmp_path / "mine.toml"
    mine.write_text(printed.replace('"m3-q3"', '"mine"').replace('type = "Q3_K"', 'type = "IQ3_S"'))
    again = json.loads(m3("quantize", "recipe", "mine.toml", "--json").stdout)
    assert again["name"] == "mine"
    (gate_up,) = [rule for rule in again["tensors"] if "gate|up)_exps" in rule["pattern"]]
    assert gate_up["type"] == "IQ3_S"
    assert m3("quantize", "recipe", "./mine.toml").stdout == mine.read_text()


def test_of_a_model(m3: Run, tiny_gguf: Path) -> None:
    """With a model, exact sizes: those of M3's kind match it, in rising order for rising types."""
    listed = json.loads(m3("quantize", "recipe", "--model", str(tiny_gguf), "--json").stdout)
    assert [each["problem"] for each in listed] == [None] * len(built_in())
    sizes = {each["name"]: each["nbytes"] for each in listed}
    assert sizes["uniform-q2_k"] < sizes["uniform-q4_k"] < sizes["uniform-q8_0"] < tiny_gguf.stat().st_size
    table = m3("quantize", "recipe", "--model", str(tiny_gguf)).stdout
    assert f"{sizes['m3-q4']:,}" in table
    one = m3("quantize", "recipe", "m3-q4", "--model", str(tiny_gguf))
    assert one.stdout == load_recipe("m3-q4").toml()
    assert one.stderr.startswith(f"{sizes['m3-q4']:,} bytes (")
    assert m3("quantize", "recipe", "m3-q4", "-q", "--model", str(tiny_gguf)).stderr == ""


def test_a_model_that_a_recipe_does_not_match(m3: Run, smollm2: str) -> None:
    """The list gives the reason; asked for by name, it is an error, and nothing is printed."""
    listed = json.loads(m3("quantize", "recipe", "--model", smollm2, "--json").stdout)
    fits = {each["name"]: each for each in listed}
    assert fits["uniform-q4_k"]["nbytes"] > 80_000_000
    assert "names no tensor of this model" in fits["m3-q4"]["problem"]
    assert fits["m3-q4"]["nbytes"] is None
    table = m3("quantize", "recipe", "--model", smollm2, COLUMNS="300").stdout
    assert "does not match: Rule 2 (ffn_gate_inp" in table
    one = m3("quantize", "recipe", "m3-q4", "--model", smollm2)
    assert (one.returncode, one.stdout) == (2, "")
    assert "Rule 2 (ffn_gate_inp\\.|exp_probs_b) of recipe m3-q4 names no tensor" in one.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["m3-q33"], 2, "There is no recipe m3-q33.\nDid you mean m3-q3?"),
        (["none.toml"], 2, "The recipe none.toml cannot be read: No such file or directory."),
        (["broken.toml"], 2, "broken.toml is not valid TOML"),
        (["m3-q2", "--model", "none.gguf"], 3, "none.gguf"),
        (["m3-q2", "--model", "broken.toml.gguf"], 3, "broken.toml.gguf is not a GGUF file"),
    ],
)
def test_what_is_wrong_is_said(
    m3: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    """A sentence and a hint on stderr, nothing on stdout."""
    (tmp_path / "broken.toml").write_text("name =")
    (tmp_path / "broken.toml.gguf").write_text("name =")
    done = m3("quantize", "recipe", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_printing_loads_nothing_heavy(environ: dict[str, str]) -> None:
    """Recipes are listed and printed without the libraries that quantize."""
    program = (
        "import sys\n"
        "from m3cli.__main__ import main\n"
        "sys.argv = ['m3', 'quantize', 'recipe', 'm3-q2']\n"
        "try:\n    main()\n"
        "finally:\n    print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True
    )
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "quantize" in loaded
    assert not loaded & {"torch", "gguf", "numpy", "llama_cpp", "safetensors"}
