"""Text of a language → its syntax tree's nodes that matter, by role.

Grammars name the kinds of their nodes alike (`function_definition`, `method_declaration`), so rules
over these names serve all languages, and only what they miss is said per language. The nodes are
found by tree-sitter's queries, which walk a tree of any depth without recursion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

from tree_sitter import Language, Parser, Query, QueryCursor
from tree_sitter_language_pack import get_language

if TYPE_CHECKING:
    from tree_sitter import Node
    from tree_sitter_language_pack import SupportedLanguage

# Reports of progress, one for each 100 steps of the parser: a count, unlike a clock, gives the same
# answer everywhere. Sound code takes about 10 for each kilobyte.
_REPORTS = 100_000
_READ = 1 << 16
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")

_DEFINED = r"(?:definition|declaration|declaration_statement|statement|item|defn|def)"
# Role → the kinds of nodes that have it. The first that matches counts.
_ROLES = {
    "function": rf"""
        (?:\w+_)?(?:function|func|method|constructor|destructor|subroutine|procedure|accessor)_
            (?:{_DEFINED}|signature|signature_item|or_value_defn|or_prop_defn)
        | (?:\w+_)?(?:init|deinit|operator|subscript)_declaration | secondary_constructor
        | [gs]etter | static_initializer | anonymous_initializer | class_static_block | modifier_definition
        | fallback_receive_definition""",
    "anonymous": r"""
        arrow_function | (?:generator_)?function_expression | generator_function | func_literal
        | closure_expression | lambda_expression | anonymous_function | anonymous_method_expression
        | anonymous_function_creation_expression | anonymous_subroutine_expression""",
    "type": rf"""
        (?:\w+_)?(?:class|struct|union|enum|interface|trait|protocol|impl|module|mod|namespace|object|record
            |extension|contract|library|mixin|macro|given|annotation_type)_
            (?:{_DEFINED}|specifier|interface|implementation)
        | companion_object | package_object | internal_module""",
    "wrapper": r"decorated_definition | template_declaration | export_(?:statement|declaration)",
    "comment": r"(?:\w+_)?comment",
    "attribute": r"attribute_item | attribute_list | decorator | annotations?",
    "other": r"(?:\w+_)?(?:declaration|definition|defn|item|type_alias)",
}
_NO_DEFINITION = re.compile(
    r"""\w*(?:parameter|import|export|use|using|package|field|member|catch|element|crate|with|case|attribute
    |annotation|variable_definition|local|let|short_var|static_assert|friend|expression|requires|inner_)\w*""",
    re.VERBOSE,
)

# What the names of kinds do not tell. `body` is one outside a function's node, `doc` is the part of a
# body that belongs to the signature.
_QUERIES = {
    "cmake": "(function_def (body) @body) @function (macro_def (body) @body) @function",
    "dart": "(function_body) @body",
    "elixir": """
        ((call target: (identifier) @_word (do_block)) @type
          (#any-of? @_word "defmodule" "defprotocol" "defimpl"))
        ((call target: (identifier) @_word (arguments)) @function
          (#any-of? @_word "def" "defp" "defmacro" "defmacrop" "defstruct" "defdelegate"))
        ((call target: (identifier) @_word (do_block) @body)
          (#any-of? @_word "def" "defp" "defmacro" "defmacrop"))
        (unary_operator "@") @attribute""",
    "elm": "(value_declaration) @other",
    "erlang": "(fun_decl) @other (record_decl) @other (pp_define) @other",
    "haskell": """
        (signature) @attribute (haddock) @comment
        (declarations [(function) (bind) (data_type) (newtype) (class) (instance)] @other)""",
    "hcl": "(body (block) @other)",
    "julia": "(abstract_definition) @other (const_statement) @other",
    "kotlin": """(type_alias) @other (anonymous_initializer (statements) @body)
        (secondary_constructor (statements) @body)""",
    "lua": "(chunk (assignment_statement) @other)",
    "objc": "(class_interface) @type (class_implementation) @type",
    "powershell": "(script_block (param_block) @doc)",
    "proto": "[(message) (service) (enum)] @type (rpc) @other",
    "python": """
        (module [(assignment) (type_alias_statement)] @other)
        (function_definition body: (block . (comment)* . (string) @doc))""",
    "r": """(program (binary_operator rhs: (function_definition)) @other)""",
    "ruby": """
        [(method) (singleton_method)] @function [(class) (module) (singleton_class)] @type
        (program (assignment) @other)""",
    "rust": "(foreign_mod_item) @type",
    "swift": "(property_declaration computed_value: (computed_property) @body)",
    "zig": """
        (Decl (FnProto) (Block) @body) @function (Decl (VarDecl)) @other (TestDecl (Block) @body) @function
        [(doc_comment) (container_doc_comment)] @comment""",
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language's grammar and the query that finds the nodes of all roles."""

    language: Language
    query: Query


@cache
def grammar(name: str) -> Grammar | None:
    """Load the grammar of a language; None if the pack has none that works here."""
    try:
        language = get_language(cast("SupportedLanguage", name))
    except (LookupError, ImportError, OSError, ValueError):
        return None
    return Grammar(language, Query(language, _query(language) + _QUERIES.get(name, "")))


def _query(language: Language) -> str:
    kinds: dict[str, list[str]] = {}
    seen = set()
    for number in range(language.node_kind_count):
        kind = language.node_kind_for_id(number)
        if kind is None or kind in seen or not re.fullmatch(r"[a-z]\w*", kind):
            continue
        if not (language.node_kind_is_named(number) and language.node_kind_is_visible(number)):
            continue
        seen.add(kind)
        if role := _role(kind):
            kinds.setdefault(role, []).append(f"({kind})")
    return "(ERROR) @error\n" + "".join(f"[{' '.join(some)}] @{role}\n" for role, some in kinds.items())


def _role(kind: str) -> str:
    for role, pattern in _ROLES.items():
        if re.fullmatch(pattern, kind, re.VERBOSE):
            return "" if role == "other" and _NO_DEFINITION.fullmatch(kind) else role
    return ""


def parse(name: str, data: bytes) -> dict[str, list[Node]] | None:
    """Find the nodes of `data`, in UTF-8, by role, each list in the order of the text.

    Outer nodes stand before those inside. None if there is no grammar, the text is too much for it, or
    more than half of the text is in no construct that it knows.
    """
    known = grammar(name)
    root = root_of(name, data)
    if known is None or root is None:
        return None
    found = QueryCursor(known.query).captures(root)
    nodes = {role: outer_first(some) for role, some in found.items()}
    return nodes if 2 * _unknown(nodes) <= len(data) else None


def root_of(name: str, data: bytes) -> Node | None:
    """Parse `data`; None if there is no grammar, the text is too much for it, or makes no sense to it."""
    known = grammar(name)
    if known is None:
        return None
    data = data.replace(b"\0", b" ")  # scanners take it for the end of the text
    data = _SURROGATE.sub("\ufffd".encode(), data)  # as long, and part of a name, a string, a comment
    reports = 0

    def stop(_offset: int, _error: bool) -> bool:
        nonlocal reports
        reports += 1
        return reports > _REPORTS

    try:
        tree = Parser(known.language).parse(
            lambda offset, _point: data[offset : offset + _READ], encoding="utf8", progress_callback=stop
        )
    except ValueError:  # stopped
        return None
    return None if _is_rubble(tree.root_node) else tree.root_node


def _is_rubble(root: Node) -> bool:
    """Tell whether most of the text is loose tokens: a query needs the square of their count."""
    errors = [root] if root.is_error else [node for node in root.children if node.is_error]
    tokens = [node for error in errors for node in error.children if not node.is_named or node.is_error]
    return 2 * sum(node.end_byte - node.start_byte for node in tokens) > root.end_byte


def outer_first(nodes: list[Node]) -> list[Node]:
    """Sort by place; a node comes before those in it. One that was found twice comes once."""
    ordered = sorted({node.id: node for node in nodes}.values(), key=lambda n: (n.start_byte, -n.end_byte))
    return list(ordered)


def outermost(nodes: list[Node]) -> list[tuple[int, int]]:
    """Give the spans of bytes of those nodes that are in no other; `nodes` is ordered."""
    spans: list[tuple[int, int]] = []
    for node in nodes:
        if not spans or node.start_byte >= spans[-1][1]:
            spans.append((node.start_byte, node.end_byte))
    return spans


def _unknown(nodes: dict[str, list[Node]]) -> int:
    """Count the bytes in errors, less what is in definitions and comments within them."""
    errors = outermost(nodes.get("error", []))
    if not errors:
        return 0
    known = outermost(
        outer_first([node for role in ("function", "type", "comment") for node in nodes.get(role, [])])
    )
    total = sum(end - start for start, end in errors)
    index = 0
    for start, end in known:
        while index < len(errors) and errors[index][1] <= start:
            index += 1
        if index < len(errors) and errors[index][0] <= start:
            total -= min(end, errors[index][1]) - start
    return total
