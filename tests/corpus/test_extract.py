"""Text out of documents: every format with a real file, anchors, refusals, hostile files."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.corpus import formats
from m3cli.corpus.corpus import CorpusRequest, read_corpus
from m3cli.corpus.documents import DocumentLimits, read_document
from m3cli.corpus.extract import ExtractOptions
from m3cli.corpus.types import Document, Skip, SkipReason, Source
from m3cli.errors import CorpusError

DATA = Path(__file__).parent.parent / "data" / "documents"
PDF = (DATA / "letter.pdf").read_bytes()
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def read(
    path: str, data: bytes | None = None, *, explicit: bool = False, options: ExtractOptions | None = None
) -> Document | Skip:
    source = Source(path, data=(DATA / path).read_bytes() if data is None else data, explicit=explicit)
    return read_document(source, DocumentLimits(), options or ExtractOptions())


def text_of(path: str, options: ExtractOptions | None = None) -> str:
    result = read(path, options=options)
    assert isinstance(result, Document), result
    return result.text


def changed(path: str, member: str, data: bytes) -> bytes:
    """Give the archive at `path` with another `member`."""
    memory = io.BytesIO()
    with zipfile.ZipFile(DATA / path) as old, zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name != member:
                new.writestr(name, old.read(name))
        new.writestr(member, data)
    return memory.getvalue()


def word(entities: str, body: str) -> bytes:
    """Give a Word document with entities declared, and used in its only paragraph."""
    text = f"<w:p><w:r><w:t>{body}</w:t></w:r></w:p>"
    xml = f'<!DOCTYPE d [{entities}]><w:document xmlns:w="{WORD}"><w:body>{text}</w:body></w:document>'
    return changed("report.docx", "word/document.xml", xml.encode())


def test_pdf() -> None:
    """A PDF gives its text page by page, lines joined at hyphens.

    A page without text says so, and no text passes for an anchor.
    """
    assert read("letter.pdf") == Document(
        "letter.pdf",
        "[page 1]\nThe harbour opens at six in the morning.\nFerries to Ærø leave every two hours.\n\n"
        "[page 2: no text]\n\n[page 3]\nA ticket costs 14 euros.\n [page 9]\n"
        "Ask the harbour master, or the Trans-Baltic office.\n",
        "pdf",
    )


def test_pdf_form() -> None:
    """What has been filled in on a form is part of its text."""
    assert text_of("form.pdf") == "[page 1]\nSkipper:\nIngeborg Hansen\n"


def test_docx() -> None:
    """A Word document gives headings, lists and tables as Markdown, tracked insertions included."""
    assert text_of("report.docx") == (
        "# Tides\n\nHigh water is at noon.\n\n- spring tide\n- neap tide\n\n"
        "|  |  |\n| --- | --- |\n| Port | Metres |\n| Marstal | 1.2 |\n\nThe lock is always closed\n"
    )


def test_pptx() -> None:
    """A presentation gives texts, tables, groups, charts and notes slide by slide."""
    assert text_of("slides.pptx") == (
        "[slide 1]\nMoorings\n\nTwelve buoys\nFour piers\n\n"
        "[notes of slide 1]\nMention the storm of 1872.\n\n"
        "[slide 2]\n| Pier | Depth |\n| A | 3.5 |\n\n"
        "[slide 3]\nIn a group\n\nGuests: June 40, July 65.5\n"
    )


def test_xlsx() -> None:
    """A workbook gives each sheet with the letters of columns and the numbers of rows, one row a line."""
    assert text_of("costs.xlsx") == (
        "[sheet Costs]\nrow\tA\tB\tC\tD\n1\tItem\tEuros\tPaid\tDue\n2\tRope\t12.5\tTRUE\t2024-05-01\n"
        "3\tPaint\t300\tFALSE\n\n[sheet Crew]\nrow\tC\n5\tIngeborg Hansen\n"
    )


def test_epub() -> None:
    """A book gives its chapters in reading order; elements that close themselves swallow nothing."""
    assert text_of("book.epub") == (
        "[chapter 1]\n# Dusk\n\nThe lamp is lit at\xa0eight.\n\n[chapter 2]\n# Dawn\n\nThe lamp is put out.\n"
    )


def test_rtf() -> None:
    """RTF gives its text without its markup, escapes of both kinds decoded."""
    assert text_of("menu.rtf") == "Café at the pier\nOpen from т to ten.\n"


def test_html_is_source_unless_its_text_is_asked_for() -> None:
    """HTML stays as it is, line for line; on request it gives what a reader of the page sees."""
    assert text_of("page.html") == (DATA / "page.html").read_text("utf-8")
    assert text_of("page.html", ExtractOptions(html=True)) == (
        "Knots\n\n# Bowline\n\nA loop that does not **slip**; see [the others](https://example.org/knots).\n\n"
        "| Rope | Turns |\n| --- | --- |\n| thin | 2 |\n\na drawing of a knot\n"
    )


def test_notebook() -> None:
    """A notebook gives its cells under their numbers, and what they printed only on request."""
    assert text_of("wind.ipynb") == (
        "[cell 1: markdown]\n# Wind\n\nFrom the west.\n\n[cell 2: code]\nspeed = 7  # knots\n\n"
        '[cell 3: code]\nraise ValueError("no wind")\n'
    )
    assert text_of("wind.ipynb", ExtractOptions(outputs=True)) == (
        "[cell 1: markdown]\n# Wind\n\nFrom the west.\n\n[cell 2: code]\nspeed = 7  # knots\n\n"
        '[output of cell 2]\nknots: 7\n<Figure>\n\n[cell 3: code]\nraise ValueError("no wind")\n\n'
        "[output of cell 3]\nValueError: no wind\n"
    )


def test_notebooks_of_old() -> None:
    """A notebook of version 3, whose cells lie in worksheets, gives its cells too."""
    cells = [{"cell_type": "code", "input": ["a = 1\n", "b = 2"], "outputs": []}]
    old = {"nbformat": 3, "worksheets": [{"cells": cells}]}
    assert read("a.ipynb", json.dumps(old).encode()) == Document(
        "a.ipynb", "[cell 1: code]\na = 1\nb = 2\n", "utf-8"
    )


@pytest.mark.parametrize(
    "text",
    ['{"cells": [\n<<<<<<< HEAD\n', "[1]", '"x"', '{"cells": 3}', '{"cells": [7]}', "[" * 100_000, "{}"],
)
def test_what_is_no_notebook_stays_text(text: str) -> None:
    """A .ipynb that cannot be taken apart is read as the text that it is, and nothing is lost."""
    assert read("a.ipynb", text.encode()) == Document("a.ipynb", text, "utf-8")


def test_tables_of_plain_text_stay_as_they_are() -> None:
    """CSV and TSV are text already."""
    assert read("a.csv", b"a;b\r\n1;2\r\n") == Document("a.csv", "a;b\r\n1;2\r\n", "utf-8")
    assert read("a.tsv", b"a\tb\n") == Document("a.tsv", "a\tb\n", "utf-8")


@pytest.mark.parametrize("path", ["a.pdf", "a.docx", "a.xlsx", "a.pptx", "a.epub", "a.rtf"])
def test_the_content_has_a_say(path: str) -> None:
    """Plain text under the name of a document is plain text."""
    assert read(path, b"not written yet\n") == Document(path, "not written yet\n", "utf-8")


def test_a_pdf_without_a_suffix() -> None:
    """A PDF from standard input, or under a name without a suffix, is one by its first bytes."""
    result = read("stdin", PDF, explicit=True)
    assert isinstance(result, Document)
    assert result.encoding == "pdf"


REFUSED = [
    ("encrypted.pdf", SkipReason.ENCRYPTED, "needs a password"),
    ("encrypted.docx", SkipReason.ENCRYPTED, "needs a password"),
    ("scanned.pdf", SkipReason.NO_TEXT, "none on any page, perhaps scanned"),
]


@pytest.mark.parametrize(("path", "reason", "detail"), REFUSED)
def test_documents_without_text_to_give(path: str, reason: SkipReason, detail: str) -> None:
    """Encrypted and scanned documents are left out with the reason; one that was named is an error."""
    assert read(path) == Skip(path, reason, detail)
    with pytest.raises(CorpusError, match=f"{path} cannot be read: .*{detail}") as error:
        read(path, explicit=True)
    assert error.value.hint.endswith("or leave it out.")


@pytest.mark.parametrize("path", ["letter.pdf", "report.docx", "slides.pptx", "costs.xlsx", "book.epub"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_document_that_is_cut_short_is_broken(path: str, part: float) -> None:
    """The first part of a document is not taken for all of it."""
    data = (DATA / path).read_bytes()
    result = read(path, data[: int(len(data) * part)])
    assert isinstance(result, Skip)
    assert result.reason is SkipReason.BROKEN


def test_a_protected_book_is_encrypted() -> None:
    """A book whose chapters are listed as encrypted is; one whose fonts are is not."""
    listing = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><EncryptedData '
        'xmlns="http://www.w3.org/2001/04/xmlenc#"><CipherData><CipherReference URI="{}"/></CipherData>'
        "</EncryptedData></encryption>"
    )
    for uri, kept in (("OEBPS/text/a%20b.xhtml", False), ("OEBPS/font.otf", True)):
        data = changed("book.epub", "META-INF/encryption.xml", listing.format(uri).encode())
        result = read("book.epub", data)
        assert isinstance(result, Document) == kept
        assert kept or result == Skip("book.epub", SkipReason.ENCRYPTED, "a protected book")


def test_a_line_of_a_document_can_be_cited_by_its_page() -> None:
    """The nearest anchor above a line says which page it stands on."""
    lines = text_of("letter.pdf").split("\n")
    number = lines.index("A ticket costs 14 euros.")
    assert next(line for line in reversed(lines[:number]) if line.startswith("[")) == "[page 3]"


def test_a_directory_of_documents() -> None:
    """Walking a directory reads its documents and lists those that cannot be read, twice the same."""
    request = CorpusRequest((str(DATA),))
    corpus = read_corpus(request, lambda: b"")
    assert sorted(corpus.paths) == [
        "book.epub",
        "costs.xlsx",
        "form.pdf",
        "letter.pdf",
        "make.py",
        "menu.rtf",
        "page.html",
        "report.docx",
        "slides.pptx",
        "wind.ipynb",
    ]
    assert {skip.path: skip.reason for skip in corpus.skips} == {
        "encrypted.docx": SkipReason.ENCRYPTED,
        "encrypted.pdf": SkipReason.ENCRYPTED,
        "far-cell.xlsx": SkipReason.TOO_LARGE,
        "scanned.pdf": SkipReason.NO_TEXT,
    }
    assert read_corpus(request, lambda: b"") == corpus


def test_a_named_document_of_any_size(tmp_path: Path) -> None:
    """A document that the user names is read without a limit, though it is binary; another file is not."""
    for path in ("letter.pdf", "costs.xlsx"):
        source = Source(path, file=DATA / path, explicit=True)
        assert isinstance(read_document(source, DocumentLimits()), Document)
    (tmp_path / "letter.bin").write_bytes(PDF)
    result = read_document(
        Source("letter.bin", file=tmp_path / "letter.bin", explicit=True), DocumentLimits()
    )
    assert result == Skip("letter.bin", SkipReason.BINARY, "PDF document")


def test_limits_hold_for_documents() -> None:
    """A document found in a directory is not read beyond the size limit."""
    result = read_document(Source("letter.pdf", file=DATA / "letter.pdf"), DocumentLimits(max_bytes=1000))
    assert isinstance(result, Skip)
    assert result.reason is SkipReason.TOO_LARGE


@pytest.mark.parametrize("kind", list(formats.READERS))
def test_without_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that no reader is installed for is left out or refused, and how to get one is told."""
    path = {"pdf": "letter.pdf", "html": "page.html"}.get(kind) or next(
        file.name for file in sorted(DATA.glob(f"*.{kind}")) if file.name not in ("encrypted.docx",)
    )
    options = ExtractOptions(html=True)
    monkeypatch.setitem(sys.modules, formats.READERS[kind][0][0], None)
    assert read(path, options=options) == Skip(path, SkipReason.UNREADABLE, "needs pip install 'm3cli[docs]'")
    with pytest.raises(CorpusError, match=r"needs pip install 'm3cli\[docs\]'"):
        read(path, explicit=True, options=options)
    assert isinstance(read("wind.ipynb"), Document)


def test_readers_are_not_loaded_into_m3() -> None:
    """Reading a document leaves no reader in the process that asked for it."""
    modules = sorted({module for needed, _ in formats.READERS.values() for module in needed} | {"lxml"})
    program = (
        "import sys; from pathlib import Path; from m3cli.corpus.extract import extract;"
        f"print(extract('pdf', Path({str(DATA / 'letter.pdf')!r}).read_bytes())[:8], "
        f"[m for m in {modules} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[page 1] []\n"


def test_nothing_is_imported_from_the_directory_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module beside the documents is never run, whatever it is called."""
    for name in ("pypdfium2", "json", "cchardet", "chardet"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert isinstance(read("letter.pdf"), Document)
    assert isinstance(read("book.epub"), Document)
    assert not (tmp_path / "ran").exists()


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading documents leaves nothing in the directory for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for file in sorted(DATA.iterdir()):
        read(file.name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a.docx", "a.pptx", "a.xlsx", "a.epub"])
def test_an_archive_that_would_fill_the_memory(path: str) -> None:
    """A small archive of very much is not unpacked."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            with archive.open(f"word/{number}.xml", "w") as member:
                for _ in range(100):
                    member.write(bytes(1_000_000))
    assert read(path, memory.getvalue()) == Skip(
        path, SkipReason.TOO_LARGE, "400,000,000 bytes when unpacked, the limit is 300,000,000"
    )


def test_an_archive_that_lies_about_its_size() -> None:
    """A member that says it is smaller than it is gives no more than it says."""
    data = changed("report.docx", "word/document.xml", b"<a>" + b" " * 5_000_000 + b"</a>")
    lie = data.replace((5_000_007).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lie != data
    result = read("a.docx", lie)
    assert isinstance(result, Skip)
    assert result.reason is SkipReason.BROKEN


def test_a_sheet_with_a_cell_at_the_far_end() -> None:
    """A workbook that would be a table of 17 thousand million cells is left out."""
    assert read("far-cell.xlsx") == Skip(
        "far-cell.xlsx",
        SkipReason.TOO_LARGE,
        "a sheet of 17,179,869,184 cells, the limit is 20,000,000",
    )


def test_a_reader_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in a native library costs the document, not m3."""
    (tmp_path / "crash.py").write_text("import os; os.abort()")
    monkeypatch.setattr(formats, "__file__", str(tmp_path / "crash.py"))
    result = read("letter.pdf")
    assert isinstance(result, Skip)
    assert result.reason is SkipReason.BROKEN
    assert "crashed" in result.detail


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
def test_memory_is_limited() -> None:
    """A reader gets no more than its share of memory."""
    program = (
        f"import runpy; formats = runpy.run_path({formats.__file__!r}); formats['_limit_resources']()\n"
        "try: bytearray(3 << 30)\nexcept MemoryError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


def test_external_entities_are_not_read(tmp_path: Path) -> None:
    """What a document refers to outside of itself never becomes part of its text."""
    (tmp_path / "secret.txt").write_text("the secret")
    entity = f'<!ENTITY e SYSTEM "file://{tmp_path}/secret.txt">'
    package = f'<!DOCTYPE p [{entity}]><package xmlns="http://www.idpf.org/2007/opf">&e;</package>'
    chapter = f"<!DOCTYPE html [{entity}]><html><body><p>Before &e; after</p></body></html>"
    slide = f'<!DOCTYPE p [{entity}]><p:sld xmlns:p="p">&e;</p:sld>'
    strings = f'<!DOCTYPE s [{entity}]><sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si><t>&e;</t></si></sst>'
    assert read("a.docx", word(entity, "Before &e; after")) == Document("a.docx", "Before after\n", "docx")
    for path, data in (
        ("a.epub", changed("book.epub", "OEBPS/content.opf", package.encode())),
        ("a.epub", changed("book.epub", "OEBPS/b.xhtml", chapter.encode())),
        ("a.pptx", changed("slides.pptx", "ppt/slides/slide1.xml", slide.encode())),
        ("a.xlsx", changed("costs.xlsx", "xl/sharedStrings.xml", strings.encode())),
    ):
        assert "the secret" not in str(read(path, data))


def test_entities_that_grow_without_end() -> None:
    """A thousand million laughs are not laughed."""
    entities = '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    result = read("a.docx", word(entities, "&e9;"))
    assert isinstance(result, Skip)


def test_a_document_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for a document is limited, and what takes longer is left out."""
    monkeypatch.setattr(formats, "SECONDS", 0.001)
    assert read("letter.pdf") == Skip(
        "letter.pdf", SkipReason.TOO_LARGE, "takes more than 0.001 seconds to read"
    )


def test_a_text_that_grows_beyond_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a document is limited, however small the document is."""
    monkeypatch.setattr(formats, "_TEXT", 50)
    with pytest.raises(formats.RefusedError, match="more than 50 characters"):
        formats.read_text("rtf", b"{\\rtf1 " + b"x" * 60 + b"}")


def test_absurd_nesting() -> None:
    """HTML that is nested without end is broken, not a crash."""
    result = read("a.html", b"<div>" * 100_000 + b"x", options=ExtractOptions(html=True))
    assert isinstance(result, Document) or result.reason is SkipReason.BROKEN


def test_text_is_clean() -> None:
    """Text from a document has line feeds for line ends, and no controls or lone surrogates."""
    assert (
        formats.clean("\n\na\r\nb\rc\vd\x0ce\x00\x1b\ud800 \n\n\n\n[page 2]\n")
        == "a\nb\nc\nd\ne?\n\n [page 2]"
    )


@pytest.mark.parametrize(
    "start", [b"%PDF-1.7\n", b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf1", b"{"]
)
@pytest.mark.parametrize("suffix", ["pdf", "docx", "pptx", "xlsx", "epub", "rtf", "ipynb", "html"])
@settings(deadline=None, max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_document_or_a_skip(suffix: str, start: bytes, data: bytes) -> None:
    """Nothing that a file may hold ends in an exception."""
    result = read(f"a.{suffix}", start + data, options=ExtractOptions(html=True, outputs=True))
    assert isinstance(result, (Document, Skip))


@pytest.mark.parametrize("path", sorted(file.name for file in DATA.iterdir() if file.suffix != ".py"))
def test_damaged_documents_give_a_document_or_a_skip(path: str) -> None:
    """Real documents with some bytes changed never end in an exception."""
    original = (DATA / path).read_bytes()
    for seed in range(6):
        chance = random.Random(seed)
        data = bytearray(original)
        for _ in range(1 + seed * 4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        result = read(path, bytes(data), options=ExtractOptions(html=True, outputs=True))
        assert isinstance(result, (Document, Skip))
        assert "\0" not in getattr(result, "text", "")


def test_the_child_runs_where_the_current_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deleted current directory does not keep a document from being read."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    os.rmdir(gone)  # noqa: PTH106
    assert isinstance(read("letter.pdf"), Document)
