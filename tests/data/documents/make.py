"""Makes the documents beside it, with writers that are independent of the readers.

usage: python make.py   (with pypdf, cryptography, reportlab, pillow, python-docx, python-pptx,
openpyxl, nbformat and msoffcrypto-tool installed; none of them is needed to run the tests)
"""

from __future__ import annotations

import io
import re
import zipfile
from datetime import date
from pathlib import Path

import docx
import msoffcrypto.format.ooxml
import nbformat.v4 as notebooks
import openpyxl
import pptx
import pypdf
from PIL import Image, ImageDraw
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.util import Inches
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

HERE = Path(__file__).parent


def pdfs() -> None:
    """A letter of three pages, the same encrypted, a form, and a page that is a picture of text."""
    memory = io.BytesIO()
    canvas = Canvas(memory, invariant=True)
    canvas.drawString(72, 770, "The harbour opens at six in the morning.")
    canvas.drawString(72, 750, "Ferries to Ærø leave every two hours.")
    canvas.showPage()
    canvas.showPage()
    canvas.drawString(72, 770, "A ticket costs 14 euros.")
    canvas.drawString(72, 755, "[page 9]")
    canvas.drawString(72, 740, "Ask the har-")
    canvas.drawString(72, 725, "bour master, or the Trans-")
    canvas.drawString(72, 710, "Baltic office.")
    canvas.save()
    (HERE / "letter.pdf").write_bytes(memory.getvalue())

    writer = pypdf.PdfWriter(clone_from=HERE / "letter.pdf")
    writer.encrypt("secret", algorithm="AES-256")
    writer.write(HERE / "encrypted.pdf")

    canvas = Canvas(str(HERE / "form.pdf"), invariant=True)
    canvas.drawString(72, 770, "Skipper:")
    canvas.acroForm.textfield(name="skipper", x=130, y=760, width=200, height=20, value="Ingeborg Hansen")
    canvas.save()

    picture = Image.new("1", (300, 60), 1)
    ImageDraw.Draw(picture).text((10, 20), "You can see this, but not select it.")
    canvas = Canvas(str(HERE / "scanned.pdf"), invariant=True)
    canvas.drawImage(ImageReader(picture), 72, 700)
    canvas.save()


def word() -> None:
    """A report with headings, a list, a table and a tracked insertion; and the same encrypted."""
    report = docx.Document()
    for unused in list(report.styles):
        if unused.name not in (
            "Normal",
            "Heading 1",
            "List Bullet",
            "Normal Table",
            "Default Paragraph Font",
        ):
            unused.delete()
    report.add_heading("Tides", 1)
    report.add_paragraph("High water is at noon.")
    report.add_paragraph("spring tide", style="List Bullet")
    report.add_paragraph("neap tide", style="List Bullet")
    table = report.add_table(rows=2, cols=2)
    cells = [cell for row in table.rows for cell in row.cells]
    for cell, text in zip(cells, "Port Metres Marstal 1.2".split(), strict=True):
        cell.text = text
    paragraph = report.add_paragraph("The lock is ")
    paragraph.add_run("closed")._r.addprevious(
        docx.oxml.parse_xml(
            '<w:ins xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" w:id="1" '
            'w:author="a"><w:r><w:t xml:space="preserve">always </w:t></w:r></w:ins>'
        )
    )
    report.save(HERE / "report.docx")
    repacked(HERE / "report.docx")
    with (HERE / "report.docx").open("rb") as plain, (HERE / "encrypted.docx").open("wb") as out:
        msoffcrypto.format.ooxml.OOXMLFile(plain).encrypt("secret", out)


def slides() -> None:
    """Three slides: a title with a text and notes, a table, and a group and a chart."""
    deck = pptx.Presentation()
    for number in (10, 9, 8, 7, 5, 4, 3, 2, 0):
        deck.slide_layouts.remove(deck.slide_layouts[number])
    first = deck.slides.add_slide(deck.slide_layouts[0])
    first.shapes.title.text = "Moorings"
    first.placeholders[1].text = "Twelve buoys\nFour piers"
    first.notes_slide.notes_text_frame.text = "Mention the storm of 1872."
    second = deck.slides.add_slide(deck.slide_layouts[1])
    table = second.shapes.add_table(2, 2, Inches(1), Inches(1), Inches(4), Inches(1)).table
    for cell, text in zip(table.iter_cells(), "Pier Depth A 3.5".split(), strict=True):
        cell.text = text
    third = deck.slides.add_slide(deck.slide_layouts[1])
    group = third.shapes.add_group_shape()
    group.shapes.add_textbox(Inches(1), Inches(1), Inches(2), Inches(1)).text_frame.text = "In a group"
    guests = CategoryChartData()
    guests.categories = ["June", "July"]
    guests.add_series("Guests", (40, 65.5))
    third.shapes.add_chart(XL_CHART_TYPE.PIE, Inches(1), Inches(2), Inches(4), Inches(4), guests)
    deck.save(HERE / "slides.pptx")


def sheets() -> None:
    """Two sheets, one whose table does not begin at A1; and one sheet with a cell at the far end."""
    book = openpyxl.Workbook()
    costs = book.active
    costs.title = "Costs"
    costs.append(["Item", "Euros", "Paid", "Due"])
    costs.append(["Rope", 12.5, True, date(2024, 5, 1)])
    costs.append(["Paint", 300, False, None])
    book.create_sheet("Crew")["C5"] = "Ingeborg\nHansen"
    book.save(HERE / "costs.xlsx")
    far = openpyxl.Workbook()
    far.active["A1"] = "near"
    far.active["XFD1048576"] = "far"
    far.save(HERE / "far-cell.xlsx")


def book() -> None:
    """A book of two chapters in the order of its spine, not of its file names."""
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<?xml version="1.0"?><container version="1.0" '
        'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
        'full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        "OEBPS/content.opf": '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" '
        'version="3.0" unique-identifier="id"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        '<dc:identifier id="id">m3</dc:identifier><dc:title>The Lighthouse</dc:title>'
        "<dc:language>en</dc:language></metadata><manifest>"
        '<item id="b" href="b.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="a" href="text/a%20b.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="b"/><itemref idref="a"/></spine></package>',
        "OEBPS/b.xhtml": '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>'
        '<body><h1><a id="p1"/>Dusk</h1><p>The lamp is lit at&#160;eight.</p></body></html>',
        "OEBPS/text/a b.xhtml": '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>'
        "</head><body><h1>Dawn</h1><p>The lamp is put out.</p></body></html>",
    }
    with zipfile.ZipFile(HERE / "book.epub", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), text)


def notebook() -> None:
    """A notebook with a text, code that has printed and drawn something, and code that failed."""
    outputs = [
        notebooks.new_output("stream", text="knots: 7\n"),
        notebooks.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}),
    ]
    failed = notebooks.new_output(
        "error", ename="ValueError", evalue="no wind", traceback=["\x1b[31mValueError"]
    )
    cells = [
        notebooks.new_markdown_cell("# Wind\n\nFrom the west."),
        notebooks.new_code_cell("speed = 7  # knots", outputs=outputs, execution_count=1),
        notebooks.new_code_cell('raise ValueError("no wind")', outputs=[failed], execution_count=2),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    text = nbformat_json(notebooks.new_notebook(cells=cells))
    (HERE / "wind.ipynb").write_text(text, encoding="utf-8")


def nbformat_json(node: object) -> str:
    """A notebook as Jupyter writes it."""
    return notebooks.writes_json(node) + "\n"


def repacked(path: Path) -> None:
    """Give every member of an archive the same date, and leave the ballast of the templates out."""
    ballast = "thumbnail|printerSettings|stylesWithEffects"
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist() if not re.search(ballast, name)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            undated = re.sub(rb"(<dcterms:\w+ [^>]*>)[^<]*", rb"\g<1>2024-01-01T00:00:00Z", data)
            lean = re.sub(rf"<Relationship [^>]*(?:{ballast})[^>]*/>".encode(), b"", undated)
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), lean, zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    pdfs()
    word()
    slides()
    sheets()
    book()
    notebook()
    for name in ("slides.pptx", "costs.xlsx", "far-cell.xlsx"):
        repacked(HERE / name)
