from __future__ import annotations

import json
import resource
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from m3cli.errors import MachineError, UsageError
from quantize import partial
from quantize.events import OutputFile
from quantize.partial import PartialFiles, Source

if TYPE_CHECKING:
    from pathlib import Path

FILES = (OutputFile("m-00001-of-00002.gguf", 6), OutputFile("m-00002-of-00002.gguf", 4))


def begin(
    tmp_path: Path, fingerprint: str = "a", sources: dict[str, Source] | None = None, *, resume: bool = False
) -> PartialFiles:
    return PartialFiles(tmp_path / "m.gguf", FILES, fingerprint, sources, resume=resume)


def write_all(output: PartialFiles, text: bytes = b"abcdefghij") -> list[Path]:
    """Write what is missing of `text`, two bytes at a time, and publish."""
    with output:
        while output.done < output.total:
            output.append(text[output.done : output.done + 2])
        return output.publish()


def interrupted(tmp_path: Path, after: int) -> None:
    """Write `after` bytes, then stop as Ctrl-C does."""
    with pytest.raises(KeyboardInterrupt), begin(tmp_path) as output:  # noqa: PT012
        while output.done < after:
            output.append(b"abcdefghij"[output.done : output.done + 2])
        raise KeyboardInterrupt


def test_files_appear_when_all_are_complete(tmp_path: Path) -> None:
    """Until the last byte only the partial directory is there; then only the files are."""
    with begin(tmp_path) as output:
        output.append(b"abcdef")
        output.append(b"ghij")
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.partial"]
        published = output.publish()
    assert [path.name for path in published] == [file.name for file in FILES]
    assert sorted(tmp_path.iterdir()) == published
    assert b"".join(path.read_bytes() for path in published) == b"abcdefghij"


@pytest.mark.parametrize("after", [0, 2, 6, 8, 10])
def test_an_interrupt_loses_nothing(tmp_path: Path, after: int) -> None:
    """What was written before Ctrl-C is not written again, in whichever file it fell."""
    interrupted(tmp_path, after)
    output = begin(tmp_path, resume=True)
    assert output.done == after
    # other bytes now, so that one can see who wrote which
    text = b"".join(path.read_bytes() for path in write_all(output, b"ABCDEFGHIJ"))
    assert text == b"abcdefghij"[:after] + b"ABCDEFGHIJ"[after:]


def test_what_the_journal_does_not_vouch_for_is_written_again(tmp_path: Path) -> None:
    """Bytes behind the last entry, as a killed process leaves them, are cut off."""
    interrupted(tmp_path, 4)
    with (tmp_path / "m.gguf.partial" / FILES[0].name).open("ab") as file:
        file.write(b"zzz")
    assert b"".join(path.read_bytes() for path in write_all(begin(tmp_path, resume=True))) == b"abcdefghij"


def test_a_kill_while_files_move_is_made_good(tmp_path: Path) -> None:
    """All is written, one file has moved already: resuming moves the other."""
    interrupted(tmp_path, 10)
    (tmp_path / "m.gguf.partial" / FILES[1].name).rename(tmp_path / FILES[1].name)
    assert b"".join(path.read_bytes() for path in write_all(begin(tmp_path, resume=True))) == b"abcdefghij"
    assert not (tmp_path / "m.gguf.partial").exists()


def test_nothing_is_overwritten_or_restarted_unasked(tmp_path: Path) -> None:
    """An unfinished conversion needs --resume, and a finished one another name."""
    interrupted(tmp_path, 6)
    with pytest.raises(UsageError, match=r"unfinished conversion in .*m\.gguf\.partial, 60% of it done"):
        begin(tmp_path)
    write_all(begin(tmp_path, resume=True))
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"00001-of-00002\.gguf already exists"):
            begin(tmp_path, resume=resume)
    assert not (tmp_path / "m.gguf.partial").exists()


def test_another_conversion_is_not_resumed(tmp_path: Path) -> None:
    """With another checkpoint or other options nothing is written, and nothing lost."""
    interrupted(tmp_path, 6)
    with pytest.raises(UsageError, match="another model, or was begun with other options"):
        begin(tmp_path, "b", resume=True)
    assert begin(tmp_path, resume=True).done == 6


def test_a_damaged_partial_directory_is_not_trusted(tmp_path: Path) -> None:
    """A file shorter than the journal says, or a journal that is none, ends the attempt."""
    interrupted(tmp_path, 8)
    directory = tmp_path / "m.gguf.partial"
    journal = (directory / "journal.json").read_text("utf-8")
    (directory / FILES[1].name).write_bytes(b"g")
    with pytest.raises(UsageError, match="shorter than the journal"):
        begin(tmp_path, resume=True)
    for nonsense in ("", "[]", "null", '{"fingerprint": "a"}', '{"fingerprint": "a", "done": "x"}'):
        (directory / "journal.json").write_text(nonsense, "utf-8")
        with pytest.raises(UsageError, match="is no journal"):
            begin(tmp_path, resume=True)
    (directory / "journal.json").write_text(journal, "utf-8")
    shutil.rmtree(directory)
    directory.mkdir()  # as if killed at once: nothing to resume, nothing to lose
    assert b"".join(path.read_bytes() for path in write_all(begin(tmp_path))) == b"abcdefghij"


def test_a_changed_source_costs_what_came_from_it(tmp_path: Path) -> None:
    """From its first byte on everything is written again; before it, nothing is."""
    before = {"a": Source("1", 0), "b": Source("1", 4), "c": Source("1", 8)}
    output = begin(tmp_path, sources=before)
    with output:
        for text in (b"ab", b"cd", b"ef"):
            output.append(text)
    after = {**before, "b": Source("2", 4), "c": Source("2", 8)}
    output = begin(tmp_path, sources=after, resume=True)
    assert output.done == 4
    text = b"".join(path.read_bytes() for path in write_all(output, b"ABCDEFGHIJ"))
    assert text == b"abcdEFGHIJ"


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """What merely has the name of an unfinished conversion is neither written into nor removed."""
    directory = tmp_path / "m.gguf.partial"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is no unfinished conversion"):
            begin(tmp_path, resume=resume)
    assert (directory / "notes.txt").read_text() == "mine"
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is in the way"):
        begin(tmp_path, resume=True)


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Hours may pass: the name is looked at again when the files move, also in a later run."""
    target = tmp_path / FILES[0].name
    with begin(tmp_path) as output:
        output.append(b"abcdef")
        output.append(b"ghij")
        target.write_text("foreign")
        with pytest.raises(UsageError, match="already exists"):
            output.publish()
    with pytest.raises(UsageError, match="already exists"):
        begin(tmp_path, resume=True)
    assert target.read_text() == "foreign"
    target.unlink()
    (tmp_path / FILES[1].name).unlink(missing_ok=True)


def test_the_first_file_moves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that can be opened means a model that is whole."""
    seen: list[list[str]] = []
    rename = type(tmp_path).rename

    def watch(path: Path, target: Path) -> Path:
        seen.append(sorted(file.name for file in tmp_path.glob("*.gguf")))
        return rename(path, target)

    with begin(tmp_path) as output:
        output.append(b"abcdef")
        output.append(b"ghij")
        monkeypatch.setattr(type(tmp_path), "rename", watch)
        output.publish()
    assert seen == [[], [FILES[1].name]]


def test_two_processes_do_not_write_one_model(tmp_path: Path) -> None:
    """The second is refused, while the first goes on."""
    with begin(tmp_path) as output:
        output.append(b"ab")
        with pytest.raises(UsageError, match="Another process is writing"):
            begin(tmp_path, resume=True)
        output.append(b"cdef")


def test_a_disk_without_room_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is compared with what is still to be written; nothing is begun."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(MachineError, match=r"needs 0\.00 GB more in .* free"):
        begin(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage)
    interrupted(tmp_path, 6)
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage._replace(free=4))
    assert begin(tmp_path, resume=True).done == 6


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the system refuses is one sentence; what was on the disk before can be resumed."""
    monkeypatch.setattr(partial, "_SYNC_BYTES", 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = (OutputFile("m.gguf", 1 << 16),)
    try:
        with (  # noqa: PT012 - the limit has to be set after the journal was begun
            pytest.raises(MachineError, match=r"m\.gguf\.partial cannot be written"),
            PartialFiles(tmp_path / "m.gguf", big, "a") as output,
        ):
            output.append(bytes(8192))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10000, limits[1]))
            output.append(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    with PartialFiles(tmp_path / "m.gguf", big, "a", resume=True) as output:
        assert output.done == 8192
        output.append(bytes((1 << 16) - 8192))
        assert output.publish()[0].stat().st_size == 1 << 16


def test_the_journal_follows_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written whenever enough came together, and never says more than was synced."""
    monkeypatch.setattr(partial, "_SYNC_BYTES", 4)
    with begin(tmp_path) as output:
        seen = []
        for start in range(0, 10, 2):
            output.append(b"abcdefghij"[start : start + 2])
            path = tmp_path / "m.gguf.partial" / "journal.json"
            seen.append(json.loads(path.read_text("utf-8"))["done"])
    assert seen == [0, 4, 6, 6, 10]
