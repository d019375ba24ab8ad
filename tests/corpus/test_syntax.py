"""Syntax: languages by name, where definitions begin, and parsers that hostile text may kill."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus import grammars, languages, syntax
from m3cli.corpus.languages import language_of
from m3cli.corpus.syntax import definition_lines
from tests.corpus.samples import SAMPLES, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECES = st.sampled_from(
    [
        *(
            "def f(a):\n",
            "    return 1\n",
            "class A:\n",
            "# c\n",
            '"""',
            "'",
            '"',
            "{",
            "}",
            "(",
            ")\n",
            "\n",
        ),
        *("function f() {\n", "/* ", "*/", "// x\n", "\r\n", "\t", "\f", "\x00", "\u2028", "é漢😀", "\ud800"),
        *(
            "struct A {\n",
            "};\n",
            "fn f() {",
            "#if A\n",
            "#endif\n",
            "end\n",
            "<?php\n",
            "`${",
            "<<E\n",
            "\\\n",
        ),
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=10)), max_size=40).map("".join)
SUFFIXES = st.sampled_from(["py", "js", "tsx", "go", "rs", "c", "h", "cpp", "java", "rb", "php", "sh", "lua"])


@pytest.mark.parametrize(
    ("path", "text", "language"),
    [
        ("a/b.py", "", "python"),
        ("a/B.PY", "", "python"),
        ("a.tsx", "", "tsx"),
        ("a.d.ts", "", "typescript"),
        ("Makefile", "", "make"),
        ("lib/CMakeLists.txt", "", "cmake"),
        ("README.md", "#!/bin/sh\n", None),
        ("data.json", "{}", None),
        ("run", "#!/usr/bin/env python3.12\n", "python"),
        ("run", "#!/usr/bin/env -S FOO=1 node --x\n", "javascript"),
        ("run", "#!/bin/sh -e\n", "bash"),
        ("run", "#! /usr/local/bin/ruby\n", "ruby"),
        ("run", "#!/usr/bin/awk\n", None),
        ("run", "echo\n", None),
        ("a.h", "int f(void);\n", "c"),
        ("a.h", "#include <vector>\n", "cpp"),
        ("a.h", "namespace a {\n}\n", "cpp"),
        ("a.h", '#ifdef __cplusplus\nextern "C" {\ntemplate <class T>\n#endif\nint f(void);\n', "c"),
    ],
)
def test_the_language_is_told_by_name_then_by_first_line(path: str, text: str, language: str | None) -> None:
    """A suffix or a name tells the language; a file without a suffix may name its interpreter."""
    assert language_of(path, text) == language


def test_every_language_has_a_grammar_and_its_query_fits() -> None:
    """No language is named whose grammar is missing, or has not the nodes that its query asks for."""
    names = {language_of(f"a.{suffix}", "") for suffix in languages.SUFFIXES}
    assert len(names) > 40
    for name in names:
        assert name is not None
        assert grammars.grammar(name) is not None
    assert grammars.grammar("no_such_language") is None


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_definitions_begin_where_a_reader_says(sample: Sample) -> None:
    """Each language's sample says for each line whether a definition begins there, and how deep."""
    assert definition_lines(sample.path, sample.text) == sample.depths


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_line_ends_do_not_move_definitions(sample: Sample) -> None:
    """Files with CRLF have their definitions on the same lines."""
    assert definition_lines(sample.path, sample.text.replace("\n", "\r\n")) == sample.depths


@pytest.mark.parametrize("odd", ["é漢😀", "\u2028\u2029\x85", "\x0c\x0b", "\x00", "\ud800\udfff", "a\rb"])
def test_odd_characters_do_not_move_definitions(odd: str) -> None:
    """Only a line feed ends a line, whatever else is in comments and strings."""
    text = f'# {odd}\nx = "{odd}"\n\n\nclass A:\n    # {odd}\n    def f(self):\n        return "{odd}"\n'
    lines = definition_lines("a.py", text)
    assert lines is not None
    assert lines.items() >= {5: 0, 6: 1}.items()


def test_a_byte_order_mark_changes_nothing() -> None:
    """The mark is no part of the first line's code."""
    assert definition_lines("a.py", "\ufeffdef f():\n    pass\nx = 1\n") == {1: 0, 3: 0}


def test_a_remark_at_the_end_of_code_is_no_part_of_what_follows() -> None:
    """Only comments that have their lines alone, with none blank between, belong to a definition."""
    text = "int a; // of a\nint f(void) { return 1; }\n// of nothing\n\n// of g\n/* too */\nint g(void);\n"
    assert definition_lines("a.c", text) == {1: 0, 2: 0, 5: 0}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("notes.txt", "def f():\n    pass\n"),
        ("a.py", "}{)( ;; ]][ ?? \u2603 !! << >> ,, {{ (( \n" * 50),
        ("a.c", "once upon a time; there (was a { king\n" * 50),
        ("a.py", "x = 1\n" * (syntax.MAX_CHARACTERS // 6 + 1)),
    ],
    ids=["unknown", "rubble", "prose", "long"],
)
def test_no_answer_for_what_no_parser_understands(path: str, text: str) -> None:
    """Unknown languages, rubble, prose, and what is too long, give None."""
    assert definition_lines(path, text) is None


@pytest.mark.parametrize("pair", ["()", "[]", "{}"])
@pytest.mark.parametrize("path", ["a.py", "a.js", "a.c", "a.rs"])
def test_deep_nesting_is_survived(path: str, pair: str) -> None:
    """100,000 brackets, closed or not, neither crash nor hang; what is beside them is still answered."""
    for text in (pair[0] * 100_000 + pair[1] * 100_000, pair[0] * 100_000):
        lines = definition_lines(path, text)
        assert lines is None or set(lines) <= {1}
    assert definition_lines("a.py", "def f():\n    pass\n") == {1: 0}


def test_deep_functions_are_counted() -> None:
    """Functions in functions have their depth, however many."""
    text = "function f() {\n" * 3000 + "}\n" * 3000
    assert definition_lines("a.js", text) == {line + 1: line for line in range(3000)}


def test_a_text_that_takes_all_memory_costs_only_its_own_answer() -> None:
    """A parser that asks for more memory than there is dies; the next text has another."""
    assert definition_lines("a.rs", "%w(" * 20_000) is None
    assert definition_lines("a.rs", "fn f() {\n}\n") == {1: 0}


def test_a_process_that_is_gone_is_replaced() -> None:
    """An idle process may have been killed meanwhile."""
    assert definition_lines("a.py", "class A:\n    pass\n") == {1: 0}
    for child in syntax._idle:
        child._process.kill()
        child._process.wait()
    assert definition_lines("a.py", "class A:\n    pass\n") == {1: 0}


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a parser be too slow, its text has no answer."""
    monkeypatch.setattr(syntax, "_SECONDS", 0.0001)
    assert definition_lines("a.py", "x = (1 +\n 2)\n" * 100_000) is None
    monkeypatch.undo()
    assert definition_lines("a.py", "class A:\n    pass\n") == {1: 0}


def test_threads_have_their_own_answers() -> None:
    """Several threads may ask at once."""
    texts = ["\n" * number + "def f():\n    pass\n" for number in range(60)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: definition_lines("a.py", text), texts))
    assert answers == [{number + 1: 0} for number in range(60)]


@pytest.fixture
def hostile_directory(tmp_path: Path) -> Iterator[Path]:
    for name in ("json", "tree_sitter", "tree_sitter_language_pack", "m3cli", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w')\n")
    yield tmp_path
    assert not (tmp_path / "pwned").exists()


def test_nothing_of_the_current_directory_is_imported(hostile_directory: Path) -> None:
    """A tree that is read may hold modules with the names of those that read it."""
    root = Path(syntax.__file__).parents[2]
    code = (
        f"import sys; sys.path.append({str(root)!r}); sys.path.remove(''); "
        "from m3cli.corpus.syntax import definition_lines; "
        "print(definition_lines('a.py', 'def f():\\n  pass'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=hostile_directory, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{1: 0}\n"


def test_parsers_are_not_imported_here() -> None:
    """The command line starts without grammars."""
    code = (
        "import sys, m3cli.corpus.syntax, m3cli.corpus.reduce; "
        "print([name for name in sys.modules if 'tree_sitter' in name])"
    )
    root = Path(syntax.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@settings(max_examples=150, deadline=None)
@given(TEXTS, SUFFIXES)
def test_any_text_is_survived(text: str, suffix: str) -> None:
    """Whatever the text, the lines are lines of it and the depths are no more than definitions around."""
    lines = definition_lines(f"a.{suffix}", text)
    if lines is not None:
        assert all(1 <= line <= text.count("\n") + 1 for line in lines)
        assert all(0 <= depth < 100 for depth in lines.values())
