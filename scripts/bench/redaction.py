"""Time the redaction of secrets with and without its prefilter, and compare what both find.

python scripts/bench/redaction.py PATH [MEGABYTES]

Takes files in a random order, the same every time, up to MEGABYTES (10): without the prefilter a
megabyte takes about three seconds.

(Not secrets.py: a script's folder comes first in the import path, and numpy imports `secrets`.)
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Document
from m3cli.prompt.secret_scan import scan
from m3cli.prompt.secrets import Redactor

LARGEST = 300_000  # bytes of a file


def read(root: Path, megabytes: float) -> list[Document]:
    """UTF-8 texts under `root`."""
    documents = []
    paths = sorted(root.rglob("*"))
    random.Random(1).shuffle(paths)
    room = megabytes * 1e6
    for path in paths:
        if room <= 0:
            break
        if path.is_file() and path.stat().st_size <= LARGEST:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if "\0" not in text:
                room -= len(text.encode())
                documents.append(Document(path.relative_to(root).as_posix(), text, "utf-8"))
    return documents


def main() -> None:
    documents = read(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 10)
    chunks = [chunk for document in documents for chunk in chunk_document(document)]
    megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
    scan("warm", "up")
    print(f"{len(documents)} files, {megabytes:.1f} MB")
    results = []
    for prefilter in (True, False):
        start = time.perf_counter()
        redactor = Redactor(prefilter=prefilter)
        texts = [chunk.text for chunk in redactor.redact(chunks)]
        seconds = time.perf_counter() - start
        results.append((redactor, texts))
        print(f"prefilter {'on ' if prefilter else 'off'}  {megabytes / seconds:8.2f} MB/s  {seconds:7.2f} s")
    (fast, fast_texts), (slow, slow_texts) = results
    print(f"{'kind':32} {'with':>6} {'without':>8}")
    for kind in sorted(fast.counts | slow.counts):
        print(f"{kind:32} {fast.counts.get(kind, 0):6} {slow.counts.get(kind, 0):8}")
    same = fast_texts == slow_texts and fast.findings == slow.findings
    print("the same" if same else "NOT THE SAME")
    sys.exit(not same)


if __name__ == "__main__":
    main()
