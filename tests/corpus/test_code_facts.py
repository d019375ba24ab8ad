"""Facts of source code: those of Python as `ast` has them, those of other languages as a reader says."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.syntax import MAX_CHARACTERS, code_facts
from tests.corpus.samples import SAMPLES

if TYPE_CHECKING:
    from m3cli.corpus.facts import Facts, Function
    from tests.corpus.samples import Sample

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = sorted([*STDLIB.glob("*.py"), *STDLIB.glob("[a-u]*/*.py")])[::6]
LANGUAGES = {"py", "js", "ts", "go", "rs", "java", "c", "cpp"}


def facts_of(path: str, text: str) -> Facts:
    facts = code_facts(path, text)
    assert facts is not None
    return facts


class Tree(ast.NodeVisitor):
    """What `ast` says of a module, in the terms of the facts."""

    def __init__(self) -> None:
        self.functions: list[tuple[str, str, int, bool, tuple[str, ...]]] = []
        self.defaults: dict[tuple[int, str], ast.expr] = {}
        self.calls: Counter[tuple[str, int]] = Counter()
        self.constants: list[tuple[str, str, int]] = []
        self.values: dict[tuple[str, str, int], ast.expr] = {}
        self.types: list[tuple[str, int]] = []
        self.returned: dict[int, str] = {}
        self._classes: list[str] = []
        self._row = -1  # of the function around

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._decorated(node)
        for part in (*node.bases, *node.keywords):
            self.visit(part)
        if self._row < 0:
            self.types.append((node.name, node.lineno - 1))
        self._classes.append(node.name)
        self._body(node)
        self._classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._decorated(node)
        self.visit(node.args)
        if node.returns is not None:
            self.visit(node.returns)
        owner = ".".join(self._classes)
        spec = node.args
        positional = [*spec.posonlyargs, *spec.args]
        every = [*positional, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
        every.sort(key=lambda arg: (arg.lineno, arg.col_offset))
        names = [arg.arg for arg in every]
        if names[:1] in (["self"], ["cls"]):
            del names[0]
        row = node.lineno - 1
        self.functions.append((node.name, owner, row, self._row >= 0, tuple(names)))
        padded = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
        for arg, default in zip([*positional, *spec.kwonlyargs], [*padded, *spec.kw_defaults], strict=True):
            if default is not None:
                self.defaults[row, arg.arg] = default
        last = node.body[-1]
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Name):
            self.returned[row] = last.value.id
        around, self._row = (self._row, self._classes), row
        self._classes = []
        self._body(node)
        self._row, self._classes = around

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - a name of ast's

    def visit_Call(self, node: ast.Call) -> None:
        self._called(node.func)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if len(node.targets) == 1:
            self._value(node.targets[0], node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._value(node.target, node.value)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store | ast.Del):
            self._constant(node.id, node.lineno)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for part in (node.iter, *node.ifs):  # its targets are names of its own
            self.visit(part)

    def visit_alias(self, node: ast.alias) -> None:
        if node.asname:
            self._constant(node.asname, node.end_lineno or node.lineno)

    def _body(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def _decorated(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self._called(decorator)
            self.visit(decorator)

    def _called(self, callee: ast.expr) -> None:
        name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(callee))
        if name is not None:
            self.calls[getattr(callee, name), self._row] += 1

    def _constant(self, name: str, line: int) -> None:
        if self._row < 0:
            self.constants.append((name, ".".join(self._classes), line - 1))

    def _value(self, target: ast.expr, value: ast.expr) -> None:
        if self._row < 0 and isinstance(target, ast.Name):
            self.values[target.id, ".".join(self._classes), target.lineno - 1] = value


def agrees(literal: str, value: ast.expr | None, text: str) -> bool:
    """Whether `literal` is what a fact has to say of an expression of `text`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            known = ast.literal_eval(value) if value is not None else None
        except (ValueError, TypeError):
            known = None
    if value is None or known is None:
        return not literal
    source = ast.get_source_segment(text, value) or ""
    if isinstance(known, bytes):
        known = known.decode("latin-1")
    if isinstance(known, str):
        plain = not set("\\\n\r") & set(source) and source[-1] not in source.lstrip("rRbBuU")[1:-1]
        asked = plain and known.strip() and known not in ("0", "1") and len(source.encode()) <= 80
        return literal == (known if asked else "")
    simple = type(known) in (int, float, complex) and not isinstance(value, ast.BinOp)
    if simple and known in (0, 1, -1):
        return literal in ("", source)
    if not simple or "_" in source or " " in source or source[:1] in ("~", "("):
        return not literal
    return literal == source


@pytest.mark.parametrize("start", range(4))
def test_facts_of_python_are_those_of_its_own_parser(start: int) -> None:
    """Functions, parameters, defaults, calls, constants and types of the library are as `ast` has them."""
    compared = missing = 0
    for path in MODULES[start::4]:
        text = path.read_text("utf-8", "replace")
        facts = code_facts(path.name, text)
        if facts is None:
            continue
        tree = Tree()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree.visit(ast.parse(text))
        ours = [
            (f.name, f.owner, f.row, f.nested, tuple(p.name for p in f.parameters)) for f in facts.functions
        ]
        assert sorted(ours) == sorted(tree.functions), path
        for function in facts.functions:
            for parameter in function.parameters:
                default = tree.defaults.get((function.row, parameter.name))
                assert agrees(parameter.default, default, text), (path, function.name, parameter)
            if not function.returns_own:
                assert function.returns == tree.returned.get(function.row, ""), (path, function)
        rows = [function.row for function in facts.functions]
        calls = Counter((c.name, rows[c.function] if c.function >= 0 else -1) for c in facts.calls)
        assert not calls - tree.calls, path
        missing += (tree.calls - calls).total()
        assert set(tree.constants) <= {(c.name, c.owner, c.row) for c in facts.constants}, path
        for constant in facts.constants:
            if constant.value:
                value = tree.values[constant.name, constant.owner, constant.row]
                assert agrees(constant.value, value, text), (path, constant)
        assert sorted((kind.name, kind.row) for kind in facts.types) == sorted(tree.types), path
        compared += len(facts.functions)
    assert compared > 100
    assert missing < compared / 100  # the grammar takes `type(x).y = 1` for an alias, and the like


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "a.js",
            """const A = 42; export const NAME = "some name";
class K { m(a, b = 10, {c, d}, ...rest) { this.z(); return A; } }
const arrow = (t = 99) => A;
const one = t => { new K(); g(); return NAME };
""",
            ["A=42@0", "NAME=some name@0", "type K@1", "K.m(a,b=10,,rest) calls z returns A",
             "arrow(t=99) returns A", "one(t) calls K g returns NAME"],
        ),
        (
            "a.ts",
            """export const LIMIT: number = 250;
export class K<T> { private m(this: K, a: string, b: number = 10, c?: string): number { return LIMIT; } }
interface I {} type T = string; enum E { A = 1 }
export default function f(x: string = "why"): void { g<string>(x); }
""",
            ["LIMIT=250@0", "type K@1", "type I@2", "type T@2", "type E@2", "K.m(a,b=10,c) returns LIMIT",
             "f(x=why) calls g"],
        ),
        (
            "a.go",
            """package x
const Limit = 250
type Server struct { a int }
func (s *Server) Serve(addr string, a, b int, rest ...string) int { s.x(); y(); return Limit }
func (s List[T]) V() {}
""",
            ["Limit=250@1", "type Server@2", "Server.Serve(addr,a,b,rest) calls x y returns Limit",
             "List.V()"],
        ),
        (
            "a.rs",
            """const LIMIT: usize = 250; static NAME: &str = "nom";
struct S<T> { a: T }
impl<T> Tr for S<T> { fn m(&mut self, mut a: i32, (c, d): (i32, i32)) -> usize { self.bar(); S::new();
  LIMIT } }
fn f<T: X>(a: T) -> usize { g::<T>(a); return LIMIT; }
""",
            ["LIMIT=250@0", "NAME=nom@0", "type S@1", "S.m(a,) calls bar new returns LIMIT",
             "f(a) calls g returns LIMIT"],
        ),
        (
            "A.java",
            """public class K extends B { static final int LIMIT = 250; String low = "low";
 K(int a) { f(a); }
 class In { int m(final int a, String... b) { new K(3); this.z(); return LIMIT; } }
 interface Q { int CC = 99; void abs(); }
}
""",
            ["LIMIT=250@0", "CC=99@3", "type K@0", "type In@2", "type Q@3", "K.K(a) calls f",
             "K.In.m(a,b) calls K z returns LIMIT"],
        ),
        (
            "a.c",
            """#define LIMIT 250
#define NAME "nom" // of nothing
#define F(x) (x)
static const int size = 17; int changes = 18;
enum E { AA = 12, BB };
static char **f(int a, char *b[], void (*back)(int), const struct S *p) { g(a); p->h(); return LIMIT; }
struct S *h(int one, int two) { struct S *s; return s; }
""",
            ["LIMIT=250@0", "NAME=nom@1", "size=17@3", "AA=12@4", "type E@4",
             "f(a,b,back,p) calls g h returns LIMIT", "h(one,two) returns s"],
        ),
        (
            "a.cpp",
            """namespace n { constexpr int kLimit = 250;
template <class T> class K : public B { static constexpr double D = 2.5; public: K(int a = 10) : x(a) {}
  int m(const std::string& s = "text", T&& t = 12) const { return kLimit; } };
int K<int>::out(int a) { std::sort(a); x.y(); z<int>(); return 1; }
int& Foo::bar(int& b) { }
}
""",
            ["kLimit=250@0", "D=2.5@1", "type K@1", "K.K(a=10)", "K.m(s=text,t=12) returns kLimit",
             "K.out(a) calls sort y z", "Foo.bar(b)"],
        ),
        (
            "a.py",
            """A: str = "hello"
B = C = 22
D = -12.5e-3
E = r"a\\b"
lower = 33
if D:
    F = 44
class K:
    G = b"bytes"
    def m(self, a, b=10, *args, c: int = 42, d=True, e=0, f="", **rest):
        def inner(self): pass
        return self.G
""",
            ["A=hello@0", "D=-12.5e-3@2", "G=bytes@8", "type K@7",
             "K.m(a,b=10,args,c=42,d,e,f,rest) returns G"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 8 else "",
)  # fmt: skip
def test_facts_are_what_a_reader_says(path: str, text: str, expected: list[str]) -> None:
    """Each language's constants, types, and functions with parameters, defaults, calls, what they return."""
    facts = facts_of(path, text)
    found = [
        f"{constant.name}={constant.value}@{constant.row}" for constant in facts.constants if constant.value
    ]
    found += [f"type {kind.name}@{kind.row}" for kind in facts.types]
    for number, function in enumerate(facts.functions):
        if not function.nested:
            found.append(described(function, [c.name for c in facts.calls if c.function == number]))
    assert found == expected


def described(function: Function, calls: list[str]) -> str:
    parameters = ",".join(p.name + (f"={p.default}" if p.default else "") for p in function.parameters)
    text = f"{function.owner}.{function.name}({parameters})".removeprefix(".")
    text += f" calls {' '.join(calls)}" if calls else ""
    return text + (f" returns {function.returns}" if function.returns else "")


def test_a_name_that_is_set_twice_is_given_twice() -> None:
    """Whoever wants the value of a constant sees that it changes: in a branch, by a sum, or in a function."""
    text = "A = 22\nif A:\n    A = 33\nA += 1\ndef f():\n    global A\n    A = 44\n"
    found = [(constant.value, constant.row) for constant in facts_of("a.py", text).constants]
    assert found == [("22", 0), ("", 2), ("", 3), ("", 5)]


@pytest.mark.parametrize(
    "line",
    [
        *("for A in x:\n    pass", "for i, (A, *b) in x:\n    pass", "for *A, b in x:\n    pass"),
        *("with x as A:\n    pass", "with x as (A, b):\n    pass"),
        *("(A, b) = 77, 88", "b, (c, [d, A]) = x", "[b, *A] = x", "print(A := 77)"),
        *("import x as A", "from x import y as A", "del A", "del b, A", "del (b, A)"),
    ],
)
def test_all_that_binds_a_name_of_python_is_given(line: str) -> None:
    """Whoever asks for the value of a constant sees each other way to bind or unbind its name."""
    constants = facts_of("a.py", f"A = 22\n{line}\n").constants
    assert [(c.value, c.row) for c in constants if c.name == "A"] == [("22", 0), ("", 1)]


@pytest.mark.parametrize("line", ["[A for A in x]", "{A: b for A, b in x}", "def f(*A): pass", "x.A = 77"])
def test_names_of_inner_scopes_are_not_given(line: str) -> None:
    """Comprehensions, parameters and attributes leave the name of the module alone."""
    found = [(c.value, c.row) for c in facts_of("a.py", f"A = 22\n{line}\n").constants if c.name == "A"]
    assert found == [("22", 0)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "A = 1_000\ndef f(b=1_000): pass\n"),
        ("a.rs", "const A: u32 = 1_000;\n"),
        ("A.java", "class K { static final int A = 1_000; }\n"),
    ],
)
def test_numbers_with_grouped_digits_are_no_literals(path: str, text: str) -> None:
    """Who answers 1000 is right, too, so such a value is not given."""
    facts = facts_of(path, text)
    assert [c.value for c in facts.constants] == [""]
    assert not any(p.default for f in facts.functions for p in f.parameters)
    plain = facts_of(path, text.replace("1_000", "1000"))
    assert [c.value for c in plain.constants] == ["1000"]


def test_what_stands_before_a_callee_is_told() -> None:
    """A method is called on something, a function is not."""
    text = "f()\nself.g()\na.b.h()\n(x + y).i()\nobj . j()\n"
    found = [(call.name, call.receiver) for call in facts_of("a.py", text).calls]
    assert found == [("f", ""), ("g", "self"), ("h", "a.b"), ("i", "?"), ("j", "obj")]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.path)
def test_rows_are_of_the_lines_that_hold_the_names(sample: Sample) -> None:
    """In each language of which facts are known, whatever is said to be in a line is in it; CRLF or not."""
    facts = code_facts(sample.path, sample.text)
    assert (facts is not None) == (sample.path.rpartition(".")[2] in LANGUAGES)
    if facts is None:
        return
    lines = sample.text.split("\n")
    assert facts.functions
    for name, row in [
        *((p.name, p.row) for function in facts.functions for p in function.parameters),
        *((p.default, p.row) for function in facts.functions for p in function.parameters),
        *((kind.name, kind.row) for kind in facts.types),
        *((call.name, call.row) for call in facts.calls),
        *((text, c.row) for c in facts.constants for text in (c.name, c.value)),
    ]:
        assert name in lines[row]
    assert code_facts(sample.path, sample.text.replace("\n", "\r\n")) == facts


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("notes.txt", "def f():\n    pass\n"),
        ("a.rb", "def f\nend\n"),
        ("a.py", "}{)( ;; ]][ ?? \u2603 !! << >> ,, {{ (( \n" * 50),
        ("a.py", "x = 1\n" * (MAX_CHARACTERS // 6 + 1)),
    ],
    ids=["prose", "language", "rubble", "long"],
)
def test_no_facts_of_what_is_not_understood(path: str, text: str) -> None:
    """Prose, languages without queries, rubble, and what is too long, give None."""
    assert code_facts(path, text) is None


@pytest.mark.parametrize("path", ["a.py", "a.js", "a.c", "a.rs", "a.go", "A.java", "a.cpp", "a.tsx"])
def test_hostile_sources_are_survived(path: str) -> None:
    """Deep nesting, endless parameters and chains neither crash nor hang; the next text is answered."""
    for text in (
        *("(" * 50_000, "f(" * 20_000, "{" * 50_000, "class A { " * 2000, "def f(a=(" * 5000),
        "int " + "*" * 50_000 + "f(int a) { return X; }",
        f"def f({', '.join(f'a{i}={i}' for i in range(20_000))}): return A\n",
        "class A:\n" + "".join(f"{' ' * i}class A:\n" for i in range(1, 300)),
        "x" + ".f()" * 2000,
        "A = '" + "b" * 500_000 + "'\n",
    ):
        code_facts(path, text)
    assert facts_of("a.py", "AB = 12\n").constants[0].value == "12"


PIECES = st.sampled_from(
    [
        *(
            "def f(a, b=10):\n",
            "    return NAME\n",
            "class A:\n",
            "NAME = 'x y'\n",
            "global NAME\n",
            "self.g()\n",
        ),
        *(
            "function f(a = 1) {",
            "const N = 12;",
            "=> ",
            "impl A { fn f(&self) {",
            "#define N 12\n",
            "func (s *S) F(",
        ),
        *(
            "static final int N = 12;",
            "}",
            ")",
            "(",
            "{",
            "'",
            '"',
            "`",
            "\\\n",
            "\r\n",
            "\x00",
            "é漢😀",
            "\ud800",
            "\u2028",
        ),
    ]
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=30).map("".join),
    st.sampled_from(sorted({*LANGUAGES, "tsx"})),
)
def test_any_text_is_survived(text: str, suffix: str) -> None:
    """Whatever the text, rows are rows of it, calls are in known functions, and values are in one line."""
    facts = code_facts(f"a.{suffix}", text)
    if facts is None:
        return
    rows = text.count("\n") + 1
    assert all(0 <= f.row <= f.end < rows for f in facts.functions)
    assert all(0 <= call.row < rows and -1 <= call.function < len(facts.functions) for call in facts.calls)
    for constant in facts.constants:
        assert "\n" not in constant.value
        assert constant.value in text
