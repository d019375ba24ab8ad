"""Reduced documents: what stays, what goes, and that every line keeps its number."""

from __future__ import annotations

import ast
import io
import itertools
import re
import sysconfig
import tokenize
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus import grammars
from m3cli.corpus.languages import language_of
from m3cli.corpus.reduce import GAP, compress, strip_comments
from m3cli.corpus.types import Document
from tests.corpus.samples import SAMPLES, Sample

LINE = re.compile(r"[^\n]*\n|[^\n]+")
MODULES = [
    Path(sysconfig.get_path("stdlib"), name)
    for name in (
        *("abc.py", "argparse.py", "ast.py", "bisect.py", "cmd.py", "configparser.py", "contextlib.py"),
        *("dataclasses.py", "difflib.py", "enum.py", "functools.py", "heapq.py", "inspect.py", "locale.py"),
        *("pdb.py", "pickle.py", "random.py", "tarfile.py", "tokenize.py", "typing.py", "zipfile.py"),
        *("asyncio/tasks.py", "email/message.py", "json/decoder.py", "logging/__init__.py", "re/_parser.py"),
    )
    if Path(sysconfig.get_path("stdlib"), name).is_file()
]
PIECES = st.sampled_from(
    [
        *(
            "def f(a,  # c\n      b):\n",
            '    """Doc."""\n',
            "    return 1  # c\n",
            "class A:\n",
            "# c\n",
            '"""',
        ),
        *(
            "'",
            '"',
            "{",
            "}\n",
            "(",
            ")\n",
            "\n",
            "function f() {\n",
            "/* ",
            "*/ ",
            "// x\n",
            "x = 1;",
            "\r\n",
        ),
        *("\t", "\f", "\x00", "\u2028", "é漢😀", "\ud800", "struct A {\n", "};\n", "fn f() {\n", "#if A\n"),
        *("end\n", "#!/bin/sh\n", "<?php\n", "`${", "<<E\n", "\\\n", "f() {\n", "=begin\n", "--[[", "]]\n"),
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=40).map("".join)
SUFFIXES = st.sampled_from(
    ["py", "js", "tsx", "go", "rs", "c", "h", "cpp", "java", "rb", "php", "sh", "lua", "kt", "txt"]
)


def document(path: str, text: str) -> Document:
    return Document(path, text, "utf-8")


def numbered(document: Document) -> dict[int, str]:
    """The document's lines by number, without gaps; checks that there is a number for each."""
    lines = LINE.findall(document.text)
    numbers = document.numbers or tuple(range(1, len(lines) + 1))
    assert len(lines) == len(numbers)
    kept = [number for number in numbers if number]
    assert kept == sorted(set(kept))
    return {number: line for line, number in zip(lines, numbers, strict=True) if number}


def errors(document: Document) -> int:
    """How many errors a parser sees."""
    language = language_of(document.path, document.text)
    assert language is not None
    nodes = grammars.parse(language, document.text.encode("utf-8", "surrogatepass"))
    assert nodes is not None
    return len(nodes.get("error", []))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_bodies_go_and_all_else_stays(sample: Sample) -> None:
    """Each language's sample says which lines a compressed document keeps."""
    reduced = compress(document(sample.path, sample.text))
    lines = sample.text.splitlines(keepends=True)
    assert numbered(reduced) == {number: lines[number - 1] for number in sample.kept}
    assert reduced.text.splitlines().count(GAP) == (reduced.numbers or ()).count(0)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_comments_go_and_all_else_stays(sample: Sample) -> None:
    """Each language's sample says what becomes of each line without comments; no parser minds."""
    whole = document(sample.path, sample.text)
    reduced = strip_comments(whole)
    assert numbered(reduced) == {number: line + "\n" for number, line in sample.stripped.items()}
    assert errors(reduced) <= errors(whole)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_both_reductions_keep_true_numbers(sample: Sample) -> None:
    """In either order, the lines that stay are those that both keep, as they are without comments."""
    whole = document(sample.path, sample.text)
    expected = {number: sample.stripped[number] + "\n" for number in sample.kept if number in sample.stripped}
    for both in (compress(strip_comments(whole)), strip_comments(compress(whole))):
        assert numbered(both) == expected
        assert (0 in (both.numbers or ())) == (GAP in both.text)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_line_ends_stay(sample: Sample) -> None:
    """A file with CRLF has its lines end so still, those of gaps too, and loses the same lines."""
    whole = document(sample.path, sample.text.replace("\n", "\r\n"))
    for reduce in (compress, strip_comments):
        plain = reduce(document(sample.path, sample.text))
        reduced = reduce(whole)
        assert reduced.text == plain.text.replace("\n", "\r\n")
        assert reduced.numbers == plain.numbers


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_python_keeps_names_signatures_and_docstrings(module: Path) -> None:
    """Of real modules, every definition outside of functions stays, with its signature and docstring."""
    text = module.read_text("utf-8")
    reduced = compress(document(module.name, text))
    kept = numbered(reduced)
    assert len(reduced.text) < len(text)
    blocks: list[ast.Module | ast.ClassDef] = [ast.parse(text)]
    found = 0
    for block in blocks:
        for item in block.body:
            if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            found += 1
            first = min([item.lineno, *(decorator.lineno for decorator in item.decorator_list)])
            needed = set(range(first, item.lineno + 1))
            if isinstance(item, ast.ClassDef):
                needed |= {part.lineno for part in item.body if isinstance(part, ast.Assign | ast.AnnAssign)}
            else:
                needed |= {argument.lineno for argument in item.args.args + item.args.kwonlyargs}
            if ast.get_docstring(item, clean=False) is not None:
                needed |= set(range(item.body[0].lineno, (item.body[0].end_lineno or 0) + 1))
            assert needed <= set(kept), item.name
            if isinstance(item, ast.ClassDef):
                blocks.append(item)
    assert found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_python_without_comments_is_the_same_program(module: Path) -> None:
    """Of real modules, Python's own parser sees no difference, and its tokenizer no comment."""
    text = module.read_text("utf-8")
    reduced = strip_comments(document(module.name, text))
    assert ast.dump(ast.parse(reduced.text)) == ast.dump(ast.parse(text))
    tokens = tokenize.generate_tokens(io.StringIO(reduced.text).readline)
    comments = [token.start for token in tokens if token.type == tokenize.COMMENT]
    assert comments == [(1, 0)] * text.startswith("#!")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.c", "int a/**/b;\n", "int a b;\n"),
        ("a.c", "f(/* x */1, /* y */ 2 /* z */, 3);\n", "f( 1, 2 , 3);\n"),
        ("a.c", "/* a */ /* b */ // c\nint a;\n", "int a;\n"),
        ("a.c", "#define A 1 /* x\n y */\n", "#define A 1\n"),
        ("a.c", "int a; /* x\n\n y */ int b;\n", "int a; /* x\n\n y */ int b;\n"),
        ("a.c", "/* x\n y */ int b;\n", "      int b;\n"),
        ("a.c", 'char *a = "/* no */ // no"; // yes\n', 'char *a = "/* no */ // no";\n'),
        ("a.sh", "f a \\\n# c\ng # d\n", "f a \\\n# c\ng\n"),
        ("a.sh", "f \\ # c\ng\n", "f \\ # c\ng\n"),
        ("a.sh", "#!/bin/sh\n# c\n\nf\n", "#!/bin/sh\n\nf\n"),
        ("a.py", "# c", ""),
        ("a.py", "x = 1  # c", "x = 1"),
        ("a.py", "x = '# no'  # é漢😀\ny = 2\n", "x = '# no'\ny = 2\n"),
        ("a.py", "def f():\n    '''# no'''\n    # c\n    pass\n", "def f():\n    '''# no'''\n    pass\n"),
        ("a.js", "a = b // c\u2028d()\n", "a = b \u2028d()\n"),
        ("a.py", "\ufeffx = '\ud800' # \udfff\n# c\n", "\ufeffx = '\ud800'\n"),
        ("a.py", "\ufeff# c\nx = 1\n", "\ufeff\nx = 1\n"),
        ("a.js", "a = /[/*]/; // c\nb = `// no`\n", "a = /[/*]/;\nb = `// no`\n"),
        ("a.go", "\tx := 1 // c\n", "\tx := 1\n"),
        ("a.hs", "f = do\n  {- c -} g\n  h\n", "f = do\n          g\n  h\n"),
        ("a.php", "<?php f(); // c ?>\n<p>// no</p>\n", "<?php f(); ?>\n<p>// no</p>\n"),
        ("a.py", "if (:\n    # in an error\n    ) # too\n", None),
    ],
)
def test_comments_go_without_a_change_of_meaning(path: str, text: str, expected: str | None) -> None:
    """Tokens stay apart, lines joined or parted by a comment stay so, strings are no comments."""
    whole = document(path, text)
    reduced = strip_comments(whole)
    if expected in (None, text):
        assert reduced is whole
    else:
        assert reduced.text == expected
        numbered(reduced)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.py", "def f(): return 1\n", None),
        ("a.py", "def f():\n    '''Doc.'''\n", None),
        ("a.py", "def f():\n    return 1", "def f():\n⋮"),
        ("a.py", "def f(): g(\n    1)\n", None),
        ("a.c", "int f(void) {\n\n}\n", None),
        ("a.c", "int f(void) { a(\n1);\n  b();\n  c(); }\n", "int f(void) { a(\n1);\n⋮\n  c(); }\n"),
        ("a.c", "int f(void) {\n  a();\n", None),
        ("a.js", "f(function () {\n  a();\n  b();\n});\n", "f(function () {\n⋮\n});\n"),
        (
            "a.js",
            "(() => {\n  class A {\n    f() {\n      a();\n    }\n  }\n})();\n",
            "(() => {\n  class A {\n    f() {\n⋮\n    }\n  }\n})();\n",
        ),
        ("a.c", "namespace a {\nint f(void) {\n  b();\n}\n}\n", "namespace a {\nint f(void) {\n⋮\n}\n}\n"),
        ("a.js", "const f = (a) =>\n  a +\n  1;\n", None),
        ("a.js", "const f = (a) => ({\n  a,\n});\n", None),
        ("a.kt", "fun f() =\n    1\nfun g() = 2\n", None),
        ("a.py", "}{)( ;; ]][ ?? !! << >> ,, {{ (( \ndef f():\n  (\n" * 9, None),
    ],
)
def test_bodies_go_by_whole_lines(path: str, text: str, expected: str | None) -> None:
    """What shares a line with a signature or a bracket stays, and so does what is not closed or unclear."""
    whole = document(path, text)
    reduced = compress(whole)
    if expected is None:
        assert reduced is whole
    else:
        assert reduced.text == expected
        numbered(reduced)


@settings(max_examples=200, deadline=None)
@given(TEXTS, SUFFIXES)
def test_compress_obeys_its_laws(text: str, suffix: str) -> None:
    """Kept lines are the original's, in order; a gap stands for lines; twice is once."""
    whole = document(f"a.{suffix}", text)
    reduced = compress(whole)
    lines = LINE.findall(text)
    assert all(lines[number - 1] == line for number, line in numbered(reduced).items())
    numbers = reduced.numbers or ()
    assert all(number or before for before, number in itertools.pairwise(numbers))
    assert compress(reduced) == reduced
    if suffix == "txt":
        assert reduced is whole


@settings(max_examples=200, deadline=None)
@given(TEXTS, SUFFIXES)
def test_strip_comments_obeys_its_laws(text: str, suffix: str) -> None:
    """Each line that stays is made of its own characters, in order, and blanks; others stay as they are."""
    whole = document(f"a.{suffix}", text)
    for start in (whole, compress(whole)):
        before = numbered(start)
        reduced = strip_comments(start)
        for number, line in numbered(reduced).items():
            rest = iter(before[number])
            assert all(character in rest for character in line if character not in " \t")
        assert [n for n in reduced.numbers or () if not n] == [n for n in start.numbers or () if not n]
        if suffix == "txt":
            assert reduced is start
