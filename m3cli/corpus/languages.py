"""Path → programming language, by its suffix, its name, or the interpreter that its first line names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

# Languages by the names that tree-sitter-language-pack gives their grammars, each with its suffixes.
SUFFIXES = {
    suffix: line.split()[0]
    for line in """
    ada adb ads
    bash sh bash zsh ksh bats ebuild
    c c
    cmake cmake
    cpp cc cpp cxx c++ hh hpp hxx h++ inl ipp tpp txx ino metal
    csharp cs csx
    cuda cu cuh
    dart dart
    elixir ex exs
    elm elm
    erlang erl hrl
    fish fish
    fsharp fs fsx
    gdscript gd
    glsl glsl vert frag geom comp tesc tese vsh fsh
    go go
    haskell hs
    hcl hcl tf tfvars
    hlsl hlsl hlsli fx
    java java
    javascript js mjs cjs jsx es6
    julia jl
    kotlin kt kts
    lua lua
    luau luau
    make mk mak
    objc m mm
    ocaml ml
    odin odin
    perl pl pm t
    php php php3 php4 php5 phtml
    powershell ps1 psm1
    proto proto
    python py pyi pyw
    r r
    ruby rb rake gemspec ru podspec
    rust rs
    scala scala sc sbt
    solidity sol
    sql sql
    swift swift
    tsx tsx
    typescript ts mts cts
    wgsl wgsl
    zig zig
    """.strip().splitlines()
    for suffix in line.split()[1:]
}
_NAMES = {
    **dict.fromkeys(("makefile", "gnumakefile"), "make"),
    "cmakelists.txt": "cmake",
    **dict.fromkeys(("rakefile", "gemfile", "podfile", "vagrantfile", "brewfile", "fastfile"), "ruby"),
    **dict.fromkeys(("sconstruct", "sconscript", "wscript"), "python"),
    **dict.fromkeys((".bashrc", ".bash_profile", ".profile", ".zshrc", "pkgbuild", "configure"), "bash"),
}
_INTERPRETERS = {
    **dict.fromkeys(("sh", "bash", "dash", "ash", "ksh", "zsh", "bats"), "bash"),
    **dict.fromkeys(("python", "pypy", "uv"), "python"),
    **dict.fromkeys(("node", "nodejs", "bun"), "javascript"),
    **dict.fromkeys(("deno", "ts-node", "tsx"), "typescript"),
    "rscript": "r",
    **{name: name for name in ("elixir", "fish", "julia", "perl", "php", "ruby")},
    **dict.fromkeys(("lua", "luajit"), "lua"),
    "pwsh": "powershell",
}
_SHEBANG = re.compile(r"#!\s*(?:\S*/)?(?:env\s+(?:-\S+\s+|\w+=\S*\s+)*(?:\S*/)?)?([A-Za-z]+(?:-[A-Za-z]+)*)")
# A header that asks whether it is read as C++ is written in C.
_C_HEADER = re.compile(r"^[ \t]*#[ \t]*if(?:def|[ \t]+defined)\b.*\b__cplusplus\b", re.M)
_CPP_HEADER = re.compile(
    r"^[ \t]*(?:class|namespace|template|using|public:|private:|#[ \t]*include[ \t]*<\w+>)", re.M
)


def language_of(path: str, text: str) -> str | None:
    """Name the language of a file, as its grammar is named; None for prose, data and the unknown.

    A name says more than a first line, which is read only where there is no suffix.
    """
    name = PurePosixPath(path).name.lower()
    suffix = PurePosixPath(name).suffix[1:]
    if suffix == "h":
        return "cpp" if _CPP_HEADER.search(text) and not _C_HEADER.search(text) else "c"
    if language := _NAMES.get(name) or SUFFIXES.get(suffix):
        return language
    if suffix and not name.startswith("."):
        return None
    shebang = _SHEBANG.match(text[:200].partition("\n")[0])
    if shebang is None:
        return None
    return _INTERPRETERS.get(shebang[1].lower())
