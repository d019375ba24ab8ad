"""Documents that are not plain text → their text, with anchors for pages, slides, sheets and cells.

What is a document is told by its suffix and its first bytes together: a `.pdf` that holds plain
text is plain text. Its text comes from a child process (`formats`), which a hostile file may crash,
fill or keep busy without harm; the readers it uses are the extra `m3cli[docs]`. Notebooks are JSON
and need neither. CSV and TSV are text already.

HTML found anywhere is source code and stays as it is, line for line, unless `ExtractOptions.html`
asks for the text of the page. The same bytes give the same text, with the same readers installed.
Word documents have no pages of their own until they are printed: their anchors are their headings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from m3cli.corpus import formats
from m3cli.corpus.names import suffix_of
from m3cli.corpus.types import SkipReason

_EXTRA = "pip install 'm3cli[docs]'"

_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"\xd0\xcf\x11\xe0")  # the last is an encrypted Office document
_KINDS = {
    ".pdf": "pdf",
    **dict.fromkeys((".docx", ".docm"), "docx"),
    **dict.fromkeys((".pptx", ".pptm"), "pptx"),
    **dict.fromkeys((".xlsx", ".xlsm"), "xlsx"),
    ".epub": "epub",
    ".rtf": "rtf",
}
_HTML = frozenset((".html", ".htm", ".xhtml"))


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What of a document is wanted.

    `html` takes the text of HTML pages instead of their source, `outputs` adds what the cells of a
    notebook have printed.
    """

    html: bool = False
    outputs: bool = False


def is_extracted(path: str, options: ExtractOptions) -> bool:
    """Whether a file of that name is a document, unless its content is another one."""
    suffix = suffix_of(path)
    return suffix in _KINDS or not suffix or (options.html and suffix in _HTML)


def document_kind(path: str, head: bytes, options: ExtractOptions) -> str:
    """Name the kind of document that a file is by its name and first 1,024 bytes; empty if none."""
    suffix = suffix_of(path)
    if not suffix:  # as standard input is
        return "pdf" if head.startswith(b"%PDF-") else ""
    if suffix in _HTML:
        return "html" if options.html else ""
    kind = _KINDS.get(suffix, "")
    if kind == "pdf":
        return kind if b"%PDF-" in head[:1024] else ""
    if kind == "rtf":
        return kind if head.startswith(b"{\\rtf") else ""
    return kind if head.startswith(_ZIP) else ""


def extract(kind: str, data: bytes) -> str | tuple[SkipReason, str]:
    """Give the text of a document, or the reason why there is none, and words about it."""
    if any(find_spec(module) is None for module in formats.READERS[kind][0]):
        return SkipReason.UNREADABLE, f"needs {_EXTRA}"
    command = [sys.executable, "-I", formats.__file__, kind, *module_path()]
    try:
        done = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=formats.SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return SkipReason.TOO_LARGE, f"takes more than {formats.SECONDS} seconds to read"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return SkipReason.BROKEN, f"its reader crashed or ran out of memory: code {done.returncode}"
    if "missing" in answer:
        return SkipReason.UNREADABLE, f"needs {_EXTRA}"
    if "reason" in answer:
        return SkipReason[answer["reason"]], str(answer["detail"])
    return str(answer["text"])


def module_path() -> list[str]:
    """m3's module path without the current directory, which may be the very tree that is read."""
    try:
        here = Path.cwd().resolve()
    except OSError:  # it was deleted: nothing can be imported from it
        here = None
    return [path for path in sys.path if Path(path).is_absolute() and Path(path).resolve() != here]


def notebook_text(path: str, text: str, options: ExtractOptions) -> str:
    """Give the cells of a notebook, each under a line such as `[cell 4: code]`.

    A text that is no notebook comes back as it is: one that holds a merge conflict, for instance.
    """
    if suffix_of(path) != ".ipynb":
        return text
    try:
        return _notebook_cells(json.loads(text), options.outputs) or text
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return text


def _notebook_cells(notebook: dict[str, Any], outputs: bool) -> str:
    cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]  # until 2014
    parts: list[str] = []
    for number, cell in enumerate(cells, 1):
        source = _joined(cell.get("source", cell.get("input", "")))
        parts.append(
            f"[cell {number}: {' '.join(str(cell['cell_type']).split())}]\n{formats.clean(source)}\n"
        )
        printed = [_output_text(output) for output in cell.get("outputs", ())] if outputs else []
        if any(printed):
            parts.append(f"[output of cell {number}]\n{formats.clean(''.join(printed))}\n")
    return "\n".join(parts)


def _output_text(output: dict[str, Any]) -> str:
    """Give what a cell has printed, or the plain text of its value; pictures have none."""
    if "traceback" in output:
        return f"{output.get('ename')}: {output.get('evalue')}\n"
    return _joined(output.get("text", output.get("data", {}).get("text/plain", "")))


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
