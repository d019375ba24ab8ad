"""A syntax tree's nodes → facts about lines, which are counted from 0 and called rows here.

They are: where definitions begin, which rows are bodies of functions, and what is left of rows
without their comments. Beside them there are the statements that name other files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from typing import TYPE_CHECKING

from tree_sitter import Query, QueryCursor

from m3cli.corpus.grammars import grammar, outer_first, outermost, parse, root_of

if TYPE_CHECKING:
    from tree_sitter import Node

_BODY = re.compile(r"(?:\w+_)?(?:body|block)")
_STATEMENTS = re.compile(r"(?:\w+_)?(?:body|block|statements?)")
# No function of these is in another: what looks so are words that the grammar does not know.
_FLAT = frozenset(("c", "cpp", "cuda", "glsl", "hlsl", "objc"))
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_BLANKS = b" \t"
_MARGIN = 200  # bytes; what begins its line is indented by less
_SPACE = b" \t\r\n\f\v"
_INCLUDE = "(preproc_include path: [(string_literal) (system_lib_string)] @import)"
_MODULE = """
    (import_statement source: (string) @import) (export_statement source: (string) @import)
    (call_expression function: (import) arguments: (arguments . (comment)* . (string) @import))
    ((call_expression function: (identifier) @_name arguments: (arguments . (string) @import))
      (#eq? @_name "require"))"""
# The whole statement where several names are in it, else only what names the file.
_IMPORTS = {
    **dict.fromkeys(("c", "cpp", "cuda", "objc"), _INCLUDE),
    "go": "(import_spec path: (_) @import)",
    "java": "(import_declaration) @import",
    "javascript": _MODULE,
    "python": "[(import_statement) (import_from_statement)] @import",
    "rust": "(source_file (use_declaration) @import) (source_file (mod_item !body) @import)",
    **dict.fromkeys(("tsx", "typescript"), _MODULE + "(import_require_clause source: (string) @import)"),
}


def definition_rows(language: str, text: str) -> dict[int, int] | None:
    """Give for each row at which a definition begins how many definitions it is inside of.

    The comments, decorators and attributes right above a definition are part of it. Constants and types
    within functions are no definitions. None if the text does not parse.
    """
    data = text.encode("utf-8", "surrogatepass")
    nodes = parse(language, data)
    if nodes is None:
        return None
    leads = _lead_rows(data, nodes)
    roles = {node.id: role for role, some in nodes.items() for node in some}
    rows: dict[int, int] = {}
    around: list[tuple[int, bool, bool]] = []  # (its end, whether it is a definition, a function)
    depth = functions = 0
    wrapper: Node | None = None
    for node in _of(nodes, "wrapper", "type", "function", "anonymous", "body", "other"):
        while around and around[-1][0] <= node.start_byte:
            _, defines, function = around.pop()
            depth -= defines
            functions -= function
        role = roles[node.id]
        if role == "wrapper":
            wrapper = node
            continue
        defines = _defines(node, role, functions > 0) and not _after_closer(node, data)
        if defines:
            first = node
            if wrapper is not None and node.end_byte <= wrapper.end_byte:
                first, wrapper = wrapper, None
            row = first.start_point.row
            while row - 1 in leads:
                row = leads[row - 1]
            rows.setdefault(row, depth)
        function = role in ("function", "anonymous", "body")
        around.append((node.end_byte, defines, function))
        depth += defines
        functions += function
    return rows


def _defines(node: Node, role: str, in_function: bool) -> bool:
    if role == "other":
        return not in_function
    if role == "type":  # C uses types by the same words that define them
        return not node.type.endswith("_specifier") or node.child_by_field_name("body") is not None
    return role == "function"


def _after_closer(node: Node, data: bytes) -> bool:
    """Tell whether what is before ends on this line, which is then no place for a cut."""
    line = node.start_byte - node.start_point.column
    return data[line : min(node.start_byte, line + _MARGIN)].lstrip()[:1] in (b")", b"]", b"}")


def _lead_rows(data: bytes, nodes: dict[str, list[Node]]) -> dict[int, int]:
    """Map the last row of each comment and attribute that has its lines alone to its first row."""
    leads: dict[int, int] = {}
    for node in _of(nodes, "comment", "attribute"):
        start, column = node.start_byte, node.start_point.column
        if column > _MARGIN or data[start - column : start].strip():
            continue
        end = data.find(b"\n", node.end_byte - 1)
        if not data[node.end_byte : end if end >= 0 else len(data)].strip():
            leads.setdefault(_last_row(node, data), node.start_point.row)
    return leads


def body_rows(language: str, text: str) -> list[tuple[int, int]] | None:
    """Give the spans of rows, both ends included, in which nothing but the bodies of functions is.

    The rows of a body's brackets are not among them, nor is a docstring, nor statements that share a
    row with the signature. A function without a name that holds definitions, as modules of JavaScript
    do, is no function here, and neither is one that its text does not close, nor one with errors of
    syntax that holds others. None if the text does not parse.
    """
    data = text.encode("utf-8", "surrogatepass")
    nodes = parse(language, data)
    if nodes is None:
        return None
    docs = {node.id for node in nodes.get("doc", [])}
    bodies = {node.id for node in nodes.get("body", [])}
    anonymous = {node.id for node in nodes.get("anonymous", [])}
    named = [n.start_byte for n in _of(nodes, "function", "type") if not n.type.endswith("_specifier")]
    lines = [match.span() for match in _LINE.finditer(data)]
    spans: list[tuple[int, int]] = []
    done = 0  # bytes, up to the end of the last body
    for node in _of(nodes, "function", "anonymous", "body"):
        if node.start_byte < done:
            continue
        body = node if node.id in bodies else _body(node)
        if body is None or (node.child_count and node.children[-1].is_missing):
            continue
        unsure = node.id in anonymous or node.has_error or language in _FLAT
        if unsure and bisect_right(named, body.start_byte) < bisect_right(named, body.end_byte - 1):
            continue
        siblings = node.children if body is not node else [body]
        first, last = _inner_rows(body, siblings, data, lines)
        if first > last:
            continue
        done = body.end_byte
        doc = next((child for child in body.children if not child.is_extra), body)
        if doc.id in docs and first <= doc.start_point.row:
            spans.append((first, doc.start_point.row - 1))
            first = _last_row(doc, data) + 1
        spans.append((first, last))
    return [(first, last) for first, last in spans if first <= last]


def _body(function: Node) -> Node | None:
    if (body := function.child_by_field_name("body")) is not None:
        return body
    children = function.named_children
    return children[-1] if children and _BODY.fullmatch(children[-1].type) else None


def _inner_rows(
    body: Node, siblings: list[Node], data: bytes, lines: list[tuple[int, int]]
) -> tuple[int, int]:
    """Give the first and last row of what may be left out; the first is greater if nothing may be."""
    at = siblings.index(body)
    while body.child_count == 1 and _BODY.fullmatch(body.children[0].type):
        body = body.children[0]
    children = body.children
    row, last = body.start_point.row, _last_row(body, data)
    if len(children) > 1 and not children[0].is_named and not children[-1].is_named:
        if children[-1].is_missing:
            return 1, 0
        top, bottom = children[0].end_point.row, children[-1].start_point.row
        children = children[1:-1]
    elif not _STATEMENTS.fullmatch(body.type) or (children and not children[0].is_named):
        return 1, 0  # an expression, as after Kotlin's `=`
    else:  # indented, or closed by a word outside
        top, bottom = row, last
        if not data[lines[row][0] : body.start_byte].strip():
            top = row - 1
        if not data[body.end_byte : lines[last][1]].strip():
            bottom = last + 1
        before = siblings[:at]  # comments beside the body belong to it, but for one behind the signature
        while len(before) > 1 and before[-1].is_extra:
            comment = before.pop()
            if comment.start_point.row == _last_row(before[-1], data):
                break
            top = min(top, comment.start_point.row - 1)
        for comment in siblings[at + 1 :]:
            if not comment.is_extra or comment.start_point.row < bottom:
                break
            bottom = _last_row(comment, data) + 1
    for child in children:  # statements that share a row with what stays
        if child.start_point.row > top:
            break
        top = max(top, _last_row(child, data))
    for child in reversed(children):
        if _last_row(child, data) < bottom:
            break
        bottom = min(bottom, child.start_point.row)
    return top + 1, bottom - 1


def without_comments(language: str, text: str) -> list[tuple[int, str | None]] | None:
    """Give the rows that are another line without their comments; None for a line if nothing is left.

    A comment stays where its removal could change what the rest means: the first line if it names
    an interpreter; in an error of syntax; over several lines, with code before and behind it; behind a
    backslash that would then join two lines, or had joined them. None if the text does not parse.
    """
    data = text.encode("utf-8", "surrogatepass")
    nodes = parse(language, data)
    if nodes is None:
        return None
    lines = [match.group() for match in _LINE.finditer(data)]
    errors = outermost(nodes.get("error", []))
    starts = [start for start, _ in errors]
    cuts: dict[int, list[tuple[int, int]]] = {}
    end = 0
    for node in nodes.get("comment", []):
        inside = bisect_right(starts, node.start_byte) - 1
        if node.start_byte < end or (inside >= 0 and node.start_byte < errors[inside][1]):
            continue
        end = node.end_byte
        if node.start_byte == 0 and data.startswith(b"#!"):
            continue
        _add_cuts(cuts, node, lines)
    changed: list[tuple[int, str | None]] = []
    kept = b""  # what became of the row above
    above = -1
    for row in sorted(cuts):
        if above != row - 1:
            kept = lines[row - 1] if row else b""
        line = _cut(lines[row], cuts[row])
        joined = kept.rstrip(b"\r\n").endswith(b"\\")
        if joined if line is None else line.rstrip(b"\r\n").endswith(b"\\"):
            line = lines[row]
        else:
            changed.append((row, None if line is None else line.decode("utf-8", "surrogatepass")))
        kept, above = line or b"", row
    return changed


def _add_cuts(cuts: dict[int, list[tuple[int, int]]], comment: Node, lines: list[bytes]) -> None:
    """Add the columns of each row, in bytes, that `comment` takes."""
    (first, start), (last, end) = comment.start_point, comment.end_point
    if end == 0 and last > first:  # some grammars count the line's end in
        last -= 1
        end = len(lines[last])
    if first < last and lines[first][:start].strip() and lines[last][end:].strip():
        return
    for row in range(first, last + 1):
        length = len(lines[row].rstrip(b"\r\n"))
        left = start if row == first else 0
        cuts.setdefault(row, []).append((left, min(end, length) if row == last else length))


def _cut(line: bytes, spans: list[tuple[int, int]]) -> bytes | None:
    """Give a line without `spans`; None if it had more than blanks and now has no more.

    Tokens stay apart. Code that follows a comment which begins the line keeps its column, which has
    a meaning in some languages.
    """
    length = len(line.rstrip(b"\r\n"))
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        beside = bool(joined) and not line[joined[-1][1] : start].strip(_BLANKS)
        joined.append((joined.pop()[0] if beside else start, end))
    result = bytearray()
    at, code = 0, False
    for number, (start, end) in enumerate(joined):
        result += line[at:start]
        code = code or bool(result.strip(_BLANKS))
        at = end
        right = line[end : joined[number + 1][0] if number + 1 < len(joined) else length]
        if not code and right.strip(_BLANKS):
            result += b" " * len(line[start:end].decode("utf-8", "replace"))
        elif not right.strip(_BLANKS) or right[:1] in (b" ", b"\t"):
            while result and result[-1] in _BLANKS:
                result.pop()
            at = end if right.strip(_BLANKS) else length
        elif not result.endswith((b" ", b"\t")):
            result += b" "
    result += line[at:length]
    return bytes(result) + line[length:] if result.strip() else None


def import_statements(language: str, text: str) -> list[str] | None:
    """Give the statements that import, or only the quoted name in those that name one file.

    They stand in the order of the text. In Rust they are those outside of inline modules, in which
    `super` is the file itself. None if the text does not parse.
    """
    data = text.encode("utf-8", "surrogatepass")
    query = _import_query(language)
    root = root_of(language, data) if query is not None else None
    if query is None or root is None:
        return None
    nodes = QueryCursor(query).captures(root).get("import", [])
    return [data[n.start_byte : n.end_byte].decode("utf-8", "replace") for n in outer_first(nodes)]


@cache
def _import_query(language: str) -> Query | None:
    known, source = grammar(language), _IMPORTS.get(language)
    return Query(known.language, source) if known is not None and source is not None else None


def _of(nodes: dict[str, list[Node]], *roles: str) -> list[Node]:
    return outer_first([node for role in roles for node in nodes.get(role, [])])


def _last_row(node: Node, data: bytes) -> int:
    """Give the row of a node's last visible character: some grammars count the blanks behind in."""
    end = node.end_byte
    while end > node.start_byte and data[end - 1] in _SPACE:
        end -= 1
    return node.end_point.row - data.count(b"\n", end, node.end_byte)
