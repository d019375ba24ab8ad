"""A syntax tree → facts about its functions, constants and types, as `facts` describes them.

What to look for is said per language in queries. The same names of captures mean the same in all:
`function` with `name`, `parameters` and `body`, or with a `declarator` that holds the first two; `owner` is
the type of a method that is written outside of it. `constant` may have a `value`; one that is captured twice
has that of either capture. A `global` is changed somewhere inside of a function.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from tree_sitter import Query, QueryCursor

from m3cli.corpus.grammars import grammar, root_of

if TYPE_CHECKING:
    from tree_sitter import Node

    Captures = dict[str, list[Node]]

_SCRIPT = """
    [(function_declaration name: (_) @name parameters: (_) @parameters body: (_) @body)
     (generator_function_declaration name: (_) @name parameters: (_) @parameters body: (_) @body)
     (method_definition name: (_) @name parameters: (_) @parameters body: (_) @body)
     (variable_declarator name: (identifier) @name
       value: [(arrow_function parameters: (_) @parameters body: (_) @body)
               (arrow_function parameter: (_) @parameters body: (_) @body)
               (function_expression parameters: (_) @parameters body: (_) @body)])] @function
    (class_declaration name: (_) @name) @type
    (program [
      (lexical_declaration "const" (variable_declarator name: (identifier) @constant value: (_) @value))
      (export_statement
        (lexical_declaration "const" (variable_declarator name: (identifier) @constant value: (_) @value)))])
    (variable_declarator name: (identifier) @constant)
    (call_expression function: [(identifier) @callee (member_expression property: (_) @callee)])
    (new_expression constructor: (identifier) @callee)"""
_TYPED_SCRIPT = (
    _SCRIPT
    + """
    (abstract_class_declaration name: (_) @name) @type
    (interface_declaration name: (_) @name) @type
    (enum_declaration name: (_) @name) @type
    (type_alias_declaration name: (_) @name) @type"""
)
_C = """
    (function_definition declarator: (_) @declarator body: (_) @body) @function
    [(struct_specifier name: (type_identifier) @name body: (_))
     (union_specifier name: (type_identifier) @name body: (_))
     (enum_specifier name: (type_identifier) @name body: (_))] @type
    (preproc_def name: (identifier) @constant value: (preproc_arg) @value)
    (preproc_def name: (identifier) @constant)
    (enumerator name: (identifier) @constant value: (_) @value)
    ((declaration (type_qualifier) @_const
      declarator: (init_declarator declarator: (identifier) @constant value: (_) @value))
      (#any-of? @_const "const" "constexpr"))
    (call_expression function: [(identifier) @callee (field_expression field: (field_identifier) @callee)])"""
_QUERIES = {
    "python": """
        (function_definition name: (_) @name parameters: (_) @parameters body: (_) @body) @function
        (class_definition name: (_) @name) @type
        (module (assignment left: (identifier) @constant right: (_) @value))
        (class_definition body: (block (assignment left: (identifier) @constant right: (_) @value)))
        (assignment left: [(identifier) @constant (pattern_list (identifier) @constant)])
        (for_statement left: [(identifier) @constant (pattern_list (identifier) @constant)])
        [(tuple_pattern (identifier) @constant) (list_pattern (identifier) @constant)
         (pattern_list (list_splat_pattern (identifier) @constant))
         (tuple_pattern (list_splat_pattern (identifier) @constant))
         (list_pattern (list_splat_pattern (identifier) @constant))]
        (as_pattern_target [(identifier) @constant (tuple (identifier) @constant)])
        (augmented_assignment left: (identifier) @constant)
        (named_expression name: (identifier) @constant)
        (aliased_import alias: (identifier) @constant)
        (delete_statement [(identifier) @constant (expression_list (identifier) @constant)
          (tuple (identifier) @constant) (parenthesized_expression (identifier) @constant)])
        (global_statement (identifier) @global)
        (call function: [(identifier) @callee (attribute attribute: (identifier) @callee)])
        (decorator [(identifier) @callee (attribute attribute: (identifier) @callee)])""",
    "javascript": _SCRIPT,
    "typescript": _TYPED_SCRIPT,
    "tsx": _TYPED_SCRIPT,
    "go": """
        (function_declaration name: (_) @name parameters: (_) @parameters body: (_) @body) @function
        (method_declaration receiver: (parameter_list (parameter_declaration type: (_) @owner))
          name: (_) @name parameters: (_) @parameters body: (_) @body) @function
        (type_spec name: (_) @name) @type
        (const_spec . name: (identifier) @constant value: (expression_list . (_) @value .))
        (const_spec name: (identifier) @constant)
        (var_spec name: (identifier) @constant)
        (call_expression function: [(identifier) @callee (selector_expression field: (_) @callee)])""",
    "rust": """
        (function_item name: (_) @name parameters: (_) @parameters body: (_) @body) @function
        [(struct_item name: (_) @name) (enum_item name: (_) @name) (union_item name: (_) @name)
         (trait_item name: (_) @name) (type_item name: (_) @name)] @type
        (impl_item type: (_) @name) @extension
        (const_item name: (_) @constant value: (_) @value)
        (static_item name: (_) @constant value: (_) @value)
        (call_expression function: [(identifier) @callee (field_expression field: (_) @callee)
          (scoped_identifier name: (_) @callee)
          (generic_function function: [(identifier) @callee (scoped_identifier name: (_) @callee)
            (field_expression field: (_) @callee)])])""",
    "java": """
        [(method_declaration name: (_) @name parameters: (_) @parameters body: (_) @body)
         (constructor_declaration name: (_) @name parameters: (_) @parameters body: (_) @body)] @function
        [(class_declaration name: (_) @name) (interface_declaration name: (_) @name)
         (enum_declaration name: (_) @name) (record_declaration name: (_) @name)] @type
        (field_declaration declarator: (variable_declarator name: (_) @constant value: (_) @value))
        (constant_declaration declarator: (variable_declarator name: (_) @constant value: (_) @value))
        (method_invocation name: (_) @callee)
        (object_creation_expression type: (type_identifier) @callee)""",
    "c": _C,
    "cpp": _C
    + """
        (class_specifier name: (type_identifier) @name body: (_)) @type
        ((field_declaration (type_qualifier) @_const declarator: (_) @constant default_value: (_) @value)
          (#any-of? @_const "const" "constexpr"))
        (call_expression function: (qualified_identifier name: (identifier) @callee))
        (call_expression function: (template_function name: (identifier) @callee))""",
}
# Names of these are of constants only by their capitals: nothing else says that they do not change.
_BY_FORM = frozenset(("python", "java"))

_NAME = re.compile(r"[^\W\d][\w$]*")
_PATH = re.compile(r"(?:[^\W\d]\w*::)*~?[^\W\d]\w*")
_RECEIVER = re.compile(rb"([\w$.]*)\s*(?:\?\.|\.|::|->)\s*$")
_OF_TYPES = re.compile(r"<[^<>]*>")
_NUMBER = re.compile(r"[-+]?(?:\d|\.\d)(?:[\w.]|(?<=[eE])[-+])*")
_STRING = re.compile(r"""(?:[rRuUbBL]|u8)?(["'`])((?:(?!\1)[^\\\r\n])+)\1""")
_REMARK = re.compile(r"\s*(?://|/\*).*", re.S)
_GUESSED = re.compile(r"[-+]?(?:0[xXoObB])?0*[01]?(?:\.0*)?")
_LONGEST = 80  # bytes of a literal
_DEEPEST = 8  # types around a function that name it
_STEPS = 12  # from a parameter or a body to the name in it
_DOWN = ("declarator", "pattern", "left", "name")
_DEFAULTS = ("value", "default_value", "right")
_WRAPPERS = frozenset(
    (
        *("list_splat_pattern", "dictionary_splat_pattern", "typed_parameter", "rest_pattern", "mut_pattern"),
        *("ref_pattern", "reference_declarator", "spread_parameter", "parenthesized_declarator"),
    )
)
_NAMELESS = frozenset(
    (
        *("comment", "line_comment", "block_comment", "self_parameter", "receiver_parameter"),
        *("keyword_separator", "positional_separator", "attribute_item", "variadic_parameter"),
    )
)
_ENDS = frozenset(
    (
        *("block", "statement_list", "statement_block", "compound_statement", "constructor_body"),
        *("expression_statement", "return_statement", "return_expression", "expression_list"),
    )
)
_RETURNS = frozenset(("return_statement", "return_expression"))
_THEMSELVES = frozenset(("self", "cls"))


Rows = list[list[Any]]


def code_facts(language: str, text: str) -> tuple[Rows, Rows, Rows, Rows] | None:
    """Give functions, constants, types and calls as `Facts.of` takes them.

    None if nothing is known of the language, or the text does not parse.
    """
    query = _query(language)
    data = text.encode("utf-8", "surrogatepass")
    root = root_of(language, data) if query is not None else None
    if query is None or root is None:
        return None
    return _Reader(language, data).read([captures for _, captures in QueryCursor(query).matches(root)])


@cache
def _query(language: str) -> Query | None:
    known, source = grammar(language), _QUERIES.get(language)
    return Query(known.language, source) if known is not None and source is not None else None


class _Reader:
    """Reads captures of one text."""

    def __init__(self, language: str, data: bytes) -> None:
        self._by_form = language in _BY_FORM
        self._has_values = language == "rust"  # of blocks, which are those of their last expressions
        self._data = data
        self._functions: Rows = []
        self._constants: Rows = []
        self._types: Rows = []
        self._calls: Rows = []

    def read(self, matches: list[Captures]) -> tuple[Rows, Rows, Rows, Rows]:
        """All facts, in one pass over what begins in the text, with a stack of what it is inside of."""
        around: list[tuple[int, int, str]] = []  # (end, index of the function or -1, name of the type)
        for start, _, what, captures in _in_order(matches):
            while around and around[-1][0] <= start:
                around.pop()
            function = next((index for _, index, _ in reversed(around) if index >= 0), -1)
            if what == "function":
                captures["index"] = len(self._functions)
                self._function(captures, around, function >= 0)
            elif what == "body":
                around.append((captures["body"][0].end_byte, captures["index"], ""))
            elif what in ("type", "extension"):
                name = self._plain(captures["name"][0])
                if what == "type" and function < 0 and _NAME.fullmatch(name):
                    self._types.append([name, captures["name"][0].start_point.row])
                around.append((captures[what][0].end_byte, -1, name))
            elif what == "callee":
                node = captures["callee"][0]
                receiver = self._receiver(node.start_byte)
                self._calls.append([self._text(node), node.start_point.row, function, receiver])
            elif what == "global" or function < 0:
                self._constant(captures, what, _owner(around))
        return self._functions, self._constants, self._types, self._calls

    def _function(self, captures: Any, around: list[tuple[int, int, str]], nested: bool) -> None:
        node = captures["function"][0]
        named, parameters = captures.get("name", [None])[0], captures.get("parameters", [None])[0]
        if "declarator" in captures:
            named, parameters = _declared(captures["declarator"][0])
        name = self._plain(named) if named is not None else ""
        owner = self._plain(captures["owner"][0]) if "owner" in captures else _owner(around)
        if "::" in name:
            scope, _, name = name.rpartition("::")
            owner = ".".join([*filter(None, [owner]), *scope.split("::")])
        if not _NAME.fullmatch(name):
            name = ""
        returns, own = self._returned(captures["body"][0])
        found = self._parameters(parameters) if parameters is not None else []
        span = node.start_point.row, node.end_point.row
        self._functions.append([name, owner, *span, nested, found, returns, own])

    def _constant(self, captures: Captures, what: str, owner: str) -> None:
        node = captures[what][0]
        name = self._text(node)
        if not _NAME.fullmatch(name):
            return
        value = self._literal(captures["value"][0]) if "value" in captures else ""
        if self._by_form and name != name.upper():
            value = ""
        self._constants.append([name, "" if what == "global" else owner, value, node.start_point.row])

    def _parameters(self, parameters: Node) -> Rows:
        """Names, literal defaults and rows; the object that a method belongs to is none of them."""
        if parameters.type == "identifier":  # of an arrow function
            return [[self._text(parameters), "", parameters.start_point.row]]
        found: Rows = []
        children = [c for c in parameters.named_children if c.type not in _NAMELESS and not c.is_extra]
        for number, child in enumerate(children):
            default = _field(child, _DEFAULTS)
            literal = self._literal(default) if default is not None else ""
            for node in child.children_by_field_name("name") or [child]:
                name = _innermost(node)
                text = self._text(name) if name is not None else ""
                if number == 0 and (text in _THEMSELVES or self._text(node).startswith("this:")):
                    continue
                found.append([text, literal, (name or node).start_point.row])
        return found

    def _returned(self, body: Node) -> tuple[str, bool]:
        """The name that the last statement returns, and whether it is an attribute of the object itself."""
        node: Node | None = body
        returns = body.type not in _ENDS  # of an arrow function
        for _ in range(_STEPS):
            if node is None:
                return "", False
            if node.type == "identifier":
                return (self._text(node), False) if returns else ("", False)
            if node.type == "attribute" and returns:
                of, name = node.child_by_field_name("object"), node.child_by_field_name("attribute")
                own = of is not None and name is not None and self._text(of) in _THEMSELVES
                return (self._text(name), True) if own and name is not None else ("", False)
            if node.type not in _ENDS or (returns and node.named_child_count != 1):
                return "", False
            returns = returns or node.type in _RETURNS
            last = node.named_child(node.named_child_count - 1) if node.named_child_count else None
            while last is not None and last.is_extra:
                last = last.prev_named_sibling
            if self._has_values and node.type == "block" and last is not None:
                returns = returns or last.type == "identifier"
            node = last
        return "", False

    def _literal(self, node: Node) -> str:
        """The text of a number or a string; empty if it is neither, easily guessed, or has `_` in digits."""
        if node.end_byte - node.start_byte > _LONGEST:
            return ""
        text = self._text(node).strip()
        if node.type == "preproc_arg" and text[:1] not in "\"'":
            text = _REMARK.sub("", text)
        elif node.type == "preproc_arg":
            text = re.sub(r"""(?<=["'])\s*(?://|/\*)[^"']*$""", "", text)
        if _NUMBER.fullmatch(text):
            return "" if _GUESSED.fullmatch(text) or "_" in text else text
        string = _STRING.fullmatch(text)
        if string is None or (string[1] == "`" and "$" in string[2]):
            return ""
        return string[2] if string[2].strip() and string[2] not in ("0", "1") else ""

    def _receiver(self, start: int) -> str:
        before = _RECEIVER.search(self._data[max(0, start - _LONGEST) : start])
        return "" if before is None else before[1].decode("utf-8", "replace") or "?"

    def _plain(self, node: Node) -> str:
        """A name without what is around it, as of a pointer or with parameters of type."""
        text = re.split(r"[\[(]", self._text(node), maxsplit=1)[0].strip("*& ")
        for _ in range(_DEEPEST):
            text = _OF_TYPES.sub("", text)
        return text if _PATH.fullmatch(text) or _NAME.fullmatch(text) else ""

    def _text(self, node: Node) -> str:
        return self._data[node.start_byte : min(node.end_byte, node.start_byte + 4 * _LONGEST)].decode(
            "utf-8", "replace"
        )


def _in_order(matches: list[Captures]) -> list[tuple[int, int, str, Any]]:
    """What begins, in the order of the text: (start, -end, capture, its match). The outer comes first.

    A constant that was found twice comes once, with its value; a function that is one comes as a function.
    """
    found: list[tuple[int, int, str, Any]] = []
    constants: dict[int, Captures] = {}
    for captures in matches:
        if "constant" in captures:
            start = captures["constant"][0].start_byte
            if start not in constants or "value" in captures:
                constants[start] = captures
            continue
        for what in ("function", "body", "type", "extension", "callee", "global"):
            if what in captures:
                node = captures[what][0]
                found.append((node.start_byte, -node.end_byte, what, captures))
    named = {
        captures.get("name", captures["function"])[0].start_byte
        for _, _, what, captures in found
        if what == "function"
    }
    found += [
        (start, -start, "constant", captures) for start, captures in constants.items() if start not in named
    ]
    # A body that begins where its function does comes after it.
    return sorted(found, key=lambda entry: (entry[0], entry[1], entry[2] == "body"))


def _owner(around: list[tuple[int, int, str]]) -> str:
    names: list[str] = []
    for _, index, name in reversed(around):
        if index >= 0 or not name or len(names) == _DEEPEST:
            break
        names.insert(0, name)
    return ".".join(names)


def _declared(declarator: Node) -> tuple[Node | None, Node | None]:
    """Name and parameters in a declarator of C."""
    node: Node | None = declarator
    for _ in range(_STEPS):
        if node is None or node.type == "function_declarator":
            break
        node = node.child_by_field_name("declarator") or (
            node.named_child(0) if node.type in _WRAPPERS else None
        )
    if node is None or node.type != "function_declarator":
        return None, None
    return node.child_by_field_name("declarator"), node.child_by_field_name("parameters")


def _field(node: Node, names: tuple[str, ...]) -> Node | None:
    """The first of the fields that the node has."""
    return next(filter(None, map(node.child_by_field_name, names)), None)


def _innermost(node: Node) -> Node | None:
    """The identifier that a parameter names, through pointers and the like; None in a pattern."""
    at: Node | None = node
    for _ in range(_STEPS):
        if at is None or at.type == "identifier":
            return at
        down = _field(at, _DOWN)
        if down is None and at.type in _WRAPPERS:
            down = at.named_child(at.named_child_count - 1 if at.type == "spread_parameter" else 0)
        at = down
    return None
