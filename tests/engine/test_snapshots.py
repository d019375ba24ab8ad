from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine import snapshots
from m3cli.engine.edits import common_prefix
from m3cli.engine.snapshots import Entry, SnapshotError, SnapshotStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STATE = b"keys and values " * 64


def store_at(path: Path, key: str = "k", **options: object) -> tuple[SnapshotStore, list[str]]:
    """A store and what it reports."""
    told: list[str] = []
    return SnapshotStore(path, key, report=told.append, **options), told  # type: ignore[arg-type]


def write(path: Path, data: bytes = STATE) -> int:
    return path.write_bytes(data)


def save(store: SnapshotStore, tokens: Sequence[int], state: bytes = STATE) -> Entry:
    entry = store.save(
        tokens, len(state), lambda path: write(path, state), label="tree", model="m", tokens_per_second=100.0
    )
    assert entry is not None
    return entry


def used(entry: Entry, seconds: float) -> None:
    os.utime(entry.directory / "manifest.json", (seconds, seconds))


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_the_longest_shared_prefix_comes_first(tmp_path: Path) -> None:
    """Entries of the same key are found by what they share with a prompt, those of another key not."""
    store, told = store_at(tmp_path)
    save(store, [1, 2, 3, 9])
    best = save(store, [1, 2, 3, 4, 5])
    save(store, [7, 8])
    save(store_at(tmp_path, "other")[0], [1, 2, 3, 4, 5, 6])
    found = store.find([1, 2, 3, 4, 6])
    assert [(match.common, match.entry.manifest.tokens) for match in found] == [(4, 5), (3, 4)]
    assert found[0].entry == best
    assert best.state_file.read_bytes() == STATE
    best.check()
    assert told == []


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_a_common_prefix_is_what_both_begin_with(first: list[int], second: list[int]) -> None:
    """Equal up to there, and not one further."""
    length = common_prefix(np.array(first, np.int32), np.array(second, np.int32))
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


def test_one_context_is_one_entry(tmp_path: Path) -> None:
    """Saving what is there already writes nothing; it counts as a use."""
    store, _ = store_at(tmp_path)
    entry = save(store, [1, 2])
    used(entry, 1.0)
    again = store.save(
        [1, 2], 1, lambda _: pytest.fail("written twice"), label="", model="", tokens_per_second=0
    )
    assert again is not None
    assert again.directory == entry.directory
    assert again.used > 1.0


def test_what_only_begins_a_longer_context_goes(tmp_path: Path) -> None:
    """A checkpoint is superseded by what was computed from it; what differs stays."""
    store, _ = store_at(tmp_path)
    save(store, [1, 2])
    other = save(store, [1, 9])
    longer = save(store, [1, 2, 3])
    assert {entry.directory for entry in store.entries()} == {other.directory, longer.directory}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "tokens.bin", "state.bin"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_damage_is_reported_once_and_ignored(tmp_path: Path, name: str, damage: str) -> None:
    """A bit that flipped, a file that is short or gone: the entry is not used, and is removed."""
    store, told = store_at(tmp_path)
    entry = save(store, [1, 2, 3])
    file = entry.directory / name
    if damage == "flipped":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "empty":
        os.truncate(file, 0)
    else:
        file.unlink()
    for match in store.find([1, 2, 3]):
        with pytest.raises(SnapshotError) as caught:
            match.entry.check()
        store.discard(match.entry, str(caught.value))
    # an entry without a manifest is none: a half-written or half-removed one looks so
    assert len(told) == (0 if (name, damage) == ("manifest.json", "gone") else 1)
    assert store.find([1, 2, 3]) == []
    assert len(told) <= 1
    assert save(store, [1, 2, 3]).state_file.read_bytes() == STATE


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """No flipped bit makes another manifest that is believed."""
    store, _ = store_at(tmp_path)
    entry = save(store, [1, 2, 3])
    path = entry.directory / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 16):
            data = bytearray(whole)
            data[place] ^= bit
            decoded = snapshots._decode(bytes(data))
            assert decoded is None or decoded == entry.manifest  # a blank may become another blank


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"manifest": 1, "digest": 2}', '{"manifest": {"a": []}}', "\xff"]
)
def test_nonsense_is_no_manifest(tmp_path: Path, text: str) -> None:
    """Whatever stands in a manifest's place, nothing but None comes of it."""
    assert snapshots._decode(text.encode("latin-1")) is None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """Beyond the limit, what was not used for longest makes room; the new entry always has its place."""
    store, _ = store_at(tmp_path, max_bytes=3 * (len(STATE) + 8))
    first, second, third = (save(store, [n, n]) for n in range(3))
    for entry, time in ((first, 2.0), (second, 1.0), (third, 3.0)):
        used(entry, time)
    save(store, [3, 3])
    left = {entry.directory for entry in store.entries()}
    assert second.directory not in left
    assert len(left) == 3


def test_what_is_larger_than_the_cache_is_not_saved(tmp_path: Path) -> None:
    """It says how large both are, and nothing that is there is given up for it in the end."""
    store, _ = store_at(tmp_path, max_bytes=100)
    with pytest.raises(SnapshotError, match="the cache may hold 0 MB"):
        save(store, [1, 2])
    assert files(tmp_path) == []


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the disk stays free for others."""
    store, _ = store_at(tmp_path, max_bytes=1 << 40)
    usage = snapshots.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda _: usage._replace(free=200 << 20))
    with pytest.raises(SnapshotError, match="the disk has 210 MB free"):
        save(store, [1, 2])
    assert files(tmp_path) == []


def no_space(_: Path) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "writer", [no_space, lambda _: 0, lambda path: write(path) + 1, lambda path: write(path, b"")]
)
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, writer: object) -> None:
    """Whether the system or llama.cpp says so, or the file is short."""
    store, _ = store_at(tmp_path)
    with pytest.raises(SnapshotError):
        store.save([1], 1, writer, label="", model="", tokens_per_second=0)  # type: ignore[arg-type]
    assert files(tmp_path) == []
    assert [path.name for path in (tmp_path / "v1" / "k").iterdir()] == []


def test_two_writers_make_one_entry(tmp_path: Path) -> None:
    """While one writes, the other leaves it alone, and so does pruning."""
    store, _ = store_at(tmp_path)

    def write_while_others_try(path: Path) -> int:
        other, _ = store_at(tmp_path)
        again = other.save([1], 1, lambda _: pytest.fail("both"), label="", model="", tokens_per_second=0)
        assert again is None
        other.prune()
        return write(path)

    assert store.save([1], 1, write_while_others_try, label="", model="", tokens_per_second=0) is not None
    assert len(store.entries()) == 1


def test_what_a_dead_writer_left_is_written_over_or_pruned(tmp_path: Path) -> None:
    """A directory that nobody holds is debris."""
    store, told = store_at(tmp_path)
    entry = save(store, [1])
    partial = entry.directory.with_name(entry.directory.name + ".partial")
    store.remove(entry)
    partial.mkdir()
    (partial / "state.bin").write_bytes(b"half")
    assert store.entries() == []
    assert save(store, [1]).state_file.read_bytes() == STATE
    partial.mkdir()
    store.prune()
    assert not partial.exists()
    assert told == []


def test_loading_has_to_pay(tmp_path: Path) -> None:
    """An entry is loaded if that is faster than computing, by what was measured on this machine."""
    store, _ = store_at(tmp_path)
    entry = save(store, [1] * 1000)  # computed at 100 tokens/s
    assert store.pays(entry, 10)
    for _ in range(60):
        store.note_load(1, 1.0)  # a byte a second
    assert not store.pays(entry, 10)
    assert store.pays(entry, 10**6)
    (tmp_path / "v1" / "rates.json").write_text("nonsense")
    assert store.pays(entry, 10)


def test_manifests_say_what_an_entry_is(tmp_path: Path) -> None:
    """A person finds tree, model and size in it, and the ids in little-endian order beside it."""
    store, _ = store_at(tmp_path)
    entry = save(store, [258, 1])
    manifest = json.loads((entry.directory / "manifest.json").read_text("utf-8"))["manifest"]
    assert (manifest["label"], manifest["model"], manifest["tokens"]) == ("tree", "m", 2)
    assert (entry.directory / "tokens.bin").read_bytes() == bytes([2, 1, 0, 0, 1, 0, 0, 0])
    assert entry.nbytes == len(STATE) + 8


def test_a_manifest_of_an_older_release_is_read(tmp_path: Path) -> None:
    """One that says nothing of cuts and changes has none."""
    store, told = store_at(tmp_path)
    entry = save(store, [1, 2, 3])
    path = entry.directory / "manifest.json"
    manifest = json.loads(path.read_bytes())["manifest"]
    del manifest["cuts"], manifest["changed"]
    digest = snapshots._digest(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps({"manifest": manifest, "digest": digest}, indent=1))
    (match,) = store.find([1, 2, 3])
    assert (match.common, *match.entry.manifest.cuts, *match.entry.manifest.changed) == (3,)
    match.entry.check()
    assert told == []


def test_cuts_and_changes_survive(tmp_path: Path) -> None:
    """What an entry says of how its tokens were computed is what was saved."""
    store, _ = store_at(tmp_path)
    store.save(
        [1, 2, 3],
        len(STATE),
        write,
        label="tree",
        model="m",
        tokens_per_second=0,
        cuts=[1],
        changed=[[2, 0], [1, 5]],
    )
    (match,) = store.find([1, 2, 3])
    assert list(match.entry.manifest.cuts) == [1]
    assert [list(run) for run in match.entry.manifest.changed] == [[2, 0], [1, 5]]


def test_entries_are_found_by_label(tmp_path: Path) -> None:
    """The one used last first, and of this key only."""
    store, _ = store_at(tmp_path)
    other, _ = store_at(tmp_path, "other")
    entries = [save(store, [n, n]) for n in range(3)]
    save(other, [5])
    store.save([9], len(STATE), write, label="else", model="m", tokens_per_second=0)
    for entry, time in zip(entries, (2.0, 3.0, 1.0), strict=True):
        used(entry, time)
    assert [ids.tolist() for _, ids in store.labelled("tree", 9)] == [[1, 1], [0, 0], [2, 2]]
    assert len(store.labelled("else", 9)) == len(other.labelled("tree", 9)) == 1


def test_one_of_each_label(tmp_path: Path) -> None:
    """Where that is asked for, an entry takes the place of those of its label; without a label, of none."""
    store = SnapshotStore(tmp_path, "key", most_of_a_label=1)
    for ids, label in (([1], "tree"), ([1, 2], "else"), ([3], ""), ([4], ""), ([1, 2, 3], "tree")):
        store.save(ids, len(STATE), write, label=label, model="m", tokens_per_second=0)
    assert [ids.tolist() for _, ids in store.labelled("tree", 9)] == [[1, 2, 3]]
    assert [ids.tolist() for _, ids in store.labelled("else", 9)] == [[1, 2]]
    assert len(store.labelled("", 9)) == 2
