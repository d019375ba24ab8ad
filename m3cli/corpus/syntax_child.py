"""The child's side of `syntax`: a request a line on standard input, its answer a line on standard output.

Parsers are C code, and what they read is hostile: some texts of a few kilobytes make them take all
memory in one step that nothing can interrupt. So they run in a process that may die.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_MEMORY = 3 << 29  # bytes of address space; 2 MB of dense code take a third


def main() -> None:
    """Answer until the input ends; the arguments are import paths."""
    sys.path[:] = [*sys.argv[1:], str(Path(__file__).resolve().parents[2])]
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    _limit_resources()
    from m3cli.corpus import code_facts, outline

    tasks = {
        "definitions": outline.definition_rows,
        "bodies": outline.body_rows,
        "comments": outline.without_comments,
        "imports": outline.import_statements,
        "facts": code_facts.code_facts,
    }
    for line in sys.stdin.buffer:
        task, language, text = json.loads(line)
        answer = tasks[task](language, text)
        json.dump(sorted(answer.items()) if isinstance(answer, dict) else answer, answers)
        answers.write("\n")
        answers.flush()


def _limit_resources() -> None:
    import resource

    limits = {resource.RLIMIT_AS: _MEMORY, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # less is allowed already, or this system does not know it
            continue


if __name__ == "__main__":
    main()
