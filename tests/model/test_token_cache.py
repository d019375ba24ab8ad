from __future__ import annotations

import sqlite3
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli import memo
from m3cli.memo import Memo
from m3cli.model.token_cache import CachingTokenizer
from m3cli.model.tokens import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LONG = "a text that is long enough to be kept, line after line\n" * 8


class Counting(ByteTokenizer):
    """Counts the texts that it had to encode."""

    def __init__(self, name: str = "bytes") -> None:
        self.name = name
        self.encoded = 0
        self.closed = False

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        texts = list(texts)
        self.encoded += len(texts)
        return super().encode_batch(texts)

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        texts = list(texts)
        self.encoded += len(texts)
        return super().count_batch(texts)

    def close(self) -> None:
        self.closed = True


def cached(path: Path, name: str = "bytes") -> tuple[CachingTokenizer, Counting]:
    inner = Counting(name)
    return CachingTokenizer(inner, Memo(path)), inner


def test_what_was_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    """A second process finds the ids of long texts; short ones are faster to encode than to look up."""
    texts = [LONG + "1", "short", LONG + "2", LONG + "1"]
    first, _ = cached(tmp_path / "tokens.sqlite")
    want = ByteTokenizer().encode_batch(texts)
    assert first.encode_batch(texts) == want
    first.close()
    second, inner = cached(tmp_path / "tokens.sqlite")
    assert second.encode_batch([*texts, LONG + "3"]) == [*want, ByteTokenizer().encode(LONG + "3")]
    assert inner.encoded == 2  # the short one and the new one
    assert second.encode(LONG + "3") == ByteTokenizer().encode(LONG + "3")
    assert inner.encoded == 2


@settings(max_examples=30)
@given(st.lists(st.one_of(st.text(), st.text(min_size=256, max_size=300)), max_size=8))
def test_ids_are_those_of_the_tokenizer(texts: list[str]) -> None:
    """Whatever the texts, surrogates and repeats included, known or new."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        tokenizer, _ = cached(Path(directory) / "tokens.sqlite")
        for _ in range(2):
            assert tokenizer.encode_batch(texts) == ByteTokenizer().encode_batch(texts)
        tokenizer.close()


@settings(max_examples=30)
@given(st.lists(st.text(max_size=300), max_size=80), st.data())
def test_counts_are_those_of_the_tokenizer(texts: list[str], data: st.DataObject) -> None:
    """However the texts fall into groups, and after an edit of one of them."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        tokenizer, _ = cached(Path(directory) / "tokens.sqlite")
        for _ in range(2):
            assert tokenizer.count_batch(iter(texts)) == ByteTokenizer().count_batch(texts)
        if texts:
            texts[data.draw(st.integers(0, len(texts) - 1))] = data.draw(st.text())
        assert tokenizer.count_batch(texts) == ByteTokenizer().count_batch(texts)
        tokenizer.close()


def test_an_edit_is_counted_anew_with_its_neighbours_only(tmp_path: Path) -> None:
    """A second process counts the group of the changed text, and no other."""
    texts = [f"{LONG}{number}" for number in range(2000)]
    first, _ = cached(tmp_path / "tokens.sqlite")
    first.count_batch(texts)
    first.close()
    texts[1000:1000] = ["new", LONG]
    second, inner = cached(tmp_path / "tokens.sqlite")
    assert second.count_batch(texts) == ByteTokenizer().count_batch(texts)
    assert 2 <= inner.encoded <= 300
    second.close()


def test_vocabularies_are_kept_apart(tmp_path: Path) -> None:
    """The ids of one model are not those of another."""
    first, _ = cached(tmp_path / "tokens.sqlite", "one")
    first.encode(LONG)
    first.close()
    second, inner = cached(tmp_path / "tokens.sqlite", "two")
    second.encode(LONG)
    assert inner.encoded == 1


@pytest.mark.parametrize("data", [b"", b"no database at all", b"SQLite format 3\0" + bytes(2000)])
def test_a_broken_file_means_an_empty_cache(tmp_path: Path, data: bytes) -> None:
    """It is replaced, and the next run finds what this one computed."""
    path = tmp_path / "tokens.sqlite"
    path.write_bytes(data)
    first, _ = cached(path)
    assert first.encode(LONG) == ByteTokenizer().encode(LONG)
    first.close()
    second, inner = cached(path)
    assert second.encode(LONG) == ByteTokenizer().encode(LONG)
    assert inner.encoded == 0


def test_a_damaged_row_is_no_answer(tmp_path: Path) -> None:
    """Ids that do not come in fours are not taken for some."""
    path = tmp_path / "tokens.sqlite"
    first, _ = cached(path)
    first.encode(LONG)
    first.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE memo SET value = substr(value, 2)")
    database.close()
    second, inner = cached(path)
    assert second.encode(LONG) == ByteTokenizer().encode(LONG)
    assert inner.encoded == 1


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    """Without a cache everything is encoded."""
    (tmp_path / "file").write_text("in the way")
    tokenizer, inner = cached(tmp_path / "file" / "tokens.sqlite")
    for _ in range(2):
        assert tokenizer.encode(LONG) == ByteTokenizer().encode(LONG)
    assert inner.encoded == 2


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit, half of it goes, what was used longest ago first."""
    monkeypatch.setattr(memo, "_LARGEST", 200_000)
    path = tmp_path / "tokens.sqlite"
    tokenizer, inner = cached(path)
    for number in range(400):
        tokenizer.encode(LONG + str(number))
    assert path.stat().st_size < 400_000
    inner.encoded = 0
    tokenizer.encode(LONG + "399")
    assert inner.encoded <= 1


def test_processes_share_it(tmp_path: Path) -> None:
    """Writers at the same time wait for each other, and none gets a wrong answer."""
    failures: list[str] = []

    def work(start: int) -> None:
        tokenizer, _ = cached(tmp_path / "tokens.sqlite")
        texts = [LONG + str(number) for number in range(start, start + 60)]
        failures.extend(text for text in texts if tokenizer.encode(text) != ByteTokenizer().encode(text))
        tokenizer.close()

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 30, 30, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_closing_closes_what_is_inside(tmp_path: Path) -> None:
    """A tokenizer that holds a process ends with its cache."""
    tokenizer, inner = cached(tmp_path / "tokens.sqlite")
    tokenizer.close()
    tokenizer.close()
    assert inner.closed
