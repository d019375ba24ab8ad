"""`from m3cli import pack`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from m3cli import pack
from m3cli.errors import CorpusError, DoesNotFitError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("def retry(call):\n    # once more\n    return call()\n")
    (tmp_path / "src/b.py").write_text("".join(f"value_{i} = {i}\n" for i in range(400)))
    (tmp_path / ".hidden").write_text("x = 1\n")
    return tmp_path


def test_packing_from_python(tree: Path) -> None:
    """The same values as on the command line, as arguments, and everything about the pack."""
    result = pack(tree, format="json")
    files = json.loads(result.text)["files"]
    assert [file["path"] for file in files] == ["src/a.py", "src/b.py"]
    assert [skip.path for skip in result.corpus.skips] == [".hidden"]
    assert result.pack.tokens == result.pack.tokens_needed > 1000
    small = pack(tree, budget=100, query="retry", cache_dir=tree / "cache", exclude=["cache"])
    assert small.pack.tokens <= 100
    assert "def retry" in small.text
    assert small.pack.omitted
    assert "once more" not in pack(tree / "src/a.py", strip_comments=True).text
    assert "return call" not in pack(str(tree / "src"), compress=True).text
    assert len(pack(tree, split_tokens=1500).split) > 1
    assert pack(tree, template="{{ files|length }}", hidden=True).text == "3"


def test_errors_are_exceptions(tree: Path) -> None:
    """Each is of m3's own tree; nothing is printed and nothing exits."""
    with pytest.raises(UsageError):
        pack(tree / "nothing")
    with pytest.raises(UsageError):
        pack("-")
    with pytest.raises(DoesNotFitError):
        pack(tree, budget=1)
    with pytest.raises(UsageError, match="exclude each other"):
        pack(tree, split_tokens=1000, budget=1)
    with pytest.raises(UsageError, match="yaml"):
        pack(tree, format="yaml")  # type: ignore[arg-type]
    with pytest.raises(CorpusError):
        pack(tree, include=["*.nothing"])


def test_importing_the_package_is_light() -> None:
    """Nothing heavy is imported before it is used."""
    code = (
        "import m3cli, sys; print([n for n in ('typer', 'numpy', 'tiktoken', 'jinja2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
