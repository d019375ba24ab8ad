"""Results on their way to standard output."""

from __future__ import annotations

import json
import sys


def write_stdout(data: bytes) -> None:
    """Write bytes to standard output, whatever its encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def write_json(value: object) -> None:
    """Write one JSON document in UTF-8 with a final newline; half surrogate pairs become `?`."""
    write_stdout((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace"))
