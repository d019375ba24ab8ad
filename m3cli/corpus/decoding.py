"""Bytes of a file → text and the name of its encoding, or the reason why it is none.

UTF-8 if it is valid, UTF-16 and UTF-32 by their byte order mark or beyond doubt, else one of a
fixed list of legacy encodings, as charset-normalizer sees it. Nothing is ever replaced or
dropped: an encoding that does not decode every byte is not the one.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from m3cli.corpus.types import SkipReason

if TYPE_CHECKING:
    from collections.abc import Iterator

# (offset, bytes, kind). What is printable ASCII throughout could begin a text as well, so it only
# names the kind of a file that holds NUL bytes; the others decide by themselves.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"GIF87a", "GIF image"),
    (0, b"GIF89a", "GIF image"),
    (8, b"WEBP", "WebP image"),
    (0, b"BM", "BMP image"),
    (0, b"II*\0", "TIFF image"),
    (0, b"MM\0*", "TIFF image"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"8BPS", "Photoshop image"),
    (0, b"PK\x03\x04", "ZIP archive or Office document"),
    (0, b"PK\x05\x06", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (0, b"\x04\x22\x4d\x18", "LZ4 data"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (0, b"Rar!\x1a\x07", "RAR archive"),
    (257, b"ustar", "tar archive"),
    (0, b"!<arch>\n", "static library"),
    (0, b"\x7fELF", "ELF program or library"),
    (0, b"MZ", "Windows program or library"),
    (0, b"\xfe\xed\xfa\xce", "Mach-O program or library"),
    (0, b"\xfe\xed\xfa\xcf", "Mach-O program or library"),
    (0, b"\xce\xfa\xed\xfe", "Mach-O program or library"),
    (0, b"\xcf\xfa\xed\xfe", "Mach-O program or library"),
    (0, b"\xca\xfe\xba\xbe", "Java class or Mach-O file"),
    (0, b"\0asm", "WebAssembly module"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document"),
    (0, b"SQLite format 3\0", "SQLite database"),
    (0, b"GGUF", "GGUF model"),
    (0, b"PAR1", "Parquet data"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 data"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\0\1\0\0", "TrueType font"),
    (0, b"OTTO", "OpenType font"),
    (0, b"wOFF", "web font"),
    (0, b"wOF2", "web font"),
    (0, b"OggS", "Ogg media"),
    (0, b"fLaC", "FLAC audio"),
    (0, b"ID3", "MP3 audio"),
    (4, b"ftyp", "MP4 media"),
    (0, b"RIFF", "WAV or AVI media"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska media"),
)
_FIRST_BYTES = tuple(signature for offset, signature, _ in _SIGNATURES if not offset)
_LATER_BYTES = tuple((signature, offset) for offset, signature, _ in _SIGNATURES if offset)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What legacy text is found in, most likely first: where several fit equally well the first is
# taken. All contain ASCII, so that a line of a file can be looked at by itself.
_LEGACY = (
    *("cp1252", "cp1250", "iso8859_2", "cp1251", "koi8_r", "cp866", "cp932", "euc_jp", "gb18030", "big5"),
    *("cp949", "cp1253", "iso8859_5", "cp1254", "cp1255", "cp1256", "cp1257", "cp874"),
)
_MOST_CHAOS = 0.1  # charset-normalizer's measure, 0 to 1; random bytes have 0.2 and more
_ABOUT_EQUAL = 0.03
_SAMPLE = 65_536  # bytes
_CONTROL_BYTES = re.compile(rb"[\x00-\x07\x0e-\x19\x1c-\x1f\x7f]")
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffe\uffff]")
_SYMBOL_IN_WORD = re.compile(r"(?<=[^\W\d_])[^\w\s\x00-\x7f]+(?=[^\W\d_])|(?<=[^\W\d_])[¹²³]")


def decode(data: bytes) -> tuple[str, str] | tuple[SkipReason, str]:
    """Return text and encoding, or BINARY or UNDECODABLE and what the bytes are.

    A byte order mark is dropped. Every byte of `data` is decoded, strictly.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            text = _decoded(data[len(mark) :], encoding)
            if text is not None and "\0" not in text:
                return text, encoding
    kind, decides = _kind(data)
    if decides:
        return SkipReason.BINARY, kind
    if b"\0" in data:
        return _wide_text(data) or (SkipReason.BINARY, kind or "NUL bytes")
    text = _decoded(data, "utf-8")
    if text is not None:
        return text, "utf-8"
    if _CONTROL_BYTES.search(data) is None:
        for encoding in _legacy_encodings(data):
            text = _decoded(data, encoding)
            if (
                text is not None
                and _CONTROL_CHARACTERS.search(text.replace("\x1a", "").replace("\b", "")) is None
            ):
                return text, codecs.lookup(encoding).name
    return SkipReason.UNDECODABLE, "in no encoding that m3 can tell"


def _kind(data: bytes) -> tuple[str, bool]:
    """Name the kind of file by its first bytes, and tell if that alone makes it binary."""
    if data.startswith(b"%PDF-"):
        return "PDF document", True
    if not data.startswith(_FIRST_BYTES) and not any(data.startswith(*place) for place in _LATER_BYTES):
        return "", False
    for offset, signature, kind in _SIGNATURES:
        if data.startswith(signature, offset):
            return kind, not (signature.isascii() and signature.decode("ascii").isprintable())
    return "", False


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _wide_text(data: bytes) -> tuple[str, str] | None:
    """Decode UTF-16 without a mark, if it cannot be anything else: mostly ASCII, no controls."""
    for encoding, high_byte in (("utf-16-le", 1), ("utf-16-be", 0)):
        units = len(data) // 2
        if len(data) % 2 or units < 8 or data[high_byte::2].count(0) < 0.8 * units:
            continue
        text = _decoded(data, encoding)
        if text is not None and _CONTROL_CHARACTERS.search(text) is None:
            return text, encoding
    return None


def _legacy_encodings(data: bytes) -> Iterator[str]:
    """Yield the likely encodings of text that is not UTF-8, best first; none if it is no text."""
    from charset_normalizer import from_bytes

    sample = _sample(data)
    matches = list(from_bytes(sample, cp_isolation=list(_LEGACY), preemptive_behaviour=False))
    if not matches:
        # Together, an encoding is passed over when one much like it does not fit: ask for each.
        for encoding in _LEGACY:
            matches += from_bytes(sample, cp_isolation=[encoding], preemptive_behaviour=False)
    best = min((match.chaos for match in matches), default=1.0)
    scores: dict[str, tuple[int, int]] = {}
    for match in matches:
        if match.chaos > min(_MOST_CHAOS, best + _ABOUT_EQUAL):
            continue
        # A letter of one encoding is often a symbol of another, and symbols do not stand in words.
        symbols = len(_SYMBOL_IN_WORD.findall(str(match)))
        # Encodings that give the same text are one match under the name of any of them.
        for encoding in match.could_be_from_charset:
            if encoding in _LEGACY:
                scores[encoding] = (symbols, _LEGACY.index(encoding))
    yield from sorted(scores, key=scores.__getitem__)


def _sample(data: bytes) -> bytes:
    """Take the lines that are not ASCII, up to a bound: the others tell nothing."""
    if len(data) <= _SAMPLE and b"\n" not in data:
        return data
    lines, size = [], 0
    for line in data.splitlines(keepends=True):
        if line.isascii():
            continue
        room = _SAMPLE - size
        if len(line) > room:
            # No multi-byte character has a byte below 0x30 in it, so the cut splits none.
            cut = max(line.rfind(bytes([byte]), 0, room) for byte in range(0x20, 0x30))
            lines.append(line[: cut if cut > 0 else room])
            break
        lines.append(line)
        size += len(line)
    return b"".join(lines)
