"""Files that are written, and words that are shown."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from m3cli.errors import MachineError
from m3cli.report.output import write_file
from m3cli.report.text import amount, duration, printable, size


def test_a_file_keeps_its_mode_and_its_links(tmp_path: Path) -> None:
    """Writing over a file keeps its mode; over a link it writes where the link leads."""
    target, link = tmp_path / "private.txt", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_file(link, [b"new"])
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "private.txt"]


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    """A FIFO stays one, and its reader gets the data."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    write_file(fifo, [b"data"])
    reader.join(30)
    assert got == [b"data"]
    assert fifo.is_fifo()


@pytest.mark.parametrize("name", ["nowhere/out", "loop", "x" * 300])
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    """The error names the file, and nothing is left behind."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(MachineError, match="cannot be written"):
        write_file(tmp_path / name, [b"data"])
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the replacement cannot be put in place, the old content stays and no debris does."""
    old = tmp_path / "out"
    old.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MachineError, match="No space left"):
        write_file(old, [b"new"])
    assert old.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_control_characters_become_visible() -> None:
    """What could drive a terminal or turn text round is replaced; newlines, tabs and letters stay."""
    assert printable("a\x1b[2Jb\x9bc\u202ed\r\n\té漢") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd\n\té漢"


def test_numbers_are_written_for_people() -> None:
    """Amounts, sizes and durations have their units."""
    assert [amount(1, "file"), amount(1234, "file")] == ["1 file", "1,234 files"]
    assert [size(999), size(98_362_432), size(8.5e11)] == ["999 B", "98.4 MB", "850.0 GB"]
    assert [duration(45), duration(720), duration(12_000)] == ["45 s", "12 min", "3 h 20 min"]
