"""Reading and decoding: encodings, binary kinds, limits, generated and lock files."""

from __future__ import annotations

import codecs
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.decoding import decode
from m3cli.corpus.documents import DocumentLimits, read_document, read_documents
from m3cli.corpus.types import Document, Skip, SkipReason, Source
from m3cli.errors import CorpusError

FRENCH = (
    "# Le module gère la connexion à la base\ndef connexion(hôte, délai=30):\n    # réessaie en cas d'échec\n"
)
POLISH = "# Ten moduł zarządza połączeniem z bazą danych, żeby łączyć się szybciej.\n# Powtórzy próbę.\n"
RUSSIAN = "# Этот модуль управляет соединением с базой данных\ndef connect(host):\n    # При ошибке повтор\n"
JAPANESE = (
    "# このモジュールはデータベースへの接続を管理します\ndef connect(host):\n    # 三回まで再試行する\n"
)
CHINESE = "# 这个模块负责管理数据库连接\ndef connect(host):\n    # 如果连接失败则重试三次，然后返回错误\n"
TAIWANESE = "# 這個模組負責管理資料庫連線\n# 如果連線失敗則重試三次，然後回傳錯誤\n"
KOREAN = (
    "# 이 모듈은 데이터베이스 연결을 관리합니다\ndef connect(host):\n    # 연결에 실패하면 다시 시도합니다\n"
)
GREEK = "# Αυτή η μονάδα διαχειρίζεται τη σύνδεση με τη βάση δεδομένων\n"


def read(
    data: bytes, path: str = "a.txt", *, explicit: bool = False, limits: DocumentLimits | None = None
) -> Document | Skip:
    return read_document(Source(path, data=data, explicit=explicit), limits or DocumentLimits())


def reason(result: Document | Skip) -> SkipReason | None:
    return result.reason if isinstance(result, Skip) else None


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (FRENCH, "utf-8", "utf-8"),
        (JAPANESE, "utf-8-sig", "utf-8"),
        (FRENCH, "latin-1", "cp1252"),
        (FRENCH, "cp1252", "cp1252"),
        ("It\u2019s \u201csmart\u201d \u2013 and costs 5 \u20ac today\u2026\n", "cp1252", "cp1252"),
        ("/* Copyright \xa9 2003 Acme Inc. */\nint main(void) { return 0; }\n", "latin-1", "cp1252"),
        ("Author: J\xf6rg M\xfcller <j@example.org>\n", "latin-1", "cp1252"),
        ("café\r\n", "latin-1", "cp1252"),
        (POLISH, "cp1250", "cp1250"),
        (POLISH, "iso8859-2", "iso8859-2"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (RUSSIAN, "cp1251", "cp1251"),
        (RUSSIAN, "cp866", "cp866"),
        (JAPANESE, "shift_jis", "cp932"),
        (JAPANESE, "euc_jp", "euc_jp"),
        (CHINESE, "gb18030", "gb18030"),
        (TAIWANESE, "big5", "big5"),
        (KOREAN, "euc_kr", "cp949"),
        (GREEK, "cp1253", "cp1253"),
    ],
)
def test_encodings(text: str, encoding: str, name: str) -> None:
    """Text in common encodings is read without a wrong character, and the encoding is named."""
    assert read(text.encode(encoding)) == Document("a.txt", text, name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [FRENCH, CHINESE, "a\n", "😀 text\n"])
def test_wide_encodings_by_their_mark(text: str, encoding: str) -> None:
    """UTF-16 and UTF-32 are read by their byte order mark, which is no part of the text."""
    mark = {
        "utf-16-le": codecs.BOM_UTF16_LE,
        "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE,
        "utf-32-be": codecs.BOM_UTF32_BE,
    }[encoding]
    assert read(mark + text.encode(encoding)) == Document("a.txt", text, encoding)


def test_utf_16_without_a_mark_is_read_only_when_it_is_certain() -> None:
    """Mostly ASCII text in UTF-16 is recognised; small numbers in 16 bits are binary."""
    for encoding in ("utf-16-le", "utf-16-be"):
        assert read(FRENCH.encode(encoding)) == Document("a.txt", FRENCH, encoding)
        numbers = b"".join(n.to_bytes(2, "little" if encoding.endswith("le") else "big") for n in range(200))
        assert reason(read(numbers)) is SkipReason.BINARY


@given(
    st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\ufeff"), min_size=1)
)
def test_utf_8_comes_back_unchanged(text: str) -> None:
    """Every UTF-8 text without NUL that is not blank is read to the same characters."""
    if text.strip() and not text.startswith("%PDF-"):
        result = decode(text.encode())
        assert result == (text, "utf-8") or result[0] is SkipReason.BINARY


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_what_is_decoded_is_all_of_the_bytes(data: bytes) -> None:
    """Whatever is decoded is the whole of the bytes in the encoding that is named."""
    first, second = decode(data)
    if not isinstance(first, SkipReason):
        assert first in {data[mark:].decode(second, "replace") for mark in (0, 2, 3, 4)}
    assert decode(data) == (first, second)


def test_random_bytes_are_not_text() -> None:
    """Bytes without NUL and without controls, but at random, are undecodable."""
    alphabet = [code for code in range(256) if code >= 0x20 and code != 0x7F]
    for seed in range(40):
        data = bytes(random.Random(seed).choices(alphabet, k=64 + 50 * seed))
        assert reason(read(data)) is SkipReason.UNDECODABLE


def test_legacy_text_late_in_a_long_file_is_seen() -> None:
    """The encoding is told by the lines that are not ASCII, wherever they stand."""
    text = "x = 1\n" * 50_000 + FRENCH
    assert read(text.encode("latin-1")) == Document("a.txt", text, "cp1252")
    line = CHINESE.replace("\n", " ") * 3_000
    assert read(line.encode("gb18030")) == Document("a.txt", line, "gb18030")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG image"),
        (b"%PDF-1.7\n1 0 obj\n", "PDF document"),
        (b"PK\x03\x04\x14\x06", "ZIP archive or Office document"),
        (b"\x1f\x8b\x08\x08abc", "gzip data"),
        (b"\x7fELF\x02\x01\x01", "ELF program or library"),
        (b"GGUF\x03\0\0\0", "GGUF model"),
        (b"text with a NUL\0 in it\n", "NUL bytes"),
        (b"\xff\xfe\0\0\0\0\0\0\0", "NUL bytes"),
    ],
)
def test_binary_files_are_named(data: bytes, kind: str) -> None:
    """Binary content is left out under the name of its kind, even from explicit sources."""
    assert read(data) == Skip("a.txt", SkipReason.BINARY, kind)
    assert reason(read(data, explicit=True)) is SkipReason.BINARY


def test_text_that_begins_like_a_binary_is_text() -> None:
    """A signature of plain letters does not make a text binary."""
    for text in ("BM is a bitmap\n", "MZ\n", "GGUF is a format\n", "RIFF\n", "ID3 tags\n", "OTTO\n"):
        assert read(text.encode()) == Document("a.txt", text, "utf-8")


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE + b"\n\0"])
def test_blank_files_are_empty(data: bytes) -> None:
    """Files without anything but white space are left out, named or not."""
    assert read(data) == Skip("a.txt", SkipReason.EMPTY)
    assert reason(read(data, explicit=True)) is SkipReason.EMPTY


def test_line_ends_stay() -> None:
    """Carriage returns are part of the text."""
    assert read(b"a\r\nb\rc\n") == Document("a.txt", "a\r\nb\rc\n", "utf-8")


LOCKS = [
    "package-lock.json",
    "sub/yarn.lock",
    "Cargo.lock",
    "go.sum",
    "Gemfile.lock",
    "uv.lock",
    "Pipfile.lock",
]


@pytest.mark.parametrize("path", LOCKS)
def test_lock_files_are_left_out_unless_named(path: str) -> None:
    """Lock files found in a walk are left out, one that the user names is read."""
    assert reason(read(b"{}\n", path)) is SkipReason.LOCK_FILE
    assert reason(read(b"{}\n", path, explicit=True)) is None


@pytest.mark.parametrize("path", ["lock.py", "package.json", "file.lock.md", "go.mod", "block.lock"])
def test_other_files_are_no_lock_files(path: str) -> None:
    """Names that merely resemble lock files are read."""
    assert reason(read(b"{}\n", path)) is None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.min.js", "x\n"),
        ("lib/jquery-min.js", "x\n"),
        ("a.MIN.css", "x\n"),
        ("a.js.map", "x\n"),
        ("app.map", '{"version":3,"sources":["a.ts"],"mappings":"AAAA"}\n'),
        ("a.go", "// Code generated by protoc-gen-go. DO NOT EDIT.\n\npackage a\n"),
        ("a.go", "// Copyright 2020\n\n// Code generated by mockgen. DO NOT EDIT.\npackage a\n"),
        ("a_pb2.py", "# -*- coding: utf-8 -*-\n# Generated by the protocol buffer compiler.  DO NOT EDIT!\n"),
        ("a.php", "<?php\n/**\n * @generated SignedSource<<abc>>\n */\n"),
        ("a.rs", "// This file is @generated by prost-build.\n"),
        ("Cargo.txt", "# This file is automatically @generated by Cargo.\n"),
        ("a.sql", "-- This file was auto-generated by x; do not modify.\n"),
        ("a.xml", "<!-- Autogenerated, do not edit -->\n<a/>\n"),
        ("a.js", "var a=1;" * 2_000 + "\n"),
        ("a.svg", "<svg>" + "<path/>" * 2_000 + "</svg>\n"),
    ],
)
def test_generated_and_minified_files_are_left_out(path: str, text: str) -> None:
    """Files that a program wrote are left out with what shows it, unless the user names them."""
    result = read(text.encode(), path)
    assert reason(result) is SkipReason.GENERATED
    assert isinstance(result, Skip)
    assert result.detail
    assert reason(read(text.encode(), path, explicit=True)) is None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", 'MARKER = "@generated"\n'),
        ("a.py", "# Skips files that hold the @generated marker near the top.\n"),
        ("a.py", "# @generated_by is set by the caller\n"),
        ("a.py", '"""Find files that say: Code generated by x. DO NOT EDIT."""\n'),
        ("a.go", 'var re = "// Code generated .* DO NOT EDIT"\n'),
        ("a.md", "Files marked with `@generated` are generated. Do not edit them.\n"),
        ("a.py", "# The report is generated at night.\n"),
        ("a.py", "x = 1\n" * 30 + "# Code generated by hand. DO NOT EDIT.\n"),
        ("admin.js", "x\n"),
        ("min.js", "x\n"),
        ("game.map", "#####\n#   #\n"),
        ("short.js", "var a=1;" * 300),
        ("a.txt", "word " * 4_000),
        ("a.css", "a { color: red; background: blue }\n" * 400),
    ],
)
def test_files_that_people_wrote_stay(path: str, text: str) -> None:
    """What merely mentions a marker, or has long lines of prose, is read."""
    assert read(text.encode(), path) == Document(path, text, "utf-8")


def test_size_limits(tmp_path: Path) -> None:
    """A file above its limit is not read; the two limits are for found and for named files."""
    file = tmp_path / "a.txt"
    file.write_text("x" * 101)
    limits = DocumentLimits(max_bytes=100, explicit_max_bytes=None)
    found, named = Source("a.txt", file=file), Source("a.txt", file=file, explicit=True)
    assert read_document(found, limits) == Skip("a.txt", SkipReason.TOO_LARGE, "101 bytes, the limit is 100")
    assert reason(read_document(named, limits)) is None
    assert reason(read_document(found, DocumentLimits(max_bytes=101))) is None
    assert reason(read_document(found, DocumentLimits(max_bytes=None))) is None
    assert reason(read_document(named, DocumentLimits(explicit_max_bytes=100))) is SkipReason.TOO_LARGE
    assert (
        reason(read(b"x" * 9, explicit=True, limits=DocumentLimits(explicit_max_bytes=8)))
        is SkipReason.TOO_LARGE
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_that_grows_past_its_limit_is_too_large() -> None:
    """A file that says it is empty and is not, as in /proc, is cut off at the limit."""
    source = Source("status", file=Path("/proc/self/status"))
    assert reason(read_document(source, DocumentLimits(max_bytes=20))) is SkipReason.TOO_LARGE
    assert reason(read_document(source, DocumentLimits())) is None


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_files() -> None:
    """A read error is a skip in a walk, and an error when the user named the file."""
    file = Path("/proc/self/mem")
    assert read_document(Source("mem", file=file), DocumentLimits()) == Skip(
        "mem", SkipReason.UNREADABLE, os.strerror(5)
    )
    with pytest.raises(CorpusError, match=r"mem cannot be read: Input/output error\."):
        read_document(Source("mem", file=file, explicit=True), DocumentLimits())


def test_files_that_changed_since_the_walk(tmp_path: Path) -> None:
    """A file that became a FIFO or a link is neither waited for nor followed; a lost one is told."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "link").symlink_to("secret")
    sources = [Source(name, file=tmp_path / name) for name in ("fifo", "link", "lost", "secret")]
    results = list(read_documents(sources, DocumentLimits()))
    documents = [result for result in results if isinstance(result, Document)]
    skips = [result for result in results if isinstance(result, Skip)]
    assert [document.path for document in documents] == ["secret"]
    assert [(skip.path, skip.reason) for skip in skips] == [
        ("fifo", SkipReason.SPECIAL),
        ("link", SkipReason.UNREADABLE),
        ("lost", SkipReason.UNREADABLE),
    ]
    with pytest.raises(CorpusError, match="fifo cannot be read: not a regular file"):
        read_document(Source("fifo", file=tmp_path / "fifo", explicit=True), DocumentLimits())
    link = Source("link", file=tmp_path / "link", explicit=True)
    assert reason(read_document(link, DocumentLimits())) is None
