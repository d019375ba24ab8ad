"""What the syntax tree of a source file says of its lines, asked of a process that parses.

The processes (`syntax_child`) are kept for the next text. One that crashes, runs out of memory or does
not answer costs only the syntax of the text that did it.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from m3cli.corpus import syntax_child
from m3cli.corpus.extract import module_path
from m3cli.corpus.facts import Facts
from m3cli.corpus.languages import language_of

MAX_CHARACTERS = 2_000_000
_SECONDS = 10.0  # on the clock, should a parser neither end nor count its steps; sound code takes one

Task = Literal["definitions", "bodies", "comments", "imports", "facts"]


def definition_lines(path: str, text: str) -> dict[int, int] | None:
    """Give the lines, counted from 1, at which definitions begin, each with its depth, 0 at top level.

    Comments, decorators and attributes right above a definition belong to it. None if the language is
    unknown, the text is longer than MAX_CHARACTERS, or a parser cannot make sense of it.
    """
    language = language_of(path, text)
    rows = ask("definitions", language, text) if language else None
    return None if rows is None else {row + 1: depth for row, depth in rows}


def code_facts(path: str, text: str) -> Facts | None:
    """Give the functions, constants, types and calls of a source.

    None if the language is none of which facts are known, the text is longer than MAX_CHARACTERS, or a parser
    cannot make sense of it.
    """
    language = language_of(path, text)
    answer = ask("facts", language, text) if language else None
    return None if answer is None else Facts.of(answer)


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether the parsers are installed."""
    return all(find_spec(module) is not None for module in ("tree_sitter", "tree_sitter_language_pack"))


def ask(task: Task, language: str, text: str) -> Any:
    """Let a process parse `text`; its answer as in `outline`, or None if it has none.

    May be called from several threads: as many processes then parse at once.
    """
    if len(text) > MAX_CHARACTERS or not is_available():
        return None
    request = json.dumps((task, language, text)).encode("ascii") + b"\n"
    while True:
        try:
            child = _idle.pop()
        except IndexError:
            child = _Child()
        retry = child.used  # what other texts left behind may be to blame: ask one without a past
        answer = child.ask(request)
        if answer:
            _idle.append(child)
            return json.loads(answer)
        child.close()
        if child.late or not retry:
            return None


class _Child:
    """A process that parses one text after another."""

    def __init__(self) -> None:
        self.used = False
        self.late = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", syntax_child.__file__, *module_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, request: bytes) -> bytes:
        """Give the answer's line; empty if the process has died, or takes too long and is killed."""
        self.used, self.late = True, False
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        alarm = threading.Timer(_SECONDS, self._expire)
        alarm.daemon = True
        alarm.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it died with the request half read
            return b""
        except BaseException:  # interrupted: its answer would be taken for that to the next request
            self.close()
            raise
        finally:
            alarm.cancel()
        return answer if answer.endswith(b"\n") else b""

    def _expire(self) -> None:
        self.late = True
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # what it has not read cannot be written any more
                continue
        self._process.wait()


_idle: list[_Child] = []


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()
