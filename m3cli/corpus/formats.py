"""Bytes of a PDF, Office, EPUB, HTML or RTF document → its text; the child's side of `extract`.

Documents are hostile: this file is run as a program of its own, isolated, with a limit on memory
and processor time and none of its own files to write, and imports nothing of m3. It reads a
document from standard input and writes one JSON object, `{"text": …}` or `{"reason": …, "detail":
…}` with the name of a SkipReason, to standard output.

No library that is used here follows a link or opens a second file: what a document only refers to
is not read. Parsers of XML refuse or ignore external entities (defusedxml, lxml in python-pptx with
`resolve_entities=False`, expat in mammoth, none at all in calamine), and all archives are measured
before anything is unpacked.

Where a format has places that people name (pages, slides, sheets, chapters), each begins with a
line of its own, such as `[page 3]`, so that a citation of lines points at one. A line of content
that looks like that is indented by a space.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 120  # for one document, on the clock; of processor time, should nobody look at the clock
_MEMORY = 2 << 30  # bytes of address space
_UNPACKED = 300_000_000  # bytes that the members of an archive may come to, pictures included
_MEMBERS = 20_000
_TEXT = 50_000_000  # characters
_PAGES = 20_000
_CELLS = 20_000_000  # of the rectangle around all that a sheet holds, which calamine keeps in memory
_RECURSION = 5_000  # Python frames; nested HTML is walked recursively

_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # also the envelope of encrypted new documents
_ENCRYPTED_OFFICE = "EncryptedPackage".encode("utf-16-le")
_ANCHOR = re.compile(r"^(?=\[(?:page|slide|notes of slide|sheet|chapter|cell|output of cell) )", re.MULTILINE)
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f]")
_PDF_HYPHEN = re.compile("(\\w?)[\x02\ufffe](?=(\\w?))")
_CELL_COLUMN = re.compile(rb"""\sr\s*=\s*["']([A-Z]{1,3})\d""")
_CELL_ROW = re.compile(rb"""\sr\s*=\s*["'][A-Z]{1,3}(\d{1,7})["']""")
_UNSEEN_ELEMENTS = ("script", "style", "template", "svg", "math")


class RefusedError(Exception):
    """The document has no text to give; `reason` is the name of a SkipReason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Text:
    """The text so far, which is refused when it grows beyond all use."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._size = 0
        self.empty = True

    def add(self, text: str, anchor: str = "") -> None:
        """Append `text`, under a line with `anchor` in brackets if there is one."""
        text = clean(text)
        self.empty = self.empty and not text
        if anchor:
            anchor = " ".join(clean(anchor).split())
            text = f"[{anchor}]\n{text}\n" if text else f"[{anchor}: no text]\n"
        elif text:
            text += "\n"
        self._size += len(text)
        if self._size > _TEXT:
            raise RefusedError("TOO_LARGE", f"its text has more than {_TEXT:,} characters")
        if text:
            self._parts.append(text)

    def __str__(self) -> str:
        return "\n".join(self._parts)


def clean(text: str) -> str:
    """Make `text` one that can stand in the corpus, without blank lines around it.

    Lines end at a line feed, no more than one blank line stands between two, controls and lone
    surrogates are gone, and no line looks like an anchor.
    """
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n")))
    return _ANCHOR.sub(" ", text.strip("\n"))


def _pdf(data: bytes, text: _Text) -> None:
    import pypdfium2
    from pypdfium2.raw import FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY

    if b"%%EOF" not in data.rstrip(b"\0\t\n\r ")[-1024:]:  # PDFium would make up for missing pages
        raise RefusedError("BROKEN", "a PDF that is cut short")
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code in (FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY):
            raise RefusedError("ENCRYPTED", "needs a password") from error
        raise
    if len(document) > _PAGES:
        raise RefusedError("TOO_LARGE", f"{len(document):,} pages, the limit is {_PAGES:,}")
    document.init_forms()
    for index in range(len(document)):
        page = document[index]
        if document.formenv is not None:  # what has been filled in becomes text of the page
            page.flatten()
            page.close()
            page = document[index]
        words = page.get_textpage()
        text.add(_PDF_HYPHEN.sub(_without_hyphen, words.get_text_bounded()), f"page {index + 1}")
        words.close()
        page.close()
    if text.empty:
        raise RefusedError("NO_TEXT", "none on any page, perhaps scanned")


def _without_hyphen(place: re.Match[str]) -> str:
    """Decide on a hyphen at the end of a line, which PDFium marks where it joins it with the next.

    Between letters of one case it is mostly the typesetter's, and elsewhere the writer's.
    """
    before, after = place.groups()
    inside = before.isalpha() and after.isalpha() and before.islower() == after.islower()
    return before if inside else f"{before}-"


def _docx(data: bytes, text: _Text) -> None:
    import mammoth

    _unzip(data)
    pictures = mammoth.images.img_element(lambda _: {})
    html = mammoth.convert_to_html(
        io.BytesIO(data), convert_image=pictures, include_embedded_style_map=False, external_file_access=False
    )
    text.add(_markdown(html.value))


def _pptx(data: bytes, text: _Text) -> None:
    from pptx import Presentation

    _unzip(data)
    for number, slide in enumerate(Presentation(io.BytesIO(data)).slides, 1):
        text.add("\n\n".join(_shape_texts(slide.shapes)), f"slide {number}")
        if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) and notes.text.strip():
            text.add(notes.text, f"notes of slide {number}")


def _shape_texts(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _shape_texts(shape.shapes)
        elif shape.has_text_frame:
            if shape.text_frame.text.strip():
                yield shape.text_frame.text
        elif getattr(shape, "has_table", False):
            rows = ([_one_line(cell.text) for cell in row.cells] for row in shape.table.rows)
            yield "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
        elif getattr(shape, "has_chart", False):
            yield "\n".join(_chart_lines(shape.chart))


def _chart_lines(chart: Any) -> Iterator[str]:
    """Yield a chart's title and, a line for each of its series, the name and value of every point."""
    if chart.has_title and chart.chart_title.has_text_frame:
        yield chart.chart_title.text_frame.text
    try:
        plots = list(chart.plots)
    except ValueError:  # a type of chart that python-pptx does not know
        return
    for plot in plots:
        names = [str(name) for name in plot.categories]
        for series in plot.series:
            points = [_cell_text(value) for value in series.values if value is not None]
            if len(names) == len(series.values):
                points = [
                    f"{name} {_cell_text(value)}"
                    for name, value in zip(names, series.values, strict=True)
                    if value is not None
                ]
            yield f"{series.name}: {', '.join(points)}"


def _xlsx(data: bytes, text: _Text) -> None:
    from python_calamine import CalamineWorkbook

    archive = _unzip(data)
    for member in archive.namelist():
        if member.startswith("xl/worksheets/") and (cells := _area(archive.read(member))) > _CELLS:
            raise RefusedError("TOO_LARGE", f"a sheet of {cells:,} cells, the limit is {_CELLS:,}")
    workbook = CalamineWorkbook.from_filelike(io.BytesIO(data))
    for name in workbook.sheet_names:
        sheet = workbook.get_sheet_by_name(name)
        text.add("\n".join(_sheet_lines(sheet)), f"sheet {name}")


def _area(sheet: bytes) -> int:
    """Count the cells of the rectangle that encloses all cells of a sheet, given its XML."""
    columns = [_column_number(name) for name in set(_CELL_COLUMN.findall(sheet))]
    rows = [int(number) for number in set(_CELL_ROW.findall(sheet))]
    return (max(columns) - min(columns) + 1) * (max(rows) - min(rows) + 1) if columns and rows else 0


def _sheet_lines(sheet: Any) -> Iterator[str]:
    """Yield rows as a spreadsheet shows them: columns by letter, rows by number, tabs between."""
    rows = sheet.to_python(skip_empty_area=True)
    if not rows or sheet.start is None:
        return
    first_row, first_column = sheet.start
    columns = range(first_column, first_column + max(map(len, rows)))
    yield "\t".join(["row", *map(_column_name, columns)])
    for number, row in enumerate(rows, first_row + 1):
        cells = [_cell_text(cell) for cell in row]
        if any(cells):
            yield "\t".join([str(number), *cells])


def _column_number(name: bytes) -> int:
    number = 0
    for letter in name:
        number = 26 * number + letter - ord("A") + 1
    return number


def _column_name(index: int) -> str:
    name = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        name = chr(ord("A") + letter) + name
    return name


def _cell_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # calamine gives every number as a float
    return _one_line(str(value))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _epub(data: bytes, text: _Text) -> None:
    import posixpath
    from urllib.parse import unquote

    from defusedxml import ElementTree

    archive = _unzip(data)
    names = set(archive.namelist())
    encrypted: set[str] = set()
    if "META-INF/encryption.xml" in names:  # lists fonts, or in a protected book the chapters
        listing = ElementTree.fromstring(archive.read("META-INF/encryption.xml"))
        encrypted = {unquote(item.get("URI", "")) for item in listing.iterfind(".//{*}CipherReference")}
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    package_name = container.find(".//{*}rootfile").get("full-path")
    package = ElementTree.fromstring(archive.read(package_name))
    links = {item.get("id"): item.get("href", "") for item in package.iterfind("{*}manifest/{*}item")}
    number = 0
    for reference in package.iterfind("{*}spine/{*}itemref"):
        link = links.get(reference.get("idref"))
        if not link:
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package_name), unquote(link)))
        if name in encrypted:
            raise RefusedError("ENCRYPTED", "a protected book")
        if name in names:
            number += 1
            text.add(_markdown(archive.read(name)), f"chapter {number}")


def _html(data: bytes, text: _Text) -> None:
    text.add(_markdown(data))


def _markdown(html: str | bytes) -> str:
    """Give the text of a page with its headings, lists and tables, as Markdown without pictures."""
    from bs4 import BeautifulSoup, CData
    from bs4.element import PreformattedString
    from markdownify import MarkdownConverter

    # The one parser that takes `<a id="x"/>`, which books are full of, as an element without content.
    soup = BeautifulSoup(html, "html.parser")
    for element in soup(_UNSEEN_ELEMENTS):
        element.decompose()
    for string in soup.find_all(string=lambda _: True):
        if isinstance(string, PreformattedString) and not isinstance(string, CData):
            string.extract()  # a comment, a declaration, an instruction
    for picture in soup("img"):
        picture.replace_with(picture.get("alt") or "")
    converter = MarkdownConverter(
        heading_style="atx", bullets="-", escape_asterisks=False, escape_underscores=False
    )
    return str(converter.convert_soup(soup))


def _rtf(data: bytes, text: _Text) -> None:
    from striprtf.striprtf import rtf_to_text

    text.add(rtf_to_text(data.decode("cp1252", "replace"), errors="replace"))


# The modules that each reader needs, and the reader.
READERS: dict[str, tuple[tuple[str, ...], Callable[[bytes, _Text], None]]] = {
    "pdf": (("pypdfium2",), _pdf),
    "docx": (("mammoth", "bs4", "markdownify"), _docx),
    "pptx": (("pptx",), _pptx),
    "xlsx": (("python_calamine",), _xlsx),
    "epub": (("defusedxml", "bs4", "markdownify"), _epub),
    "html": (("bs4", "markdownify"), _html),
    "rtf": (("striprtf",), _rtf),
}


def _unzip(data: bytes) -> zipfile.ZipFile:
    """Open an archive that is neither encrypted nor a bomb."""
    if data.startswith(_OLD_OFFICE):
        if _ENCRYPTED_OFFICE in data:
            raise RefusedError("ENCRYPTED", "needs a password")
        raise RefusedError("BROKEN", "an old Office document under the name of a new one")
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    if any(member.flag_bits & 1 for member in members):
        raise RefusedError("ENCRYPTED", "needs a password")
    if len(members) > _MEMBERS:
        raise RefusedError("TOO_LARGE", f"{len(members):,} members, the limit is {_MEMBERS:,}")
    unpacked = sum(member.file_size for member in members)
    if unpacked > _UNPACKED:
        raise RefusedError("TOO_LARGE", f"{unpacked:,} bytes when unpacked, the limit is {_UNPACKED:,}")
    return archive


def read_text(kind: str, data: bytes) -> str:
    """Give the text of a document of a kind in `READERS`. Raises RefusedError, ImportError."""
    text = _Text()
    try:
        READERS[kind][1](data, text)
    except (RefusedError, ImportError):
        raise
    except MemoryError as error:
        raise RefusedError("TOO_LARGE", "takes too much memory to read") from error
    except Exception as error:  # what a library says of hostile bytes has no bounds
        raise RefusedError("BROKEN", f"not readable as {kind}: {type(error).__name__}") from error
    if text.empty:
        raise RefusedError("NO_TEXT", f"none found in the {kind}")
    return str(text)


def _limit_resources() -> None:
    import resource

    limits = {
        resource.RLIMIT_AS: _MEMORY,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS has no limit on address space; a lower one may be set
            continue


def main() -> None:
    """Read the document of the kind that is the first argument; the others are import paths."""
    sys.path[:] = sys.argv[2:]
    result = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no part of the result
    sys.setrecursionlimit(_RECURSION)
    _limit_resources()
    try:
        answer = {"text": read_text(sys.argv[1], sys.stdin.buffer.read())}
    except RefusedError as refused:
        answer = {"reason": refused.reason, "detail": refused.detail}
    except ImportError as error:
        answer = {"missing": error.name or str(error)}
    json.dump(answer, result)
    result.close()


if __name__ == "__main__":
    main()
