"""From a name to a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from m3cli.errors import ModelError
from m3cli.model.catalog import downloaded_models, resolve

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a directory that m3 is started in."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tree").mkdir()
    monkeypatch.chdir(tmp_path / "tree")
    return tmp_path


def test_an_alias_wins_over_a_file_of_that_name(place: Path) -> None:
    """A repository that holds a file called like the user's alias does not choose the model."""
    (place / "real.gguf").touch()
    (place / "tree" / "m3").touch()
    assert resolve("m3", {"m3": str(place / "real.gguf")}).path == place / "real.gguf"
    assert resolve("./m3", {"m3": str(place / "real.gguf")}).origin == "path"


def test_downloads_are_known_by_their_file_name(place: Path) -> None:
    """Files in the hub's cache and llama.cpp's have names; of a split file only the first part has."""
    hub = place / ".cache/huggingface/hub/models--org--repo/snapshots/abc/Q4"
    llama = place / ".cache/llama.cpp"
    for directory in (hub, llama):
        directory.mkdir(parents=True)
    for path in (hub / "big-00001-of-00002.gguf", hub / "big-00002-of-00002.gguf", llama / "small.gguf"):
        path.touch()
    assert [ref.name for ref in downloaded_models()] == ["big-00001-of-00002", "small"]
    assert resolve("small", {}).path == llama / "small.gguf"
    assert resolve("small.gguf", {}).origin == "downloaded"


@pytest.mark.parametrize("name", ["smal", "x" * 5000, "~nobody-here/x.gguf", "a\0b"])
def test_an_unknown_name_is_an_error(place: Path, name: str) -> None:
    """Whatever was typed, the answer is that there is no such model."""
    with pytest.raises(ModelError, match="There is no model file or alias"):
        resolve(name, {})


def test_an_alias_without_a_file_is_an_error(place: Path) -> None:
    """The alias and what it stands for are named."""
    with pytest.raises(ModelError, match=r"alias 'a' stands for /gone.gguf"):
        resolve("a", {"a": "/gone.gguf"})
