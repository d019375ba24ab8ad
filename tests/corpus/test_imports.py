"""What files import, resolved among the files of a corpus."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.imports import dependencies


def imported(path: str, text: str, others: str | dict[str, str]) -> set[str]:
    """What the file at `path` imports from a corpus with `others`, which are empty files or have texts."""
    texts = dict.fromkeys(others.split(), "") if isinstance(others, str) else others
    return dependencies({**texts, path: text}).get(path, set())


@pytest.mark.parametrize(
    ("path", "text", "others", "expected"),
    [
        # absolute names, from the root or below another directory, and the longest that is a module
        ("p/a.py", "import p.b\n", "p/__init__.py p/b.py", "p/b.py"),
        ("src/p/a.py", "import p.b as c, p.d\n", "src/p/b.py src/p/d/__init__.py",
         "src/p/b.py src/p/d/__init__.py"),
        ("tests/t.py", "from p import b, C\n", "src/p/__init__.py src/p/b.py",
         "src/p/b.py src/p/__init__.py"),
        ("p/a.py", "from p.b import (\n  C,  # of, that\n  D\n)\n", "p/__init__.py p/b.py", "p/b.py"),
        ("p/a.py", "from p.b import *\n", "p/b.py", "p/b.py"),
        ("a.py", "def f():\n    if 1:\n        import b\n", "b.py b.pyi", "b.py"),
        # relative names
        ("p/q/a.py", "from . import b\nfrom ..r import s\nfrom .. import T\n",
         "p/q/b.py p/r/s.py p/r/__init__.py p/__init__.py", "p/q/b.py p/r/s.py p/__init__.py"),
        ("p/a.py", "from .....x import y\n", "x.py p/x.py", ""),
        # a module of a package is not found by its last name alone
        ("p/a.py", "import json, types\n", "p/__init__.py p/json.py p/types.py", ""),
        # what stands in a string or a comment imports nothing
        ("a.py", "# import b\nx = '''\nimport b\n'''\n", "b.py", ""),
        # the nearest of several
        ("one/src/a.py", "import p.b\n", "one/p/b.py two/p/b.py", "one/p/b.py"),
        ("a.py", "import p.b\n", "one/p/b.py two/p/b.py", ""),
    ],
)  # fmt: skip
def test_python(path: str, text: str, others: str, expected: str) -> None:
    """Modules and packages are found with and without src/, by absolute and by relative names."""
    assert imported(path, text, others) == set(expected.split())


@pytest.mark.parametrize(
    ("path", "text", "others", "expected"),
    [
        ("s/a.js", "import b from './b'; import '../c.js';", "s/b.ts c.ts", "s/b.ts c.ts"),
        ("s/a.ts", "export * from './b';\nimport type { C } from \"./c\";", "s/b/index.tsx s/c.d.ts",
         "s/b/index.tsx s/c.d.ts"),
        ("a.tsx", "const b = await import(/* x */ './b'); const e = <p>{require('./c.json')}</p>;",
         "b.jsx c.json", "b.jsx c.json"),
        ("s/a.mjs", "import x from '.';\nimport y from '..'", "s/index.js index.js", "s/index.js index.js"),
        ("a.ts", "import b = require('./b');", "b.ts", "b.ts"),
        ("a.js", "import react from 'react'; require(name); require('b'); // './b'\n", "b.js react.js", ""),
        ("a.ts", "import './b.svg?raw'", "b.svg", "b.svg"),
    ],
)  # fmt: skip
def test_scripts(path: str, text: str, others: str, expected: str) -> None:
    """Relative names are found with their endings left out or changed, packages by name are not."""
    assert imported(path, text, others) == set(expected.split())


GO = 'package m\nimport (\n\tx "example.org/me/app/store"\n\t"fmt"\n\t. `example.org/me/app`\n)\n'


@pytest.mark.parametrize(
    ("path", "others", "expected"),
    [
        ("cmd/m.go", {"go.mod": "module example.org/me/app\n", "store/s.go": "", "store/s_test.go": "",
                      "store/t.go": "", "root.go": "", "x/fmt/f.go": ""}, "store/s.go store/t.go root.go"),
        ("cmd/m.go", {"store/s.go": "", "root.go": "", "fmt/f.go": ""}, "store/s.go"),
        ("cmd/m.go", {"go.mod": "module example.org/other\n", "store/s.go": ""}, ""),
        ("cmd/m.go", {"go.mod": "module example.org/other\n",
                      "vendor/example.org/me/app/store/s.go": ""}, "vendor/example.org/me/app/store/s.go"),
    ],
)  # fmt: skip
def test_go(path: str, others: dict[str, str], expected: str) -> None:
    """A package is all files of a directory but tests, by the module's path or by the end of the path."""
    assert imported(path, GO, others) == set(expected.split())


@pytest.mark.parametrize(
    ("path", "text", "others", "expected"),
    [
        ("src/lib.rs", "mod a;\npub mod b;\n#[cfg(test)] mod tests { use super::*; }",
         "src/a.rs src/b/mod.rs", "src/a.rs src/b/mod.rs"),
        ("src/b/c.rs", "use crate::{a::{self, Type as T, f}, d::*, Root};",
         "src/lib.rs src/a.rs src/d/mod.rs", "src/a.rs src/d/mod.rs src/lib.rs"),
        ("src/b/c.rs", "use super::e::F;\nuse self::g::h;\nuse super::super::a;",
         "src/main.rs src/a.rs src/b/e.rs src/b/c/g.rs src/b/mod.rs", "src/b/e.rs src/b/c/g.rs src/a.rs"),
        ("src/lib.rs", "use a::B; use serde::de;", "src/a.rs", "src/a.rs"),
        ("tests/t.rs", "mod common;\n", "tests/common/mod.rs src/lib.rs", "tests/common/mod.rs"),
    ],
)  # fmt: skip
def test_rust(path: str, text: str, others: str, expected: str) -> None:
    """Modules are found by the module tree: `mod`, and `use` from the crate, the parent and itself."""
    assert imported(path, text, others) == set(expected.split())


def test_a_crate_of_the_same_workspace_is_found_by_its_name() -> None:
    """A crate's name is what its manifest says."""
    others = {"my-core/Cargo.toml": '[package]\nname = "my-core"\n', "my-core/src/lib.rs": ""}
    assert imported("cli/src/main.rs", "use my_core::Thing;\n", others) == {"my-core/src/lib.rs"}


@pytest.mark.parametrize(
    ("path", "text", "others", "expected"),
    [
        ("src/a.c", '#include "b.h"\n# include "../c.h"\n', "src/b.h b.h c.h", "src/b.h c.h"),
        ("src/a.cpp", "#include <p/b.hpp>\n#include <string.h>\n", "include/p/b.hpp x/string.h",
         "include/p/b.hpp"),
        ("src/a.c", '#include "b.h"\n', "one/b.h two/b.h", ""),
        ("one/src/a.c", '#include "b.h"\n', "one/include/b.h two/include/b.h", "one/include/b.h"),
        ("a.c", '/*\n#include "b.h"\n*/\n#include NAME\n', "b.h", ""),
        ("a.h", '#if X\n#include "b.h"\n#else\n#include "c.h"\n#endif\n', "b.h c.h", "b.h c.h"),
        ("a.cu", '#include "b.cuh"\n', "b.cuh", "b.cuh"),
        ("a.m", '#import "b.h"\n', "b.h", "b.h"),
    ],
)  # fmt: skip
def test_c(path: str, text: str, others: str, expected: str) -> None:
    """Headers are looked for beside the file, then nearby, and not taken where several are as near."""
    assert imported(path, text, others) == set(expected.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import a.b.C;\n", "src/main/java/a/b/C.java"),
        (
            "import static a.b.C.f;\nimport a.b.D.Inner;\n",
            "src/main/java/a/b/C.java src/main/java/a/b/D.java",
        ),
        ("import a.b.*;\n", "src/main/java/a/b/C.java src/main/java/a/b/D.java"),
        ("import java.util.List;\n", ""),
    ],
)
def test_java(text: str, expected: str) -> None:
    """Classes are found by the package's path, wherever it begins."""
    others = "src/main/java/a/b/C.java src/main/java/a/b/D.java src/x/List.java"
    assert imported("src/test/java/a/T.java", text, others) == set(expected.split())


def test_cycles_and_imports_of_oneself() -> None:
    """Files may import each other; an import of oneself is none."""
    texts = {"a.py": "import a, b\n", "b.py": "import a\n", "c.h": '#include "c.h"\n'}
    assert dependencies(texts) == {"a.py": {"b.py"}, "b.py": {"a.py"}}


def test_what_does_not_parse_has_no_imports() -> None:
    """Rubble, NULs, lone surrogates and names that are no paths cost only their own edges."""
    texts = {
        "a.py": "import b\n}{)( ;; ]][ ?? \u2603 !!\n" * 100,
        "b.py": "import \x00\nimport c\n\ud800\n",
        "c.py": "",
        "d.c": '#include ""\n#include "/"\n#include ".."\n#include "' + "x/" * 9000 + '"\n#include <>\n',
        "e.go": 'package e\nimport ""\nimport "/"\nimport "."\n',
        "f.js": "import ''; import '.'; import '" + "../" * 5000 + "'\n",
    }
    assert set(dependencies(texts)) <= {"a.py", "b.py"}
    assert dependencies({}) == {}


def test_many_files_of_one_name_take_no_square_of_time() -> None:
    """20,000 headers that share a name, asked for by long lists, are one look-up each."""
    texts = {f"d{n}/x.h": "" for n in range(20_000)}
    texts["a.c"] = "".join(f'#include "d{n}/x.h"\n' for n in range(20_000))
    texts["b.py"] = "from " + "p." * 500 + "p import " + ", ".join(f"n{n}" for n in range(20_000)) + "\n"
    texts["c.rs"] = "use " + "a::" * 2000 + "{" + ", ".join(f"b{n}" for n in range(20_000)) + "};\n"
    start = time.process_time()
    found = dependencies(texts)
    assert time.process_time() - start < 10  # the square of them would take minutes
    assert found == {"a.c": {f"d{n}/x.h" for n in range(20_000)}}


def test_a_large_package_is_not_a_square_of_edges() -> None:
    """Of a package with more files than any person wrote, only some are what an import of it means."""
    texts = {f"p/f{n:04}.go": "package p\n" for n in range(1000)}
    texts |= {f"m{n}.go": 'package m\nimport "example.org/p"\n' for n in range(20)}
    assert sum(map(len, dependencies(texts).values())) == 20 * 256


NAMES = st.sampled_from(["a", "b", "p/a", "p/__init__", "p/q/b", "p/mod", "lib", "p/q/a"])
SUFFIXES = st.sampled_from(["py", "js", "ts", "go", "rs", "c", "h", "java"])
LINES = st.sampled_from(
    [
        *("import a\n", "from . import a\n", "from ..q import b\n", "from p import *\n", "import './a';\n"),
        *("require('../b')\n", 'import "p/q"\n', "mod a;\n", "use super::{a, b};\n", "use crate::p::q;\n"),
        *(
            '#include "a.h"\n',
            "#include <p/a.h>\n",
            "import p.q.b;\n",
            "import p.*;\n",
            "(",
            "'",
            "\x00",
            "{",
        ),
    ]
)
CORPORA = st.dictionaries(
    st.builds("{}.{}".format, NAMES, SUFFIXES), st.lists(LINES, max_size=5).map("".join), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(CORPORA)
def test_dependencies_are_other_files_of_the_corpus(texts: dict[str, str]) -> None:
    """Whatever the texts, the answer names files of the corpus, none itself, in any order of the files."""
    found = dependencies(texts)
    for path, others in found.items():
        assert path in texts
        assert others
        assert others <= set(texts) - {path}
    assert dependencies(dict(reversed(texts.items()))) == found
