"""Which files of a corpus a file imports, by the syntax of its language and the names of the files.

A name is looked up where the language would look first, and then among the ends of all paths: a tree is
read without knowing its import paths, and a part of a repository has its upper directories left out.
Whatever is found nowhere is of another project.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from posixpath import basename, dirname, join, normpath, splitext
from typing import TYPE_CHECKING

from m3cli.corpus.languages import language_of
from m3cli.corpus.syntax import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# Whether there can be an import at all: most of the time goes into parsing.
_GATES = {
    **dict.fromkeys(("c", "cpp", "cuda", "objc"), re.compile(r"#[ \t]*(?:include|import)\b")),
    **dict.fromkeys(("go", "java", "python"), re.compile(r"\bimport\b")),
    **dict.fromkeys(("javascript", "tsx", "typescript"), re.compile(r"\b(?:import|export|require)\b")),
    "rust": re.compile(r"\b(?:mod|use)\b"),
}
_LONGEST = 4096  # characters of a name that may be a path
_PACKAGE = "\0"  # between a directory and the suffix of the files that are one package in it
# Files of a package that an import of it stands for. More would make as many edges as their square.
_LARGEST_PACKAGE = 256

_SCRIPT_SUFFIXES = (".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts", ".json")
# What a script names is what it is compiled to.
_COMPILED = {".js": (".ts", ".tsx"), ".jsx": (".tsx",), ".mjs": (".mts",), ".cjs": (".cts",)}
_C_LIBRARY = frozenset(
    f"{name}.h"
    for name in "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal "
    "stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time "
    "uchar wchar wctype".split()
)
_PYTHON_NAME = re.compile(r"[\w.]+")
_RUST_TOKEN = re.compile(r"/\*.*?\*/|//[^\n]*|\w+|::|[{},*]", re.DOTALL)
_RUST_ROOTS = ("lib.rs", "main.rs")
_RUST_DEPTH = 16  # components of a path that are looked at
_GO_MODULE = re.compile(r'^[ \t]*module[ \t]+"?([^\s"]+)', re.M)
_CRATE = re.compile(r'^\[package\][^\[]*?^name\s*=\s*"([\w-]+)"', re.M)


@dataclass(frozen=True, slots=True)
class _Import:
    """One import: paths of which the first that exists is meant, else names for ends of paths.

    Of the names in one group the nearest file counts, and a group only if those before it have none.
    """

    paths: Iterable[str]
    groups: Iterable[tuple[str, ...]] = ()


def dependencies(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Give for each path of the corpus that depends on others of it all that it imports itself.

    `texts` has the text of each path. Known are Python, JavaScript, TypeScript, Go, Rust, C and its
    relatives, and Java. What does not parse has no imports, and without parsers
    (`syntax.is_available`) nothing has. Nothing but `texts` is read.
    """
    corpus = _Corpus(texts)
    found: dict[str, set[str]] = {}
    later: list[tuple[str, list[tuple[str, ...]]]] = []
    for path, language, statements in _statements(texts):
        targets: set[str] = set()
        for wanted in _READERS[language](corpus, path, statements):
            exact = next((name for name in wanted.paths if name in corpus.files), None)
            if exact is not None:
                targets.update(corpus.files[exact])
                continue
            groups = [tuple(name for name in group if corpus.may_end_with(name)) for group in wanted.groups]
            if groups := [group for group in groups if group]:
                later.append((path, groups))
        found[path] = targets
    ends = _Ends(corpus.files, {name for _, groups in later for group in groups for name in group})
    for path, groups in later:
        near = (ends.nearest(dirname(path), group) for group in groups)
        nearest = next((name for name in near if name is not None), None)
        if nearest is not None:
            found[path].update(corpus.files[nearest])
    return {path: others for path, targets in found.items() if (others := targets - {path})}


def _statements(texts: Mapping[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """Give path, language and import statements of each file that has some."""
    files = []
    for path, text in texts.items():
        language = language_of(path, text)
        if language in _GATES and _GATES[language].search(text):
            files.append((path, language))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # each waits for a process of its own
        answers = pool.map(lambda file: ask("imports", file[1], texts[file[0]]), files)
        for (path, language), answer in zip(files, answers, strict=True):
            if answer:
                yield path, language, [name for name in dict.fromkeys(answer) if name]


class _Corpus:
    """What there is to import: files, and packages, which are the files of a directory.

    `files` has for a path itself, and for a package (`directory`, `_PACKAGE`, suffix) its files.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.files: defaultdict[str, list[str]] = defaultdict(list)
        self.go_modules: dict[str, str] = {}
        self.crates: dict[str, str] = {}
        for path, text in texts.items():
            self.files[path] = [path]
            name = basename(path)
            suffix = splitext(name)[1]
            if suffix in (".go", ".java") and not name.endswith("_test.go"):
                package = self.files[dirname(path) + _PACKAGE + suffix]
                if len(package) < _LARGEST_PACKAGE:
                    package.append(path)
            if name == "go.mod" and (go_module := _GO_MODULE.search(text)):
                self.go_modules.setdefault(go_module[1], dirname(path))
            if name == "Cargo.toml" and (crate := _CRATE.search(text)):
                self.crates.setdefault(crate[1].replace("-", "_"), join(dirname(path), "src"))
        self.go_roots = set(self.go_modules.values())
        self._names = {basename(name) for name in self.files}

    def may_end_with(self, name: str) -> bool:
        """Whether there is a file or package with the last part of `name`."""
        return len(name) <= _LONGEST and basename(name) in self._names


class _Ends:
    """The files and packages whose paths end with a name, by how near they are."""

    def __init__(self, files: Mapping[str, object], names: set[str]) -> None:
        self._starts: defaultdict[str, list[str]] = defaultdict(list)
        self._below: dict[str, dict[str, tuple[int, str | None]]] = {}
        for path in files:
            cut = len(path)
            while cut >= 0:
                cut = path.rfind("/", 0, cut) if cut else -1
                if (name := path[cut + 1 :]) in names and not _in_package(files, path, max(cut, 0)):
                    self._starts[name].append(path[: cut + 1])

    def nearest(self, directory: str, names: tuple[str, ...]) -> str | None:
        """Give the file with one of `names` that is the fewest steps up from `directory`, then down.

        None if there is none, or if several are as near.
        """
        above = directory
        while True:
            hits = [found for name in names if (found := self._under(name).get(above)) is not None]
            if hits:
                return min(hits, key=lambda hit: hit[0])[1]
            if not above or above == "/":
                return None
            above = dirname(above)

    def _under(self, name: str) -> dict[str, tuple[int, str | None]]:
        """Directory → steps down to the nearest file with this name, and its path; None for several."""
        if name in self._below:
            return self._below[name]
        below: dict[str, tuple[int, str | None]] = {}
        for start in self._starts.get(name, ()):
            above, steps = dirname(start), 0
            while True:
                best = below.get(above)
                if best is None or steps < best[0]:
                    below[above] = steps, start + name
                elif steps == best[0]:
                    below[above] = steps, None
                if not above or above == "/":
                    break
                above, steps = dirname(above), steps + 1
        self._below[name] = below
        return below


def _in_package(files: Mapping[str, object], path: str, cut: int) -> bool:
    """Whether Python finds this module only by a name that is longer than what follows `cut`."""
    return path.endswith((".py", ".pyi")) and join(path[:cut], "__init__.py") in files


def _python(_corpus: _Corpus, path: str, statements: Iterable[str]) -> Iterator[_Import]:
    for statement in statements:
        text = re.sub(r"#[^\n]*|\\\r?\n", " ", statement)
        source, _, names = text.partition("import") if text.startswith("from") else ("", "", text[6:])
        module = "".join(source[4:].split())
        if len(module) > _LONGEST:
            continue
        imported = [match[0] for part in names.split(",") if (match := _PYTHON_NAME.search(part))]
        if not source:
            for name in imported:
                yield _Import((), (_modules(name.replace(".", "/")),))
            continue
        rest = module.lstrip(".")
        place = rest.replace(".", "/")
        for name in dict.fromkeys(imported or ["*"]):
            inner = _modules(join(place, name)) + _modules(place)
            if not (level := len(module) - len(rest)):
                yield _Import((), (inner,))
            else:
                base = normpath(join(dirname(path), *[".."] * (level - 1)))
                yield _Import(normpath(join(base, end)) for end in inner)


def _modules(place: str) -> tuple[str, ...]:
    init = (join(place, "__init__.py"), join(place, "__init__.pyi"))
    return (f"{place}.py", init[0], f"{place}.pyi", init[1]) if place else init


def _script(_corpus: _Corpus, path: str, statements: Iterable[str]) -> Iterator[_Import]:
    for statement in statements:
        name = re.split(r"[?#]", statement[1:-1], maxsplit=1)[0]
        if name.startswith(".") and len(name) <= _LONGEST:
            target = normpath(join(dirname(path), name))
            stem, suffix = splitext(target)
            index = normpath(join(target, "index"))
            yield _Import(
                [
                    *([] if name.endswith(("/", "/.", "..")) else [target]),
                    *(stem + other for other in _COMPILED.get(suffix, ())),
                    *(target + other for other in _SCRIPT_SUFFIXES),
                    *(index + other for other in _SCRIPT_SUFFIXES),
                ]
            )


def _go(corpus: _Corpus, path: str, statements: Iterable[str]) -> Iterator[_Import]:
    above = dirname(path)
    while above not in corpus.go_roots and above not in ("", "/"):
        above = dirname(above)
    in_module = above in corpus.go_roots
    for statement in statements:
        name = statement[1:-1].strip("/")
        if not name or len(name) > _LONGEST:
            continue
        parts = name.split("/")
        places = []
        for length in range(len(parts), 0, -1):
            root = corpus.go_modules.get("/".join(parts[:length]))
            if root is not None:
                places.append(join(root, *parts[length:]) + _PACKAGE + ".go")
        ends: Iterable[str] = [name]
        if "." in parts[0] and not in_module:  # of the project itself, whose own root has no name here
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
        elif len(parts) == 1:  # of the standard library
            ends = []
        yield _Import(places, [(end + _PACKAGE + ".go",) for end in ends])


def _rust(corpus: _Corpus, path: str, statements: Iterable[str]) -> Iterator[_Import]:
    directory, name = dirname(path), basename(path)
    own = directory if name in (*_RUST_ROOTS, "mod.rs") else join(directory, splitext(name)[0])
    crate = own
    while not any(join(crate, root) in corpus.files for root in _RUST_ROOTS) and crate not in ("", "/"):
        crate = dirname(crate)
    for statement in statements:
        declared = re.search(r"\bmod\s+(?:r#)?(\w+)\s*;\Z", statement)
        if declared:
            # A file that is the root of a crate, such as a test, has its modules beside it.
            yield _Import(
                [place for base in (own, directory) for place in _rust_files(join(base, declared[1]))]
            )
            continue
        for parts in _use_paths(statement):
            first = parts[0]
            base = crate if first == "crate" else corpus.crates.get(first, own)
            least = 0
            if first in ("crate", "self") or first in corpus.crates:
                parts.pop(0)
            elif first != "super":
                least = 1  # it is another crate, unless it is a module of this one
            while parts and parts[0] == "super":
                base = dirname(base)
                parts.pop(0)
            lengths = range(min(len(parts), _RUST_DEPTH), least - 1, -1)
            yield _Import([place for length in lengths for place in _rust_files(join(base, *parts[:length]))])


def _rust_files(module: str) -> list[str]:
    return [f"{module}.rs", *(join(module, name) for name in ("mod.rs", *_RUST_ROOTS))]


def _use_paths(statement: str) -> Iterator[list[str]]:
    """Give all paths of a `use`, of which the braces of a list may hold lists."""
    tokens = [token for token in _RUST_TOKEN.findall(statement) if token[:2] not in ("//", "/*")]
    if "use" not in tokens:
        return
    stack: list[list[str]] = [[]]
    current: list[str] = []
    renamed = False
    for token in tokens[tokens.index("use") + 1 :]:
        if token == "{":
            stack.append(current[:_RUST_DEPTH])
        elif token in (",", "}"):
            if current:
                yield current.copy()
            if token == "}" and len(stack) > 1:
                stack.pop()
                current, renamed = [], False
            else:
                current, renamed = list(stack[-1]), False
        elif token == "as":
            renamed = True
        elif token not in ("::", "*") and not renamed and len(current) <= _RUST_DEPTH:
            current.append(token)
    if current:
        yield current


def _c(_corpus: _Corpus, path: str, statements: Iterable[str]) -> Iterator[_Import]:
    for statement in statements:
        name = statement[1:-1].strip()
        if not name or len(name) > _LONGEST or (statement[0] == "<" and name in _C_LIBRARY):
            continue
        beside = [normpath(join(dirname(path), name))] if statement[0] == '"' else []
        yield _Import(beside, [(re.sub(r"\A(?:\.*/)+", "", normpath(name)),)])


def _java(_corpus: _Corpus, _path: str, statements: Iterable[str]) -> Iterator[_Import]:
    for statement in statements:
        name = re.sub(r"/\*.*?\*/|//[^\n]*", " ", statement, flags=re.DOTALL).strip()
        name = re.sub(r"\Aimport\s+(?:static\s+)?|[\s;]+", "", name)
        parts = name.split(".")
        if len(name) > _LONGEST:
            continue
        ends = ["/".join(parts[:-1]) + _PACKAGE + ".java"] if parts[-1] == "*" else []
        # What is in a class comes after the class: a method, a class, or a method of that.
        shortest = max(len(parts) - 3, 1)
        ends += ["/".join(parts[:length]) + ".java" for length in range(len(parts), shortest, -1)]
        yield _Import((), [(end,) for end in ends])


_READERS: dict[str, Callable[[_Corpus, str, Iterable[str]], Iterator[_Import]]] = {
    **dict.fromkeys(("c", "cpp", "cuda", "objc"), _c),
    "go": _go,
    "java": _java,
    **dict.fromkeys(("javascript", "tsx", "typescript"), _script),
    "python": _python,
    "rust": _rust,
}
